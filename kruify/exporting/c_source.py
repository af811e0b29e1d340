"""One recurrent layer as the text of a C99 file: its weights as eight-bit integers, one function that takes a step.

No matrix of factors is formed: low rank is two products with the state, another Kronecker product one product a factor
(kruify.kronecker). All are calls of one C function, which adds up integer times float and multiplies by the row's
scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kruify.checkpoint.integers import SCALE
from kruify.checkpoint.sparse_index import COLUMNS, COUNTS, VALUES
from kruify.checkpoint.stored import encode
from kruify.checkpoint.summed_biases import in_full
from kruify.conversion import plan_of
from kruify.conversion.computed import state_of
from kruify.conversion.storing import matrix_sizes
from kruify.errors import UnsupportedError
from kruify.exporting.c_text import CELLS, FILE, HELPERS
from kruify.exporting.shapes import Interface
from kruify.factors import contraction_order
from kruify.layers.matrix import KroneckerMatrix, KroneckerTerm
from kruify.layers.storage import marks

C_TYPES = {torch.int8: "int8_t", torch.uint16: "uint16_t", torch.int32: "int32_t", torch.float32: "float"}
PER_LINE = 16  # numbers


@dataclass(frozen=True)
class Source:
    """A layer in C.

    Attributes:
        text: of the file.
        flash: bytes of its constants; the code is beside them.
        ram: bytes of the struct that one stream keeps: h, c, and what a step works with, all floats.
    """

    text: str
    flash: int
    ram: int


@dataclass(frozen=True)
class _Step:
    """A product with (I (x) W (x) I) for each gate and each product of a term.

    Attributes:
        name: of its constants.
        values: int8 (gates, rank, rows, columns).
        scales: float32 (gates, rank, rows, 1), or (gates, 1, rows, 1) where all products of a term share them.
        before, after: sizes of the identities.
    """

    name: str
    values: Tensor
    scales: Tensor
    before: int = 1
    after: int = 1


def identifier(text: str) -> str:
    """`text` as the beginning of C names."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    return name if re.match("[A-Za-z]", name) else f"layer_{name}"


def layer_source(module: nn.Module, interface: Interface, file: str, prefix: str, about: Sequence[str]) -> Source:
    """The file of a layer that `kruify.quantize` stored in eight bits.

    Args:
        file: its name.
        prefix: of the names that other files see, an identifier.
        about: lines for the comment at its head.

    Raises:
        UnsupportedError: a number is NaN or infinite.
    """
    layer = interface.layer
    stored = encode(state_of(module), in_full(marks(module)), matrix_sizes(plan_of(module)), packed=False)
    writer = _Writer({name: _in_c(tensor.load().detach().cpu()) for name, tensor in stored.items()})
    wide, lstm, gru = len(layer.gates) * layer.hidden_size, layer.kind == "lstm", layer.kind == "gru"
    for k, suffix in enumerate(layer.suffixes):
        x, h = f"state->h[{k - 1}]" if k else "input", f"state->h[{k}]"
        writer.line(f"/* layer {k} */")
        writer.biases(suffix, wide, apart=gru)
        writer.product(module, f"weight_ih{suffix}", x, "state->gates")
        writer.product(module, f"weight_hh{suffix}", h, _at("state->gates", wide * gru))
        c, new = f"state->c[{k}], " * lstm, writer.work(0, layer.hidden_size) if layer.proj_size else h
        writer.line(f"{layer.kind}(state->gates, {c}{new});")
        if layer.proj_size:
            writer.line(f"clear({h}, {layer.proj_size});")
            writer.product(module, f"weight_hr{suffix}", new, h)
    works = {"gates": wide * (1 + gru), **writer.works}
    ram = 4 * (layer.num_layers * sum(interface.state_sizes) + sum(works.values()))
    name = prefix.upper()
    about = [*about, f"Flash: {writer.flash:,} bytes of constants, and the code.", f"RAM: {ram:,} bytes a stream."]
    text = FILE.format(
        about="\n".join(f" * {_safe(line)}".rstrip() for line in about),
        file=_safe(file),
        prefix=prefix,
        name=name,
        input=layer.input_size,
        hidden=layer.hidden_size,
        output=layer.output_size,
        layers=layer.num_layers,
        states=" and ".join(interface.states),
        c=f"    float c[{name}_LAYERS][{name}_HIDDEN];\n" * lstm,
        clear_c=f"        clear(state->c[k], {name}_HIDDEN);\n" * lstm,
        work="".join(f"    float {work}[{size}];\n" for work, size in works.items()),
        constants="\n".join(writer.constants),
        helpers="\n".join(HELPERS[helper] for helper in HELPERS if helper in writer.helpers),
        cell=CELLS[(layer.nonlinearity or "tanh") if layer.kind == "rnn" else layer.kind],
        locals="    size_t r;\n\n" * writer.loops,
        steps="\n".join(writer.lines),
    )
    return Source(text.replace("$HIDDEN", f"{name}_HIDDEN").replace("$INDEX", writer.index), writer.flash, ram)


