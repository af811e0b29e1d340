"""Made `schema_5.safetensors`, `schema_5.pt` and `schema_5_outputs.pt` at commit 1e1c287: the networks of schema 1 in
four bits, equal steps.

    python tests/golden/make_schema_5.py FOLDER

It writes that schema with that commit only: the files stand for what users have on their disks.
"""

from __future__ import annotations

import make_schema_1

import kruify

if __name__ == "__main__":
    make_schema_1.main("schema_5", lambda net: kruify.quantize(net, "int4"))
