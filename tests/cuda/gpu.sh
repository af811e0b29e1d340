#!/usr/bin/env bash
# Everything that only a GPU can show, `make test-gpu`, in parts of at most four minutes. The first four say most: the
# kernels for the GPU at hand are built, the parity cases run on it (every structure, clusters), CUDA graphs are captured
# and replayed, the three layers of benchmarks/cuda_layers.py are timed.
#   PYTHON=python3 tests/cuda/gpu.sh
#   GPU_STEPS="build parity graphs quick" tests/cuda/gpu.sh    some of these, gpu, memcheck, racecheck, synccheck
# A part that passed with these sources on this GPU is not run again (GPU_FRESH=1: it is). Needs torch with CUDA, nvcc
# and pytest; nothing is downloaded or installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
"$PYTHON" - <<'CHECK'
import importlib.util
import shutil

missing = [n for n in ("torch", "numpy", "scipy", "safetensors", "pytest", "setuptools") if not importlib.util.find_spec(n)]
if missing:
    raise SystemExit(f"this Python has no {', '.join(missing)}: name one that has with PYTHON=...")
import torch

if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
if not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
    raise SystemExit("nvcc was not found: put it on PATH or set CUDA_HOME")
print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
CHECK
gpu=$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()))')
KRUIFY_CUDA_ARCHS=${KRUIFY_CUDA_ARCHS:-$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
export KRUIFY_CUDA=1 KRUIFY_REQUIRE_KERNELS=1 KRUIFY_CUDA_ARCHS PYTHONPATH=. PYTHONUNBUFFERED=1
sources=$(find setup.py kruify tests/cuda benchmarks/*.py -type f ! -name '*.so' ! -path '*/__pycache__/*' | sort)
done=build/gpu-steps/$gpu-$(cat $sources | sha256sum | cut -c1-12)
mkdir -p "$done"

sanitize() {
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  if [ -z "$sanitizer" ]; then echo "compute-sanitizer was not found"; return 1; fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 "$sanitizer" --tool "$1" --error-exitcode 9 "$PYTHON" tests/cuda/sanitize.py
}
run() {
  case $1 in
    build) timeout 240 "$PYTHON" setup.py -q build_ext --inplace ;;
    parity) timeout 240 "$PYTHON" -m pytest tests/cuda/test_parity.py -m gpu -q ;;
    graphs) timeout 120 "$PYTHON" -m pytest tests/cuda/test_gpu.py -m gpu -q -k graphs ;;
    quick) timeout 240 "$PYTHON" benchmarks/cuda_layers.py --quick --seconds 200 ;;
    gpu) timeout 240 "$PYTHON" -m pytest tests/cuda/test_gpu.py -m gpu -q --durations=5 ;;
    *) sanitize "$1" ;;
  esac
}

status=0
for part in ${GPU_STEPS:-build parity graphs quick gpu memcheck racecheck synccheck}; do
  if [ -e "$done/$part" ] && [ "$part" != build ] && [ -z "${GPU_FRESH:-}" ]; then
    echo "$part: passed before"
    continue
  fi
  began=$SECONDS log=$done/$part.log
  if run "$part" >"$log" 2>&1; then
    touch "$done/$part"
    echo "$part: passed in $((SECONDS - began)) s; $(tail -1 "$log")"
  elif grep -qE "Device not supported|compute-sanitizer was not found" "$log"; then
    echo "$part: no compute-sanitizer that serves this machine: not run"
  else
    tail -40 "$log"
    echo "$part: FAILED after $((SECONDS - began)) s; all of it in $log"
    status=1
    [ "$part" = build ] && break
  fi
done
exit $status
