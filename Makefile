PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

# The main job on embedded data: end-to-end, checkpointing, local and PGL side by side, in a few minutes on 2 cores.
demo: $(VENV)/.installed
	$(BIN)/torchlocal compare --config demo --out runs/demo

# Everything that has to pass: format, lint, types, tests.
test: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "torchlocal needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,timm,lightning,transformers,peft]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .ruff_cache .pytest_cache
