# make demo   the whole job on a small data set that needs no download
# make test   linters, type checker and all tests
# Both set everything up on a fresh machine; PYTHON=python3.12 picks an interpreter (3.10 or later).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo fashion-mnist test lint install clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/divqat run --config configs/digits.yaml --out runs/digits

fashion-mnist: .venv/installed
	$(BIN)/divqat run --config configs/fashion-mnist.yaml --out runs/fashion-mnist

test: lint
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "divqat needs Python 3.10 or later; say PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

.venv/dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
