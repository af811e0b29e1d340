"""Networks stored in fewer bits: what the file holds, what is loaded from it, and how far that is from float32."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kruify
from kruify.checkpoint import read, write_safetensors
from kruify.layers import KRU, KroneckerMatrix
from kruify.layers.storage import marks, storage_of
from kruify.training.rounding import rounded_weights

SPECS = {
    "kron": ("lstm", "2*(6x6,6x6)+diag"),
    "low rank": ("gru", "8*(36x1,1x36)"),
    "stacked": ("lstm", "stacked:8*(144x1,1x36)+sparse:5%:4"),
    "scaled": ("rnn", "6x6,6x6"),
    "sparse": ("gru", "auto+sparse:3%:1"),
    "dense": ("lstm", None),
}
LAYERS: dict[str, type[nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.rnn = LAYERS[kind](8, 36, 1, batch_first=True)
        self.out = nn.Linear(36, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embedding(tokens).mT).mT
        out: Tensor = self.out(self.rnn(x)[0])
        return out


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    kind, spec = SPECS[name]
    net = Net(kind)
    return net if spec is None else kruify.convert(net, spec)[0]


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
def test_a_file_gives_back_what_was_rounded(name: str, dtype: str, tmp_path: Path) -> None:
    net = network(name)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    small = kruify.quantize(net, dtype)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    kruify.save(small, tmp_path / "a.safetensors", seed=5)
    again = kruify.load(tmp_path / "a.safetensors", into=Net(SPECS[name][0]))
    for n, tensor in small.state_dict().items():
        assert torch.equal(again.state_dict()[n], tensor), n
    assert marks(again) == marks(small) and storage_of(again.rnn, "weight_hh_l0") == dtype
    kruify.save(again, tmp_path / "b.safetensors", seed=5)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    kruify.save(again, tmp_path / "a.pt")
    from_torch = read(tmp_path / "a.pt").tensors
    assert all(torch.equal(from_torch[n], tensor) for n, tensor in small.state_dict().items())


@pytest.mark.parametrize("name", SPECS)
def test_int8_is_within_half_a_scale(name: str, tmp_path: Path) -> None:
    net = network(name)
    kruify.save(kruify.quantize(net, "int8"), tmp_path / "a.safetensors")
    stored, decoded = tensors_of(tmp_path / "a.safetensors"), read(tmp_path / "a.safetensors").tensors
    state = net.state_dict()
    assert set(decoded) == set(state)
    for n, tensor in state.items():
        if n.startswith("rnn.bias"):
            continue
        elif n + ".scale" not in stored:
            assert torch.equal(decoded[n], tensor), n
        elif not n.endswith("overlay.values"):
            scale = stored[n + ".scale"]
            assert torch.equal(decoded[n], stored[n].float() * scale)
            assert bool(((decoded[n] - tensor).abs() <= scale / 2).all()), n
        else:
            row = state[n.replace("values", "index")][:, 0].long() // tensor.shape[1]
            assert bool(((decoded[n] - tensor).abs() <= stored[n + ".scale"][row] / 2).all())
    for n in ("embedding.weight", "conv.weight", "out.weight", "rnn.weight_ih_l0"):
        assert stored[n].dtype == torch.int8 and stored[n + ".scale"].shape == (
            len(state[n]),
            *[1] * (state[n].dim() - 1),
        )
    assert all(t.dtype != torch.int8 for n, t in stored.items() if "bias" in n or "diagonal" in n)


@pytest.mark.parametrize(
    "layer", [nn.LSTM(3, 4, 2, bidirectional=True), nn.RNNCell(3, 4), nn.GRU(3, 4), nn.GRUCell(3, 4)]
)
def test_biases_that_are_only_added_are_one(layer: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        for n, p in layer.named_parameters():
            if "bias" in n:
                p[-1] = p[0] = -1e-9  # -0 in float16
    small, state = kruify.quantize(layer, "int8"), layer.state_dict()
    kruify.save(small, tmp_path / "a.safetensors")
    stored, decoded = tensors_of(tmp_path / "a.safetensors"), read(tmp_path / "a.safetensors").tensors
    apart = 4 if "GRU" in type(layer).__name__ else 0
    for first in [n for n in state if n.startswith("bias_ih")]:
        second = first.replace("ih", "hh")
        inside = len(state[first]) - apart
        b_hh = torch.cat([torch.zeros(inside), state[second][inside:].half().float()])
        b_ih = (state[first] + torch.cat([state[second][:inside], torch.zeros(apart)])).half().float()
        for found in (decoded, small.state_dict()):
            assert torch.equal(found[first], b_ih) and torch.equal(found[second], b_hh)
        assert stored[first].dtype == torch.float16 and (
            stored[second].shape == (4,) if apart else second not in stored
        )
    kruify.verify(tmp_path / "a.safetensors")
    again = kruify.load(tmp_path / "a.safetensors")[""]
    kruify.save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def one_bias(net: nn.ModuleDict) -> None:
    net["a"].bias_hh_l0 = net["a"].bias_ih_l0


def another_partner(net: nn.ModuleDict) -> None:
    net["a"].bias_hh_l0 = net["b"].bias_hh_l0


def crosswise(net: nn.ModuleDict) -> None:
    net["a"].bias_hh_l0, net["a"].bias_ih_l0 = net["b"].bias_ih_l0, net["b"].bias_hh_l0


def both(net: nn.ModuleDict) -> None:
    net["a"].bias_hh_l0, net["a"].bias_ih_l0 = net["b"].bias_hh_l0, net["b"].bias_ih_l0


@pytest.mark.parametrize(
    ("tie", "keep", "summed"),
    [
        (one_bias, [], "b"),
        (another_partner, [], ""),
        (crosswise, [], ""),
        (both, [], "ab"),
        (both, ["a.bias_ih_l0"], ""),
        (lambda net: None, ["a.bias_ih_l0"], "b"),
    ],
)
def test_biases_that_are_shared_otherwise_stay_two(
    tie: Callable[[nn.ModuleDict], None], keep: list[str], summed: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(3, 4)})
    tie(net)
    x = torch.randn(5, 2, 3)
    wanted = {name: net[name](x)[0] for name in net}
    torch.save(net.state_dict(), tmp_path / "dense.pt")
    kruify.convert(tmp_path / "dense.pt", "dense", dtype="int8", keep=keep, output=tmp_path / "small.safetensors")
    found = read(tmp_path / "small.safetensors")
    assert {n for n, how in found.storage.items() if how == "sum"} == {f"{name}.bias_hh_l0" for name in summed}
    back = kruify.load(tmp_path / "small.safetensors", into=net)
    for name in net:
        torch.testing.assert_close(back[name](x)[0], wanted[name], rtol=0.02, atol=0.02)


def test_computed_weights_are_rounded_when_they_are_written(tmp_path: Path) -> None:
    """In memory and in training they stay what they are computed from; a norm of zero is no NaN."""
    net = nn.ModuleDict({"rnn": nn.LSTM(3, 4)})
    for name in ("weight_ih_l0", "bias_hh_l0"):
        parametrizations.weight_norm(net["rnn"], name)
    x = torch.randn(5, 2, 3)
    wanted = net["rnn"](x)[0]
    small = kruify.quantize(net, "int8")
    with rounded_weights(small):
        torch.testing.assert_close(small["rnn"](x)[0], wanted, rtol=0.02, atol=0.02)
    kruify.save(small, tmp_path / "a.safetensors")
    back = kruify.load(tmp_path / "a.safetensors", into=net)
    torch.testing.assert_close(back["rnn"](x)[0], wanted, rtol=0.02, atol=0.02)


def test_rows_of_factors(tmp_path: Path) -> None:
    shapes = {}
    for name in ("kron", "low rank", "stacked"):
        kruify.save(kruify.quantize(network(name), "int8"), tmp_path / "a.safetensors")
        shapes[name] = {
            n.removeprefix("rnn.weight_hh_l0."): tuple(t.shape)
            for n, t in tensors_of(tmp_path / "a.safetensors").items()
            if n.startswith("rnn.weight_hh_l0.") and n.endswith(".scale")
        }
    first, second = "terms.0.factors.0.scale", "terms.0.factors.1.scale"
    assert shapes["kron"] == {first: (4, 2, 6, 1), second: (4, 2, 6, 1)}
    assert shapes["low rank"] == {first: (3, 8, 1, 1), second: (3, 8, 1, 1)}  # one a term of U and of V
    assert shapes["stacked"] == {first: (1, 8, 1, 1), second: (1, 8, 1, 1), "overlay.values.scale": (36, 1)}


def test_dense_layers_become_kruifys_and_compute_the_same(tmp_path: Path) -> None:
    net = network("dense")
    small = kruify.quantize(net, "int8")
    assert isinstance(small.rnn, kruify.KRULSTM)
    kruify.save(small, tmp_path / "a.safetensors")
    layers = kruify.load(tmp_path / "a.safetensors")
    assert isinstance(layers["rnn"], kruify.KRULSTM) and storage_of(layers["rnn"], "weight_ih_l0") == "int8"
    x = torch.randn(4, 3, 8)
    reference = nn.LSTM(8, 36, batch_first=True)
    reference.load_state_dict({n: small.state_dict()[f"rnn.{n}"] for n in reference.state_dict()})
    torch.testing.assert_close(layers["rnn"](x)[0], reference(x)[0], rtol=1e-4, atol=1e-5)
    assert [check.name for check in kruify.verify(tmp_path / "a.safetensors")][-1] == "layer rnn"
    assert [item.layer.name for item in kruify.inspect(tmp_path / "a.safetensors").summaries] == ["rnn"]


def test_keep(tmp_path: Path) -> None:
    small = kruify.quantize(network("kron"), "int8", keep=["embedding", "*.weight_ih_l0", "*.bias_ih_l0"])
    assert sorted(marks(small)) == ["conv.weight", "out.weight", "rnn.bias_hh_l0", "rnn.weight_hh_l0"]
    with pytest.raises(kruify.KruifyError, match="matches no weight"):
        kruify.quantize(network("kron"), "int8", keep=["encoder"])
    with pytest.raises(kruify.KruifyError, match="int3"):
        kruify.quantize(network("kron"), "int3")


@pytest.mark.parametrize("name", ["tokens.weight", "out"])
def test_what_is_kept_under_one_name_is_kept_under_all(name: str, tmp_path: Path) -> None:
    net = nn.ModuleDict({"tokens": nn.Embedding(5, 8), "rnn": nn.GRU(8, 8), "out": nn.Linear(8, 5)})
    net["out"].weight = net["tokens"].weight
    torch.save(net.state_dict(), tmp_path / "a.pt")
    kruify.convert(tmp_path / "a.pt", "dense", dtype="int4", keep=[name], output=tmp_path / "b.safetensors")
    kruify.save(kruify.quantize(net, "int4", keep=[name]), tmp_path / "c.safetensors")
    for file in ("b.safetensors", "c.safetensors"):
        assert len([n for n in tensors_of(tmp_path / file) if n in ("tokens.weight", "out.weight")]) == 1
        back = kruify.load(tmp_path / file, into=copy.deepcopy(net))
        assert torch.equal(back["tokens"].weight, net["tokens"].weight)


@pytest.mark.parametrize("owner", ["", "net"])
def test_what_a_subclass_of_a_layer_has_beside_is_not_the_layers(owner: str, tmp_path: Path) -> None:
    class Tagger(nn.LSTM):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.out, self.table = nn.Linear(8, 6), nn.Parameter(torch.randn(2, 4))

    net = nn.ModuleDict({owner: Tagger()}) if owner else Tagger()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    kruify.convert(tmp_path / "a.pt", "2x2", dtype="int4", output=tmp_path / "b.safetensors")
    kruify.verify(tmp_path / "b.safetensors")
    layer = kruify.load(tmp_path / "b.safetensors")[owner]
    assert marks(layer)["weight_hh_l0"] == marks(layer)["weight_ih_l0"] == "int4"
    kruify.save(layer, tmp_path / "c.safetensors")
    kruify.verify(tmp_path / "c.safetensors")


def test_float32_takes_the_marks_off(tmp_path: Path) -> None:
    small = kruify.quantize(kruify.quantize(network("kron"), "int8"), "float32")
    assert not marks(small)
    kruify.save(small, tmp_path / "a.safetensors")
    assert "kruify.storage" not in read(tmp_path / "a.safetensors").metadata


def test_complex_numbers_stay(tmp_path: Path) -> None:
    net = nn.ModuleDict({"kru": KRU(4, 8, factors="2x2"), "out": nn.Linear(16, 3)})
    kruify.save(kruify.quantize(net, "int8"), tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").storage == {"out.weight": "int8"}


@pytest.mark.parametrize("change", [lambda net: net, nn.Module.half])
def test_how_weights_are_stored_is_said_only_where_dtypes_do_not_tell_it(
    change: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    net = network("sparse")
    small, narrow = kruify.quantize(net, "int8", keep=["embedding"]), kruify.quantize(net, "bfloat16")
    half = change(net)
    half.register_buffer("steps", torch.ones(2, 2, dtype=torch.int8))
    for model, said in ((small, False), (narrow, False), (half, True)):
        kruify.save(model, tmp_path / "a.safetensors")
        found = read(tmp_path / "a.safetensors")
        assert found.storage == marks(model) and ("kruify.storage" in found.metadata) == said
        assert all(found.tensors[n].dtype == t.dtype for n, t in model.state_dict().items())


@pytest.mark.parametrize(("dtype", "value"), [("int8", float("inf")), ("float16", 1e6)])
def test_numbers_without_a_form_are_refused(dtype: str, value: float) -> None:
    net = network("kron")
    with torch.no_grad():
        net.out.weight[0, 0] = value
    with pytest.raises(kruify.KruifyError, match=r"out\.weight"):
        kruify.quantize(net, dtype)


def test_marks_follow_copies_and_moves() -> None:
    small = kruify.quantize(network("kron"), "int8")
    for same in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), small.double().float()):
        assert marks(same) == marks(small)
    matrix = small.rnn.weight_hh_l0
    assert isinstance(matrix, KroneckerMatrix) and matrix.storage == "int8"


Damage = Callable[[dict[str, Tensor]], object]
U = "rnn.weight_hh_l0.terms.0.factors.0"
DAMAGES: dict[str, Damage] = {
    "scale missing": lambda t: t.pop("out.weight.scale"),
    "scale of a factor missing": lambda t: t.pop(f"{U}.scale"),
    "nan": lambda t: t["out.weight.scale"].fill_(float("nan")),
    "infinite": lambda t: t[f"{U}.scale"][0].fill_(float("inf")),
    "negative": lambda t: t["out.weight.scale"].neg_(),
    "zero": lambda t: t["out.weight.scale"].zero_(),
    "overflow": lambda t: t["out.weight.scale"].fill_(3e38),
    "shape": lambda t: t.__setitem__("out.weight.scale", t["out.weight.scale"][:-1].clone()),
    "dims": lambda t: t.__setitem__("out.weight.scale", t["out.weight.scale"][:, 0].clone()),
    "scale dtype": lambda t: t.__setitem__("out.weight.scale", t["out.weight.scale"].double()),
    "minus 128": lambda t: t["out.weight"].fill_(-128),
    "float where int8 is said": lambda t: t.__setitem__("out.weight", t["out.weight"].float()),
    "sum of a bias missing": lambda t: t.pop("rnn.bias_ih_l0"),
    "bias beside its sum": lambda t: t.__setitem__("rnn.bias_hh_l0", t["rnn.bias_ih_l0"].clone()),
    "weight missing": lambda t: (t.pop("out.weight"), t.pop("out.weight.scale")),
    "counts do not add up": lambda t: t["rnn.weight_hh_l0.overlay.counts"].view(torch.int16)[0].add_(1),
    "columns missing": lambda t: t.pop("rnn.weight_hh_l0.overlay.columns"),
    "column outside": lambda t: t["rnn.weight_hh_l0.overlay.columns"].view(torch.int16)[-1].fill_(-1),
    "too many columns": lambda t: t.__setitem__(
        "rnn.weight_hh_l0.overlay.columns", torch.zeros(500, dtype=torch.uint16)
    ),
    "index dtype": lambda t: t.__setitem__(
        "rnn.weight_hh_l0.overlay.columns", t["rnn.weight_hh_l0.overlay.columns"].long()
    ),
    "one row too many": lambda t: t.update(
        {
            "rnn.weight_hh_l0.overlay.counts": torch.cat(
                [t["rnn.weight_hh_l0.overlay.counts"].long(), torch.zeros(1, dtype=torch.long)]
            ).to(torch.uint16)
        }
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = tmp_path_factory.mktemp("storing") / "a.safetensors"
    kruify.save(kruify.quantize(network("stacked"), "int8"), path)
    kruify.verify(path)
    checkpoint = read(path)
    return tensors_of(path), {**checkpoint.metadata, "kruify.storage": json.dumps(checkpoint.storage)}


@pytest.mark.parametrize("how", DAMAGES)
def test_verify_refuses_damage(how: str, good: tuple[dict[str, Tensor], dict[str, str]], tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in good[0].items()}
    DAMAGES[how](tensors)
    write_safetensors(tmp_path / "b.safetensors", tensors, good[1])
    with pytest.raises(kruify.KruifyError) as caught:
        kruify.verify(tmp_path / "b.safetensors")
    assert caught.value.exit_code == 4
