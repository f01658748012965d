# The two commands of the README: `make demo` and `make test`. Both make the environment first, from requirements.lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4
STAMP  := $(VENV)/.made-from-lock

.PHONY: demo test unit lint lock clean

demo: $(STAMP)
	$(BIN)/slope-compile run digits-resnet18

test: lint $(STAMP)
	$(PYTEST)

unit: $(STAMP)
	$(PYTEST) -m "not e2e"

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

# Resolve anew (needs uv: `pip install uv`); the files name no index. Those of docker/ hold for every Python from 3.10 on.
COMPILE := uv pip compile --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet
lock:
	$(COMPILE) --python-version 3.11 --extra train --extra rtx --extra dev --output-file requirements.lock pyproject.toml
	$(COMPILE) --python-version 3.10 --universal --output-file docker/requirements-device.txt pyproject.toml
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" | \
		$(COMPILE) --python-version 3.10 --universal --output-file docker/requirements-build.txt -

clean:
	rm -rf $(VENV) dist runs
