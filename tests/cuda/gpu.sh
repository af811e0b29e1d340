#!/usr/bin/env bash
# Everything that only a GPU can show, `make test-gpu`: builds the kernels for the GPU at hand, runs the GPU tests, then
# compute-sanitizer (memcheck, racecheck, synccheck) over every kernel.
#   PYTHON=python3 tests/cuda/gpu.sh [pytest arguments]
#   GPU_STEPS="build test" tests/cuda/gpu.sh      some of build, test, memcheck, racecheck, synccheck: each is bounded
# Needs torch with CUDA, nvcc and pytest; nothing is downloaded or installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
steps=" ${GPU_STEPS:-build test memcheck racecheck synccheck} "
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
KRUIFY_CUDA_ARCHS=${KRUIFY_CUDA_ARCHS:-$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
export KRUIFY_CUDA=1 KRUIFY_REQUIRE_KERNELS=1 KRUIFY_CUDA_ARCHS
if [[ $steps == *" build "* ]]; then time "$PYTHON" setup.py -q build_ext --inplace; fi
status=0
if [[ $steps == *" test "* ]]; then
  PYTHONPATH=. timeout 420 "$PYTHON" -m pytest tests/cuda -m gpu -q --durations=5 "$@" || status=$?
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -z "$sanitizer" ]; then
  echo "compute-sanitizer: not here, not run"
else
  for tool in memcheck racecheck synccheck; do
    [[ $steps == *" $tool "* ]] || continue
    echo "compute-sanitizer $tool"
    log=$(mktemp)
    if PYTHONPATH=. PYTHONUNBUFFERED=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 500 "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" tests/cuda/sanitize.py >"$log" 2>&1; then
      tail -2 "$log"
    elif grep -q "Device not supported" "$log"; then
      echo "compute-sanitizer does not support this machine: not run"
    else
      tail -40 "$log"
      status=1
    fi
  done
fi
exit $status
