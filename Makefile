# `make demo` and `make test` set everything up by themselves; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test lint format clean

help:
	@echo "make demo    train, export, adapt and report on this machine, in a few minutes on a CPU"
	@echo "make test    the whole test suite with coverage; what needs a GPU is left out without one"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make format  let ruff format and fix"
	@echo "make clean   remove .venv and what builds and runs left"

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("klora needs Python 3.11 or newer; this is " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/klora demo

test: setup
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest -m gpu; else echo "no CUDA GPU here: the tests marked gpu are left out"; fi
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not gpu" --cov=klora.model --cov=klora.ttt --cov-report=term --cov-fail-under=80

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist runs *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .coverage
