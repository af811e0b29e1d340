"""Mutations of what a file means: its bytes are in order, its checksums right, and what they say is not.

Of a converted file: its plan, its other metadata, the places of its single entries, names, shapes and dtypes of its
tensors, its numbers; of a .pt file: its pickle, with calls put in; and plans as files of their own. `mutants(folder)`
writes them without end, each with the commands that are run on it.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickletools
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import hostile

Draw = random.Random
Tensors = dict[str, tuple[str, list[Any], bytes]]  # name -> dtype, shape, bytes
Mutant = tuple[str, Path, list[list[str]]]  # class, file, commands


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NUMBERS = (*(0, -1, 1, 2, 3, 7, 24), *(1 << n for n in (14, 20, 24, 31, 53, 63)), (1 << 63) - 1, 10**30)
NUMBERS += (1.5, -0.0, 1e308, 5e-324, 0.999999)
TEXTS = _words("""
    a dense all lstm kru float8_e4m3fn float64 complex64 os.system weight_hh_l0 ../../x __class__ $ None true 1 _l1
""")
TEXTS += ("", "\ud800", "\u0663", "a\x00b", "x" * 5000, "\x1b[31m")
NAMES = _words("""
    a . .. rnn rnn. __metadata__ rnn.weight_hh_l0 rnn.weight_hh_l0.terms rnn.weight_hh_l0.terms.0.factors.00
    rnn.weight_hh_l0.terms.-1.factors.0 rnn.weight_hh_l0.overlay.x rnn.weight_hh_l9
    rnn.weight_hh_l99999999999999999999 rnn.weight_ih_l0_reverse rnn.weight_hr_l0 rnn.bias_hh_l0.terms.0.scale
    rnn.weight_hh_l0.parametrizations.weight.original0 rnn.parametrizations.weight_hh_l0.original0 rnn.weight_hh_l0_g
    rnn.weight_hh_l0_v rnn.weight_hh_l0_orig rnn.weight_hh_l0_mask module.rnn.x rnn.weight_hh_l0_raw
    rnn._orig_mod.weight_hh_l0 module. _orig_mod. rnn.cell.weight_hh weight_hh
""")
NAMES += ("", "\ud800", "a\nb", "rnn.weight_hh_l0.terms.\u0661.factors.0", "n" * 5000, "rnn.weight_hh_l\u0661")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2}
SIZES |= {"U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "F4": 1, "F6_E2M3": 1, "X": 1}
CODES = {"U16": "H", "I32": "i", "I64": "q", "F32": "f", "F64": "d", "U32": "I", "I16": "h"}
PLACES = (-1, 0, 1, 7, 8, 23, 24, 31, 32, 1 << 20, (1 << 31) - 1, -(1 << 31))
FLOATS = (b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\xff" * 4)
PRODUCTS = ("2x2", "4x4,2x2", "8x8", "4x2,2x4", "8x1,1x8", "auto", "auto:3", "auto:32", "24x8", "1x1", "4096x4096,1x1")
GLOBALS = tuple(
    word.split(":")
    for word in _words("""
    torch:LongStorage torch._utils:_rebuild_tensor_v2 torch._utils:_rebuild_tensor_v3 torch:Size
    collections:OrderedDict collections:Counter collections:deque collections:defaultdict torch:device builtins:set
    builtins:list builtins:tuple builtins:complex builtins:bytearray builtins:slice _codecs:encode
    copyreg:_reconstructor copyreg:__newobj__ builtins:getattr builtins:object numpy.core.multiarray:_reconstruct
    numpy.core.multiarray:scalar numpy:dtype numpy:ndarray torch._utils:_rebuild_parameter
    torch._tensor:_rebuild_from_type_v2 torch.jit._pickle:build_intlist torch._utils:_rebuild_qtensor
    torch.serialization:_get_layout os:system my.net:Net torch:float8_e4m3fn torch.nn.modules.rnn:LSTM
    datetime:datetime functools:partial re:_compile argparse:Namespace
