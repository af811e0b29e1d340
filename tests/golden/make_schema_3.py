"""Made `schema_3.safetensors`, `schema_3.pt` and `schema_3_outputs.pt` at commit 473d403: the networks of schema 1 in
eight bits, both biases of every layer in the file.

    python tests/golden/make_schema_3.py FOLDER

It writes that schema with that commit only: the files stand for what users have on their disks.
"""

from __future__ import annotations

import make_schema_1

import kruify

if __name__ == "__main__":
    make_schema_1.main("schema_3", lambda net: kruify.quantize(net, "int8"))
