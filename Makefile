# `make run`, `make test`: the two commands. Everything else is for those who work on the code.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
DATA ?=
ROUTERS ?=

.PHONY: run test test-fast lint bench clean

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "make: Python 3.11 or 3.12 is needed, found %d.%d: set PYTHON=python3.11" % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

run: .venv/.installed  ## the whole loop; DATA=<folder, file or hub name>, ROUTERS=<kinds, or all: every kind, with and without labels>
	@$(BIN)/routellm retrain $(if $(DATA),--source "$(DATA)") $(if $(ROUTERS),--routers "$(ROUTERS)") $(if $(filter all,$(ROUTERS)),--compare-augmentation)

# three workers of one thread each on two cores: many tests wait for servers; in the order of
# their names, since the long files are of the first folders
test: .venv/.installed  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 25

test-fast: .venv/.installed  ## no server, under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed  ## prints one table
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .routellm .pytest_cache .mypy_cache .ruff_cache
