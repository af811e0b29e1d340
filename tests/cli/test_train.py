"""train: networks from scratch, the files they leave, and requests that cannot be carried out."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from kruify.checkpoint import read
from kruify.conversion.network import load_network
from kruify.layers import KRU
from kruify.tasks.loader import load_task

TASK = "copy-memory:T=3,train_examples=128"
ADDING = "adding:T=5,train_examples=256"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("kruify.tasks.copy_memory.CopyMemory.drawn", {"valid": (20, 1), "test": (20, 2)})
    monkeypatch.setattr("kruify.tasks.adding.Adding.drawn", {"valid": (20, 1), "test": (20, 2)})


@pytest.fixture
def done(run):
    """Runs a command and holds it to its exit code."""

    def invoke(*arguments, code=0):
        result = run(*arguments)
        assert result.exit_code == code, result.stderr
        return result

    return invoke


@pytest.mark.parametrize("cell", ["kru", "kru-real", "kru-lstm", "kru-gru", "kru-rnn", "lstm", "gru", "rnn"])
def test_every_cell_trains_and_is_evaluated_by_the_tasks_name_alone(cell, folder, run_json):
    factors = ("--factors", "4x4,2x2") if cell.startswith("kru") else ()
    result = run_json(
        "train", "--task", TASK, "--cell", cell, "--hidden", "8", *factors, "--epochs", "2", "--lr", ".02"
    )
    assert result["output"] == f"copy-memory-{cell}-8.safetensors"
    assert result["network"]["cell"] == cell and result["network"]["hidden"] == 8
    assert [entry["epoch"] for entry in result["history"]] == [0, 1, 2]
    assert result["metrics"]["bits"] < result["history"][0]["metrics"]["bits"]
    again = run_json("evaluate", result["output"], "--task", TASK, "--split", "valid")
    assert again["metrics"] == result["metrics"]
    gates = {"lstm": 4, "gru": 3}.get(cell.removeprefix("kru-"), 1)
    entries = (16 + 4) * (2 if cell == "kru" else 1) if cell.startswith("kru") else 64
    assert result["parameters"]["recurrent"] == gates * entries


def test_the_file_is_verified_inspected_reported_and_trained_on(folder, done, run_json):
    for cell, size in (("kru", "8"), ("lstm", "4")):
        done("train", "--task", TASK, "--cell", cell, "--hidden", size, "--epochs", "1", "-o", f"{cell}.safetensors")
    done("verify", "kru.safetensors")
    (layer,) = run_json("inspect", "kru.safetensors")["layers"]
    assert (layer["kind"], layer["hidden_size"], layer["recurrent_parameters"]) == ("kru", 8, 2 * (16 + 4))
    report = run_json("report", "lstm.safetensors", "kru.safetensors", "--task", TASK)
    lstm, kru, *_ = report["models"]
    assert [m["gate"] for m in kru["recurrent_matrices"]] == ["h"]
    assert kru["parameters"]["total"] == 2 * (10 * 8 + 16 + 4) + 8 + 16 * 10 + 10
    assert lstm["metrics"] != kru["metrics"]
    more = run_json("finetune", "kru.safetensors", "--task", TASK, "--epochs", "1", "-o", "more.safetensors")
    again = run_json("evaluate", "more.safetensors", "--task", TASK, "--split", "valid")
    assert again["metrics"] == more["metrics"]
    model = load_network(read("more.safetensors"), load_task(TASK))
    assert isinstance(model.rnn, KRU)


def test_resumed_it_leaves_the_same_file(folder, done):
    command = ("train", "--task", ADDING, "--cell", "kru", "--hidden", "4", "--epochs", "1")
    done(*command, "-o", "a.safetensors", "--resume", "state")
    done(*command, "-o", "b.safetensors", "--resume", "state")
    done(*command, "-o", "c.safetensors")
    histories = [json.loads(read(f"{name}.safetensors").metadata["kruify.history"]) for name in "abc"]
    assert histories[0] == histories[1] == histories[2]


def test_steps_instead_of_epochs(folder, run_json):
    result = run_json("train", "--task", ADDING, "--cell", "kru-real", "--hidden", "4", "--steps", "7")
    assert result["steps"] == 7
    assert result["history"][-1]["step"] == 7


def test_the_penalty_keeps_the_matrix_nearly_unitary(folder, run_json):
    command = ("train", "--task", ADDING, "--cell", "kru", "--hidden", "8", "--lr", "0.05", "--epochs", "4")
    defects = {
        penalty: run_json(*command, "--penalty", penalty, "--conditioning", "c.svg")["history"][-1]["penalty"]
        for penalty in ("0", "1")
    }
    assert defects["1"] < 0.2 * defects["0"]


def test_conditioning_is_drawn_logged_and_in_the_report(folder, done):
    pytest.importorskip("matplotlib")
    for cell in ("kru", "lstm"):
        command = ("train", "--task", TASK, "--cell", cell, "--hidden", "8", "--epochs", "1")
        done(*command, "-o", f"{cell}.safetensors", "--conditioning", f"{cell}.svg", "--log-dir", cell)
        root = ElementTree.parse(f"{cell}.svg").getroot()
        text = " ".join(root.itertext())
        for title in ("condition number", "spectral norm", "unitarity defect", "gradient through time"):
            assert title in text
        assert "var(--" not in (folder / f"{cell}.svg").read_text()
        header = (folder / cell / "history.csv").read_text().splitlines()[0]
        assert "condition_number rnn.weight_hh_l0." in header
    done("report", "lstm.safetensors", "kru.safetensors", "--html", "r.html")
    page = (folder / "r.html").read_text()
    assert "Training: condition number" in page and "Training: gradient through time" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cell", "kruu"), 'there is no cell "kruu"'),
        (("--cell", "kru", "--hidden", "6", "--factors", "4x4"), "4x4"),
        (("--cell", "lstm", "--factors", "2x2"), "a cell 'lstm' has no factors"),
        (("--cell", "kru", "--hidden", "0"), "0 is not in the range"),
        (("--cell", "kru", "--epochs", "1", "--steps", "3"), "twice"),
        (("--cell", "kru", "--penalty", "-1"), "unitary_penalty must be 0 or more"),
        (("--cell", "kru", "-o", "no/where.safetensors"), "there is no folder no"),
        (("--cell", "kru", "--option", "colour=red"), "colour"),
    ],
)
def test_bad_requests_are_one_sentence(arguments, said, folder, done):
    result = done("train", "--task", TASK, *arguments, code=2)
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_tasks_that_cannot_be_trained_so(folder, done):
    assert "there is no such task" in done("train", "--task", "copy-memroy", "--cell", "kru", code=2).stderr
    said = done("train", "--task", "task.py:Echo", "--cell", "kru", code=2).stderr
    assert 'there is no option "cell"' in said
    done("train", "--task", "task.py:Echo", "--epochs", "1", "-o", "own.safetensors")  # its own network, without them
    assert "rnn.weight_hh_l0" in read("own.safetensors").tensors


@pytest.mark.parametrize("to", ["dense", "onnx", "torch"])
def test_a_kru_is_not_exported_and_says_so(to, folder, done):
    done("train", "--task", TASK, "--cell", "kru", "--hidden", "4", "--epochs", "0", "-o", "kru.safetensors")
    said = done("export", "kru.safetensors", "--to", to, "-o", "out.pt", code=5).stderr
    assert "a Kronecker Recurrent Unit is not exported" in said
    assert not (folder / "out.pt").exists()


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_every_file_made_from_a_trained_one_says_which_network_it_is(ending, folder, done, run_json):
    """Not the task's own size: without the note no command could build the network."""
    dense = f"lstm.{ending}"
    done("train", "--task", ADDING, "--cell", "lstm", "--hidden", "8", "--epochs", "0", "-o", dense)
    note = read(dense).metadata["kruify.network"]
    short = ("--task", ADDING, "--epochs", "0.1")
    done("convert", dense, "--factors", "4x4,2x2", "-o", f"a.{ending}")
    done("finetune", f"a.{ending}", *short, "-o", f"b.{ending}")
    done("compress", dense, *short, "--budget", "2x", "--trial", "0", "-o", f"c.{ending}")
    done("sweep", dense, *short, "--budgets", "2x", "--trial", "0", "--dir", "points")
    done("export", f"b.{ending}", "--to", "dense", "-o", f"d.{ending}")
    made = [f"{name}.{ending}" for name in "abcd"] + ["points/2x.kru.safetensors"]
    assert [read(file).metadata["kruify.network"] for file in made] == [note] * len(made)
    report = run_json("report", dense, *made, "--task", ADDING)
    assert all("mse" in model["metrics"] for model in report["models"][: 1 + len(made)])
    assert read(f"c.{ending}").metadata["kruify.origin"] == read(f"a.{ending}").metadata["kruify.origin"]


def test_a_kronecker_cell_made_dense_is_noted_as_the_dense_cell(folder, done):
    done("train", "--task", ADDING, "--cell", "kru-gru", "--hidden", "8", "--epochs", "0", "-o", "a.safetensors")
    done("export", "a.safetensors", "--to", "dense", "-o", "b.safetensors")
    assert json.loads(read("b.safetensors").metadata["kruify.network"])["cell"] == "gru"
    done("evaluate", "b.safetensors", "--task", ADDING)
