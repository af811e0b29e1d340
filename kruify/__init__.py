"""kruify: trained RNN, LSTM and GRU checkpoints made small and fast with Kronecker Recurrent Units.

small, conversion = kruify.convert(model, budget="16x")
kruify.finetune(small, "task.py:Name", teacher=model)
kruify.save(small, "small.kru.safetensors")
"""

# ruff: noqa: F401 - the imports under TYPE_CHECKING tell type checkers what __getattr__ gives
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kruify.analysis.verify import verify
    from kruify.api import Evaluation, compress, evaluate, export, finetune, load, save, sweep, train
    from kruify.conversion import Conversion, Inspection, convert, densify, inspect, quantize
    from kruify.conversion.plan import Plan
    from kruify.errors import KruifyError
    from kruify.exporting import Exported
    from kruify.layers import KRU, KRUGRU, KRULSTM, KRURNN
    from kruify.notebook import live_progress
    from kruify.ops import backend_info
    from kruify.pretrained import from_pretrained, save_pretrained
    from kruify.progress import Progress
    from kruify.reporting import Report
    from kruify.reporting.build import report
    from kruify.search.compression import Compression
    from kruify.search.trade_off import Sweep
    from kruify.tasks.base import Task
    from kruify.training import FinetuneResult, Healing, Recipe, heal, unitary_penalty

__version__ = "0.1.0"  # here alone: pyproject.toml reads it

# Imported when first used, because torch takes a second: `kruify --help` must not wait for it.
_HOMES = {
    "analysis.verify": "verify",
    "api": "Evaluation compress evaluate export finetune load save sweep train",
    "conversion": "Conversion Inspection convert densify inspect quantize",
    "conversion.plan": "Plan",
    "errors": "KruifyError",
    "exporting": "Exported",
    "layers": "KRU KRUGRU KRULSTM KRURNN",
    "notebook": "live_progress",
    "ops": "backend_info",
    "pretrained": "from_pretrained save_pretrained",
    "progress": "Progress",
    "reporting": "Report",
    "reporting.build": "report",
    "search.compression": "Compression",
    "search.trade_off": "Sweep",
    "tasks.base": "Task",
    "training": "FinetuneResult Healing Recipe heal unitary_penalty",
}
_HOME_OF = {name: f"kruify.{home}" for home, names in _HOMES.items() for name in names.split()}

__all__ = [*_HOME_OF, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kruify' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
