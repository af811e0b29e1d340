"""Hostile files, made by code: each tries to run something, to take too much, or to pass for something that it is not.

`make(folder)` writes one file (or a small folder) for each and gives their paths by name.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

MAGIC = 0x1950A86A20F9469CFC6C
Entry = tuple[str, bytes]


# pickles by hand


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *args: str) -> bytes:
    return name(module, attribute) + b"(" + b"".join(map(text, args)) + b"tR"


def program(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def state_with(body: bytes) -> bytes:
    """A dict with one good tensor and one entry that is `body`."""
    return program(b"}(" + text("w") + tensor() + text("x") + body + b"u")


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage", tag: str = "storage") -> bytes:
    return b"(" + text(tag) + name("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    shape: tuple[int, ...] = (2, 2), stride: tuple[int, ...] = (2, 1), offset: int = 0, stored: bytes | None = None
) -> bytes:
    inner = (stored or storage()) + number(offset) + numbers(*shape) + numbers(*stride) + b"\x89"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + inner + name("collections", "OrderedDict") + b")RtR"


# zips by hand: zipfile does not write what is wrong


def archive(
    entries: list[Entry],
    *,
    method: int = 0,
    flags: int = 0,
    crc: int | None = None,
    before: bytes = b"",
    same_place: bool = False,
    central_names: list[str] | None = None,
    size: int | None = None,
) -> bytes:
    body, directory, offset = bytearray(before), bytearray(), len(before)
    for index, (title, content) in enumerate(entries):
        data = content
        if method == 8:
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            data = packer.compress(content) + packer.flush()
        total = zlib.crc32(content) if crc is None else crc
        raw = title.encode("utf-8")
        flag = flags | 0x800
        common = struct.pack("<HHHHIIIHH", 20, flag, method, 0, total, len(data), size or len(content), len(raw), 0)
        place = 0 if same_place else offset
        central = (central_names[index] if central_names else title).encode("utf-8")
        head = struct.pack("<HHHHIIIHH", 20, flag, method, 0, total, len(data), size or len(content), len(central), 0)
        body += b"PK\x03\x04" + common[:2] + common[2:4] + common[4:6] + b"\0\0" + common[6:] + raw + data
        directory += b"PK\x01\x02\x14\0" + head[:6] + b"\0\0" + head[6:26]
        directory += struct.pack("<HHHII", 0, 0, 0, 0, place) + central
        offset = len(body)
    end = struct.pack("<HHHHIIH", 0, 0, len(entries) & 0xFFFF, len(entries) & 0xFFFF, len(directory), len(body), 0)
    return bytes(body + directory + b"PK\x05\x06" + end)


def many_entries(count: int) -> bytes:
    """Empty entries; too many for `archive` to make quickly."""
    head, size = struct.pack("<HHHHIII", 0, 0, 0, 0, 0, 0, 0), 30 + 8
    body = [b"PK\x03\x04\x14\0" + head + b"\x08\0\0\0" + b"a/%06d" % i for i in range(count)]
    directory = [
        b"PK\x01\x02\x14\0\x14\0" + head + b"\x08\0" + bytes(12) + struct.pack("<I", i * size) + b"a/%06d" % i
        for i in range(count)
    ]
    length = sum(map(len, directory))
    end = struct.pack("<HHHHIIH", 0, 0, count & 0xFFFF, count & 0xFFFF, length, count * size, 0)
    return b"".join(body) + b"".join(directory) + b"PK\x05\x06" + end


def torch_zip(data: bytes, extra: list[Entry] | None = None, **options) -> bytes:
    entries = [("a/data.pkl", data), ("a/data/0", bytes(16)), ("a/version", b"3\n"), *(extra or [])]
    return archive(entries, **options)


def legacy(body: bytes, keys: list[str] | None = None, count: int = 4, payload: bytes = bytes(16)) -> bytes:
    head = b"".join(pickle.dumps(v, 2) for v in (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True}))
    return head + body + pickle.dumps(["0"] if keys is None else keys, 2) + struct.pack("<q", count) + payload


def legacy_tensor(**options) -> bytes:
    stored = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + number(4) + b"NtQ"
    return program(b"}(" + text("w") + tensor(stored=stored, **options) + b"u")


def safetensors(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(start: int = 0, end: int = 16, shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [2, 2] if shape is None else shape, "data_offsets": [start, end]}


def npy(header: str, data: bytes = bytes(16)) -> bytes:
    padded = header + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode() + data


def laughs() -> bytes:
    """Ten lists, each of ten references to the one before: 10^20 values when walked."""
    body = b"]q\0(" + b"K\x01" * 10 + b"e"
    for level in range(1, 21):
        body += b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 10 + b"e"
    return body


def module_that_contains_itself() -> bytes:
    def table(content: bytes) -> bytes:
        return b"}(" + content + b"u"

    inner = text("_parameters") + table(text("w") + tensor()) + text("_buffers") + b"}"
    inner += text("_modules") + table(text("me") + b"h\x07")
    return program(name("net", "Net") + b")\x81q\x07" + table(inner) + b"b")


def copies(of: bytes, function: bytes, count: int) -> bytes:
    """One object, copied by a call again and again: little in the file, much in memory."""
    return state_with(of + b"r\x07\0\0\x000](" + (function + b"j\x07\0\0\0\x85R") * count + b"e")


def encoded_copies(size: int, count: int) -> bytes:
    body = text("a" * size) + b"q\x07" + text("latin1") + b"\x86q\x080]("
    return state_with(body + (name("_codecs", "encode") + b"h\x08R") * count + b"e")


def function_of_tuples() -> bytes:
    """A call of a tuple of tuples: 2^60 words when it is printed."""
    return state_with(b")" + b"2\x86" * 60 + b")R")


def one_module_in_many_places(attributes: int, places: int) -> bytes:
    tables = text("_parameters") + b"}(" + text("w") + tensor() + b"u" + text("_buffers") + b"}"
    inner = tables + text("_modules") + b"}" + b"".join(text(f"a{i}") + b"N" for i in range(attributes))
    module = name("net", "Net") + b")\x81q\x07}(" + inner + b"ub"
    children = b"}(" + text("first") + module + b"".join(text(f"m{i}") + b"h\x07" for i in range(places)) + b"u"
    return program(name("net", "Net") + b")\x81}(" + tables + text("_modules") + children + b"ub")


FILES: dict[str, Callable[[], bytes]] = {
    # things that would run
    "os_system.pt": lambda: torch_zip(state_with(call("os", "system", "touch /tmp/pwned"))),
    "posix_system.pt": lambda: torch_zip(state_with(call("posix", "system", "touch /tmp/pwned"))),
    "eval.pt": lambda: torch_zip(state_with(call("builtins", "eval", "1"))),
    "exec_old.pt": lambda: torch_zip(state_with(call("__builtin__", "exec", "1"))),
    "import.pt": lambda: torch_zip(state_with(call("builtins", "__import__", "antigravity"))),
    "getattr.pt": lambda: torch_zip(state_with(call("builtins", "getattr", "a", "b"))),
    "open_write.pt": lambda: torch_zip(state_with(call("builtins", "open", "/tmp/pwned", "w"))),
    "popen_class.pt": lambda: torch_zip(state_with(call("subprocess", "Popen", "id"))),
    "popen_newobj.pt": lambda: torch_zip(state_with(name("subprocess", "Popen") + b"(" + text("id") + b"t\x81")),
    "import_module.pt": lambda: torch_zip(state_with(call("importlib", "import_module", "os"))),
    "runpy.pt": lambda: torch_zip(state_with(call("runpy", "_run_code", "1"))),
    "pickle_loads.pt": lambda: torch_zip(state_with(call("pickle", "loads", "x"))),
    "load_from_bytes.pt": lambda: torch_zip(state_with(call("torch.storage", "_load_from_bytes", "x"))),
    "torch_load.pt": lambda: torch_zip(state_with(call("torch", "load", "/etc/passwd"))),
    "torch_hub.pt": lambda: torch_zip(state_with(call("torch.hub", "load", "a/b", "c"))),
    "cpp_extension.pt": lambda: torch_zip(state_with(call("torch.utils.cpp_extension", "load", "a", "b"))),
    "ctypes.pt": lambda: torch_zip(state_with(call("ctypes", "CDLL", "libc.so.6"))),
    "socket.pt": lambda: torch_zip(state_with(call("socket", "create_connection", "x"))),
    "attrgetter.pt": lambda: torch_zip(state_with(call("operator", "attrgetter", "a"))),
    "unknown_function.pt": lambda: torch_zip(state_with(call("some.package", "run_me", "a"))),
    "dotted.pt": lambda: torch_zip(
        state_with(text("torch") + text("serialization.os.system") + b"\x93(" + text("id") + b"tR")
    ),
    "partial.pt": lambda: torch_zip(
        state_with(name("functools", "partial") + b"(" + name("os", "system") + text("id") + b"tR")
    ),
    "named_only.pt": lambda: torch_zip(state_with(name("os", "system") + b"0N")),
    "inst.pt": lambda: torch_zip(state_with(b"(" + text("id") + b"ios\nsystem\n")),
    "obj.pt": lambda: torch_zip(state_with(b"(" + name("os", "system") + text("id") + b"o")),
    "build_global.pt": lambda: torch_zip(state_with(name("torch", "FloatStorage") + b"}b")),
    "call_of_no_name.pt": lambda: torch_zip(state_with(text("os.system") + b")R")),
    "extension_code.pt": lambda: torch_zip(state_with(b"\x82\x01")),
    "codec.pt": lambda: torch_zip(state_with(call("_codecs", "encode", "x", "zlib"))),
    "raw_pickle.pkl": lambda: program(call("os", "system", "touch /tmp/pwned")),
    "protocol_0.pkl": lambda: b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.",
    "legacy_object.pt": lambda: legacy(program(call("os", "system", "touch /tmp/pwned"))),
    "legacy_header.pt": lambda: pickle.dumps(MAGIC, 2) + program(call("os", "system", "touch /tmp/pwned")),
    "module_source.pt": lambda: legacy(
        program(b"(" + text("module") + name("os", "system") + text("a.py") + text("import os") + b"tQ)R")
    ),
    # things that would take too much
    "deep_lists.pt": lambda: torch_zip(program(b"]" * 300_000 + b"a" * 299_999)),
    "deep_tuples.pt": lambda: torch_zip(state_with(b"N" + b"\x85" * 300_000)),
    "itself.pt": lambda: torch_zip(state_with(b"]q\x05h\x05a")),
    "module_in_itself.pt": lambda: torch_zip(module_that_contains_itself()),
    "billion_laughs.pt": lambda: torch_zip(state_with(laughs())),
    "encoded_copies.pt": lambda: torch_zip(encoded_copies(4 << 20, 300)),
    "list_copies.pt": lambda: torch_zip(copies(b"(" + b"N" * 200_000 + b"t", name("builtins", "list"), 1000)),
    "text_as_list.pt": lambda: torch_zip(copies(text("\u4e00" * 200_000), name("builtins", "list"), 100)),
    "function_of_tuples.pt": lambda: torch_zip(function_of_tuples()),
    "one_module_in_many_places.pt": lambda: torch_zip(one_module_in_many_places(20_000, 2_500)),
    "getattr_of_module.pt": lambda: torch_zip(
        state_with(name("builtins", "getattr") + name("torch", "hub") + text("load") + b"\x86R")
    ),
    "huge_string.pt": lambda: torch_zip(state_with(b"\x8d" + struct.pack("<Q", 1 << 60))),
    "negative_length.pt": lambda: torch_zip(state_with(b"\x8b" + struct.pack("<i", -5))),
    "sixteen_terabytes.pt": lambda: torch_zip(
        program(b"}(" + text("w") + tensor((4_000_000, 1_000_000), (0, 0)) + b"u")
    ),
    "many_expanded.pt": lambda: torch_zip(
        program(b"}(" + b"".join(text(f"w{i}") + tensor((1000, 260), (0, 0)) for i in range(400)) + b"u")
    ),
    "overflowing_shape.pt": lambda: torch_zip(
        program(
            b"}("
            + text("w")
            + tensor((1 << 40, 1 << 40, 0), (1, 1, 1))
            + text("v")
            + tensor((1 << 61, 8), (1, 1))
            + b"u"
        )
    ),
    "bomb.pt": lambda: torch_zip(state_with(b"N"), [("a/code/x.py", bytes(100 << 20))], method=8),
    "bomb.npz": lambda: archive([("w.npy", npy("{}", bytes(100 << 20)))], method=8),
    "lying_size.npz": lambda: archive([("w.npy", npy("{}", bytes(1 << 20)))], method=8, size=1 << 12),
    "entries.pt": lambda: many_entries(210_000),
    "zip64_claim.pt": lambda: (
        torch_zip(state_with(b"N"))[:-22]
        + b"PK\x06\x06"
        + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 1 << 40, 0)
        + b"PK\x06\x07"
        + struct.pack("<IQI", 0, len(torch_zip(state_with(b"N"))) - 22, 1)
        + b"PK\x05\x06"
        + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    ),
    "huge_metadata.safetensors": lambda: safetensors({"__metadata__": {"a": "x" * (70 << 20)}, "w": entry()}),
    "deep_header.safetensors": lambda: safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    # things that pass for what they are not
    "outside_storage.pt": lambda: torch_zip(program(b"}(" + text("w") + tensor((2, 3), (3, 1)) + b"u")),
    "offset_outside.pt": lambda: torch_zip(program(b"}(" + text("w") + tensor(offset=1 << 40) + b"u")),
    "negative_stride.pt": lambda: torch_zip(program(b"}(" + text("w") + tensor((2,), (-1,), 3) + b"u")),
    "storage_path.pt": lambda: torch_zip(
        program(b"}(" + text("w") + tensor(stored=storage("../../etc/passwd")) + b"u")
    ),
    "storage_size.pt": lambda: torch_zip(program(b"}(" + text("w") + tensor(stored=storage(count=400)) + b"u")),
    "storage_kind.pt": lambda: torch_zip(program(b"}(" + text("w") + tensor(stored=storage(kind="Tensor")) + b"u")),
    "persistent_kind.pt": lambda: torch_zip(program(b"}(" + text("w") + tensor(stored=storage(tag="file")) + b"u")),
    "no_mark.pt": lambda: torch_zip(program(b"tttttt")),
    "memo_gap.pt": lambda: torch_zip(program(b"}r\xff\xff\xff\x7fj\xfe\xff\xff\x7f")),
    "unfinished.pt": lambda: torch_zip(state_with(b"N")[:-1]),
    "legacy_count.pt": lambda: legacy(legacy_tensor(), count=1 << 60),
    "legacy_keys.pt": lambda: legacy(legacy_tensor(), keys=["0", "1"]),
    "legacy_tail.pt": lambda: legacy(legacy_tensor(), payload=bytes(17)),
    "twice.pt": lambda: torch_zip(state_with(b"N"), [("a/data/0", b"other")]),
    "absolute_name.pt": lambda: torch_zip(state_with(b"N"), [("/etc/cron.d/x", b"")]),
    "parent_name.pt": lambda: torch_zip(state_with(b"N"), [("a/../../x", b"")]),
    "nul_name.pt": lambda: torch_zip(state_with(b"N"), [("a/data/1\0x", b"")]),
    "two_pickles.pt": lambda: torch_zip(state_with(b"N"), [("b/data.pkl", b"")]),
    "encrypted.pt": lambda: torch_zip(state_with(b"N"), flags=1),
    "wrong_sum.pt": lambda: torch_zip(state_with(b"N"), crc=1),
    "junk_before.pt": lambda: torch_zip(state_with(b"N"), before=b"PK\x03\x04junk"),
    "overlap.pt": lambda: torch_zip(state_with(b"N"), same_place=True),
    "two_names.pt": lambda: torch_zip(state_with(b"N"), central_names=["a/data.pkl", "a/data/1", "a/version"]),
    "not_torch.zip": lambda: archive([("readme.txt", b"hello")]),
    "header_length.safetensors": lambda: safetensors({"w": entry()}, length=1 << 62),
    "header_beyond.safetensors": lambda: safetensors({"w": entry()}, length=1 << 20),
    "no_json.safetensors": lambda: safetensors(b"{hello}"),
    "twice.safetensors": lambda: safetensors(
        b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}"
    ),
    "overlap.safetensors": lambda: safetensors({"a": entry(), "b": entry()}),
    "beyond.safetensors": lambda: safetensors({"a": entry(0, 1 << 40, [1 << 38])}),
    "hole.safetensors": lambda: safetensors({"a": entry(4, 16, [3])}),
    "shape.safetensors": lambda: safetensors({"a": entry(shape=[1 << 32, 1 << 32])}),
    "negative.safetensors": lambda: safetensors({"a": entry(shape=[-2, -2])}),
    "tail.safetensors": lambda: safetensors({"a": entry()}, bytes(17)),
    "checksum.safetensors": lambda: safetensors(
        {"__metadata__": {"kruify.schema": "1", "kruify.plan": "{}", "kruify.checksum": "0" * 64}, "a": entry()}
    ),
    "no_checksum.safetensors": lambda: safetensors({"__metadata__": {"kruify.schema": "1"}, "a": entry()}),
    "object.npz": lambda: archive([("w.npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }"))]),
    "code.npz": lambda: archive([("w.npy", npy("__import__('os').system('touch /tmp/pwned')"))]),
    "shape.npz": lambda: archive(
        [("w.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"))]
    ),
    "junk.npz": lambda: archive([("w.npy", b"hello")]),
    "pointer.pt": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "page.pt": lambda: b"<!DOCTYPE html><html>Not found</html>",
    "program.pt": lambda: b"\x7fELF" + bytes(100),
    "empty.pt": lambda: b"",
    "list.json": lambda: b"{[]}",
}


def _index(target: str) -> bytes:
    return json.dumps({"weight_map": {"w": target}}).encode()


FILES |= {
    "parent.index.json": lambda: _index("../../../etc/passwd"),
    "absolute.index.json": lambda: _index("/etc/passwd"),
    "missing.index.json": lambda: _index("gone.safetensors"),
    "itself.index.json": lambda: _index("itself.index.json"),
    "twice.index.json": lambda: b'{"weight_map": {"w": "a", "w": "b"}}',
    "deep.index.json": lambda: b'{"weight_map":' * 50_000,
}


def _with_h5py() -> dict[str, Callable[[], bytes]]:
    import h5py
    import numpy as np

    def h5(fill: Callable[[h5py.File], object]) -> bytes:
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            fill(file)
        return buffer.getvalue()

    def nested(file: h5py.File) -> None:
        group: h5py.Group = file
        for _ in range(150):
            group = group.create_group("g")

    whole = h5(lambda f: f.create_dataset("layers/lstm/cell/vars/0", data=np.ones((3, 20), "f4")))
    return {
        "junk.h5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(200),
        "external_link.h5": lambda: h5(lambda f: f.__setitem__("a", h5py.ExternalLink("/etc/passwd", "x"))),
        "soft_link.h5": lambda: h5(lambda f: f.__setitem__("a", h5py.SoftLink("/a"))),
        "outside_numbers.h5": lambda: h5(
            lambda f: f.create_dataset("a", (100,), "f4", external=[("/etc/passwd", 0, 400)])
        ),
        "unstored.h5": lambda: h5(lambda f: f.create_dataset("a", (1 << 20, 1 << 20), "f4", chunks=(1, 1024))),
        "deep.h5": lambda: h5(nested),
        "cut.h5": lambda: whole[: len(whole) // 2],
        "config.keras": lambda: archive([("config.json", b"[" * 50_000), ("model.weights.h5", whole)]),
    }


def _with_onnx() -> dict[str, Callable[[], bytes]]:
    import onnx
    from onnx import helper

    def model(**fields) -> bytes:
        proto = onnx.TensorProto(name="W", data_type=1, **fields)
        node = helper.make_node("LSTM", ["X", "W", "W"], ["Y"])
        return helper.make_model(helper.make_graph([node], "g", [], [], [proto])).SerializeToString()

    external = [onnx.StringStringEntryProto(key="location", value="../../../etc/passwd")]
    return {
        "junk.onnx": lambda: b"\x08\x07" + bytes(range(256)),
        "external.onnx": lambda: model(dims=[2], data_location=1, external_data=external),
        "dims.onnx": lambda: model(dims=[1 << 40, 1 << 40], raw_data=b"0000"),
        "negative.onnx": lambda: model(dims=[-4], raw_data=b"0000"),
        "cut.onnx": lambda: model(dims=[1], raw_data=b"0000")[:-9],
    }


def make(folder: Path) -> dict[str, Path]:
    """Write every hostile file; those for libraries that are not installed are left out."""
    files = dict(FILES)
    for more in (_with_h5py, _with_onnx):
        try:
            files |= more()
        except ImportError:
            continue
    paths = {}
    for title, content in files.items():
        paths[title] = folder / title
        paths[title].write_bytes(content())
    return paths


if __name__ == "__main__":
    import sys

    print(len(make(Path(sys.argv[1]))), "files")
