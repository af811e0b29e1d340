"""Throws damaged arguments at every compiled operator. An operator may refuse them; it may not crash.

Under AddressSanitizer:

    export KRUIFY_CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer -O1"
    python setup.py build_ext --inplace --build-temp build/asan
    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
    ASAN_OPTIONS=detect_leaks=0 python tests/ops/ops_fuzz.py 1500      (KRUIFY_ISA=avx2 and portable for the others)
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import Any

import torch
from ops_cases import BATCHES, GATES, MATRICES, recurrence_arguments
from torch import Tensor

Randomness = random.Random


def damage(value: Any, rng: Randomness) -> Any:
    """One argument, changed in a way that its type still allows."""
    if isinstance(value, Tensor):
        return _damaged_tensor(value.detach(), rng)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        copy = list(value)
        place = rng.randrange(len(copy))
        if rng.random() < 0.3:
            del copy[place]
        else:
            copy[place] = _damaged_tensor(copy[place].detach(), rng)
        return copy
    if isinstance(value, list) and value:
        copy = list(value)
        place = rng.randrange(len(copy))
        if rng.random() < 0.2:
            return copy[:place]
        copy[place] = rng.choice([-1, 0, 1, 2, 3, copy[place] + 1, 2**31, 2**62, -(2**63)])
        return copy
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return rng.choice([*GATES, "", "x" * 1000])
    return value


def _damaged_tensor(t: Tensor, rng: Randomness) -> Tensor:
    choice = rng.randrange(9)
    if choice == 0:
        return t.reshape(-1)
    if choice == 1:
        return t[:0] if t.dim() else t
    if choice == 2:
        return t.unsqueeze(0)
    if choice == 3:
        return t.to(rng.choice([torch.float16, torch.float32, torch.float64, torch.int64, torch.int32]))
    if choice == 4 and t.dim() > 1:
        return t.transpose(0, 1)
    if choice == 5 and t.dim():
        return t[..., : max(0, t.shape[-1] - 1)]
    if choice == 6 and t.dim():
        return torch.cat([t, t[:1]])
    if choice == 7 and not t.is_floating_point() and t.numel():
        t = t.clone()
        t.view(-1)[rng.randrange(t.numel())] = rng.choice(
            [-1, 7] if t.dtype == torch.int8 else [-1, 2**30, 7, -(2**31)]
        )
        return t
    return torch.zeros((), dtype=t.dtype).expand(t.shape)  # strides of 0


def calls(rng: Randomness) -> tuple[str, list[Any]]:
    kind, matrix = rng.choice(list(GATES)), rng.choice([m for m in MATRICES if m != "257"])
    dtype = rng.choice([torch.float32, torch.float64])
    arguments = recurrence_arguments(
        kind, matrix, rng.choice(BATCHES), rng.random() < 0.5, dtype, rng.random() < 0.5, rng.random() < 0.5
    )
    arguments = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    matrix_arguments = arguments[6:12]
    matrix_arguments[0] = [s.detach() for s in matrix_arguments[0]]
    arguments[6] = matrix_arguments[0]
    gates, hidden = matrix_arguments[-1][0], matrix_arguments[-1][1]
    x = torch.randn(rng.randrange(4), hidden, dtype=dtype)
    name = rng.choice(
        [
            *("recurrence", "recurrence_backward", "layer_backward", "kron_matmul", "kron_matmul_backward"),
            *("dense", "merge", "int8_pack", "int8_linear", "int8_recurrence", "fingerprint"),
        ]
    )
    if name == "recurrence":
        return "recurrence_forward", arguments
    if name in ("recurrence_backward", "layer_backward"):
        out, h, c, workspace = torch.ops.kruify.recurrence_forward(*arguments)
        grads, rest = [torch.randn_like(out), h, c if kind == "lstm" else None], [out, workspace, *arguments[3:-1]]
        if name == "recurrence_backward":
            return name, [*grads, *rest]
        return name, [*grads, *arguments[:2], *rest, *(rng.random() < 0.7 for _ in range(3))]
    if name == "kron_matmul":
        return "kron_matmul_forward", [x, *matrix_arguments]
    if name == "kron_matmul_backward":
        return name, [torch.randn(x.shape[0], gates * hidden, dtype=dtype), x, *matrix_arguments]
    if name == "dense":
        weights = [*matrix_arguments[:4], matrix_arguments[-1]]
        if rng.random() < 0.5:
            return "dense", weights
        return "dense_backward", [torch.randn(gates * hidden, hidden, dtype=dtype), *weights]
    if name.startswith("int8") or name == "fingerprint":
        return name, _int8_arguments(name, kind, arguments, rng)
    factors = [torch.randn(2, 3, rng.randint(1, 4), rng.randint(1, 4), dtype=dtype) for _ in range(3)]
    scale = torch.randn(2, 3, dtype=dtype) if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        return "merge", [factors, scale, [2, 1]]
    grads = torch.ops.kruify.merge(factors, scale, [2, 1])
    return "merge_backward", [grads, factors, scale, [2, 1]]


def _int8_arguments(name: str, kind: str, arguments: list[Any], rng: Randomness) -> list[Any]:
    x, _, bias_ih, sizes, h0, c0, _, diagonal, residual, index, bias, layout = (
        a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments[:12]
    )
    gates, hidden, columns = layout[0], layout[1], rng.randint(1, 9)

    def weights(cols: int) -> list[Any]:
        rank = rng.choice([0, 5])
        spans = [0, rank or cols] * gates
        first = torch.randn(rank, cols) if rank else None
        return [first, torch.randn(gates * hidden, rank or cols), [gates, hidden, cols, rank, *spans]]

    recurrent, inputs = weights(hidden), weights(columns)
    if name == "int8_pack":
        return recurrent
    if name == "fingerprint":
        return [[recurrent[1], inputs[1]]]
    packed, packed_input = ([torch.ops.kruify.int8_pack(*w), w[2]] for w in (recurrent, inputs))
    if name == "int8_linear":
        return [torch.randn(rng.randrange(60), columns), *packed_input]
    x = torch.randn(len(x), columns)
    rest = [
        diagonal,
        residual,
        index,
        bias,
        [gates, hidden, hidden, *([1, gates - 1] if diagonal is not None else [0]), 0],
    ]
    if rng.random() < 0.3:  # whole sequences
        x, sizes, h0 = torch.randn(rng.randrange(4), len(h0), columns), None, rng.choice([h0, h0[None]])
    return [x, *packed_input, residual, index, bias_ih, sizes, h0, c0, *packed, [], *rest, kind, rng.random() < 0.5]


def fuzz(seed: int, rounds: int) -> Counter[str]:
    """Counts of calls that ran and that were refused."""
    rng, counts = random.Random(seed), Counter[str]()
    torch.manual_seed(seed)
    for _ in range(rounds):
        name, arguments = calls(rng)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            place = rng.randrange(len(arguments))
            arguments[place] = damage(arguments[place], rng)
        try:
            getattr(torch.ops.kruify, name)(*arguments)
            counts["ran"] += 1
        except (RuntimeError, NotImplementedError, MemoryError):
            counts["refused"] += 1
    return counts


if __name__ == "__main__":
    print(dict(fuzz(seed=1, rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 1000)))
