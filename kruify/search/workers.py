"""Where the independent parts of a search run: one after the other in this process, or as tasks of Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from kruify.errors import KruifyError, UnsupportedError, UsageError
from kruify.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Ray = bool | str
"""False for this process, True for the cluster that RAY_ADDRESS names or else one on this machine, or an address."""


def check_ray(ray: Ray) -> None:
    """Fails before hours of work, not after them.

    Raises:
        UnsupportedError: Ray is asked for, and not installed.
    """
    if ray and find_spec("ray") is None:
        raise UnsupportedError("ray is not installed", "--ray", "Run: pip install 'kruify[ray]'")


def spread(
    function: Callable[[Item], Result], items: Sequence[Item], ray: Ray, task: object, progress: Progress | None = None
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `function` makes of it, as soon as it is known.

    With Ray each item is a task that takes as many processors as torch has threads here, so that it gives the same
    bits as in this process. One whose worker dies is started again, up to three times, on another machine if need be.
    The working directory, and what is read and written there, must be on all machines.
    `check_ray` tells before the work begins whether Ray is there.

    Args:
        task: the user's; its class goes to the workers with its code, because they do not know his file.
        progress: told how many tasks of Ray are done.

    Raises:
        UsageError: there is no cluster at the address.
        KruifyError: what `function` raises; workers died too often.
    """
    if not ray:
        for item in items:
            yield item, function(item)
    elif items:
        with _cluster(ray) as cluster, _sent_with_code(cluster, task):
            yield from _as_tasks(cluster, function, items, progress)


def _as_tasks(
    cluster: Any, function: Callable[[Item], Result], items: Sequence[Item], progress: Progress | None
) -> Iterator[tuple[Item, Result]]:
    threads = torch.get_num_threads()
    remote = cluster.remote(num_cpus=threads, num_gpus=int(torch.cuda.is_available()))(_run)
    shared = cluster.put(function)
    waiting = {remote.remote(shared, item, threads, os.getcwd()): item for item in items}
    tell = progress or (lambda done, total, text: None)
    tell(0, len(items), "tasks of Ray")
    try:
        while waiting:
            done = cluster.wait(list(waiting))[0][0]
            result = waiting.pop(done), cluster.get(done)
            tell(len(items) - len(waiting), len(items), "tasks of Ray")
            yield result
    except cluster.exceptions.RayTaskError as error:
        raise error.cause from error
    except cluster.exceptions.RayError as error:
        raise KruifyError(f"a task could not be finished ({error})", "ray", "Give the same command again") from error
    finally:
        for left in waiting:
            cluster.cancel(left, force=True)


def _run(function: Callable[[Item], Result], item: Item, threads: int, folder: str) -> Result:
    os.chdir(folder)
    torch.set_num_threads(threads)
    return function(item)


@contextmanager
def _cluster(address: Ray) -> Iterator[Any]:
    """The module ray, connected; a connection that was there before stays."""
    import ray

    before = ray.is_initialized()
    if not before:
        try:
            ray.init(None if address is True else address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(f"there is no cluster to connect to ({error})", "ray", "Check the address") from error
    try:
        yield ray
    finally:
        if not before:
            ray.shutdown()


@contextmanager
def _sent_with_code(cluster: Any, task: object) -> Iterator[None]:
    module = sys.modules[type(task).__module__]
    if module.__name__.partition(".")[0] in ("kruify", "__main__"):  # known there, or sent so anyway
        yield
        return
    cluster.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cluster.cloudpickle.unregister_pickle_by_value(module)
