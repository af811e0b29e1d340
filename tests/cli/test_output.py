"""Where output may go, what kind of file it becomes, and names that would like to be more than names."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from kruify.checkpoint import read
from kruify.cli.main import cli

TUNE = ("--task", "task.py:Echo", "--epochs", "0.4")
CONVERT = ("convert", "model.pt", "--factors", "2x2")


@pytest.mark.parametrize("prefix", ["net[v1]", "net[/red]", "net[bold]", "net:warning:"])
def test_a_name_is_no_markup(prefix, folder, run):
    torch.save(
        {f"{prefix}.{name}": t for name, t in nn.GRU(3, 8).state_dict().items()}, f"{prefix}.pt".replace("/", "")
    )
    (file,) = (p.name for p in folder.glob("net*.pt"))
    for command in (("inspect", file), ("convert", file, "--factors", "2x2")):
        result = run(*command)
        assert result.exit_code == 0, result.stderr
        assert file in result.stdout
        assert prefix in result.stdout


def test_a_name_does_not_drive_the_terminal(folder, run):
    torch.save({f"a\x1b[31m\x9b.{name}": t for name, t in nn.GRU(3, 8).state_dict().items()}, "esc.pt")
    torch.save({"b\x1b]0;x\x07.weight_hh_l0": torch.zeros(24, 8)}, "skipped.pt")
    result = run("inspect", "esc.pt")
    assert r"a\x1b[31m\x9b" in result.stdout
    passed = run("convert", "skipped.pt", "--factors", "2x2")
    assert passed.exit_code == 2
    for text in (result.stdout, run("inspect", "skipped.pt").stdout, passed.stderr):
        assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_paths_and_hashes_stay_whole(folder, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    long = folder / ("folder-" * 15)
    long.mkdir()
    result = run(*CONVERT, "-o", str(long / "small.kru.safetensors"))
    assert f"wrote {long / 'small.kru.safetensors'}\n" in result.stdout
    assert read(long / "small.kru.safetensors").sha256 in run("verify", str(long / "small.kru.safetensors")).stdout


@pytest.mark.parametrize(
    "command",
    [
        (*CONVERT, "-o", "model.pt"),
        (*CONVERT, "-o", "link.pt"),
        (*CONVERT, "--dry-run", "--plan-out", "model.pt"),
        ("finetune", "model.pt", *TUNE, "-o", "model.pt"),
        ("finetune", "small.kru.safetensors", *TUNE, "--teacher", "model.pt", "-o", "model.pt"),
        ("finetune", "model.pt", *TUNE, "-o", "new.pt", "--conditioning", "model.pt"),
        ("compress", "model.pt", *TUNE, "--budget", "2x", "-o", "model.pt"),
        ("sweep", "model.pt", *TUNE, "--budgets", "2x", "--html", "model.pt"),
        ("report", "model.pt", "small.kru.safetensors", "--markdown", "model.pt"),
        ("export", "small.kru.safetensors", "--to", "dense", "-o", "small.kru.safetensors"),
        (*CONVERT, "-o", "out", "--plan-out", "./out"),
        ("finetune", "model.pt", *TUNE, "-o", "out", "--conditioning", "out"),
        ("train", *TUNE, "-o", "out", "--conditioning", "out"),
        ("report", "model.pt", "small.kru.safetensors", "--markdown", "out", "--html", "out"),
    ],
)
def test_nothing_is_overwritten_that_the_command_reads_or_writes(command, folder, run):
    run(*CONVERT, "-o", "small.kru.safetensors")
    os.symlink("model.pt", "link.pt")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    result = run(*command)
    assert result.exit_code == 2
    assert "the same command reads or writes it, too" in result.stderr
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


PLACES = (
    ("nowhere/x", "there is no folder nowhere"),
    (".", "it is a folder"),
    (os.devnull, "it is not a regular file"),
)
OUTPUTS = (
    (*CONVERT, "-o"),
    (*CONVERT, "--plan-out"),
    ("finetune", "model.pt", *TUNE, "-o"),
    ("finetune", "model.pt", *TUNE, "-o", "new.pt", "--conditioning"),
    ("train", *TUNE, "-o"),
    ("train", *TUNE, "-o", "new.pt", "--conditioning"),
    ("compress", "model.pt", *TUNE, "--budget", "2x", "-o"),
    ("sweep", "model.pt", *TUNE, "--budgets", "2x", "--html"),
    ("report", "model.pt", "model.pt", "--html"),
    ("export", "model.pt", "--to", "torch", "-o"),
    ("tasks", "--export", "g2p-en", "-o"),
)


@pytest.mark.parametrize(
    ("command", "place", "sentence"),
    [(command, *place) for command, place in zip(OUTPUTS, itertools.cycle(PLACES))],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(command, place, sentence, folder, run):
    before = sorted(folder.iterdir())
    result = run(*command, place)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stdout == ""
    assert sorted(folder.iterdir()) == before


def test_a_folder_that_cannot_be_written(folder, run):
    assert "the folder /proc cannot be written to" in run(*CONVERT, "-o", "/proc/a.safetensors").stderr  # by root, too


@pytest.mark.parametrize(
    "command",
    [
        CONVERT,
        ("finetune", "model.pt", *TUNE),
        ("train", *TUNE),
        ("compress", "model.pt", *TUNE, "--budget", "2x", "--attempts", "1"),
    ],
)
def test_the_ending_decides_on_the_kind_of_file(command, folder, run):
    for ending in (".pt", ".ckpt", ".safetensors"):
        result = run(*command, "-o", f"out{ending}")
        assert result.exit_code == 0, result.stderr
        assert read(f"out{ending}").format == ("safetensors" if ending == ".safetensors" else "torch")
        assert run("evaluate", f"out{ending}", "--task", "task.py:Echo").exit_code == 0
    torch.load("out.pt", weights_only=True)
    result = run(*command, "-o", "out.onnx")
    assert result.exit_code == 2
    assert "'.onnx' stands for another kind of file" in result.stderr
    assert not Path("out.onnx").exists()


def test_dense_is_asked_for(folder, run):
    run(*CONVERT)
    for command in (
        ("convert", "--factors", "2x2"),
        ("compress", *TUNE, "--budget", "2x", "-o", "x"),
        ("sweep", *TUNE),
    ):
        result = run(command[0], "model.kru.safetensors", *command[1:])
        assert result.exit_code == 2
        assert "it is converted already" in result.stderr


def test_a_size_without_divisors(folder, run, run_json):
    torch.save(nn.GRU(3, 251).state_dict(), "prime.pt")
    text = run("convert", "prime.pt", "--factors", "auto").stdout
    assert "Not ready to use" not in text
    assert "it computes what the dense model does" in text
    (spec,) = [line.split("'")[1] for line in text.splitlines() if "Nothing became smaller" in line]
    assert run_json("convert", "prime.pt", "--factors", spec)["parameters"]["recurrent_ratio"] > 10
    assert "Not ready to use" in run("convert", "prime.pt", "--factors", spec).stdout


@pytest.mark.parametrize(("spec", "little"), [("2x2", True), ("8*(32x1,1x32)", False)])
def test_factors_that_keep_next_to_nothing_are_named(folder, run, run_json, spec, little):
    torch.manual_seed(0)
    torch.save(nn.LSTM(4, 32).state_dict(), "lstm.pt")
    text = run("convert", "lstm.pt", "--factors", spec).stdout
    matrices = run_json("convert", "lstm.pt", "--factors", spec)["matrices"]
    kept = sum(gate["energy"] for gate in matrices) / len(matrices)
    assert (f"The factors keep {100 * kept:.1f} % of the energy" in text) is little


def test_a_full_disk_while_exporting(folder, run, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device", str(self))

    run(*CONVERT, "-o", "small.kru.safetensors")
    monkeypatch.setattr(Path, "write_bytes", full)
    before = sorted(folder.iterdir())
    for to in ("onnx", "torch"):
        result = run("export", "small.kru.safetensors", "-o", "out.bin", "--to", to)
        assert result.exit_code == 2, result.stderr
        assert "out.bin: it cannot be written (No space left on device)" in result.stderr
    assert sorted(folder.iterdir()) == before


def test_an_earlier_file_survives_an_export_that_differs(folder, run):
    run(*CONVERT, "-o", "small.kru.safetensors")
    Path("rnn.pt2").write_text("an earlier file")
    assert run("export", "small.kru.safetensors", "-o", "rnn.pt2", "--to", "torch", "--tolerance", "-1").exit_code == 6
    assert Path("rnn.pt2").read_text() == "an earlier file"


def test_the_nearest_name_of_a_bare_layer(folder, run):
    torch.save(nn.LSTM(3, 8).state_dict(), "bare.pt")
    result = run("convert", "bare.pt", "--factors", "2x2", "--only", "weigth_hh_l0")
    assert "the nearest name is 'weight_hh_l0'" in result.stderr


def test_commands_are_listed_in_whole_sentences(run):
    listed = run("--help").stdout.split("Commands:")[1].strip().splitlines()
    assert len(listed) == 11
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_shells_complete_the_names_of_files():
    asked = {"_KRUIFY_COMPLETE": "bash_complete", "COMP_WORDS": "kruify convert mo", "COMP_CWORD": "2"}
    assert CliRunner().invoke(cli, env=asked, prog_name="kruify").stdout == "file,mo\n"
