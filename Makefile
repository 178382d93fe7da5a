# Everything runs in .venv, made on first use; nothing but Python (>= 3.11), make and git is expected to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test lint format slow real-data clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed ## Train, evaluate, caption and draw on the embedded data set (about five minutes on two cores)
	$(BIN)/python scripts/demo.py $(DEMO)

lint: $(VENV)/installed ## Check style and types
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/mypy

test: lint ## Lint, type-check and run the tests that need neither minutes, a GPU nor photographs
	$(BIN)/python -m pytest

slow: $(VENV)/installed ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

real-data: $(VENV)/installed ## Run the tests on the photographs in ../shared/data
	$(BIN)/python -m pytest -m real_data

format: $(VENV)/installed ## Format the code
	$(BIN)/ruff check --fix src tests scripts
	$(BIN)/ruff format src tests scripts

clean: ## Remove the environment and caches (not runs/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
