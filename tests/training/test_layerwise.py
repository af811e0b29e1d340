"""Layer-wise training without labels: converted layers learn to give what the dense ones gave."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import kruify
import kruify.training.layerwise
from kruify.errors import CorruptError, UsageError
from kruify.training.layerwise import HELD_OUT, heal, is_held_out
from kruify.training.pieces import PIECE, Pieces, call_of, run

LOW_RANK = "3*(8x1,1x8)"


class Net(nn.Module):
    """Two recurrent layers that run in the order `second`, `first`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(8, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(torch.relu(self.second(x)[0]))[0])


def inputs(count: int = 9, time: int = 12, batch: int = 4) -> list[Tensor]:
    """Of which two directions are used: a matrix of low rank can do all that the dense one does."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(2, 8, generator=generator)
    return [torch.randn(batch, time, 2, generator=generator) @ basis for _ in range(count)]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def error(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(model(x), dense(x)) for x in batches]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_network_comes_nearer_to_the_dense_one_on_batches_never_seen(dtype: str | None) -> None:
    dense = net()
    small, _ = kruify.convert(dense, LOW_RANK, input_factors=LOW_RANK, dtype=dtype)
    unseen = inputs(12)[9:]
    before = error(small, dense, unseen)
    result = heal(small, dense, inputs(), steps=40, lr=1e-2)
    assert [layer.name for layer in result.layers] == ["second", "first"]  # as the network runs them
    assert all(layer.error_after < 0.6 * layer.error_before for layer in result.layers)
    assert error(result.model, dense, unseen) < 0.5 * before
    if dtype:  # rounded already
        again = kruify.quantize(small, dtype).state_dict()
        assert all(torch.equal(tensor, again[name]) for name, tensor in small.state_dict().items())


@pytest.mark.parametrize("kinds", range(2, 13))
def test_one_batch_in_eight_is_held_out_of_every_kind_that_comes_in_turns(kinds: int) -> None:
    numbers = [n for n in range(HELD_OUT * 8 * kinds) if is_held_out(n)]
    assert [n // HELD_OUT for n in numbers] == list(range(8 * kinds)) and numbers[0] == 1
    found = [sum(n % kinds == kind for n in numbers) for kind in range(kinds)]
    assert min(found) >= 4 and max(found) <= 14  # 8 on the average


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_what_the_dense_layer_gives_is_recorded_piece_by_piece(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(3, 4).double()
    if isinstance(layer, nn.RNNCellBase):
        x = torch.randn(5, 3).double()
        state = torch.randn(5, 4).double()
        hx = (state, state) if kind is nn.LSTMCell else state
        call, lengths = call_of(layer, (x, hx), {}), [1] * 5
        output = layer(x, hx)[0] if kind is nn.LSTMCell else layer(x, hx)
        expected = [output[i][None] for i in range(5)]
    else:
        lengths = [PIECE + 7, 2 * PIECE, 5]
        x = torch.randn(2 * PIECE, 3, 3).double()
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        call = call_of(layer, (packed,), {})
        output = pad_packed_sequence(PackedSequence(layer(packed)[0].data, packed.batch_sizes))[0]  # longest first
        lengths = sorted(lengths, reverse=True)
        ends = [(start, i, n) for start in (0, PIECE) for i, n in enumerate(lengths) if n > start]
        expected = [output[start : min(start + PIECE, n), i] for start, i, n in ends]
    pieces = Pieces(layer, tmp_path)
    pieces.record(call, call.input, held_out=False)
    assert [pieces.length(n) for n in pieces.train] == [len(e) for e in expected]
    given, target, counts = pieces.batch(pieces.train)
    for number, one in enumerate(expected):
        torch.testing.assert_close(target[: len(one), number], one, rtol=0, atol=1e-6)
        assert counts[:, number].sum() == len(one)
    again = (run(layer, given)[0] - target) * counts  # from the states that were recorded
    assert again.abs().max() < 1e-6


def test_two_directions_of_packed_sequences_and_states_of_a_projection(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, bidirectional=True, num_layers=2, proj_size=2, batch_first=True).double()
    x, lengths = torch.randn(3, 9, 3).double(), torch.tensor([4, 9, 2])
    hx = (torch.randn(4, 3, 2).double(), torch.randn(4, 3, 4).double())
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, _ = pad_packed_sequence(layer(packed, hx)[0])
    pieces = Pieces(layer, tmp_path)
    call = call_of(layer, (packed, hx), {})
    pieces.record(call, call.input, held_out=True)
    _, target, counts = pieces.batch(pieces.held_out)
    torch.testing.assert_close(target * counts, output[:, [1, 0, 2]].double(), rtol=0, atol=1e-6)  # longest first


def test_all_terms_kept_have_nothing_to_learn() -> None:
    dense = net()
    small, _ = kruify.convert(dense, "8*(8x1,1x8)")
    (second, first) = heal(small, dense, inputs(2)).layers
    assert max(second.error_after, first.error_after) < 1e-5
    assert (second.steps, first.steps) == (0, 0)


def test_a_run_goes_on_where_it_stopped_and_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = net()
    options: dict[str, Any] = {"steps": 5, "resume": tmp_path / "state"}
    runs = [kruify.convert(dense, LOW_RANK)[0] for _ in range(3)]
    whole = heal(runs[0], dense, inputs(3), steps=5)

    def stopped(done: float, total: float, phase: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(runs[1], dense, inputs(3), progress=stopped, **options)
    told: list[float] = []
    again = heal(runs[2], dense, inputs(3), progress=lambda done, total, phase: told.append(done), **options)
    assert told == [6, 7, 8, 9, 10]  # of ten steps; the first layer was finished
    assert again.layers == whole.layers
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[2].parameters(), strict=True))
    for changed, what in (({"steps": 6}, "steps"), ({"batches": inputs(4)}, "samples")):
        other = {"batches": inputs(3), **options, **changed}
        with pytest.raises(UsageError, match=rf"another run \(other {what}\)"):
            heal(kruify.convert(dense, LOW_RANK)[0], dense, **other)
    with monkeypatch.context() as patch:
        patch.setattr(kruify.training.layerwise, "is_held_out", lambda number: number % 8 == 1)  # as it was once
        with pytest.raises(UsageError, match=r"another run \(other held out\)"):
            heal(kruify.convert(dense, LOW_RANK)[0], dense, inputs(3), **options)
    state = torch.load(tmp_path / "state" / "layer-2.pt")
    torch.save({**state, "weights": {}}, tmp_path / "state" / "layer-2.pt")
    with pytest.raises(CorruptError, match=r"layer-2\.pt: the state of the training cannot be read"):
        heal(kruify.convert(dense, LOW_RANK)[0], dense, inputs(3), **options)
    with pytest.raises(UsageError, match="/proc/self: the folder cannot be written to"):
        heal(kruify.convert(dense, LOW_RANK)[0], dense, **{"batches": inputs(3), **options, "resume": "/proc/self"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda small, dense: (small, dense, inputs(1)), "no second batch"),
        (lambda small, dense: (dense, dense, inputs(2)), "no converted layer"),
        (lambda small, dense: (small, nn.Linear(2, 2), inputs(2)), "no recurrent layer"),
        (lambda small, dense: (small, dense, [*inputs(1), torch.full((4, 12, 8), math.nan)]), "with NaN"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: Any, message: str) -> None:
    dense = net()
    with pytest.raises(UsageError, match=message):
        heal(*change(kruify.convert(dense, LOW_RANK)[0], dense))
