# `make demo` and `make test` work in a fresh clone: each sets up .venv first if necessary.
# PYTHON=python3.12 picks another interpreter (when .venv is created), CXX another compiler, and ARGS is passed on to
# the command: make test ARGS='-k native', make demo ARGS='--method diffusion_dpo'.

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
PINS   := constraints.txt
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.sipo-installed

# The package is installed again when these change; its Python sources are used in place.
INPUTS := pyproject.toml setup.py $(PINS) $(shell find csrc -type f -not -path 'csrc/emulation/*')
# And when the library no longer fits csrc/: deleting it or copying another over it does not show in times of files.
$(shell test ! -e $(STAMP) || $(BIN)/python sipo_kernels/build_info.py >/dev/null 2>&1 || rm $(STAMP))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-lowest bench bench-training bench-alignment lint clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(STAMP)  ## create .venv with the tested versions and build the native library

demo: $(STAMP)  ## align a small model on handwritten digits in under two minutes, and draw the result
	$(BIN)/sipo demo $(ARGS)

test: $(STAMP)  ## run all tests, with line coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile --cov --cov-report=term $(ARGS)

test-lowest:  ## run all tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) test VENV=.venv-lowest PINS=constraints-lowest.txt

bench: $(STAMP)  ## compare the pair loss with plain torch and torch.compile, in 15 minutes (ARGS=--quick: two)
	$(BIN)/python -m pytest benchmarks/test_kernel.py -q --benchmark-columns=median,iqr,rounds --benchmark-sort=name
	$(BIN)/python -m benchmarks.kernel $(ARGS)
	$(BIN)/python -m benchmarks.sweep $(ARGS)
	$(BIN)/python -m benchmarks.host $(if $(filter --quick,$(ARGS)),--quick)
	$(BIN)/python -m benchmarks.plots

bench-training: $(STAMP)  ## compare training steps with a hand-written loop; memory over 2,000 steps; seven minutes
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-alignment: $(STAMP)  ## measure alignment on digits: four methods, five beta, three seeds, in 20 minutes
	$(BIN)/python -m benchmarks.alignment $(ARGS)

lint: $(STAMP)  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  ## remove .venv and everything that was built or that tools wrote
	rm -rf $(VENV) .venv-lowest build dist *.egg-info .benchmarks .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f sipo_kernels/_native.* sipo_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "sipo needs Python 3.10 or newer, and $(PYTHON) is older: try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "cannot create $(VENV): on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

$(STAMP): $(INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c $(PINS)
	@$(BIN)/python sipo_kernels/build_info.py
	@touch $@
