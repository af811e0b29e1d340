"""Built-in tasks, one file or folder each. `tasks.base.load_task` imports the one that is named, no other."""
