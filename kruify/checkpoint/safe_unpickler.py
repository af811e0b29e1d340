"""Read a pickle without running it: no import, no class, no call; what it would build becomes a `Record`.

A pickle is a program for a small stack machine. Three of its instructions load and call things of the reader's Python
(GLOBAL, REDUCE, BUILD); here a GLOBAL is only a name and a call is only recorded. So a module of a class that is not
installed can be read, and a hostile file cannot act. A pickle that names what no model needs (os.system, eval), or
calls a function that does not rebuild data, is refused by name all the same: another program would run it.

Opcodes and the decoding of their arguments: the standard library's pickletools, protocols 0 to 5.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from kruify.checkpoint import limits
from kruify.checkpoint.tensors import LazyTensor
from kruify.errors import CorruptError, KruifyError, UnsafeError


class Global(NamedTuple):
    """The name of a class or function in a pickle; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)  # what is in it may be nested without end
class Record:
    """An object of a class that is known by name only: what it would be constructed from and filled with."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: dict[Any, Any] = field(default_factory=dict)


class OtherDict(dict[Any, Any]):
    """A Counter or defaultdict, read as a dict."""


class OtherList(list[Any]):
    """A deque, read as a list."""


Rebuild = Callable[[tuple[Any, ...]], Any]
"""Stands for a function that a pickle calls to rebuild data; gets the arguments."""


def words(text: str) -> frozenset[str]:
    """The words of a list."""
    return frozenset(text.split())


FORBIDDEN_ROOTS = words("""
    os posix nt posixpath ntpath subprocess sys shutil socket importlib runpy pty pickle _pickle cloudpickle dill joblib
    webbrowser ctypes code codeop types multiprocessing asyncio operator _operator inspect tempfile urllib requests
    http httpx aiohttp ftplib smtplib marshal linecache pdb bdb timeit trace cProfile profile signal threading _thread
    imp io _io zipimport pkgutil site pip setuptools distutils pydoc doctest commands popen2 gc atexit sched sqlite3
    platform getpass fileinput glob builtins __builtin__ __builtins__ nturl2path _osx_support
""")
"""Modules that no checkpoint needs and that can do something."""

FORBIDDEN_ANYWHERE = words("os sys subprocess importlib builtins __builtins__ ctypes socket")
"""The same where they are reached through another module: torch.serialization.os.system."""

FORBIDDEN_PREFIXES = (
    "torch.load",
    "torch.serialization.load",
    "torch.hub",
    "torch.utils.cpp_extension",
    "torch.jit.load",
)

PLAIN_BUILTINS = words("""
    set frozenset list dict tuple int float bool str bytes bytearray complex object slice range type long unicode xrange
    NotImplemented Ellipsis
""")

HARMLESS = ("builtins.getattr", "types.SimpleNamespace")
"""May be named; `_Machine.call` allows getattr for torch's own functions and for classes in classes only."""

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
        "re._compile",
        "torch.nn.backends.thnn._get_thnn_function_backend",
        "numpy.random._pickle.__randomstate_ctor",
        "numpy.random._pickle.__generator_ctor",
        "numpy.random._pickle.__bit_generator_ctor",
        "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
    }
)
"""Harmless callables with small letters; a call is recorded like that of any class."""

FUNCTION_TABLES = words("torch._C._VariableFunctions torch._C._VariableFunctionsClass torch._C._nn")
"""Where pickles find torch's own functions by getattr: a module with `self.act = torch.tanh`."""


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
    return result, machine.file.tell()


def check_tree(root: Any, where: object) -> None:
    """Refuse cycles, deep nesting and objects that are small in the file and huge when walked.

    Raises:
        UnsafeError: any of them.
    """
    sizes: dict[int, int] = {}
    on_path: set[int] = set()

    def walk(node: Any, depth: int) -> int:
        if not isinstance(node, dict | list | tuple | set | frozenset) or isinstance(node, Global):
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
    if (name.module == "builtins" and name.name in PLAIN_BUILTINS) or str(name) in HARMLESS:
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

_MARK = object()


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_")[:1].isupper()


def _size(value: Any) -> int:
    """Bytes that a copy of a value takes, roughly, without what is in it."""
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    return 64 * len(value) if isinstance(value, dict | list | tuple | set | frozenset) else 0


