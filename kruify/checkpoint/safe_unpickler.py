"""Read a pickle without running it: no import, no class, no call; what it would build becomes a `Record`.

A pickle is a program for a small stack machine. Three of its instructions load and call things of the reader's Python
(GLOBAL, REDUCE, BUILD); here a GLOBAL is only a name and a call is only a note of it. So a full-module pickle of a
class that nobody has any more can be read, and a hostile one has nothing to take hold of. A pickle that names what no
model needs (os.system, eval) or calls a function that is not one of the few that rebuild data is refused by name all
the same: opened elsewhere, it would run.

Opcodes: CPython's Lib/pickletools.py, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kruify.checkpoint import limits
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, KruifyError, UnsafeError


class Global(NamedTuple):
    """The name of a class or function in a pickle; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a class that is known by name only."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)


Rebuild = Callable[[tuple[Any, ...]], Any]
"""Stands for a function that a pickle calls to rebuild data; gets the arguments."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FORBIDDEN_ROOTS = _words("""
    os posix nt posixpath ntpath subprocess sys shutil socket importlib runpy pty pickle _pickle cloudpickle dill joblib
    webbrowser ctypes code codeop types multiprocessing asyncio operator _operator inspect tempfile urllib requests
    http httpx aiohttp ftplib smtplib marshal linecache pdb bdb timeit trace cProfile profile signal threading _thread
    imp io _io zipimport pkgutil site pip setuptools distutils pydoc doctest commands popen2 gc atexit sched sqlite3
    platform getpass fileinput glob builtins __builtin__ __builtins__ nturl2path _osx_support
""")
"""Modules that no checkpoint needs and that can do something."""

FORBIDDEN_ANYWHERE = _words("os sys subprocess importlib builtins __builtins__ ctypes socket")
"""The same where they are reached through another module: torch.serialization.os.system."""

FORBIDDEN_PREFIXES = (
    "torch.load",
    "torch.serialization.load",
    "torch.hub",
    "torch.utils.cpp_extension",
    "torch.jit.load",
)

PLAIN_BUILTINS = _words("""
    set frozenset list dict tuple int float bool str bytes bytearray complex object slice range type long unicode xrange
    NotImplemented Ellipsis
