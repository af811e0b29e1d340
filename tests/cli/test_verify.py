"""`kruify verify`."""

from __future__ import annotations

from pathlib import Path


def test_sound_and_damaged(folder, run, run_json):
    run("convert", "model.pt", "--factors", "2x2")
    names = [check["name"] for check in run_json("verify", "model.kru.safetensors", "--source", "model.pt")["checks"]]
    assert names == ["file", "plan", "numbers", "layer rnn", "source"]
    assert "is in order" in run("verify", "model.kru.safetensors").stdout
    assert run("verify", "model.pt").exit_code == 2
    data = bytearray(Path("model.kru.safetensors").read_bytes())
    data[-1] ^= 255
    Path("model.kru.safetensors").write_bytes(data)
    assert run("verify", "model.kru.safetensors").exit_code == 4
