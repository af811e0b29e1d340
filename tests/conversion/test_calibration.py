from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from kruify.conversion.calibration import Moments, bias_correction, calibrate
from kruify.errors import TaskError


class Fixed:
    def __init__(self, run, batches=2):
        self.run, self.count = run, batches

    def batches(self, split, *, seed=0):
        yield from range(self.count)

    def forward(self, model, batch):
        return self.run(model, batch)


def oracle(cell, x, state):
    """States before each step of one sequence (time, features), step by step with a torch cell."""
    states = []
    for step in x:
        states.append(state[0] if isinstance(state, tuple) else state)
        state = cell(step[None], state)
    return torch.cat(states), state


def cell_of(rnn, suffix, input_size):
    kind = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN_TANH": nn.RNNCell}[rnn.mode]
    cell = kind(input_size, rnn.hidden_size).double()
    for stem in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(cell, stem).data.copy_(getattr(rnn, f"{stem}_{suffix}"))
    return cell


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_moments_of_two_bidirectional_layers_on_packed_input_equal_a_loop_over_cells(kind):
    torch.manual_seed(0)
    rnn = kind(3, 4, num_layers=2, bidirectional=True, dropout=0.5).double().train()
    lengths, data = [2, 5, 3], torch.randn(5, 3, 3, dtype=torch.float64)
    packed = pack_padded_sequence(data, lengths, enforce_sorted=False)
    h0 = torch.randn(4, 3, 4, dtype=torch.float64)
    state = (h0, torch.randn_like(h0)) if kind is nn.LSTM else h0
    found = calibrate(rnn, Fixed(lambda m, b: m(packed, state)[0].data, batches=1))
    assert rnn.training
    inputs = [data[:n, b] for b, n in enumerate(lengths)]
    with torch.no_grad():
        for layer in range(2):
            outputs = [[], []]
            for direction, suffix in enumerate((f"l{layer}", f"l{layer}_reverse")):
                cell, seen = cell_of(rnn, suffix, inputs[0].shape[1]), []
                for b, x in enumerate(inputs):
                    place = 2 * layer + direction
                    start = tuple(s[place, b][None] for s in state) if kind is nn.LSTM else state[place, b][None]
                    before, last = oracle(cell, x.flip(0) if direction else x, start)
                    seen.append(before)
                    out = torch.cat([before[1:], last[0] if kind is nn.LSTM else last])
                    outputs[direction].append(out.flip(0) if direction else out)
                h, x = torch.cat(seen), torch.cat(inputs)
                for weight, vectors in ((f"weight_hh_{suffix}", h), (f"weight_ih_{suffix}", x)):
                    moments = found[weight]
                    assert moments.count == sum(lengths)
                    torch.testing.assert_close(moments.mean, vectors.mean(0))
                    torch.testing.assert_close(moments.second, vectors.T @ vectors / len(vectors))
                    torch.testing.assert_close(moments.covariance, vectors.T.cov(correction=0))
            inputs = [torch.cat(pair, dim=-1) for pair in zip(*outputs, strict=True)]


@pytest.mark.parametrize("batch_first", [False, True])
def test_padded_and_unbatched_input_and_projection(batch_first):
    torch.manual_seed(0)
    rnn = nn.LSTM(3, 4, proj_size=2, batch_first=batch_first).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    batched = calibrate(rnn, Fixed(lambda m, b: m(x[None] if batch_first else x[:, None])[0], batches=1))
    single = calibrate(rnn, Fixed(lambda m, b: m(input=x)[0], batches=1))
    out = rnn(x)[0].detach()
    wanted = torch.cat([torch.zeros(1, 2, dtype=torch.float64), out[:-1]])
    for found in (batched, single):
        torch.testing.assert_close(found["weight_hh_l0"].second, wanted.T @ wanted / 5)
        assert found["weight_ih_l0"].count == 5


def test_cells_inside_a_model_are_seen_at_every_call():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.lstm, self.idle = nn.GRUCell(3, 4), nn.LSTMCell(4, 2), nn.GRU(2, 2)

        def forward(self, x):
            h, s = None, None
            for step in x:
                h = self.cell(step, h)
                s = self.lstm(h, s)
            return s[0]

    net, x = Net(), torch.randn(3, 6, 3)
    found = calibrate(net, Fixed(lambda m, b: m(x), batches=3), batches=2)
    assert sorted(found) == ["cell.weight_hh", "cell.weight_ih", "lstm.weight_hh", "lstm.weight_ih"]
    assert found["cell.weight_hh"].count == 2 * 3 * 6
    torch.testing.assert_close(found["cell.weight_ih"].mean, x.reshape(-1, 3).double().mean(0))


def test_the_corrected_bias_leaves_no_mean_error_inside_the_gates():
    torch.manual_seed(0)
    w, k, h = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.randn(50, 4).double()
    moments = Moments.empty(4)
    moments.add(h)
    error = h @ w.T - (h @ k.T + bias_correction(w, k, moments.mean))
    torch.testing.assert_close(error.mean(0), torch.zeros(6).double(), atol=1e-12, rtol=0)


def test_what_cannot_be_calibrated_is_named():
    with pytest.raises(TaskError, match="no batch"):
        calibrate(nn.GRU(2, 2), Fixed(None, batches=0))
    with pytest.raises(TaskError, match="NaN"):
        calibrate(nn.GRU(2, 2), Fixed(lambda m, b: m(torch.full((3, 1, 2), float("nan")))[0]))


@pytest.mark.parametrize("spread", [0, 1e-8])
def test_the_covariance_of_vectors_that_are_all_but_alike_is_positive_definite(spread):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        vector = 1e4 * torch.randn(24, generator=generator, dtype=torch.float64)
        moments = Moments.empty(24)
        moments.add(vector * (1 + spread * torch.randn(96, 24, generator=generator, dtype=torch.float64)))
        torch.linalg.cholesky(moments.covariance)


def test_a_linear_layer_that_meets_nan_in_padding_is_left_out():
    model = nn.ModuleDict({"rnn": nn.GRU(2, 2), "fc": nn.Linear(2, 2)})

    def forward(m, _):
        hidden = m["rnn"](torch.ones(3, 1, 2))[0]
        return m["fc"](torch.cat([hidden, torch.full_like(hidden, float("nan"))]))

    found = calibrate(model, Fixed(forward), beside=["fc"])
    assert found.keys() == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
