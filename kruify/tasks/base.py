"""A task: the data, the loss and the metric that a network is judged by; and how to load one by name.

Everything that needs data (calibration, fine-tuning, evaluation, reports) goes through a `Task`. A user writes one in
one file:

    from kruify.tasks.base import Task

    class Digits(Task):
        metric, higher_is_better = "accuracy", True

        def model(self): return MyNetwork()
        def batches(self, split, *, seed=0): ...             # yields batches, whatever they are
        def forward(self, model, batch): return model(batch[0])
        def loss(self, outputs, batch): return torch.nn.functional.cross_entropy(outputs, batch[1])
        def evaluate(self, model, split): ...                # {"accuracy": 0.97}; leave it out for the mean loss

and names it on the command line as `--task path/to/digits.py:Digits`. A task file is a program: it runs. It is named by
the user, never by a checkpoint.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from kruify.errors import KruifyError, TaskError

SPLITS = ("train", "valid", "test")

# Built-in name -> "module:Class". A table of names, so that nothing is imported before it is asked for.
BUILTIN: dict[str, str] = {
    "g2p-en": "kruify.tasks.g2p_en:G2PEn",
    "copy-memory": "kruify.tasks.copy_memory:CopyMemory",
    "adding": "kruify.tasks.adding:Adding",
    "fashion-mnist-rows": "kruify.tasks.fashion_mnist:FashionMnistRows",
    "fashion-mnist-pixels": "kruify.tasks.fashion_mnist:FashionMnistPixels",
    "fashion-mnist-permuted": "kruify.tasks.fashion_mnist:FashionMnistPermuted",
    "mnist-pixels": "kruify.tasks.fashion_mnist:MnistPixels",
    "mnist-permuted": "kruify.tasks.fashion_mnist:MnistPermuted",
    "king-james": "kruify.tasks.king_james:KingJames",
    "penn-treebank": "kruify.tasks.penn_treebank:PennTreebank",
    "jsb": "kruify.tasks.jsb:Jsb",
    "piano-midi": "kruify.tasks.jsb:PianoMidi",
    "phonemes": "kruify.tasks.phonemes:Phonemes",
    "timit": "kruify.tasks.phonemes:Timit",
}


class Task(ABC):
    """What a network is for. Subclass it; constructor arguments with defaults become options (`name:key=value`)."""

    metric: str = "loss"
    """Key of `evaluate`'s result that decides between two networks."""
    higher_is_better: bool = False
    """Whether a greater `metric` is the better one."""
    measures: str = ""
    """One sentence: what the task measures."""
    chance: str = ""
    """One sentence: what a network that learnt nothing gets."""
    output_kind: str = "values"
    """What `forward` gives: "softmax" or "sigmoid" logits in the last dimension, or "values". Distillation asks."""

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a freshly initialised dense network, in the shape whose state dict a checkpoint of this task holds."""

    @abstractmethod
    def batches(self, split: str, *, seed: int = 0) -> Iterable[Any]:
        """Return the batches of `split` ("train", "valid" or "test"), on the CPU.

        A batch is anything that `forward` and `loss` understand: tensors, or tuples, lists or dicts of them, or an
        object with a method `to(device)`. For "train" the order follows from `seed` alone; the other splits do not
        depend on it.
        """

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the outputs (logits, predictions) of `model` for `batch`; both are on the model's device."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the scalar training loss of `outputs` = forward(model, batch)."""

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Return the metrics of `model` on `split`; `self.metric` is one of the keys.

        This default is the mean of the batches' losses under the name "loss".
        """
        losses = []
        with evaluating(model) as device:
            for batch in self.batches(split):
                batch = to_device(batch, device)
                losses.append(float(_one_number(self.loss(self.forward(model, batch), batch), self)))
        if not losses:
            raise TaskError(f'split "{split}" has no batches', where=type(self).__name__)
        return {"loss": sum(losses) / len(losses)}

    def weight(self, batch: Any) -> float:
        """Return how much `batch` counts beside others: how many examples (tokens, frames) its mean loss is over.

        With 1, the default, all batches of an optimiser step count alike.
        """
        return 1.0

    def examples(self, split: str) -> int | None:
        """Return how many examples `evaluate` looks at in `split`, None where that is unknown."""
        return None

    def published(self) -> dict[str, Tensor]:
        """Return the state dict of a trained network that others published for this task, in `model`'s names."""
        raise TaskError("there is no published network for this task", where=type(self).__name__)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put `model` in evaluation mode without gradients, yield its device, put the mode back afterwards.

    `no_grad`, not `inference_mode`: a layer may keep a tensor that it made here and meet it again in training.
    """
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield device_of(model)
    finally:
        for module in was_training:
            module.training = True


def fresh_model(task: Task) -> nn.Module:
    """Return `task.model()`; TaskError where that is no module."""
    model = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"model() gave {_a(model)}, not a torch.nn.Module", where=type(task).__name__)
    return model


def measure(task: Task, model: nn.Module, split: str, *, known: bool = False) -> dict[str, float]:
    """Return `task.evaluate(model, split)` as plain numbers, `task.metric` among them.

    Args:
        known: whether everything that follows compares with this metric, so that NaN will not do.

    Raises:
        TaskError: it is something else.
    """
    where = type(task).__name__
    found: Any = task.evaluate(model, split)
    if not isinstance(found, Mapping):
        raise TaskError(f'evaluate() gave {_a(found)}, not a dict such as {{"{task.metric}": 0.5}}', where=where)
    metrics: dict[str, float] = {}
    for name, value in found.items():
        try:
            metrics[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TaskError(f"evaluate() gave {_a(value)} as '{name}', not a number", where=where) from None
    if task.metric not in metrics:
        raise TaskError(
            f"evaluate() gave {', '.join(metrics) or 'nothing'}, but not the metric '{task.metric}'", where=where
        )
    if known and math.isnan(metrics[task.metric]):
        raise TaskError(
            f"evaluate() gave NaN as '{task.metric}' on the {split} split, so nothing can be compared with it",
            where=where,
            hint="See that the split has batches and the network finite outputs",
        )
    return metrics


def check_loss(loss: Any, task: Task) -> Tensor:
    """Return `loss` if training can use it: one number with a gradient; TaskError otherwise."""
    if not _one_number(loss, task).requires_grad:
        raise TaskError(
            "loss() gave a number without a gradient",
            where=type(task).__name__,
            hint="Compute it from `outputs` without detach(), item() or argmax()",
        )
    return cast(Tensor, loss)


def _one_number(loss: Any, task: Task) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise TaskError(f"loss() gave {_a(loss)}{shape}, not one number in a tensor", where=type(task).__name__)
    return loss


def _a(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter (CPU for a model without any)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor in it on `device`; looks into tuples, lists, dicts; others have `.to`."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, tuple):
        items = [to_device(item, device) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if isinstance(batch, list):
        return [to_device(item, device) for item in batch]
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


def check_split(split: str) -> Literal["train", "valid", "test"]:
    """Return `split` if it is one of the three; TaskError otherwise."""
    if split not in SPLITS:
        raise TaskError(f'there is no split "{split}"', hint=f"The splits are {', '.join(SPLITS)}")
    return cast(Literal["train", "valid", "test"], split)


def load_task(name: str | Task, **options: object) -> Task:
    """Return the task that the user named: a built-in name, or `path/to/file.py:Name`.

    Either may be followed by options for the constructor, `:key=value,key=value`: `copy-memory:T=500,cell=lstm`,
    `digits.py:Digits:data=/srv/digits`. `options` are added to those, and win. A Task passes through unchanged.

    Raises:
        TaskError: no such name, file or class, not a Task, unknown option, or the user's file failed.
    """
    if isinstance(name, Task):
        return name
    cls, written = _resolve(name)
    return _construct(cls, written | {key: str(value) for key, value in options.items()}, where=name)


def task_class(name: str) -> type[Task]:
    """Return the class that `load_task(name)` would construct, without constructing it."""
    return _resolve(name)[0]


_FILE = re.compile(r"(?P<file>.+?\.py)(?::(?P<cls>[^:]*))?(?::(?P<options>.*))?", re.DOTALL)


def _resolve(name: str) -> tuple[type[Task], dict[str, str]]:
    match = _FILE.fullmatch(name)
    if match is None:
        builtin, _, options = name.partition(":")
        return _builtin(builtin, name), _options(options, name)
    file = Path(match["file"]).expanduser()
    if not file.is_file():
        hint = "Give --task path/to/file.py:Name, seen from the current folder"
        raise TaskError("there is no such task file", where=file, hint=hint)
    if not match["cls"]:
        raise TaskError("the class is missing", where=file, hint=_name_one(file, "Say which one"))
    return _from_file(file, match["cls"]), _options(match["options"] or "", name)


def _builtin(builtin: str, name: str) -> type[Task]:
    if builtin not in BUILTIN:
        close = difflib.get_close_matches(builtin, BUILTIN, n=1)
        guess = f"Did you mean {close[0]}? " if close else ""
        hint = f"{guess}Built-in are {', '.join(BUILTIN)}; your own is path/to/file.py:Name"
        raise TaskError("there is no such task", where=f'"{name}"', hint=hint)
    module, _, cls = BUILTIN[builtin].partition(":")
    return cast(type[Task], getattr(importlib.import_module(module), cls))


def _from_file(file: Path, cls_name: str) -> type[Task]:
    found = getattr(_execute(file), cls_name, None)
    if found is None:
        hint = _name_one(file, "Name one that is there")
        raise TaskError(f'there is no class "{cls_name}" in it', where=file, hint=hint)
    if not (isinstance(found, type) and issubclass(found, Task)):
        hint = f"Write `class {cls_name}(Task)` with `from kruify.task import Task`"
        raise TaskError(f'"{cls_name}" is not a Task', where=file, hint=hint)
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        methods = ", ".join(f"{method}()" for method in missing)
        hint = "Write what is missing; `pydoc kruify.task` explains each"
        raise TaskError(f'"{cls_name}" lacks {methods}', where=file, hint=hint)
    takes = inspect.signature(found.batches).parameters
    if "seed" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise TaskError(
            f'batches() of "{cls_name}" takes no seed', where=file, hint="Write batches(self, split, *, seed=0)"
        )
    return found


def _execute(file: Path) -> ModuleType:
    """Run the user's file as a module of its own, able to import from its own folder (after everything else)."""
    resolved = file.resolve()
    module_name = f"kruify_task_{hashlib.sha1(str(resolved).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, resolved)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(resolved.parent) not in sys.path:
        sys.path.append(str(resolved.parent))
    sys.modules[module_name] = module  # dataclasses and pickling look their module up there
    try:
        spec.loader.exec_module(module)
    except KruifyError:
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _failed("the task file cannot be run", file, error) from error
    return module


