"""The HTML page and the Markdown: complete, self-contained, and safe whatever the names in them."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from kruify.analysis.counts import ParameterCounts
from kruify.analysis.matrices import MatrixHealth
from kruify.reporting import ModelReport, Report, tables, to_card, to_html, to_markdown
from kruify.reporting.pictures import compact, short, tradeoff
from kruify.reporting.report import LatencySetup
from kruify.reporting.rows import (
    comparison,
    latency_note,
    plan,
    quarters,
    size,
    sparkline,
    sparkline_of_spectrum,
    summary,
    times,
    title,
    validations,
)

HOSTILE = '<script>alert("x")</script>|&'


def make_model(name: str, recurrent: int, milliseconds: float, wer: float, factors: str = "dense") -> ModelReport:
    gates = [
        MatrixHealth("rnn.weight_hh_l0", gate, 12.0, 1.5, 0.3, factors, recurrent // 3, 4096, (1.5, 1.0, 0.125))
        for gate in "rzn"
    ]
    return ModelReport(
        name=name,
        file=f"{name}.safetensors",
        parameters=ParameterCounts(recurrent, 5000, 1000, recurrent + 6000),
        bytes=4 * recurrent + 24400,
        weight_bytes=4 * recurrent + 24000,
        multiply_adds_per_step=recurrent,
        latency_ms={1: milliseconds, 32: 10 * milliseconds},
        metrics={"wer": wer},
        recurrent_matrices=[replace(g, energy=0.25, energy_null=0.125) if factors != "dense" else g for g in gates],
        sha256="ab" * 32,
        sources=[] if factors == "dense" else ["cd" * 32],
        latency_p95_ms={1: 1.2 * milliseconds, 32: 12 * milliseconds},
        memory_bytes=4 * recurrent,
        peak_memory_bytes={1: 100, 32: 3200},
        history=[{"epoch": e, "loss": 1.0 / (e + 1), "metrics": {"wer": 0.5 / (e + 1)}} for e in range(3)],
        made={"kruify": "0.1.0", "fine-tuning": '{"epochs": 2.0}'},
    )


@pytest.fixture
def report() -> Report:
    return Report(
        [make_model("dense", 12288, 4.0, 0.3), make_model("small", 768, 1.0, 0.34, "2*(8x8,8x8)")],
        LatencySetup(64, 1, "a machine"),
        task="g2p",
        split="test",
        examples=1500,
        metric="wer",
    )


class Structure(HTMLParser):
    """Checks that tags nest; keeps ids and the text."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Structure:
    parser = Structure()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_page_says_everything(report: Report) -> None:
    page = parse(to_html(report))
    for words in (
        "16.0x smaller", "2.7x smaller", "4.0x faster", "Recurrent matrices alone, small: 16.0x smaller.", "+0.040",
        "a machine", "1,500 examples", "p95", "Peak memory, batch 32", "0.250 (0.125)", "2*(8x8,8x8)",
        "cd" * 8, "ab" * 32, "epochs 2.0", "rnn.weight_hh_l0 (r, z, n): 2*(8x8,8x8)", "Training: wer",
        "Accuracy against size",
    ):  # fmt: skip
        assert words in page.text, words


def test_page_loads_nothing_and_repeats_its_bytes(report: Report) -> None:
    page = to_html(report)
    assert not re.search(r"https?:|<script|<link|<img|@import|url\((?!#)", page)
    assert page == to_html(report)


def test_pictures_take_the_colours_of_the_page(report: Report) -> None:
    page = to_html(report)
    assert page.count("<svg") == 6 and "prefers-color-scheme: dark" in page
    assert "#0a0b0" not in page and "#0a0c0" not in page
    used = set(re.findall(r"var\(--(\w+)\)", page))
    assert used <= set(re.findall(r"--(\w+):", page))
    # A picture may define what another defines too, but then it is the same thing under the same name.
    definitions = re.findall(r'<(?:clipPath|path) id="(\w+)"(.*?)(?:</clipPath>|/>)', page, re.DOTALL)
    assert all(len({body for name, body in definitions if name == wanted}) == 1 for wanted, _ in definitions)


