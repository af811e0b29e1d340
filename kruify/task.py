"""What users' task files import: `from kruify.task import Task`. It lives in kruify.tasks.base."""

from kruify.tasks.base import SPLITS, Task, check_split, device_of, evaluating, to_device
from kruify.tasks.loader import load_task

__all__ = ["SPLITS", "Task", "check_split", "device_of", "evaluating", "load_task", "to_device"]