def _construct(cls: type[Task], options: dict[str, str], where: str) -> Task:
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    arguments = {}
    for key, text in options.items():
        if key not in parameters:
            hint = f"It takes {', '.join(parameters)}" if parameters else "It takes none"
            raise TaskError(f'there is no option "{key}"', where=f'"{where}"', hint=hint)
        arguments[key] = _convert(key, text, parameters[key], where)
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            hint = f"Add it to the name: {where}{',' if options else ':'}{key}=VALUE"
            raise TaskError(f'option "{key}" has no default', where=f'"{where}"', hint=hint)
    try:
        return cls(**arguments)
    except KruifyError:
        raise
    except (Exception, SystemExit) as error:
        raise _failed(f"{cls.__name__}() failed", Path(inspect.getfile(cls)), error) from error


def _options(text: str, where: str) -> dict[str, str]:
    """Return {key: value} of "key=value,key=value"; a comma that no "key=" follows belongs to the value."""
    options = {}
    for item in re.split(r",(?=\w+=)", text) if text else []:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            hint = "Options follow the name as :key=value,key=value"
            raise TaskError(f'"{item}" is not an option', where=f'"{where}"', hint=hint)
        options[key] = value
    return options


def _convert(key: str, text: str, parameter: inspect.Parameter, where: str) -> object:
    """Return `text` as the type of the parameter's default; of its annotation where there is none, or None."""
    annotated = str(getattr(parameter.annotation, "__name__", parameter.annotation))
    known = type(parameter.default).__name__ if parameter.default not in (None, parameter.empty) else annotated
    kind = next((kind for kind in ("bool", "int", "float") if re.search(rf"\b{kind}\b", known)), "str")
    try:
        if kind == "bool":
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        return int(text) if kind == "int" else float(text) if kind == "float" else text
    except (KeyError, ValueError):
        raise TaskError(f'option {key}="{text}" is not of type {kind}', where=f'"{where}"') from None


def _failed(what: str, file: Path, error: BaseException) -> TaskError:
    """Return a TaskError that names the line of the user's file where `error` came through."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename) == file.resolve():
            line = frame.lineno
    where = f"{file}:{line}" if line is not None else str(file)
    hint = "Correct the file and try again"
    if isinstance(error, ModuleNotFoundError):
        hint = f"Install {error.name}, or correct the import"
    return TaskError(f"{what}: {type(error).__name__}: {error}", where=where, hint=hint)


def _name_one(file: Path, ask: str) -> str:
    """Return a hint that lists the classes of `file`, read without running it."""
    try:
        tree = ast.parse(file.read_bytes())
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    except (SyntaxError, ValueError):
        classes = []
    if not classes:
        return f"{ask}: {file}:Name, a class that is a kruify.task.Task"
    return f"{ask}: {', '.join(f'{file}:{name}' for name in classes)}"