""")

CALLABLE = frozenset(
    {
        "functools.partial",
        "datetime.datetime",
        "datetime.date",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.device",
        "torch.finfo",
        "torch.layout",
    }
)
"""Types with small letters whose construction is recorded like that of any class."""


def unpickle(
    data: bytes,
    *,
    where: object,
    persistent: Callable[[Any], Any] | None = None,
    rebuild: dict[str, Rebuild] | None = None,
    globals_found: set[str] | None = None,
) -> tuple[Any, int]:
    """Read one pickle from the start of `data`.

    Args:
        where: the file, for errors.
        persistent: gives the object for a persistent id (torch's storages).
        rebuild: functions that rebuild data, by dotted name.
        globals_found: gets the dotted name of every class and function that is named.

    Returns: (the object, the number of bytes read).

    Raises:
        UnsafeError: it names or calls something that would run, or is beyond the limits.
        CorruptError: it is damaged.
    """
    machine = _Machine(data, where, persistent, {**REBUILD, **(rebuild or {})})
    try:
        result = machine.run()
    except KruifyError:
        raise
    except MemoryError as error:
        raise UnsafeError("its pickle asks for more memory than there is", where) from error
    except Exception as error:  # a damaged pickle can break any of the machine's assumptions
        raise CorruptError(f"its pickle is damaged ({type(error).__name__})", where) from error
    if globals_found is not None:
        globals_found.update(machine.named)
    return result, machine.at


def check_tree(root: Any, where: object) -> None:
    """Refuse cycles, deep nesting and objects that are small in the file and huge when walked.

    Raises:
        UnsafeError: any of them.
    """
    sizes: dict[int, int] = {}
    on_path: set[int] = set()

    def walk(node: Any, depth: int) -> int:
        if not isinstance(node, dict | list | tuple) or isinstance(node, Global):
            return 1
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in on_path:
            raise UnsafeError("an object in it contains itself", where)
        if depth > limits.DEPTH:
            raise UnsafeError(f"it is nested more than {limits.DEPTH} deep", where)
        on_path.add(id(node))
        total = 1 + sum(walk(child, depth + 1) for child in (node.values() if isinstance(node, dict) else node))
        on_path.discard(id(node))
        if total > limits.NODES:
            raise UnsafeError("the object in it is far larger than the file", where)
        sizes[id(node)] = total
        return total

    walk(root, 0)


def refuse_forbidden(name: Global, where: object) -> None:
    """Raise UnsafeError for a global that no checkpoint needs.

    >>> refuse_forbidden(Global("torch", "nn.modules.rnn.LSTM"), "a.pt")
    """
    if name.module in ("builtins", "__builtin__") and name.name in PLAIN_BUILTINS:
        return
    parts = str(name).split(".")
    if (
        parts[0] in FORBIDDEN_ROOTS
        or FORBIDDEN_ANYWHERE.intersection(parts)
        or str(name).startswith(FORBIDDEN_PREFIXES)
    ):
        raise UnsafeError(
            f"opening it would load {str(name)[:100]}",
            where,
            "Do not open it elsewhere either; save a state dict instead",
        )


_PYTHON_3 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Protocols below 3 use Python 2's names."""


class _Mark:
    pass


_MARK = _Mark()


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_")[:1].isupper()


class _Machine:
    """The stack machine."""

    def __init__(
        self, data: bytes, where: object, persistent: Callable[[Any], Any] | None, rebuild: dict[str, Rebuild]
    ) -> None:
        self.data, self.where, self.persistent, self.rebuild = data, where, persistent, rebuild
        self.at = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.named: set[str] = set()

    def run(self) -> Any:
        while True:
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            _OPCODES[code](self)

    # reading

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise CorruptError("its pickle is cut short", self.where, "Copy or download it again")
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def raw_line(self) -> bytes:
        data = self.take(self.data.index(b"\n", self.at) - self.at)
        self.at += 1
        return data

    def line(self) -> str:
        return self.raw_line().decode("utf-8")

    def pop_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise CorruptError("its pickle is damaged", self.where)

    # what would load and call

    def push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > limits.NAME:
            raise CorruptError("its pickle names a class by something that is no name", self.where)
        found = Global(_PYTHON_3.get(module, module), name)
        refuse_forbidden(found, self.where)
        self.named.add(str(found))
        self.stack.append(found)

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise UnsafeError(f"its pickle would call {str(function)[:80]}", self.where)
        name = str(function)
        if name in self.rebuild:
            return self.rebuild[name](args)
        if name in CALLABLE or _is_class(name):
            return Record(function, args)
        raise UnsafeError(f"opening it would call {name[:100]}", self.where, "Save model.state_dict() instead")

    def new(self, cls: Any, args: Any) -> Any:
        if not isinstance(cls, Global) or not isinstance(args, tuple):
            raise CorruptError("its pickle makes an object of something that is no class", self.where)
        if str(cls) in self.rebuild:
            return self.rebuild[str(cls)](args)
        return Record(cls, args)

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, Array):
            target.set_state(state)
        elif not isinstance(target, dict | list | LazyTensor):
            raise CorruptError("its pickle is damaged", self.where)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Record) else target).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs: dict[Any, Any] = target.pairs if isinstance(target, Record) else target
        if not isinstance(pairs, dict) or len(items) % 2:
            raise CorruptError("its pickle is damaged", self.where)
        for key, value in zip(items[::2], items[1::2], strict=True):
            pairs[_usable_key(key)] = value

    def persist(self, identifier: Any) -> None:
        if self.persistent is None:
            raise CorruptError("its pickle refers to something outside of it", self.where)
        self.stack.append(self.persistent(identifier))


_SIMPLE = (str, int, float, bool, bytes, type(None), Global, Record)


