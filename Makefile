# `make demo` and `make test` do all their own set-up in .venv; nothing else is needed than python >= 3.11.
# PYTHON=... picks the interpreter, VENV=... the environment, TORCH=... and HF=... what to ask pip for.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
HF ?= transformers==5.17.0
BIN := $(VENV)/bin
EXTRAS := demo,test

.PHONY: help demo demo-full test test-models test-others lint setup clean

help:
	@echo "make demo       multi-teacher distillation on simulated driving scenes -> runs/demo/report.html"
	@echo "make demo-full  the same with 3 seeds and every control (an hour or two on 2 cores)"
	@echo "make test       the whole test suite"
	@echo "make lint       ruff and mypy --strict"
	@echo "make clean      remove the environment, builds and runs"

demo: setup
	$(BIN)/drivekd demo

demo-full: setup
	$(BIN)/drivekd demo --full

# Two halves side by side, a core each. Triton kernels are checked twice: run by its interpreter, then
# compiled for GPUs that need not be there.
MODELS := tests/distributed tests/docs tests/integration

test: setup
	@$(MAKE) --no-print-directory -j2 test-models test-others

test-models:
	MAKEFLAGS= OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(MODELS)

test-others:
	MAKEFLAGS= OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(addprefix --ignore=,$(MODELS))
	MAKEFLAGS= $(BIN)/python -m pytest -q tests/kernels

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.installed

# torch first: the extension is built against the torch that is already there (csrc/README.md).
$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "drivekd needs python >= 3.11; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "drivekd: installing $(TORCH) into $(VENV) (once)"
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/core/* csrc/cuda/*)
	@echo "drivekd: installing drivekd[$(EXTRAS)] and building its extension (once)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[$(EXTRAS)]" "$(HF)"
	@$(BIN)/python -m drivekd doctor --build
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info drivekd/*.so
