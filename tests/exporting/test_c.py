"""C files against torch.nn's own layers, compiled with every warning an error."""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kruify
from kruify.conversion import densify
from kruify.errors import TargetMissedError, UnsupportedError, UsageError
from kruify.exporting import export_c

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
FLAGS = shlex.split("-std=c99 -Wall -Wextra -Werror -pedantic -Wconversion -Wdouble-promotion -Wshadow -O2")


class Compiled:
    """The struct begins with h, then c, as its declaration says; nothing else of it is looked at."""

    def __init__(self, path: Path, layer: Any) -> None:
        library = path.with_suffix(".so")
        subprocess.run(["cc", *FLAGS, "-shared", "-fPIC", str(path), "-o", str(library), "-lm"], check=True)
        self.library, self.layer, self.prefix = ctypes.CDLL(str(library)), layer, path.stem
        self.step = getattr(self.library, f"{self.prefix}_step")
        self.step.restype = ctypes.POINTER(ctypes.c_float)
        size = re.search(r"RAM: ([\d,]+) bytes", path.read_text())
        assert size
        self.memory = (ctypes.c_float * (int(size[1].replace(",", "")) // 4))()

    def run(self, x: Tensor, *states: Tensor) -> Tensor:  # (time, features) -> (time, output)
        getattr(self.library, f"{self.prefix}_init")(self.memory)
        for i, value in enumerate(torch.cat([s.flatten() for s in states]).tolist() if states else []):
            self.memory[i] = value
        steps = []
        for row in x.tolist():
            h = self.step(self.memory, (ctypes.c_float * len(row))(*row))
            steps.append(h[: getattr(self.layer, "proj_size", 0) or self.layer.hidden_size])
        return torch.tensor(steps)


torch.manual_seed(0)  # some random RNNs are chaotic: a thousand steps make a millionth a hundredth
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "lstm, two layers": (nn.LSTM(5, 8, 2), "2*(4x2,2x4)", {}),
    "lstm, low rank": (nn.LSTM(6, 8), "3*(8x1,1x8)", {"input_factors": "2*(8x1,1x6)"}),
    "lstm, low rank the other way round": (nn.LSTM(6, 8), "3*(1x8,8x1)", {}),
    "lstm, stacked": (nn.LSTM(6, 8), "stacked:3*(32x1,1x8)", {"input_factors": "stacked:2*(32x1,1x6)"}),
    "lstm, stacked Kronecker": (nn.LSTM(6, 8), "stacked:2*(16x2,2x4)+sparse:5%", {}),
    "lstm, projection": (nn.LSTM(5, 8, 2, proj_size=4), "4x2,2x2+diag", {}),
    "lstm, one input, no bias": (nn.LSTM(1, 8, bias=False), "8x1,1x8", {"input_factors": "2*(8x1,1x1)"}),
    "gru, three factors": (nn.GRU(5, 8, 2), "2x2+sparse:10%", {}),
    "gru, one factor": (nn.GRU(5, 8), "8x8", {}),
    "gru, no bias": (nn.GRU(5, 8, bias=False), "8x1,1x8+diag+sparse:10%:1", {}),
    "rnn, scales apart": (nn.RNN(5, 8), "2*(4x4,2x2)+3*(8x1,1x8)+diag", {}),
    "rnn, relu": (nn.RNN(5, 8, 2, nonlinearity="relu"), "2*(1x8,8x1)", {}),
    "rnn, a column a factor": (nn.RNN(5, 8), "2*(2x1,2x8,2x1)", {}),
    "lstm, int4": (nn.LSTM(6, 8), "stacked:3*(32x1,1x8)", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_thousand_steps(tmp_path: Path, case: str) -> None:
    layer, factors, options = CASES[case]
    small = kruify.quantize(kruify.convert(layer, factors, **options)[0], "int4" if "int4" in case else "int8")
    exported = export_c(small, tmp_path / "layer.c")
    assert exported.difference < 1e-5 and exported.embedded and exported.embedded.rounding < 1e-6
    dense, compiled = densify(small), Compiled(exported.path, layer)
    x = torch.randn(1000, layer.input_size)
    sizes = (layer.proj_size or 8, 8) if isinstance(layer, nn.LSTM) else (8,)
    for states in ((), [torch.randn(layer.num_layers, 1, size) for size in sizes]):
        with torch.no_grad():
            wanted, _ = dense(x[:, None], (states[0] if len(states) == 1 else tuple(states)) if states else None)
        torch.testing.assert_close(compiled.run(x, *states), wanted[:, 0], atol=2e-5, rtol=0)


def test_layer_of_torch_is_rounded_to_eight_bits(tmp_path: Path) -> None:
    layer = nn.LSTM(6, 8)
    with torch.no_grad():
        layer.bias_hh_l0[0] = 1e5  # no float16
    exported = export_c(layer, tmp_path / "layer.c")
    x = torch.randn(50, 6)
    got = Compiled(exported.path, layer).run(x)
    weights = [p.detach().double() for p in (layer.weight_ih_l0, layer.weight_hh_l0)]
    with torch.no_grad():
        for p in (layer.weight_ih_l0, layer.weight_hh_l0):
            scale = (p.abs().amax(1, keepdim=True) / 127).bfloat16().float()
            p.copy_((p / scale).round() * scale)
    assert 0 < (weights[1] - layer.weight_hh_l0).abs().max() < 0.01
    torch.testing.assert_close(got, layer(x[:, None])[0][:, 0].detach(), atol=1e-6, rtol=0)  # biases as they are
    assert exported.embedded and 1e-4 < exported.embedded.rounding < 0.1


def test_what_int4_keeps_is_rounded_to_eight_bits(tmp_path: Path) -> None:
    small = kruify.quantize(nn.LSTM(6, 8), "int4", keep=["weight_ih_l0"])
    exported = export_c(small, tmp_path / "layer.c")
    assert exported.embedded and 1e-5 < exported.embedded.rounding < 0.01  # in four bits about 0.05


def test_cell_and_dense(tmp_path: Path) -> None:
    cell, x = nn.GRUCell(3, 4), torch.randn(9, 3)
    small = kruify.quantize(kruify.convert(cell, "2x2")[0], "int8")
    exported = export_c(small, tmp_path / "cell.c", dense=True)
    assert exported.inputs == ("input", "h_0") and "[48]" in exported.path.read_text()  # 12 x 4
    h, dense = torch.zeros(1, 4), kruify.quantize(densify(small), "int8").double()
    for step in x:
        h = dense(step[None].double(), h.double()).detach()
    torch.testing.assert_close(Compiled(exported.path, cell).run(x)[-1:].double(), h, atol=1e-5, rtol=0)


def test_flash_and_ram_are_what_the_compiler_sees(tmp_path: Path) -> None:
    small, _ = kruify.convert(nn.GRU(16, 64), "8*(64x1,1x64)+sparse:2%")
    exported = export_c(small, tmp_path / "layer.c")
    assert exported.embedded
    main = f"""#define LAYER_DECLARATIONS
    #include "layer.c"
    typedef char ram[sizeof(layer_state) == {exported.embedded.ram} ? 1 : -1];
    int main(void) {{ static layer_state s; float x[LAYER_INPUT] = {{0}}; ram r = {{0}}; layer_init(&s);
    return layer_step(&s, x) == 0 || LAYER_OUTPUT != 64 || r[0]; }}"""
    for name, compiler, flags in (("main.c", "cc", FLAGS), ("main.cpp", "c++", ["-Wall", "-Wextra", "-Werror"])):
        if shutil.which(compiler) is None:
            continue
        (tmp_path / name).write_text(main)
        objects = [str(tmp_path / file) for file in ("layer.o", "main.o", "main")]
        subprocess.run(["cc", *FLAGS, "-Os", "-c", str(exported.path), "-o", objects[0]], check=True)
        subprocess.run([compiler, *flags, "-c", str(tmp_path / name), "-o", objects[1]], check=True)
        subprocess.run([compiler, *objects[:2], "-o", objects[2], "-lm"], check=True)
        subprocess.run([objects[2]], check=True)
    arrays = re.findall(r"static const (\w+) \w+\[(\d+)\]", exported.path.read_text())
    sizes = {"int8_t": 1, "uint16_t": 2, "float": 4}
    assert exported.embedded.flash == sum(sizes[kind] * int(count) for kind, count in arrays)
    if shutil.which("size"):
        text = subprocess.run(["size", objects[0]], capture_output=True, text=True, check=True).stdout
        found = int(text.splitlines()[1].split()[0])  # code and constants
        assert exported.embedded.flash < found < exported.embedded.flash + 4096


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer.c"
    with pytest.raises(UnsupportedError, match="two directions"):
        export_c(nn.LSTM(3, 4, bidirectional=True), path)
    broken = nn.GRU(3, 4)
    nn.init.constant_(broken.bias_hh_l0, torch.nan)
    with pytest.raises(UnsupportedError, match="NaN"):
        export_c(broken, path)
    with pytest.raises(TargetMissedError):
        export_c(nn.GRU(3, 4), path, tolerance=0.0)
    monkeypatch.setenv("CC", "false")
    with pytest.raises(UnsupportedError, match="compiler false fails"):
        export_c(nn.GRU(3, 4), path)
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UnsupportedError, match="no C compiler"):
        export_c(nn.GRU(3, 4), path)
    monkeypatch.setenv("CC", "gcc '")
    with pytest.raises(UsageError, match="CC: it is no command"):
        export_c(nn.GRU(3, 4), path)
    assert not any(tmp_path.iterdir())


def test_name_needs_no_ending(tmp_path: Path) -> None:
    assert export_c(nn.GRU(3, 4), tmp_path / "layer").path.is_file()


def test_names_of_layers_and_files_cannot_leave_their_comment(tmp_path: Path) -> None:
    exported = export_c(nn.GRU(3, 4), tmp_path / "2 my-layer.c", name='a*/ int x; /* \\\n"')
    subprocess.run(["cc", *FLAGS, "-c", str(exported.path), "-o", str(tmp_path / "layer.o")], check=True)
    assert "void layer_2_my_layer_init(" in exported.path.read_text()


def test_command_line_states_flash_and_ram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from kruify.cli.main import cli

    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.RNN(3, 4)})
    torch.save(model.state_dict(), "model.pt")
    done = CliRunner().invoke(cli, ["export", "model.pt", "--to", "c", "-o", "out.c", "--json"])
    assert done.exit_code == 0, done.output
    files = json.loads(done.stdout)["outputs"]
    assert [file["output"] for file in files] == ["out.a.c", "out.b.c"]
    assert files[0]["flash"] == (16 * 3 + 16 * 4) + 4 * 3 * 16 and files[0]["ram"] == 4 * (4 + 4 + 16)
    assert files[0]["assumed"] == [] and files[1]["assumed"] == ["tanh"]
