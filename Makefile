# `make demo` and `make test` work in a fresh clone: each sets up .venv first where that is due.
# PYTHON=python3.12 picks another interpreter (only when .venv is made), CXX another compiler, and ARGS goes to
# what runs: make test ARGS='-k native', make demo ARGS='--method diffusion_dpo'.

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
PINS   := constraints.txt
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.sipo-installed

# What an installation is made from; the Python sources are used where they lie.
INPUTS := pyproject.toml setup.py $(PINS) $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-lowest bench bench-training bench-alignment lint clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(STAMP)  ## .venv with the tested versions and the native library

demo: $(STAMP)  ## align a small model on real handwritten digits, under two minutes; writes a picture to look at
	$(BIN)/sipo demo $(ARGS)

test: $(STAMP)  ## the whole test suite, with line coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile --cov --cov-report=term $(ARGS)

test-lowest:  ## the same with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) test VENV=.venv-lowest PINS=constraints-lowest.txt

bench: $(STAMP)  ## the pair loss against plain torch and torch.compile on this machine, in 15 minutes; ARGS=--quick: two
	$(BIN)/python -m pytest benchmarks/test_kernel.py -q --benchmark-columns=median,iqr,rounds --benchmark-sort=name
	$(BIN)/python -m benchmarks.kernel $(ARGS)
	$(BIN)/python -m benchmarks.sweep $(ARGS)
	$(BIN)/python -m benchmarks.host $(if $(filter --quick,$(ARGS)),--quick)
	$(BIN)/python -m benchmarks.plots

bench-training: $(STAMP)  ## whole training steps against a hand-written loop, and memory over 2,000 steps, in seven minutes
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-alignment: $(STAMP)  ## does it align? four methods, five beta, three seeds on digits, in 20 minutes
	$(BIN)/python -m benchmarks.alignment $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove .venv and everything that was built or written by tools
	rm -rf $(VENV) .venv-lowest build dist *.egg-info .benchmarks .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f sipo_kernels/_native.* sipo_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "sipo needs Python 3.10 or newer, and $(PYTHON) is not: try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "cannot make $(VENV): on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

$(STAMP): $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c $(PINS)
	@$(BIN)/python sipo_kernels/build_info.py
	@touch $@
