# Two commands do everything: `make demo` (the main job) and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip builds DeepSpeed from source; without isolation it sees the torch that is here instead of fetching another one
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The tests of a file stay in one worker, and files start in their order: the short unit tests last, to end together.
WORKERS ?= 2
# Hundreds of processes are started, of which each compiles all modules where the environment forbids to keep bytecode.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
SHARD ?= 1/1

.PHONY: help install demo test test-fast test-long test-all check format docs bench lock clean

help:
	@echo "make install   set up .venv (the other targets do it when they need it)"
	@echo "make demo      set up, then prepare data, train, generate and evaluate on this machine"
	@echo "make test      set up, then run the tests (about 9 minutes on 2 cores)"
	@echo "make test-fast the unit tests only (about a minute)"
	@echo "make test-all  the long tests as well (about half an hour); SHARD=2/3 runs the second third"
	@echo "make test-long the long tests alone; SHARD works here too. WORKERS=8 suits a larger machine"
	@echo "make check     lint, formatting, types, import rules      make format  fix the first two"
	@echo "make docs      write the pages made from the code         make bench   the benchmarks (quiet machine)"
	@echo "make lock      renew requirements/ from pyproject.toml"

install: $(VENV)/.installed

demo: $(VENV)/.installed
	@$(BIN)/python tools/demo.py

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not long" tests

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not long" tests/unit

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m long --shard $(SHARD) tests

test-all: $(VENV)/.installed-dev
	$(PYTEST) --shard $(SHARD) tests

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: requirements/build.txt requirements/run.txt pyproject.toml
	@echo "setting up $(VENV) (once; several minutes where packages have to be fetched)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r requirements/build.txt
	$(PIP_INSTALL) --no-build-isolation -r requirements/run.txt
	$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.txt
	$(PIP_INSTALL) --no-build-isolation -r requirements/dev.txt
	@touch $@

docs: $(VENV)/.installed
	$(BIN)/python tools/make_docs.py

bench: $(VENV)/.installed-dev
	$(BIN)/python bench/preprocess.py
	$(BIN)/python bench/loader.py
	$(BIN)/python bench/checkpoint_save.py
	$(BIN)/python bench/checkpoint_load.py
	$(BIN)/python bench/checkpoint_moves.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/start.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/layouts.py
	$(BIN)/python bench/train_step.py
	$(BIN)/python bench/generate.py
	$(BIN)/python bench/serve.py

lock:
	$(PYTHON) tools/lock.py

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
