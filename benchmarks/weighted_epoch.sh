#!/usr/bin/env bash
# What the activation-weighted start is worth: word error of g2p-en (16x smaller recurrent matrices) before fine-tuning
# (valid split) and after one epoch (test split), with and without --task. About 4 minutes on one thread; needs `kruify` on
# PATH. Writes results/weighted_epoch.json. SEED=1 bash benchmarks/weighted_epoch.sh for another seed.
set -euo pipefail
export OMP_NUM_THREADS=1
here=$(cd "$(dirname "$0")" && pwd)
seed=${SEED:-0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
spec='4*(256x1,1x256)+sparse:3.125%:1'
kruify tasks --export g2p-en -o dense.pt
kruify convert dense.pt --factors "$spec" -o plain.kru.safetensors
kruify convert dense.pt --factors "$spec" --task g2p-en -o weighted.kru.safetensors
for start in plain weighted; do
    kruify evaluate $start.kru.safetensors --task g2p-en --split valid --json > $start.before.json
    kruify finetune $start.kru.safetensors --task g2p-en --epochs 1 --seed "$seed" -o $start.tuned.safetensors
    kruify evaluate $start.tuned.safetensors --task g2p-en --json > $start.after.json
done
python - "$here/results/weighted_epoch.json" "$seed" "$spec" "$(git -C "$here" rev-parse --short HEAD)" <<'PYTHON'
import json, platform, sys
from pathlib import Path

target, seed, spec, commit = sys.argv[1:]
read = lambda name: json.loads(Path(name).read_text())["metrics"]
rows = {start: {when: read(f"{start}.{when}.json") for when in ("before", "after")} for start in ("plain", "weighted")}
cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
about = {"spec": spec, "seed": int(seed), "epochs": 1, "commit": commit, "cpu": cpu, "python": platform.python_version()}
Path(target).write_text(json.dumps({**about, **rows}, indent=1) + "\n")
PYTHON