class _Machine:
    """The stack machine."""

    def __init__(
        self, data: bytes, where: object, persistent: Callable[[Any], Any] | None, rebuild: dict[str, Rebuild]
    ) -> None:
        self.file, self.where, self.persistent, self.rebuild = io.BytesIO(data), where, persistent, rebuild
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.named: set[str] = set()
        self.copies = len(data) + limits.SLACK  # bytes that its calls may still copy

    def run(self) -> Any:
        read = self.file.read
        for _ in range(limits.OPCODES):
            name, decode, handle = _OPCODES[read(1)]
            argument = decode(self.file) if decode else None
            if handle:
                handle(self, argument)
            elif name == "STOP":
                return self.stack.pop()
            else:  # its argument is the object
                self.stack.append(argument)
        raise UnsafeError(f"its pickle has more than {limits.OPCODES} instructions", self.where)

    def pop(self, count: int) -> list[Any]:
        """The last `count` objects, in order."""
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def pop_mark(self) -> list[Any]:
        """The objects since the last mark, in order."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise IndexError

    def put(self, index: int) -> None:
        if not 0 <= index < 1 << 32:  # larger numbers can be chosen to have one and the same hash
            raise IndexError
        self.memo[index] = self.stack[-1]

    def name(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > limits.NAME:
            raise CorruptError("its pickle names a class by something that is no name", self.where)
        found = Global(_PYTHON_3.get(module, module), name)
        refuse_forbidden(found, self.where)
        self.named.add(str(found))
        return found

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise UnsafeError("its pickle would call something that has no name", self.where)
        name = str(function)
        if name in self.rebuild:
            self.copies -= sum(map(_size, args))
            if self.copies < 0:
                raise UnsafeError("its pickle copies far more than the file holds", self.where)
            return self.rebuild[name](args)
        if name == "builtins.getattr" and len(args) == 2 and isinstance(args[0], Global):
            if str(args[0]) in FUNCTION_TABLES:
                return self.name(str(args[0]), args[1])
            if _is_class(str(args[0])) and isinstance(args[1], str) and _is_class(args[1]):  # a class in a class
                return self.name(args[0].module, f"{args[0].name}.{args[1]}")
        if name in CALLABLE or _is_class(name):
            return Record(function, args)
        raise UnsafeError(f"opening it would call {name[:100]}", self.where, "Save model.state_dict() instead")

    def new(self, cls: Any, args: Any) -> Any:
        if not isinstance(cls, Global) or not isinstance(args, tuple) or str(cls) == "builtins.getattr":
            raise CorruptError("its pickle makes an object of something that is no class", self.where)
        return self.call(cls, args) if str(cls) in self.rebuild else Record(cls, args)

    def build(self) -> None:
        target, state = self.stack[-2], self.stack.pop()
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, Array):
            target.set_state(state)
        elif not isinstance(target, dict | list | LazyTensor):
            raise TypeError

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(map(usable_key, items))
        else:
            (target.items if isinstance(target, Record) else target).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs: dict[Any, Any] = target.pairs if isinstance(target, Record) else target
        if not isinstance(pairs, dict):
            raise TypeError
        pairs.update(_as_dict(zip(items[::2], items[1::2], strict=True)))

    def push_dict(self, items: list[Any]) -> None:
        self.stack.append({})
        self.set_items(items)

    def persist(self, identifier: Any) -> None:
        if self.persistent is None:
            raise CorruptError("its pickle refers to something outside of it", self.where)
        self.stack.append(self.persistent(identifier))

    def instance(self, cls: Any, *args: Any) -> None:
        self.stack.append(self.call(cls, args))

    def refuse_extension(self, _: Any) -> None:
        raise UnsafeError("its pickle uses an extension code, which stands for an unknown class", self.where)


def usable_key(key: Any) -> Any:
    """A key of a dict or set; those that can be chosen to have one and the same hash are compared by identity."""
    if (type(key) is int and abs(key) < 1 << 60) or isinstance(
        key, str | float | bool | bytes | None | Global | Record
    ):
        return key
    return Record(Global("builtins", type(key).__name__), (key,))


def _as_dict(pairs: Any) -> dict[Any, Any]:
    return {usable_key(key): value for key, value in pairs}


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


def _encode(args: tuple[Any, ...]) -> bytes:
    # How protocol 2 writes bytes. No other codec: some of them compress.
    text, encoding = args
    if encoding not in ("latin1", "latin-1", "iso-8859-1") or not isinstance(text, str):
        raise ValueError("encoding")
    return text.encode("latin1")


def _record(args: tuple[Any, ...]) -> Record:
    if not isinstance(args[0], Global):
        raise ValueError("class")
    return Record(*args)


def _scalar(args: tuple[Any, ...]) -> Array:
    return Array(dtype_text(args[0]), (), False, args[1])


def _items(args: tuple[Any, ...]) -> Any:
    """What a container is made of. No text: its letters would be objects of their own, far larger."""
    if args and not isinstance(args[0], list | tuple | set | frozenset):
        raise ValueError("items")
    return args[0] if args else ()


def _bytes(args: tuple[Any, ...]) -> bytes:
    if args and isinstance(args[0], str):  # how protocol 2 writes a bytearray
        return _encode(args)
    return bytes(args[0]) if args and isinstance(args[0], bytes | bytearray) else b""


def _range(args: tuple[Any, ...]) -> range:
    return range(*args)


def _recorded(name: str) -> Rebuild:
    return lambda args: Record(Global("builtins", name), args)


REBUILD: dict[str, Rebuild] = {
    "collections.OrderedDict": lambda args: OrderedDict(_as_dict(_items(args))),
    "collections.Counter": lambda args: OtherDict(_as_dict(args[0].items())),
    "collections.defaultdict": lambda args: OtherDict(),
    "collections.deque": lambda args: OtherList(_items(args)),
    "builtins.dict": lambda args: {},
    "builtins.set": lambda args: set(map(usable_key, _items(args))),
    "builtins.frozenset": lambda args: frozenset(map(usable_key, _items(args))),
    "builtins.list": lambda args: list(_items(args)),
    "builtins.tuple": lambda args: tuple(_items(args)),
    "builtins.bytes": _bytes,
    "builtins.bytearray": lambda args: bytearray(_bytes(args)),
    "builtins.complex": lambda args: complex(*args),
    "builtins.slice": _recorded("slice"),
    "builtins.range": _range,
    "builtins.xrange": _range,
    "builtins.type": _recorded("type"),
    "_codecs.encode": _encode,
    "copyreg._reconstructor": lambda args: _record(args[:1]),
    "copyreg.__newobj__": lambda args: _record((args[0], args[1:])),
    "numpy.core.multiarray._reconstruct": lambda args: Array(),
    "numpy._core.multiarray._reconstruct": lambda args: Array(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
"""Calls that rebuild plain data."""


def _names(file: IO[bytes]) -> list[str]:
    """The two lines of a class's name. pickletools takes them for ASCII, pickle writes UTF-8."""
    lines = [file.readline(), file.readline()]
    if not lines[1].endswith(b"\n"):
        raise EOFError
    return [line[:-1].decode() for line in lines]


