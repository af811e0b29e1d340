#!/usr/bin/env bash
# Everything that only a GPU can show, `make test-gpu`: builds the kernels for the GPU at hand, runs the GPU tests, then
# compute-sanitizer (memcheck, racecheck) over every kernel.
#   PYTHON=python3 tests/cuda/gpu.sh [pytest arguments]
# Needs torch with CUDA, nvcc and pytest; nothing is downloaded or installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
"$PYTHON" - <<'CHECK'
import torch
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__)
CHECK
KRUIFY_CUDA_ARCHS=${KRUIFY_CUDA_ARCHS:-$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
export KRUIFY_CUDA=1 KRUIFY_REQUIRE_KERNELS=1 KRUIFY_CUDA_ARCHS
time "$PYTHON" setup.py -q build_ext --inplace
status=0
PYTHONPATH=. "$PYTHON" -m pytest tests/cuda -m gpu -q "$@" || status=$?
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -z "$sanitizer" ]; then
  echo "compute-sanitizer: not here, not run"
else
  for tool in memcheck racecheck; do
    echo "compute-sanitizer $tool"
    log=$(mktemp)
    if PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 300 "$sanitizer" --tool "$tool" --error-exitcode 9 "$PYTHON" tests/cuda/sanitize.py >"$log" 2>&1; then
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
