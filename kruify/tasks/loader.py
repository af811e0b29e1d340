"""Loads a task by the name that the user gives: a built-in one, or a class in a file of the user's."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from kruify.errors import KruifyError, TaskError
from kruify.tasks.base import Task, check_task

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

MOST = 10**9
"""The largest size that a built-in task takes."""


def load_task(name: str | Task, **options: object) -> Task:
    """Return the task that the user named: a built-in name, or `path/to/file.py:Name`.

    Either may be followed by options for the constructor, `:key=value,key=value`: `copy-memory:T=500,cell=lstm`,
    `digits.py:Digits:data=/srv/digits`. `options` are added to those, and win. A Task passes through unchanged.

    Raises:
        TaskError: no such name, file or class, not a Task, unknown option, the user's file failed, or what stands for
            a method cannot be called.
    """
    if isinstance(name, Task):
        return check_task(name)
    cls, written = _resolve(name)
    return check_task(_construct(cls, written | {key: str(value) for key, value in options.items()}, where=name))


def task_class(name: str) -> type[Task]:
    """Return the class that `load_task(name)` would construct, without constructing it."""
    return _resolve(name)[0]


def load_function(name: str) -> Callable[..., Any]:
    """Return the function that the user named as `path/to/file.py:function`.

    Raises:
        TaskError: no such file or function, or the file failed.
    """
    path, _, function = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise TaskError("there is no such file", where=file, hint="Give path/to/file.py:function")
    found = getattr(_execute(file), function, None)
    if not callable(found):
        raise TaskError(f'there is no function "{function}" in it', where=file, hint="Name one that is there")
    return cast(Callable[..., Any], found)


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
    if found is None or found is Task:  # which the file imports
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
        if cls.__module__.startswith("kruify."):
            _check(key, arguments[key], parameters[key].default, where)
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


def _check(key: str, value: object, default: object, where: str) -> None:
    """Raise TaskError for a number that none of the built-in tasks can use: all are sizes, or shares."""
    least, most = 0, 1
    if isinstance(value, int):
        least, most = 0 if default == 0 else 1, MOST
    if isinstance(value, int | float) and not least <= value <= most:
        raise TaskError(f"option {key} must be from {least} to {most}", where=f'"{where[:80]}"')


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
