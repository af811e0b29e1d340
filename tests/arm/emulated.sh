#!/bin/bash
# Builds kruify and runs the operators' and layers' tests on 64-bit ARM, emulated: a Debian arm64 in FOLDER under qemu.
#
#     make test-arm            or  bash tests/arm/emulated.sh [FOLDER]
#
# Needs root, on Debian, and the network for packages by name; about ten minutes and 2 GB. What is left out: torch.compile
# (no compiler of its own kind there is asked for) and torch's own bfloat16 LSTM, which uses instructions that qemu 7 lacks.
set -euo pipefail
folder=${1:-/tmp/kruify-arm}
root=$folder/root
python=${PYTHON:-python3}
packages=$root/usr/local/lib/python3.11/dist-packages
here=$(cd "$(dirname "$0")/../.." && pwd)

if [ ! -e "$root/.ready" ]; then
    rm -rf "$folder"
    mkdir -p "$folder/wheels"
    apt-get install -y -qq --no-install-recommends debootstrap qemu-user-static unzip > "$folder/apt.log"
    # The kernel starts ARM programs through qemu; "F" lets it do so inside the folder, too.
    [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
    if [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
        magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
        mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
        printf '%s' ":qemu-aarch64:M::$magic:$mask:/usr/bin/qemu-aarch64-static:F" > /proc/sys/fs/binfmt_misc/register
    fi
    echo "a Debian arm64 in $root"
    debootstrap --foreign --variant=minbase --arch=arm64 --include=python3-dev,g++,libgomp1 bookworm "$root" \
        > "$folder/first.log"
    chroot "$root" /debootstrap/debootstrap --second-stage > "$folder/second.log"
    # torch 2.10 is the last whose wheel for ARM runs without CUDA's libraries.
    echo "torch and what the tests need"
    options=(--quiet --dest "$folder/wheels" --python-version 3.11 --only-binary=:all:)
    for glibc in _2_28 _2_27 _2_17 2014; do options+=(--platform "manylinux${glibc}_aarch64"); done
    "$python" -m pip download "${options[@]}" --no-deps torch==2.10.0 sympy mpmath networkx \
        jinja2 markupsafe fsspec filelock typing-extensions "setuptools>=77"
    "$python" -m pip download "${options[@]}" numpy scipy tensorly click safetensors rich \
        pytest hypothesis
    mkdir -p "$packages"
    for wheel in "$folder"/wheels/*.whl; do unzip -q -o "$wheel" -d "$packages"; done
    touch "$root/.ready"
fi
rm -rf "$root/work"
git clone -q "$here" "$root/work"
for mounted in proc sys; do mountpoint -q "$root/$mounted" || mount --bind "/$mounted" "$root/$mounted"; done
[ -e "$root/dev/urandom" ] || mknod -m 666 "$root/dev/urandom" c 1 9
trap 'umount "$root/proc" "$root/sys"' EXIT
chroot "$root" /bin/bash -c '
    set -e
    cd /work
    export OMP_NUM_THREADS=1
    KRUIFY_REQUIRE_KERNELS=1 python3 setup.py -q build_ext --inplace
    python3 -c "import platform, torch, kruify; print(platform.machine(), torch.__version__, kruify.backend_info())"
    python3 -m pytest -p no:cacheprovider tests/ops tests/layers tests/test_kronecker.py \
        -k "not compile and not dtype_is_that and not autocast"
'