def test_names_cannot_break_out(report: Report) -> None:
    hostile = replace(report, task=HOSTILE, models=[replace(m, name=m.name + HOSTILE) for m in report.models])
    page = to_html(hostile)
    assert "<script" not in page and "alert" in parse(page).text
    table = next(line for line in to_markdown(hostile).splitlines() if line.startswith("| Recurrent parameters"))
    assert len(re.findall(r"(?<!\\)\|", table)) == 4


def test_page_without_task_history_or_details(report: Report) -> None:
    models = [
        replace(m, metrics={}, history=[], made={}, peak_memory_bytes={}, latency_p95_ms={}) for m in report.models
    ]
    page = to_html(Report(models, report.latency))
    assert page.count("<svg") == 3 and "No task was named" in parse(page).text


def test_markdown_has_the_same_figures(report: Report) -> None:
    text = to_markdown(report)
    assert "| Recurrent parameters | 12,288 | 768 (16.0x smaller) |" in text
    assert "| wer, test split | 0.3000 | 0.3400 (+0.040) |" in text
    assert "| small | `rnn.weight_hh_l0` | r | `2*(8x8,8x8)` | 256 | 0.250 (0.125) |" in text
    columns = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert set(columns) == {4, 11}  # summary, comparison and training, gates


def test_every_form_says_everything(report: Report) -> None:
    """Terminal and Markdown have what the page has, curves and spectra as blocks or numbers."""
    console = Console(file=io.StringIO(), width=110)
    for part in tables(report, details=True):
        console.print(part)
    terminal = console.file.getvalue()  # type: ignore[attr-defined]
    told = [
        "16.0x", "0.3400 (+0.040)", "a machine", "1,500 examples", "p95", "Peak memory, batch 32", "Tensors in memory",
        "Multiply-adds per step", "0.250", "(0.125)", "2*(8x8,8x8)", "cd" * 8, "ab" * 32, "epochs 2.0", "training",
        "rnn.weight_hh_l0",
    ]  # fmt: skip
    for words in told:
        assert words in terminal, words
        assert words in to_markdown(report), words
    assert "██▅" in terminal  # 1.5, 1.0, 0.125 on three decades
    assert "1.5, 1.5, 1, 0.12, 0.12" in to_markdown(report)
    assert "| 2 | 0.333 | 0.167 |" in to_markdown(report)


def test_conditioning_of_the_training_is_in_every_form(report: Report) -> None:
    matrix = {"name": "m", "gate": "r", "condition_number": 7.5, "spectral_norm": 1.0, "unitarity_defect": 0.5}
    told = {"conditioning": {"matrices": [matrix, {**matrix, "condition_number": 3.0}]}}
    model = replace(report.models[1], history=[{**entry, **told} for entry in report.models[1].history])
    names = dict(validations(model))
    assert names["largest condition number"] == [7.5] * 3
    changed = replace(report, models=[report.models[0], model])
    assert "largest condition number" in to_markdown(changed)
    assert "Training: condition number" in to_html(changed)


def test_matrices_and_gates_with_the_same_factors_share_a_line(report: Report) -> None:
    gates = report.models[1].recurrent_matrices
    others = [replace(g, name="rnn.weight_hh_l1", factors="4x4" if g.gate == "n" else g.factors) for g in gates]
    twins = [replace(g, name="rnn.weight_hh_l2") for g in gates]
    assert plan(replace(report.models[1], recurrent_matrices=[*gates, *others, *twins])) == [
        "rnn.weight_hh_l0, rnn.weight_hh_l2 (r, z, n): 2*(8x8,8x8)",
        "rnn.weight_hh_l1 (r, z): 2*(8x8,8x8)",
        "rnn.weight_hh_l1 (n): 4x4",
    ]


def test_spectra_as_blocks_and_quarters() -> None:
    assert sparkline_of_spectrum([1.0, 0.03, 1e-3, 1e-20, 0.0]) == "█▄▁▁▁"
    assert sparkline_of_spectrum([0.0, 0.0]) == ""
    assert quarters([4.0, 3.0, 2.0, 1.0, 1e-18]) == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert sparkline([3.0, 3.0]) == "▁▁" and sparkline(list(range(100)), most=3) == "▁▅█"


