#!/usr/bin/env bash
# A trained network that nobody here made becomes small. `make demo` runs this; the files go to demo-out/.
# EPOCHS=15 bash examples/demo.sh goes on where the short demo stops.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p demo-out
cd demo-out
export COLUMNS=${COLUMNS:-110}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # networks this small gain nothing from more threads

say() { printf '\n# %s\n' "$1"; }
run() {
    printf '$ %s\n' "$1"
    eval "$1"
}

say "A published network: English spelling to sound, two GRU layers of 256 units, from the package g2p-en."
run "kruify tasks --export g2p-en -o dense.pt"
run "kruify inspect dense.pt"

say "Its file becomes 19x smaller: all matrices of the GRUs in low rank, 4 % more of the recurrent ones in blocks, all in int8."
run "kruify convert dense.pt --factors 'stacked:24*(768x1,1x256)+sparse:4%:8' --input-factors 'stacked:24*(768x1,1x256)' --dtype int8 -o converted.kru.safetensors"

say "Conversion alone destroys accuracy (wer: share of words whose pronunciation is not exactly right)."
run "kruify evaluate dense.pt --task g2p-en"
run "kruify evaluate converted.kru.safetensors --task g2p-en"

say "Fine-tuning brings it back: most of the way in these minutes, further in longer runs."
# So few passes want the dense parts to move slowly; from about five on the default of 6e-3 for everything is better.
run "kruify finetune converted.kru.safetensors --task g2p-en --epochs ${EPOCHS:-3} --lr 2e-3 --option factor_lr=3 -o finetuned.kru.safetensors"
run "kruify evaluate finetuned.kru.safetensors --task g2p-en"

say "The comparison. The published network has probably seen the test words, so its figure is optimistic (see README)."
run "kruify report dense.pt converted.kru.safetensors finetuned.kru.safetensors --task g2p-en"