def _usable_key(key: Any) -> Any:
    """A key that can be hashed without harm: Python hashes nested tuples without a limit on their depth."""
    level = [key]
    for _ in range(limits.DEPTH):
        level = [part for item in level if type(item) is tuple for part in item]
        if not level:
            return key if isinstance(key, (*_SIMPLE, tuple)) else Record(Global("builtins", "object"), (key,))
        if len(level) > limits.ENTRIES:
            break
        if not all(type(part) is tuple or isinstance(part, _SIMPLE) for part in level):
            return Record(Global("builtins", "tuple"), (key,))
    raise ValueError("key")


@dataclass(eq=False)
class Array:
    """A numpy array in a pickle: its dtype text, shape and bytes."""

    dtype: str = ""
    shape: tuple[int, ...] = ()
    fortran: bool = False
    data: bytes = b""

    def set_state(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        self.shape, self.fortran = tuple(shape), bool(fortran)
        self.dtype = dtype_text(dtype)
        self.data = data if isinstance(data, bytes) else b""


def dtype_text(dtype: Any) -> str:
    """Text of a pickled numpy.dtype, with its byte order: "<f4"; "" for anything else."""
    if not isinstance(dtype, Record) or not dtype.args or not isinstance(dtype.args[0], str):
        return ""
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "|"
    return f"{order if order in ('<', '>', '|') else '|'}{dtype.args[0]}"


def _pairs(args: tuple[Any, ...]) -> dict[Any, Any]:
    return {_usable_key(k): v for k, v in args[0]} if args and isinstance(args[0], list | tuple) else {}


def _encode(args: tuple[Any, ...]) -> bytes:
    # How protocol 2 writes bytes. No other codec: some of them compress.
    text, encoding = args
    if encoding not in ("latin1", "latin-1", "iso-8859-1") or not isinstance(text, str):
        raise ValueError("encoding")
    return text.encode("latin1")


def _reconstructor(args: tuple[Any, ...]) -> Record:
    if not isinstance(args[0], Global):
        raise ValueError("class")
    return Record(args[0])


def _list(args: tuple[Any, ...]) -> list[Any]:
    return list(args[0]) if args else []


REBUILD: dict[str, Rebuild] = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": lambda args: dict(args[0]) if args else {},
    "collections.defaultdict": lambda args: {},
    "collections.deque": _list,
    "builtins.dict": lambda args: {},
    "builtins.set": _list,
    "builtins.frozenset": _list,
    "builtins.list": _list,
    "builtins.tuple": lambda args: tuple(args[0]) if args else (),
    "builtins.bytes": lambda args: args[0] if args and isinstance(args[0], bytes) else b"",
    "builtins.bytearray": lambda args: args[0] if args and isinstance(args[0], bytes) else b"",
    "builtins.complex": lambda args: complex(*args),
    "builtins.slice": lambda args: Record(Global("builtins", "slice"), args),
    "builtins.range": lambda args: Record(Global("builtins", "range"), args),
    "builtins.type": lambda args: Record(Global("builtins", "type"), args),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": lambda args: Record(args[0], args[1:]) if isinstance(args[0], Global) else None,
    "numpy.core.multiarray._reconstruct": lambda args: Array(),
    "numpy._core.multiarray._reconstruct": lambda args: Array(),
    "numpy.core.multiarray.scalar": lambda args: Array(dtype_text(args[0]), (), False, args[1]),
    "numpy._core.multiarray.scalar": lambda args: Array(dtype_text(args[0]), (), False, args[1]),
}
"""Calls that rebuild plain data."""


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(read(machine))


def _sized(width: int, decode: Callable[[bytes], Any] = bytes) -> Callable[[_Machine], None]:
    return _push(lambda m: decode(m.take(m.unsigned(width))))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _latin(data: bytes) -> str:
    return data.decode("latin1")


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _int_line(machine: _Machine) -> int | bool:
    text = machine.line()
    return {"00": False, "01": True}[text] if text in ("00", "01") else int(text)