""")
)


# ------------------------------------------------------------------ a JSON value


def change(value: Any, draw: Draw) -> Any:
    """`value` with one to three changes somewhere inside."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not isinstance(value, dict | list) or not value or draw.random() < 0.02:
            return any_value(draw)
        places = list(_places(value))
        container, key = draw.choice(places)
        kind = draw.randrange(10)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[draw.choice((*TEXTS, *map(str, container)))] = copy.deepcopy(container[key])
        elif kind == 1:
            container.append(copy.deepcopy(container[key]))
        elif kind == 2:
            other, name = draw.choice(places)
            container[key] = copy.deepcopy(other[name]) if name in _keys(other) else None
        elif isinstance(container[key], str) and draw.random() < 0.7:
            container[key] = spec(draw) if _is_spec(container[key]) else letters(container[key], draw)
        else:
            container[key] = any_value(draw)
    return value


def any_value(draw: Draw) -> Any:
    kind = draw.randrange(8)
    if kind < 3:
        return draw.choice(NUMBERS)
    if kind < 5:
        return draw.choice(TEXTS)
    if kind == 5:
        return draw.choice((None, True, False, [], {}, [[]], {"": {}}, [None] * 3, {"$": "tuple", "items": [1]}))
    deep = draw.choice(("{}", "[]"))
    return json.loads('{"a":' * (depth := draw.choice((3, 60, 150))) + deep + "}" * depth)


def letters(text: str, draw: Draw) -> str:
    characters = list(text) or [""]
    characters[draw.randrange(len(characters))] = draw.choice('{}[]",:0-1.en\\u/ xé\0') * draw.choice((1, 1, 400))
    return "".join(characters)


def spec(draw: Draw) -> str:
    """A factor spec, most of them in the grammar."""
    parts = []
    for _ in range(draw.choice((1, 1, 2, 3, 400))):
        rank, product = draw.choice(("", "", *NUMBERS)), draw.choice(PRODUCTS)
        parts.append(f"{rank}*({product})" if rank != "" else product)
        if draw.random() < 0.3:
            parts.append(
                draw.choice(("diag", "sparse:10%:1", "sparse:100%:4", "sparse:1e-9%:3", "sparse:50%", "x", ""))
            )
    return draw.choice(("", "", "", "stacked:")) + "+".join(parts)


def _is_spec(text: str) -> bool:
    return any(c.isdigit() for c in text) and "x" in text


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in _keys(value):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


# ------------------------------------------------------------------ a converted .safetensors


def parts(data: bytes) -> tuple[dict[str, str], Tensors]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = entry["dtype"], entry["shape"], data[8 + length + start : 8 + length + end]
    return metadata, tensors


def whole(metadata: dict[str, Any], tensors: Tensors) -> bytes:
    """The file, with a checksum that is right."""
    ours = "kruify.schema" in metadata
    header: dict[str, Any] = {"__metadata__": {**metadata, **({"kruify.checksum": "0" * 64} if ours else {})}}
    data = b""
    for name, (dtype, shape, content) in sorted(tensors.items(), key=lambda item: -SIZES.get(item[1][0], 1)):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head + data).hexdigest()
    return head.replace(b'"kruify.checksum": "' + b"0" * 64, b'"kruify.checksum": "' + digest.encode()) + data


def plan(metadata: dict[str, Any], tensors: Tensors, draw: Draw) -> None:
    text = json.dumps(change(json.loads(metadata["kruify.plan"]), draw))
    metadata["kruify.plan"] = letters(text, draw) if draw.random() < 0.1 else text