class _Writer:
    """Constants and statements of the file.

    Args:
        stored: the tensors of the layer in eight bits, as a file stores them (checkpoint.stored).
    """

    def __init__(self, stored: dict[str, Tensor]) -> None:
        self.stored = stored
        self.constants: list[str] = []
        self.lines: list[str] = []
        self.helpers = {"clear"}
        self.works: dict[str, int] = {}  # working array -> its floats
        self.loops = False  # over the products of a term
        self.flash = 0
        wide = any(tensor.dtype == torch.int32 for tensor in stored.values())
        self.index = C_TYPES[torch.int32 if wide else torch.uint16]  # of sparse residuals

    def line(self, text: str, indent: int = 1) -> None:
        self.lines.append("    " * indent + text)

    def work(self, number: int, size: int) -> str:
        """A working array of `size` floats at least."""
        name = f"work{number}"
        self.works[name] = max(size, self.works.get(name, 0))
        return f"state->{name}"

    def biases(self, suffix: str, wide: int, *, apart: bool) -> None:
        """The gates before the products are added to them: b_ih + b_hh, or one after the other (`apart`, of a GRU,
        whose reset gate acts on the state's share alone)."""
        names = [f"bias_ih{suffix}", f"bias_hh{suffix}"]
        if names[0] not in self.stored:
            self.line(f"clear(state->gates, {wide * (1 + apart)});")
            return
        b_ih, b_hh = (self.stored[name].double() for name in names)
        bias = torch.cat([b_ih, b_hh]) if apart else b_ih + b_hh
        self.helpers.add("copy")
        self.line(f"copy(state->gates, {self.constant(f'bias{suffix}', bias.float())}, {len(bias)});")

    def product(self, module: nn.Module, name: str, x: str, y: str) -> None:
        """y += W x."""
        weight = getattr(module, name)
        if not isinstance(weight, KroneckerMatrix):
            values, scales = self.rows(name)
            self.chain([_Step(name, values[None, None], scales[None, None])], x, [y])
            return
        for number, term in enumerate(weight.term_list()):
            gates = [0] if term.stacked else term.gates
            targets = [_at(y, gate * weight.rows) for gate in gates]
            self.chain(self.steps(f"{name}.terms.{number}", term), x, targets)
        if weight.diagonal is not None:
            self.helpers.add("diagonal")
            values, size = self.stored[f"{name}.diagonal"], weight.diagonal.shape[1]
            array = self.constant(f"{name}_diagonal", values.float())
            for place, gate in enumerate(weight.diagonal_gates):
                self.line(f"diagonal({_at(array, place * size)}, {size}, {x}, {_at(y, gate * weight.rows)});")
        if weight.overlay is not None:
            self.helpers.add("residual")
            values, scales = self.rows(name + VALUES)
            counts, columns = (self.constant(_name(name + part), self.stored[name + part], self.index)
                               for part in (COUNTS, COLUMNS))  # fmt: skip
            arrays = f"{self.constant(f'{name}_sparse', values)}, {self.constant(f'{name}_sparse_scale', scales)}"
            self.line(f"residual({arrays}, {counts}, {columns}, {len(scales)}, {values.shape[1]}, {x}, {y});")

    def steps(self, name: str, term: KroneckerTerm) -> list[_Step]:
        """The products that one term is made of; stacked gates are one with more rows."""
        parts = [self.rows(f"{name}.factors.{f}") for f in range(len(term.factors))]
        if (scale := self.stored.get(f"{name}.scale")) is not None:
            # Into a factor whose rows are of one product each, if there is one that belongs to one gate.
            own = [f for f, (values, _) in enumerate(parts) if values.shape[3] > 1 and not term.stacked]
            f = own[-1] if own else 0
            parts[f] = parts[f][0], parts[f][1] * scale[..., None, None]
        if term.stacked:
            values, scales = (part.transpose(0, 1).flatten(1, 2)[None] for part in parts[0])
            parts[0] = values, scales
        shapes = [values.shape[2:] for values, _ in parts]
        if len(parts) == 2:
            for left, right in ((0, 1), (1, 0)):
                columns, scale = parts[left]
                if shapes[left][1] == shapes[right][0] == 1 and scale.shape[2] == 1:
                    # Low rank: all products at once, (P, rank) times (rank, Q), both scales of a product together.
                    values, scales = parts[right]
                    scales = (scales * scale).expand(-1, values.shape[1], -1, -1)
                    first = _Step(_name(f"{name}.right"), values.transpose(1, 2), scales.transpose(1, 2))
                    ones = torch.ones(len(columns), 1, columns.shape[2], 1)
                    return [first, _Step(_name(f"{name}.left"), columns.transpose(1, 3), ones)]
        parts = [(values, scales.expand(*values.shape[:3], 1)) for values, scales in parts]
        sizes, steps = [q for _, q in shapes], []
        for f in contraction_order([(p, q) for p, q in shapes]):
            before, after = math.prod(sizes[:f]), math.prod(sizes[f + 1 :])
            steps.append(_Step(_name(f"{name}.factors.{f}"), *parts[f], before, after))
            sizes[f] = shapes[f][0]
        return steps

    def chain(self, steps: Sequence[_Step], x: str, targets: Sequence[str]) -> None:
        """Adds to each target, one a gate, the steps applied to x, over all products of the term."""
        self.helpers.add("multiply")
        arrays = [(self.constant(s.name, s.values), self.constant(f"{s.name}_scale", s.scales)) for s in steps]
        rank = steps[0].values.shape[1]
        for gate, target in enumerate(targets):
            indent = 1
            if rank > 1:
                self.loops, indent = True, 2
                self.line(f"for (r = 0; r < {rank}; r++) {{")
            source = x
            for turn, (step, names) in enumerate(zip(steps, arrays, strict=True)):
                p, q = step.values.shape[2:]
                to, size = target, step.before * p * step.after
                if turn < len(steps) - 1:
                    to = self.work(turn % 2, size)
                    self.line(f"clear({to}, {size});", indent)
                own = [
                    _at(array, gate * part[0].numel()) + f" + r * {part[0, 0].numel()}" * (part.shape[1] > 1)
                    for array, part in zip(names, (step.values, step.scales), strict=True)
                ]
                self.line(f"multiply({', '.join(own)}, {step.before}, {p}, {q}, {step.after}, {source}, {to});", indent)
                source = to
            if rank > 1:
                self.line("}")

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """Integers and scales. What is not stored so has rows of one entry: a one, and itself as the scale."""
        values = self.stored[name]
        if values.dtype == torch.int8:
            return values, self.stored[name + SCALE]
        return torch.ones_like(values, dtype=torch.int8), values.float()

    def constant(self, name: str, values: Tensor, kind: str | None = None) -> str:
        """An array; returns its name."""
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise UnsupportedError("it has numbers that are NaN or infinite", name, "Train it again")
        kind = kind or C_TYPES[values.dtype]
        numbers = values.flatten().tolist()
        texts = list(map(_float if kind == "float" else str, numbers))
        body = ",\n".join(", ".join(texts[at : at + PER_LINE]) for at in range(0, len(texts), PER_LINE))
        self.constants.append(f"static const {kind} {name}[{len(numbers)}] = {{\n{body}}};\n")
        self.flash += len(numbers) * (1 if kind == "int8_t" else 2 if kind == "uint16_t" else 4)
        return name


def _in_c(tensor: Tensor) -> Tensor:
    """Real numbers as float: C has no 16-bit ones."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _name(entry: str) -> str:
    """The name of a tensor as that of an array."""
    return entry.replace(".", "_")


def _at(array: str, offset: int) -> str:
    return f"{array} + {offset}" if offset else array


def _float(value: float) -> str:
    text = f"{value:.9g}"
    return (text if "." in text or "e" in text else f"{text}.0") + "f"


def _safe(line: str) -> str:
    """A line for a comment, which a name from a file can neither end nor continue."""
    return re.sub(r"[^\w.,:;+*()%'^ -]", "_", line, flags=re.ASCII)
