# `make demo` and `make test` set up .venv first; nothing else has to be run before them.

# The first that really runs (a version manager may leave stubs of versions that are not there).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
# Pinned so that everybody tests the same torch; the package itself takes 2.11 and up.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test kill lint bench gpu clean

$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "python 3.10 or newer is needed: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/ppcl demo examples/scenes --out demo.png

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Fifty SIGKILLs over a whole tiny training run; `make test` has a dozen.
kill: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill.py --kills 50

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench/suites/bench_model.py --benchmark-only -s
	$(BIN)/python bench/suites/bench_kernels.py --tiny

# On a machine with a CUDA device, with its own python: nothing is installed. PART=1, 2 or 3 for one of its parts.
gpu:
	$(if $(filter file,$(origin PYTHON)),,PYTHON=$(PYTHON)) bash bench/gpu.sh $(PART)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo.png
