# `make demo` and `make test` set up .venv first; nothing else has to be run before them.

# The first that really runs (a version manager may leave stubs of versions that are not there).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
# Everything is installed in the versions of constraints.txt, so that everybody tests the same. `make TORCH=torch==2.12.0`
# takes another torch (the package itself takes 2.11 and up): the constraint on torch is then left out.
CONSTRAINTS := constraints.txt
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
# A second venv for `make lowest`, with the lowest diffusers of pyproject.toml.
LOWEST := .venv-lowest
LOWEST_DIFFUSERS := diffusers==0.41.0
# Two cores, two workers, each with one thread. What shares a worker and what starts first: tests/balance.py.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

.PHONY: demo test quick full lowest kill fuzz lint docs bench gpu clean

$(VENV)/installed: pyproject.toml Makefile $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "python 3.10 or newer is needed: make PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	sed '$(if $(filter-out torch,$(TORCH)),/^torch==/d;/^triton/d)' $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/ppcl demo examples/emoji --prompts 50 --out demo.png

# All laws and behaviours, in ten minutes on two cores.
test: $(VENV)/installed
	$(PYTEST) tests

# One case of each test function that takes less than a second or so: the loop of a day, a minute on two cores.
quick: $(VENV)/installed
	$(PYTEST) --quick tests

# The cases that `make test` leaves out: every tile compiled, many kills, large matrices.
full: $(VENV)/installed
	$(PYTEST) -m slow tests

# The lowest diffusers brings its own versions of what depends on it, so the constraints on these are left out.
$(LOWEST)/installed: pyproject.toml Makefile $(CONSTRAINTS)
	$(PYTHON) -m venv $(LOWEST)
	grep -vE '^(diffusers|huggingface-hub|transformers|tokenizers|httpx|httpcore)' $(CONSTRAINTS) > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable ".[dev]" $(LOWEST_DIFFUSERS)
	touch $@

# The runtime's tests with the lowest diffusers that pyproject.toml allows.
lowest: $(LOWEST)/installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) tests/laws tests/checkpoint tests/model tests/planning

# Fifty SIGKILLs over a whole tiny training run; `make test` has one, `make full` a dozen.
kill: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill.py --kills 50

# Ten thousand altered copies of tiny checkpoints, a quarter of an hour on two cores; `make test` has a hundred.
# SEED=... for other copies.
SEED ?= 0
fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --copies 10000 --processes 2 --seed $(SEED)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# The pages of docs/ as a site, site/index.html. A warning is an error. Without a network, and so is what is built.
# The variable: no advertisement of the theme's authors for what they make now.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(BIN)/python -m http.server --directory site"

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench/suites/bench_model.py --benchmark-only -s
	$(BIN)/python bench/suites/bench_widths.py
	$(BIN)/python bench/suites/bench_planner.py
	$(BIN)/python bench/suites/bench_kernels.py --tiny

# On a machine with a CUDA device, with its own python: nothing is installed. PART=1, 2 or 3 for one of its parts.
gpu:
	$(if $(filter file,$(origin PYTHON)),,PYTHON=$(PYTHON)) bash bench/gpu.sh $(PART)

clean:
	rm -rf $(VENV) $(LOWEST) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo.png
