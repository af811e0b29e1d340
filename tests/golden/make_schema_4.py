"""Made `schema_4.safetensors`, `schema_4.pt` and `schema_4_outputs.pt` at commit 0c78085: the networks of schema 1 in
eight bits, scales of their own for all rows of wide factors and the columns of low rank, one bias where two are added.

    python tests/golden/make_schema_4.py FOLDER

It writes that schema with that commit only: the files stand for what users have on their disks.
"""

from __future__ import annotations

import make_schema_1

import kruify

if __name__ == "__main__":
    make_schema_1.main("schema_4", lambda net: kruify.quantize(net, "int8"))
