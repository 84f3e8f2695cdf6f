# make install   .venv with exactly the versions of requirements/cpu.txt and this package (editable)
# make train     install, then train the example; ARGS="--steps 20" overrides its recipe
# make test      install, then the tests, two files at a time; ARGS="tests/recipe" picks some, WORKERS=4 takes more cores
# make lint      install, then ruff, types (mypy), and the tests of layers and of links in the documents
# make checks    lint and test
# make help      these lines

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := requirements/cpu.txt
NATIVE := $(shell find csrc -type f)  # the editable install builds them, so a change there installs again
# A build of torch for other hardware: make install TORCH=torch==2.13.0+cpu
TORCH ?= $(shell grep '^torch==' $(PINS))
# One rank a GPU; 4 on a CPU.
NPROC ?= $(shell $(BIN)/python -c 'from gspo_megatron.cli.launch import gpu_count; print(gpu_count() or 4)')
# Many tests wait (for a time-out, a Slurm, a rendezvous): two at a time fill two cores.
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: install train test lint checks help
.DEFAULT_GOAL := help

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(PINS) $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: \
	$(PYTHON) is missing or older than Python 3.11. Name another: make install PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -r $(PINS)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

train: install
	$(BIN)/torchrun --nproc-per-node $(NPROC) examples/train_moe_gspo.sh $(ARGS)

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet --durations 0 -m 'not slow' tests/test_layers.py tests/test_docs.py

checks: lint test

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
