"""Built-in tasks, one file or folder each. `kruify.task.load_task` imports the one that is named, and no other."""