def test_the_title_says_what_is_compared(report: Report) -> None:
    assert title(report) == "dense: before and after conversion"
    others = [replace(model, sources=[]) for model in report.models]
    assert title(replace(report, models=others)) == "dense, compared with small"


def test_the_summary_has_file_latency_and_accuracy_before_after_and_in_int8(report: Report) -> None:
    rival = replace(report.models[0], name="dense (int8)", bytes=20000, recurrent_matrices=[], metrics={"wer": 0.31})
    found = summary(replace(report, models=[*report.models, rival]), knee="small")
    assert [m.name for m in found.models] == ["dense", "small", "dense (int8)"]
    assert [row.label for row in found.rows] == ["Whole file", "Latency, batch 1", "wer, test split"]
    assert found.rows[0].cells == ["73.6 kB", "27.5 kB (2.7x smaller)", "20.0 kB (3.7x smaller)"]
    assert found.rows[1].cells[:2] == ["4.00 ms", "1.00 ms (4.0x faster)"]
    assert found.rows[2].cells == ["0.3000", "0.3400 (+0.040)", "0.3100 (+0.010)"]
    assert found.notes[0].startswith("The knee is at small")


def test_what_was_made_on_the_way_is_one_line_of_the_summary(report: Report) -> None:
    dense, small = report.models
    tuned = replace(small, name="tuned", sha256="ef" * 32, sources=["cd" * 32, "12" * 32], metrics={"wer": 0.32})
    models = [replace(dense, sha256="cd" * 32), replace(small, sha256="12" * 32), tuned]
    found = summary(replace(report, models=models))
    assert [m.name for m in found.models] == ["dense", "tuned"]
    assert found.notes[0] == "small, before fine-tuning: wer 0.340."


def test_latency_of_a_busy_machine_is_no_headline(report: Report) -> None:
    found = summary(replace(report, latency=replace(report.latency, load=5.2, cores=2)))
    assert not any("Latency" in row.label for row in found.rows)
    assert found.notes[0].startswith("Latency is in the comparison alone")


def test_condition_numbers_are_folded_away(report: Report) -> None:
    terminal = Console(file=io.StringIO(), width=110)
    for part in tables(report):
        terminal.print(part)
    assert "condition" not in terminal.file.getvalue()  # type: ignore[attr-defined]
    for text in (to_html(report), to_markdown(report)):
        assert "<details>" in text.partition("condition")[0]


def test_axes_begin_at_zero(report: Report) -> None:
    close = [replace(model, metrics={"wer": 0.412 + 0.002 * i}) for i, model in enumerate(report.models)]
    figures = tradeoff(replace(report, models=close))
    assert figures is not None and "0.0</text>" in figures


def test_the_card_has_front_matter_that_the_hub_reads(report: Report) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(to_card(report), ignore_metadata_errors=False)
    assert card.data.library_name == "kruify"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("wer", 0.34, "g2p")
    assert 'kruify.load("small.safetensors"' in card.text and "27.5 kB" in card.text


def test_a_busy_machine_is_said(report: Report) -> None:
    assert "relied on" not in latency_note(replace(report, latency=replace(report.latency, load=1.9, cores=2)))
    assert "(load 5.2 on 2 cores)" in latency_note(replace(report, latency=replace(report.latency, load=5.2, cores=2)))


def test_words(report: Report) -> None:
    assert times(1, 3, "faster", "x") == ("3.0x", "slower: x")
    assert times(0, 3, "faster", "x") == ("-", "x")
    assert [size(n) for n in (999, 1500, 123456, 2.5e9)] == ["999 B", "1.5 kB", "123 kB", "2.5 GB"]
    assert [compact(n) for n in (12, 1500, 2e6, 123456)] == ["12", "1.5 k", "2 M", "123 k"]
    assert len(short("a" * 50)) == 22 and short("abc") == "abc"
    slower = replace(report.models[1], latency_ms={1: 8.0, 32: 40.0})
    rows = {row.label: row for row in comparison(replace(report, models=[report.models[0], slower]))}
    assert rows["Latency, batch 1: median"].changes[1] == "2.0x slower"
    assert rows["Latency, batch 32: median"].changes[1] == ""
