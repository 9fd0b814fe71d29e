# Two commands for a newcomer: `make quickstart` and `make test`. The rest is what they are made of.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pins hold for what pip builds with, too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what it imports; to compile all of torch and transformers took 65 of 230 seconds.
export PIP_NO_COMPILE := 1

.PHONY: help venv quickstart test test-fast test-long lint check format bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

quickstart: $(VENV)/.installed ## the whole pipeline on a small model: about five minutes on two cores
	$(BIN)/python tools/quickstart.py

test: lint ## every check: ruff, import-linter, micro benchmarks alone, pytest and, as one of its tests, mypy
	$(BIN)/pytest -n 0 tests/benchmarks/test_micro.py
	$(BIN)/pytest

test-fast: $(VENV)/.installed-dev ## pytest without its slow tests
	$(BIN)/pytest -m "not slow"

test-long: $(VENV)/.installed-dev ## pytest's long tests alone: more kills, memory at size, each benchmark from end to end
	$(BIN)/pytest -m long

lint: $(VENV)/.installed-dev ## the checks that take a second: ruff, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

check: lint ## the checks that read the code: those and mypy, which takes half a minute
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## let ruff mend and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/.installed-dev ## .venv with all packages and tools, and nothing run

bench: $(VENV)/.installed-dev ## what everything takes, beside the machine's own rates: about twelve minutes
	$(BIN)/python tools/bench.py run

clean: ## remove what make made
	rm -rf $(VENV) quickstart .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt packages/*/pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

# All at once, whether or not the rest is there: pip takes a minute less than for one after the other.
$(VENV)/.installed-dev: requirements*.txt constraints.txt packages/*/pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $(VENV)/.installed $@
