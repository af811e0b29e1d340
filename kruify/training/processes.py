"""One process or several: the part of Hugging Face accelerate that training needs, behind one small class.

The model is not wrapped (no DistributedDataParallel): a task calls its model's own methods, which a wrapper would
hide, and summing the gradients by hand lets every batch count by its weight. So N processes give what one process
gives that adds up N batches per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kruify.errors import UsageError

TIMEOUT = timedelta(hours=12)  # the others wait while the main process validates; NCCL would give up after 10 minutes
T = TypeVar("T")


class Processes:
    """Rank, device and communication of this process.

    Args:
        device: "cpu", "cuda", ...; None for a GPU if there is one.
        mixed_precision: "no" or "bf16".

    Raises:
        UsageError: accelerate is not installed, or the device is not there.
    """

    def __init__(self, device: torch.device | str | None = None, mixed_precision: str = "no") -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise UsageError(
                "fine-tuning needs the package accelerate, which is not installed",
                hint="pip install 'kruify[finetune]'",
            ) from error
        found = torch.accelerator.current_accelerator(check_available=True)
        wanted = _there(device) if device is not None else found or torch.device("cpu")
        # It joins processes on CPUs only where it is asked for CPUs.
        self._state = PartialState(cpu=wanted.type == "cpu", timeout=TIMEOUT)
        self.count: int = self._state.num_processes
        self.rank: int = self._state.process_index
        self.is_main: bool = self._state.is_main_process
        # One process may be given a device; of several, each has its own.
        self.device: torch.device = wanted if self.count == 1 else self._state.device
        self._mixed = mixed_precision == "bf16"

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self._mixed else nullcontext()

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter], extra: Sequence[float]) -> list[float]:
        """Add up the gradients of all processes in place, and the numbers of `extra`, which are returned."""
        if self.count == 1:
            return list(extra)
        from accelerate.utils import reduce

        # One vector, one message: gradients, then 1 for each parameter that has one (a parameter that no process used
        # keeps the gradient None, so that the optimiser leaves it alone as it would in one process), then `extra`.
        used = [float(p.grad is not None) for p in parameters]
        pieces = [_reals(torch.zeros_like(p) if p.grad is None else p.grad).double() for p in parameters]
        tail = torch.tensor([*used, *extra], dtype=torch.float64, device=self.device)
        *summed, tail = reduce(torch.cat([*pieces, tail]), "sum").split([*(len(piece) for piece in pieces), len(tail)])
        numbers: list[float] = tail.tolist()
        for parameter, values, flag in zip(parameters, summed, numbers, strict=False):
            real = torch.view_as_complex(values.view(-1, 2)) if parameter.is_complex() else values
            parameter.grad = real.to(parameter.dtype).view_as(parameter) if flag else None
        return numbers[len(used) :]

    def from_main(self, compute: Callable[[], T]) -> T:
        """What `compute` gives on the main process, which alone calls it, on every process."""
        box = [compute() if self.is_main else None]
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(box, from_process=0)
        return box[0]  # type: ignore[return-value]

    @torch.no_grad()
    def share(self, model: nn.Module) -> None:
        """Give every process the main process's weights, should they have begun with others."""
        if self.count > 1:
            from accelerate.utils import broadcast

            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.copy_(broadcast(tensor.detach().clone(), from_process=0))

    def wait(self) -> None:
        """Return when every process has come this far."""
        self._state.wait_for_everyone()


def _there(device: torch.device | str) -> torch.device:
    """The device, if this machine has it."""
    counts = {"cpu": 1}
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        counts[accelerator.type] = torch.accelerator.device_count()
    with suppress(RuntimeError):  # torch's for a name that it does not know
        wanted = torch.device(device)
        if (wanted.index or 0) < counts.get(wanted.type, 0):
            return wanted
    raise UsageError(f"there is no device {device} here", "fine-tuning", "Use --device cpu")


def _reals(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in one row, complex ones as pairs."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
