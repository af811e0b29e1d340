"""Built-in tasks, one file or folder each. `tasks.loader.load_task` imports the one that is named, no other."""
