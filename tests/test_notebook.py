"""What a notebook shows, in IPython's own shell where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import kruify
from kruify.notebook import html_table
from kruify.search.trade_off import Point, Sweep


@pytest.fixture
def shell() -> Iterator[object]:
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    yield interactive.InteractiveShell.instance()
    interactive.InteractiveShell.clear_instance()


def test_a_table_is_plain_text_between_tags() -> None:
    assert html_table(["a"], [["<b>"]], "c & d") == (
        "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table><p>c &amp; d</p>"
    )


def test_conversion_has_a_row_a_gate_and_its_sums() -> None:
    _, conversion = kruify.convert(nn.GRU(4, 8), "4x2,2x4")
    html = conversion._repr_html_()
    assert html.count("<tr>") == 4 and "<td>weight_hh_l0</td><td>z</td><td>8x8</td><td>4x2,2x4</td><td>64</td>" in html
    assert "<p>Recurrent matrices: 192 → 48 parameters, 4.0 times smaller</p>" in html and "Weights: " in html
    dry = kruify.convert(nn.GRU(4, 8), "2x2", dry_run=True)[1]
    assert "<td></td></tr>" in dry._repr_html_()  # no energy


def test_sweep_marks_its_knee() -> None:
    points = [Point(budget, None, size, size, {"loss": 0.5}, size) for budget, size in (("dense", 2000), ("8x", 250))]
    html = Sweep(
        points, "loss", False, "test", 1, int8=Point("int8", None, 2000, 2000, {"loss": 0.6}, 500)
    )._repr_html_()
    assert "<td>8x (knee)</td><td>250</td>" in html and "<td>dense</td><td>2,000</td>" in html
    assert html.index("dense") < html.index("int8") < html.index("knee")


def test_report_is_a_page_in_a_frame(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.save(nn.GRU(4, 8).state_dict(), tmp_path / "a<b.pt")
    html = kruify.report(tmp_path / "a<b.pt", latency_seconds=0.0)._repr_html_()
    assert html and html.startswith('<iframe srcdoc="&lt;!doctype html&gt;') and "a&amp;lt;b" in html
    assert "<" not in html[len("<iframe") :].removesuffix("></iframe>")


def test_progress_without_a_notebook_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    kruify.convert(nn.GRU(4, 8), "2x2", progress=kruify.live_progress())
    assert capfd.readouterr() == ("", "")


def test_progress_is_one_bar_that_moves(shell: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.utils.capture import capture_output

    monkeypatch.setattr("kruify.notebook.SECONDS", 0.0)
    with capture_output() as shown:
        kruify.convert(nn.GRU(4, 8, 2), "2x2", progress=kruify.live_progress())
    first, *others = shown.outputs
    assert others and all(output.update for output in others) and not first.update
    bars = [output.data["text/html"] for output in shown.outputs]
    assert all(bar.startswith("<progress value=") for bar in bars) and len(set(bars)) == len(bars)