def metadata(metadata: dict[str, Any], tensors: Tensors, draw: Draw) -> None:
    name = draw.choice(list(metadata))
    kind = draw.randrange(6)
    if kind == 0:
        del metadata[name]
    elif kind == 1:
        metadata[name] = draw.choice(
            (any_value(draw), *TEXTS, "{}", "[]", "null", "1e999", "NaN", "00", "\u0661", " 1")
        )
    elif metadata[name][:1] in ("{", "["):
        metadata[name] = json.dumps(change(json.loads(metadata[name]), draw))
    else:
        metadata[name] = letters(metadata[name], draw)
    if draw.random() < 0.9:
        metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def index(metadata: dict[str, Any], tensors: Tensors, draw: Draw) -> None:
    name = draw.choice(
        [name for name in tensors if name.endswith(("overlay.index", "overlay.counts", "overlay.columns"))]
    )
    dtype, shape, content = tensors[name]
    numbers = list(struct.unpack(f"<{len(content) // SIZES[dtype]}{CODES[dtype]}", content))
    for _ in range(draw.choice((1, 1, 2, 9))):
        numbers[draw.randrange(len(numbers))] = draw.choice(PLACES)
    if draw.random() < 0.3:
        draw.shuffle(numbers)
    if draw.random() < 0.4:
        dtype = draw.choice(list(CODES))
    if draw.random() < 0.2:
        numbers = numbers[: draw.randrange(len(numbers))] * draw.choice((1, 2))
        shape = draw.choice(([len(numbers) // 2, 2], [2, len(numbers) // 2], [len(numbers)], [len(numbers), 1]))
        numbers = numbers[: shape[0] * (shape[1] if len(shape) > 1 else 1)]
    whole = [float(n) if dtype[0] == "F" else n % (1 << 8 * SIZES[dtype]) for n in numbers]
    tensors[name] = (
        dtype,
        shape,
        struct.pack(f"<{len(numbers)}{CODES[dtype].upper() if dtype[0] == 'I' else CODES[dtype]}", *whole),
    )


def names(metadata: dict[str, Any], tensors: Tensors, draw: Draw) -> None:
    for _ in range(draw.choice((1, 1, 2, 4))):
        name = draw.choice(list(tensors))
        new = draw.choice((*NAMES, letters(name, draw), name.rpartition(".")[0] or "x", f"{name}.{draw.choice(NAMES)}"))
        tensors[new] = tensors[name] if draw.random() < 0.4 else tensors.pop(name)


def shapes(metadata: dict[str, Any], tensors: Tensors, draw: Draw) -> None:
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(list(tensors))
        dtype, shape, content = tensors[name]
        kind = draw.randrange(6)
        if kind == 0:
            dtype = draw.choice(list(SIZES))
            content = (content * 8)[: max(1, len(content) // SIZES[tensors[name][0]]) * SIZES[dtype]]
        elif kind == 1:
            shape = shape[::-1]
        elif kind == 2:
            shape = draw.choice(([1] * draw.choice((1, 70)) + shape, [*shape, 1], [len(content) // SIZES[dtype]]))
        elif kind == 3:
            shape, content = draw.choice(([0], [0, 1 << 62], [1 << 40, 0], [0] * 80, [*shape[:-1], 0])), b""
        elif kind == 4:
            shape = [draw.choice(NUMBERS) for _ in shape]
        else:
            shape, content = [2 * n if i == 0 else n for i, n in enumerate(shape)], content * 2
        tensors[name] = dtype, shape, content


def values(metadata: dict[str, Any], tensors: Tensors, draw: Draw) -> None:
    name = draw.choice(list(tensors))
    dtype, shape, content = tensors[name]
    changed = bytearray(content)
    for _ in range(draw.choice((1, 4, 100))):
        at = draw.randrange(max(1, len(changed)))
        changed[at : at + 4] = draw.choice(
            (b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0", b"\xff" * 4)
        )
    tensors[name] = dtype, shape, bytes(changed[: len(content)])


IN_A_FILE: dict[str, Callable[[dict[str, Any], Tensors, Draw], None]] = {
    "plan": plan,
    "metadata": metadata,
    "index": index,
    "names": names,
    "shapes": shapes,
    "values": values,
}


# ------------------------------------------------------------------ the pickle of a .pt file


def pickled(data: bytes, draw: Draw) -> bytes:
    """The archive with one to three changes between the instructions of its pickle."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    at = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    program = entries[at][1]
    for _ in range(draw.choice((1, 1, 2, 3))):
        try:
            places = [(place, op) for op, _, place in pickletools.genops(program)]
        except ValueError:  # what was put in is no instruction
            break
        number = draw.randrange(1, len(places))
        start, op = places[number]
        end = places[number + 1][0] if number + 1 < len(places) else len(program)
        kind = draw.randrange(5)
        if kind == 0:
            program = program[:start] + program[end:]
        elif kind == 1 and op.arg is not None and op.name.startswith("BININT"):
            program = program[:start] + hostile.number(int(draw.choice(NUMBERS))) + program[end:]
        elif kind == 1 and op.name == "BINUNICODE":
            program = (
                program[:start] + hostile.text(draw.choice((*TEXTS, "0", "1")).replace("\ud800", "?")) + program[end:]
            )
        elif kind == 2:
            module, attribute = draw.choice(GLOBALS)
            program = program[:start] + hostile.name(module, attribute) + program[end:]
        else:
            program = program[:start] + call(draw, 0) + program[start:]
    entries[at] = entries[at][0], program
    return hostile.archive(entries)


def call(draw: Draw, depth: int) -> bytes:
    """Instructions that call something with some arguments, and drop the result or leave it."""
    module, attribute = draw.choice(GLOBALS)
    arguments = b"".join(argument(draw, depth) for _ in range(draw.choice((0, 1, 1, 2, 4, 7))))
    how = draw.choice((b"tR", b"tR", b"t\x81", b"tRh\x00b", b"tR}b"))
    return hostile.name(module, attribute) + b"(" + arguments + how + (b"0" if draw.random() < 0.7 else b"")


def argument(draw: Draw, depth: int) -> bytes:
    kind = draw.randrange(9 if depth < 3 else 7)
    if kind == 0:
        return hostile.number(int(draw.choice(NUMBERS)))
    if kind == 1:
        return hostile.text(draw.choice(("", "0", "latin1", "f4", "O8", "cpu", "x" * 3000, "storage", "zlib")))
    if kind == 2:
        return hostile.numbers(*(int(draw.choice(NUMBERS)) for _ in range(draw.choice((0, 1, 2, 70)))))
    if kind == 3:
        return draw.choice((b"N", b")", b"]", b"}", b"\x88", b"(" + b"K\x01" * 300 + b"t", b"]\x85", b"}\x85"))
    if kind == 4:
        return b"h" + bytes([draw.randrange(12)])
    if kind == 5:
        return hostile.storage(count=draw.choice((0, 1, 4, 72, 1 << 40)))
    if kind == 6:
        return hostile.name(*draw.choice(GLOBALS))
    return call(draw, depth + 1).removesuffix(b"0")


# ------------------------------------------------------------------ all of them


def good_files(folder: Path) -> list[Path]:
    """A dense and several converted files, and the plan of one; between them they have all that a plan can say."""
    import torch
    from torch import nn

    import kruify
    from kruify.checkpoint import read, write_safetensors

    torch.manual_seed(0)
    net = nn.ModuleDict({"rnn": nn.LSTM(3, 8, 2), "out": nn.Linear(8, 2)})
    torch.save(net.state_dict(), folder / "dense.pt")
    kruify.convert(folder / "dense.pt", "2*(4x4,2x2)+diag+sparse:10%:4", output=folder / "sums.kru.safetensors")
    kruify.convert(folder / "dense.pt", "2x2", output=folder / "pickled.pt", input_factors="auto")
    done = kruify.convert(
        folder / "dense.pt", "stacked:2*(16x4,2x2)+sparse:5%:1", output=folder / "stacked.kru.safetensors"
    )
    (folder / "plan.json").write_text(done.plan.to_json())
    kru = nn.ModuleDict({"rnn": kruify.layers.KRU(3, 8, factors="4x4,2x2")})
    history = json.dumps([{"epoch": 1, "step": 2, "loss": 0.5, "penalty": None, "metrics": {"loss": 0.5}}])
    kruify.save(kru, folder / "kru.safetensors")
    more = {"kruify.history": history, "kruify.parents": json.dumps(["ab" * 32]), "kruify.recipe": '{"epochs": 1}'}
    more |= {"kruify.network": '{"cell": "lstm", "hidden": 8}'}
    for name in ("sums.kru.safetensors", "kru.safetensors"):
        strings, tensors = parts((folder / name).read_bytes())
        del strings["kruify.checksum"]
        (folder / name).write_bytes(whole({**strings, **more}, tensors))
    write_safetensors(folder / "dense.safetensors", read(folder / "dense.pt").tensors)
    kruify.convert(folder / "dense.pt", "2x2+sparse:9%", output=folder / "int8.kru.safetensors", dtype="int8")
    old = read(folder / "sums.kru.safetensors")  # its tensors are named and stored as in schema 1
    write_safetensors(folder / "old.safetensors", old.tensors, {**old.metadata, "kruify.schema": "1"})
    net["again"] = net["rnn"]
    torch.save(net.state_dict(), folder / "tied.pt")
    kruify.convert(folder / "tied.pt", "4x2,2x4+sparse:9%", output=folder / "tied.kru.safetensors")
    names = ("tied.kru", "sums.kru", "stacked.kru", "int8.kru", "old", "kru", "dense")
    return [folder / f"{name}.safetensors" for name in names]


def commands(path: Path, dense: Path, draw: Draw) -> list[list[str]]:
    """What is run on a mutant of a checkpoint."""
    target, small = str(path.parent / "out.safetensors"), str(path.parent / "out.kru.safetensors")
    others = [["inspect", str(path), "--json"], ["export", str(path), "--to", "dense", "-o", target]]
    others += [["convert", str(path), "--factors", "2x2", "-o", small], ["report", str(dense), str(path)]]
    return [["verify", str(path)], draw.choices(others, (8, 5, 5, 1))[0]]


def mutants(folder: Path, seed: int) -> Iterator[Mutant]:
    """Files in `folder`/mutants, with their classes and commands."""
    draw = random.Random(seed)
    good = good_files(folder)
    dense, pt = folder / "dense.pt", (folder / "pickled.pt").read_bytes()
    own = json.loads((folder / "plan.json").read_text())
    (folder / "mutants").mkdir()
    kinds = [*IN_A_FILE, "pickle", "plan file"]
    for number in range(sys.maxsize):
        kind = kinds[number % len(kinds)]
        path = (
            folder
            / "mutants"
            / f"{number}.{'json' if kind == 'plan file' else 'pt' if kind == 'pickle' else 'safetensors'}"
        )
        if kind == "plan file":
            text = json.dumps(change(own, draw))
            path.write_text(letters(text, draw) if draw.random() < 0.1 else text, errors="surrogatepass")
            command = [
                "convert",
                str(dense),
                "--plan",
                str(path),
                "-o",
                str(folder / "mutants" / "out.kru.safetensors"),
            ]
            yield kind, path, [command, [*command, "--dry-run"]]
            continue
        if kind == "pickle":
            path.write_bytes(pickled(draw.choice((pt, pt, dense.read_bytes())), draw))
        else:
            usable = good[:5] if kind == "index" else good[:6] if kind in ("plan", "metadata") else good
            strings, tensors = parts(draw.choice(usable).read_bytes())
            strings.pop("kruify.checksum", None)
            IN_A_FILE[kind](strings, tensors, draw)
            path.write_bytes(whole(strings, tensors))
        yield kind, path, commands(path, dense, draw)