def _string_line(machine: _Machine) -> str:
    text = machine.line().strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise ValueError("string")
    return codecs.escape_decode(text[1:-1].encode())[0].decode("latin1")


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _tuple(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError
        items = tuple(machine.stack[-count:])
        del machine.stack[-count:]
        machine.stack.append(items)

    return make


def _global(machine: _Machine) -> None:
    machine.push_global(machine.line(), machine.line())


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.push_global(module, name)


def _inst(machine: _Machine) -> None:
    _global(machine)
    cls = machine.stack.pop()
    machine.stack.append(machine.call(cls, tuple(machine.pop_mark())))


def _obj(machine: _Machine) -> None:
    cls, *args = machine.pop_mark()
    machine.stack.append(machine.call(cls, tuple(args)))


def _reduce(machine: _Machine) -> None:
    args, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.call(function, args))


def _newobj(machine: _Machine) -> None:
    args, cls = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.new(cls, args))


def _newobj_ex(machine: _Machine) -> None:
    _kwargs, args, cls = machine.stack.pop(), machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.new(cls, args))


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    machine.append([item])


def _dict(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.stack.append({})
    machine.set_items(items)


def _persid(machine: _Machine) -> None:
    machine.persist(machine.line())


def _extension(machine: _Machine) -> None:
    raise UnsafeError("its pickle uses an extension code, which stands for an unknown class", machine.where)


def _pop(machine: _Machine) -> None:
    machine.stack.pop()


def _float_line(machine: _Machine) -> float:
    return float(machine.line())


_OPCODES: dict[int, Callable[[_Machine], None]] = {
    ord(code): handler
    for code, handler in {
        "(": _push(lambda m: _MARK),
        "0": _pop,
        "1": lambda m: m.pop_mark() and None,
        "2": _push(lambda m: m.stack[-1]),
        "F": _push(_float_line),
        "I": _push(_int_line),
        "J": _push(lambda m: _signed(m.take(4))),
        "K": _push(lambda m: m.unsigned(1)),
        "L": _push(lambda m: int(m.line().rstrip("L"))),
        "M": _push(lambda m: m.unsigned(2)),
        "N": _push(lambda m: None),
        "P": _persid,
        "Q": lambda m: m.persist(m.stack.pop()),
        "R": _reduce,
        "S": _push(_string_line),
        "T": _sized(4, _latin),
        "U": _sized(1, _latin),
        "V": _push(lambda m: m.raw_line().decode("raw-unicode-escape")),
        "X": _sized(4, _text),
        "a": _append,
        "b": lambda m: m.build(),
        "c": _global,
        "d": _dict,
        "}": _push(lambda m: {}),
        "e": lambda m: m.append(m.pop_mark()),
        "g": _push(lambda m: m.memo[int(m.line())]),
        "h": _push(lambda m: m.memo[m.unsigned(1)]),
        "i": _inst,
        "j": _push(lambda m: m.memo[m.unsigned(4)]),
        "l": _push(lambda m: m.pop_mark()),
        "]": _push(lambda m: []),
        "o": _obj,
        "p": lambda m: _put(m, int(m.line())),
        "q": lambda m: _put(m, m.unsigned(1)),
        "r": lambda m: _put(m, m.unsigned(4)),
        "s": _set_item,
        "t": _push(lambda m: tuple(m.pop_mark())),
        ")": _push(lambda m: ()),
        "u": lambda m: m.set_items(m.pop_mark()),
        "G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        "\x80": lambda m: m.take(1) and None,
        "\x81": _newobj,
        "\x82": _extension,
        "\x83": _extension,
        "\x84": _extension,
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        "\x8a": _sized(1, _signed),
        "\x8b": _sized(4, _signed),
        "B": _sized(4),
        "C": _sized(1),
        "\x8c": _sized(1, _text),
        "\x8d": _sized(8, _text),
        "\x8e": _sized(8),
        "\x8f": _push(lambda m: []),  # EMPTY_SET: read as a list
        "\x90": lambda m: m.append(m.pop_mark()),
        "\x91": _push(lambda m: m.pop_mark()),
        "\x92": _newobj_ex,
        "\x93": _stack_global,
        "\x94": lambda m: _put(m, len(m.memo)),
        "\x95": lambda m: m.take(8) and None,
        "\x96": _sized(8),
    }.items()
}