Handler = Callable[[_Machine, Any], Any]


def _push(value: Callable[[_Machine, Any], Any]) -> Handler:
    return lambda m, arg: m.stack.append(value(m, arg))


_GET = _push(lambda m, arg: m.memo[arg])
_HANDLERS: dict[str, Handler] = {
    "MARK": _push(lambda m, _: _MARK),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": _push(lambda m, _: m.stack[-1]),
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": _push(lambda m, _: None),
    "NEWTRUE": _push(lambda m, _: True),
    "NEWFALSE": _push(lambda m, _: False),
    "GET": _GET,
    "BINGET": _GET,
    "LONG_BINGET": _GET,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "EMPTY_TUPLE": _push(lambda m, _: ()),
    "TUPLE1": _push(lambda m, _: tuple(m.pop(1))),
    "TUPLE2": _push(lambda m, _: tuple(m.pop(2))),
    "TUPLE3": _push(lambda m, _: tuple(m.pop(3))),
    "TUPLE": _push(lambda m, _: tuple(m.pop_mark())),
    "EMPTY_LIST": _push(lambda m, _: []),
    "LIST": _push(lambda m, _: m.pop_mark()),
    "APPEND": lambda m, _: m.add(m.pop(1)),
    "APPENDS": lambda m, _: m.add(m.pop_mark()),
    "EMPTY_DICT": _push(lambda m, _: {}),
    "DICT": lambda m, _: m.push_dict(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "EMPTY_SET": _push(lambda m, _: set()),
    "ADDITEMS": lambda m, _: m.add(m.pop_mark()),
    "FROZENSET": _push(lambda m, _: frozenset(map(usable_key, m.pop_mark()))),
    "GLOBAL": _push(lambda m, names: m.name(*names)),
    "STACK_GLOBAL": _push(lambda m, _: m.name(*m.pop(2))),
    "INST": lambda m, names: m.instance(m.name(*names), *m.pop_mark()),
    "OBJ": lambda m, _: m.instance(*m.pop_mark()),
    "REDUCE": _push(lambda m, _: m.call(*m.pop(2))),
    "NEWOBJ": _push(lambda m, _: m.new(*m.pop(2))),
    "NEWOBJ_EX": _push(lambda m, _: m.new(*m.pop(3)[:2])),
    "BUILD": lambda m, _: m.build(),
    "PERSID": _Machine.persist,
    "BINPERSID": lambda m, _: m.persist(m.pop(1)[0]),
    "EXT1": _Machine.refuse_extension,
    "EXT2": _Machine.refuse_extension,
    "EXT4": _Machine.refuse_extension,
}
_PLAIN = ("STOP", "INT", "LONG", "FLOAT", "STRING", "UNICODE", "BYTEARRAY8")  # and all BIN..., LONG1, SHORT_BIN...

_OPCODES: Mapping[bytes, tuple[str, Callable[[IO[bytes]], Any] | None, Handler | None]] = {
    op.code.encode("latin1"): (
        op.name,
        _names if op.name in ("GLOBAL", "INST") else op.arg.reader if op.arg else None,
        _HANDLERS.get(op.name),
    )
    for op in pickletools.opcodes
    if op.name in _HANDLERS or op.name in _PLAIN or op.name.startswith(("BIN", "SHORT_BIN", "LONG"))
}
"""Opcode byte -> (name, decoder of its argument, what it does; None pushes the argument)."""
