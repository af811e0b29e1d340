"""Made `schema_2.safetensors`, `schema_2.pt` and `schema_2_outputs.pt` at commit 71852e0: the networks of schema 1 in
eight bits, whose scales had 32 bits.

    python tests/golden/make_schema_2.py FOLDER

It writes that schema with that commit only: the files stand for what users have on their disks.
"""

from __future__ import annotations

import make_schema_1

import kruify

if __name__ == "__main__":
    make_schema_1.main("schema_2", lambda net: kruify.quantize(net, "int8"))
