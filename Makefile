# `make demo` and `make test` set everything up by themselves; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where to get PyTorch from; https://download.pytorch.org/whl/cpu has it without CUDA, for a tenth of the download.
TORCH_INDEX ?=
MAKEFLAGS += --no-print-directory

# One process a core, up to four, and one thread in each: tensors in tests are small.
WORKERS := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help setup demo test test-fast coverage audit faults fuzz sanitize growth lint format clean

help:
	@echo "make demo       train, export, adapt and report on this machine, in a few minutes on a CPU"
	@echo "make test       the whole test suite; what needs a GPU is left out without one"
	@echo "make test-fast  the quick tests of every package: none takes much more than a second"
	@echo "make coverage   the whole suite without a GPU, and which lines of model and ttt it runs; half as long again"
	@echo "make audit      planted cheats, strict causality and recomputed scores: the tests behind docs/trust.md"
	@echo "make faults     kill train, export, score and ranks fifty times each, and go on each time; a quarter of an hour"
	@echo "make fuzz       N=1000000 mutated files of every format, a quarter of an hour on two cores; findings in runs/fuzz"
	@echo "make sanitize   compute-sanitizer over the kernels' tests; needs a GPU"
	@echo "make growth     train and score for SECONDS=1800: does memory grow?"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make format     let ruff format and fix"
	@echo "make setup      what all of them do first: PyTorch, klora and its tools into $(VENV)"
	@echo "make clean      remove $(VENV) and what builds and runs left"

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("klora needs Python 3.11 or newer; this is " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "1 of 2: PyTorch. PyPI's for Linux brings CUDA's libraries: some gigabytes."
	@if [ -z "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null; then \
		echo "No NVIDIA driver here: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu gets a tenth of that."; fi
	$(BIN)/python -m pip install --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "2 of 2: klora from this folder, what it needs and the tools of its tests."
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	@touch $@
	@echo "klora is ready in $(VENV), $$(du -sh $(VENV) | cut -f1): $(BIN)/klora"

demo: setup
	$(BIN)/klora demo

# Its last line counts the tests.
test: setup
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest -m gpu; else echo "no CUDA GPU here: the tests marked gpu are left out"; fi
	@echo "the tests without a GPU: about 8 minutes on two cores"
	$(WORKERS) -m "not gpu"

coverage: setup
	$(WORKERS) -m "not gpu" --cov=klora.model --cov=klora.ttt --cov-report=term --cov-fail-under=80

# Without TRITON_INTERPRET, which slows what is imported down; nothing here launches a kernel.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --count $(or $(N),1000000) --seed $(or $(SEED),0)

sanitize: setup
	$(BIN)/python tests/sanitize.py

growth: setup
	$(BIN)/python tests/growth.py --seconds $(or $(SECONDS),1800)

test-fast: setup
	@echo "the quick tests: about 2 minutes on two cores"
	$(WORKERS) -m "not gpu and not slow"

audit: setup
	$(WORKERS) -m "not gpu" tests/test_audit.py tests/test_model_audit.py tests/test_verify.py

# Its last lines count the kills that were survived; KILLS=10 makes it ten of each.
faults: setup
	KLORA_FAULTS=$(or $(KILLS),50) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -s tests/test_faults.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist runs *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks .coverage
