"""Seeded mutation fuzzing: `python tests/checkpoint/fuzz/mutate.py [--files 5000] [--meaning 5000] [--seed 0]`.

Each file is a good one with a few bytes changed, cut, doubled, zeroed or moved. It must be refused in one sentence, or
give exactly the tensors of the good one. Anything else is counted: another error, death by signal, memory or alarm, a
forbidden audit event; and weights that differ without a word, which formats with checksums must never let through.

--meaning: as many files more whose bytes are in order and which say what is wrong (meaning.py), each with two commands:
verify and another, or convert --plan twice. A command must end in 0 or, with one sentence, in 2, 3, 4, 5 or 6.
"""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import json
import random
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import harness
import hostile
import meaning

CHECKED = {"torch.pt", "module.pt", "script.pt", "kruify.safetensors", "arrays.npz", "packed.npz"}
"""Files whose format has checksums. The others: legacy torch, plain safetensors, indices, ONNX and HDF5."""


ZIPS = {"torch.pt", "module.pt", "script.pt", "arrays.npz"}
"""Of these every second file is changed inside of its archive, with checksums made right again: only crashes count."""


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to three changes of a kind that storage, networks and attackers make."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        kind, at = chance.randrange(9), chance.randrange(max(1, len(changed)))
        if chance.random() < 0.5:  # headers and directories are where a change does most
            at = chance.choice(
                (chance.randrange(min(len(changed), 300)), max(0, len(changed) - chance.randrange(1, 300)))
            )
        length = chance.choice((1, 2, 4, 8, 64))
        if kind < 3:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            changed[at] = chance.randrange(256)
        elif kind == 4:
            changed[at : at + length] = bytes([chance.choice((0, 255))]) * len(changed[at : at + length])
        elif kind == 5:
            del changed[at : at + length]
        elif kind == 6:
            changed[at:at] = changed[at : at + length]
        elif kind == 7:
            del changed[at:]
        else:
            other = chance.randrange(max(1, len(changed)))
            changed[at : at + length], changed[other : other + length] = (
                changed[other : other + length],
                changed[at : at + length],
            )
        if not changed:
            break
    return bytes(changed)


def mutate_inside(data: bytes, chance: random.Random) -> bytes:
    """Change what a zip archive holds and give it right checksums, so that the change gets past them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    telling = [i for i, (name, _) in enumerate(entries) if name.endswith((".pkl", ".npy", ".py", ".json"))]
    at = chance.choice(telling)
    entries[at] = (entries[at][0], mutate(entries[at][1], chance))
    return hostile.archive(entries)


def run(files: int, seed: int, folder: Path, batch: int = 25) -> dict[str, dict[str, int]]:
    """Counts by good file: "refused", "identical", "different", "crashed", "events"; and "slowest" in milliseconds."""
    good = harness.good_files(folder)
    chance = random.Random(seed)
    jobs, names = [], []
    (folder / "mutants").mkdir()
    shards = folder / "mutants" / "plain.safetensors"
    shards.write_bytes((folder / "plain.safetensors").read_bytes())
    for number in range(files):
        source = good[number % len(good)]
        inside = source.name in ZIPS and number // len(good) % 2 == 1
        data = (mutate_inside if inside else mutate)(source.read_bytes(), chance)
        if data == source.read_bytes():
            continue
        path = folder / "mutants" / f"{number}{source.suffix}"
        path.write_bytes(data)
        jobs.append({"path": str(path), "expect": str(source)})
        names.append(f"{source.name}{' inside' if inside else ''}")
    counts: dict[str, dict[str, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    for name, job, result in zip(names, jobs, harness.open_all(jobs, batch), strict=True):
        row = counts[name]
        row["files"] += 1
        row["slowest"] = max(row["slowest"], int(1000 * result.get("seconds", 0)))
        if result["code"] in (2, 3, 4, 5):
            row["refused"] += 1
        elif result["code"]:
            row["crashed"] += 1
            print(f"{name}: {job['path']}: {result['text']}", file=sys.stderr)
        else:
            row["identical" if result["same"] else "different"] += 1
            if not result["same"] and name in CHECKED:
                print(f"{name}: {job['path']}: different without a word", file=sys.stderr)
        row["events"] += bool(result["events"])
        if result["events"]:
            print(f"{name}: {result['events']}", file=sys.stderr)
    return counts


def run_meaning(files: int, seed: int, folder: Path, batch: int = 20) -> dict[str, dict[str, int]]:
    """Counts by class: "files", "done", "refused", "crashed"; and "slowest" in milliseconds."""
    counts: dict[str, dict[str, int]] = collections.defaultdict(lambda: collections.defaultdict(int))
    found = list(itertools.islice(meaning.mutants(folder, seed), files))
    results = harness.open_all([{"commands": commands} for _, _, commands in found], batch)
    for (kind, path, commands), result in zip(found, results, strict=True):
        row, lines = counts[kind], result["text"].splitlines()
        row["files"] += 1
        row["slowest"] = max(row["slowest"], int(1000 * result.get("seconds", 0)))
        bad = result["code"] not in range(7) or result["code"] == 1 or (result["code"] and len(lines[-1]) > 2000)
        row["crashed" if bad else "refused" if result["code"] else "done"] += 1
        if bad:
            print(f"{kind}: {path}: {[c[0] for c in commands]}: {result['text'][-600:]}", file=sys.stderr)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--meaning", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="a folder that keeps the mutated files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary)
        folder.mkdir(exist_ok=True)
        counts = run(options.files, options.seed, folder) if options.files else {}
        if options.meaning:
            (folder / "meaning").mkdir()
            counts |= run_meaning(options.meaning, options.seed, folder / "meaning")
    for name in counts:
        print(f"{name:24}", json.dumps(counts[name]))
    bad = sum(row["crashed"] + row.get("events", 0) for row in counts.values())
    bad += sum(counts[name].get("different", 0) for name in counts if name in CHECKED)
    print(sum(row["files"] for row in counts.values()), "files,", bad, "bad")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
