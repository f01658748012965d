# The two commands of the README: `make demo` and `make test`. Both make the environment first, from requirements.lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made-from-lock

.PHONY: demo test unit lint lock clean

demo: $(STAMP)
	$(BIN)/slope-compile run digits-resnet18

test: lint $(STAMP)
	$(BIN)/python -m pytest

unit: $(STAMP)
	$(BIN)/python -m pytest -m "not e2e"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every package pinned with its hash; the project itself editable, without asking the network again.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Resolve anew (needs uv: `pip install uv`); the file names no index.
lock:
	uv pip compile --python-version 3.11 --extra train --extra rtx --extra dev --generate-hashes \
		--no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) dist runs
