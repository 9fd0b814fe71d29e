# A newcomer needs two commands: `make quickstart` and `make test`. The other targets are parts of them, or rarer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pins also apply to the tools that pip builds with.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles a module when it imports it; compiling all of torch and transformers took 65 of 230 seconds.
export PIP_NO_COMPILE := 1

.PHONY: help venv quickstart test test-fast test-long lint check format bench clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

quickstart: $(VENV)/.installed ## run the whole pipeline on a small model: about five minutes on two cores
	$(BIN)/python tools/quickstart.py

test: lint ## run every check: ruff, import-linter, micro benchmarks, then pytest, one of whose tests runs mypy
	$(BIN)/pytest -n 0 tests/benchmarks/test_micro.py
	$(BIN)/pytest

test-fast: $(VENV)/.installed-dev ## run pytest without its slow tests
	$(BIN)/pytest -m "not slow"

test-long: $(VENV)/.installed-dev ## run only pytest's long tests: more kills, memory of large runs, whole benchmarks
	$(BIN)/pytest -m long

lint: $(VENV)/.installed-dev ## run the checks that take a second: ruff, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

check: lint ## run lint's checks and mypy, which takes half a minute
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: $(VENV)/.installed-dev ## create .venv with all packages and tools, and run nothing

bench: $(VENV)/.installed-dev ## measure the speed of everything beside the machine's own limits: about twelve minutes
	$(BIN)/python tools/bench.py run

clean: ## remove what make created
	rm -rf $(VENV) quickstart .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old: Python 3.11 or newer is needed (make PYTHON=python3.12 ...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt constraints.txt packages/*/pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

# Everything is installed at once, even if a part is already there: pip takes a minute less than for two installs.
$(VENV)/.installed-dev: requirements*.txt constraints.txt packages/*/pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $(VENV)/.installed $@
