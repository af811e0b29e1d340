"""One process or several: the part of Hugging Face accelerate that training needs, behind one small class.

The model is not wrapped (no DistributedDataParallel): a task calls its model's own methods, which a wrapper would
hide, and summing the gradients by hand lets every batch count by its weight. So N processes give what one process
gives that adds up N batches a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from kruify.errors import UsageError

PATIENCE = timedelta(hours=12)  # the others wait while the main process validates; NCCL would give up after 10 minutes


class Processes:
    """Rank, device and communication of this process.

    Args:
        device: "cpu", "cuda", ...; None for what accelerate picks.
        mixed_precision: "no" or "bf16".

    Raises:
        UsageError: accelerate is not installed, or the device is not there.
    """

    def __init__(self, device: torch.device | str | None = None, mixed_precision: str = "no") -> None:
        try:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
            from accelerate.utils import InitProcessGroupKwargs
        except ImportError as error:
            raise UsageError(
                "fine-tuning needs the package accelerate, which is not installed",
                hint="pip install 'kruify[finetune]'",
            ) from error
        wanted = None if device is None else _there(device)
        # accelerate keeps one state a process and refuses a second Accelerator with other settings: forget the last
        # one's.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        # It joins processes on CPUs only if it is told that CPUs are meant.
        cpu = wanted.type == "cpu" if wanted is not None else not torch.accelerator.is_available()
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        self._accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patience])
        self.count: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        self.is_main: bool = self._accelerator.is_main_process
        # One process may be told a certain device; of several, each has its own.
        self.device: torch.device = wanted if wanted is not None and self.count == 1 else self._accelerator.device
        self._mixed = mixed_precision == "bf16"

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self._mixed else nullcontext()

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter], extra: Sequence[float]) -> list[float]:
        """Add up the gradients of all processes in place, and the numbers of `extra`, which are returned."""
        if self.count == 1:
            return list(extra)
        # One vector, one message: gradients, then 1 for each parameter that has one (a parameter that no process used
        # keeps the gradient None, so that the optimiser leaves it alone as it would in one process), then the extra
        # numbers.
        used = [float(p.grad is not None) for p in parameters]
        pieces = [_reals(torch.zeros_like(p) if p.grad is None else p.grad).double() for p in parameters]
        tail = torch.tensor([*used, *extra], dtype=torch.float64, device=self.device)
        total: Tensor = self._accelerator.reduce(torch.cat([*pieces, tail]), reduction="sum")
        start = 0
        for parameter, piece in zip(parameters, pieces, strict=True):
            summed = total[start : start + piece.numel()]
            real = summed.view(-1, 2) if parameter.is_complex() else summed
            values = torch.view_as_complex(real) if parameter.is_complex() else real
            parameter.grad = values.to(parameter.dtype).view_as(parameter)
            start += piece.numel()
        numbers: list[float] = total[start:].tolist()
        for parameter, flag in zip(parameters, numbers[: len(used)], strict=True):
            if not flag:
                parameter.grad = None
        return numbers[len(used) :]

    def from_main(self, value: Any) -> Any:
        """What the main process holds, on every process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        box = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def share(self, model: nn.Module) -> None:
        """Give every process the main process's weights, should they have begun with others."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.copy_(broadcast(tensor.detach().clone(), from_process=0))

    def wait(self) -> None:
        """Return when every process has come this far."""
        self._accelerator.wait_for_everyone()


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
