"""What users' task files import: `from kruify.task import Task`. It lives in kruify.tasks.base."""

from kruify.tasks.base import SPLITS, Task, check_split, device_of, evaluating, load_task, to_device

__all__ = ["SPLITS", "Task", "check_split", "device_of", "evaluating", "load_task", "to_device"]
