# make demo · test · lint · bench · docs: each sets up .venv when it is missing or its requirements have changed.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses=auto

.PHONY: demo test test-full lint format wheel clean

demo: .venv/installed  ## train a small vision transformer with and without iRPE on real digits
	$(BIN)/irpe train

test: .venv/installed  ## every test but the long ones
	$(PYTEST) -m "not slow and not gpu"

test-full: .venv/installed  ## every test that needs no GPU
	$(PYTEST) -m "not gpu"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/installed  ## the pure-Python wheel, in dist/
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or later; this is " + sys.version.split()[0] + " (PYTHON=... names another)")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
