# `make quickstart` and `make test` do all the set-up; nothing is installed twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LABEL_ENV ?= .venv-label

.PHONY: test-slow quickstart test check clean label-env test-label

quickstart: $(INSTALLED)
	$(BIN)/biovfm quickstart

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -n 0

label-env: $(LABEL_ENV)/.installed

test-label: $(INSTALLED) label-env
	LABEL_ENV=$(LABEL_ENV) $(BIN)/python -m pytest -m slow -n 0 tests/label

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(LABEL_ENV) .mypy_cache .ruff_cache .import_linter_cache dist build

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

# MONAI Label needs older releases of what this package uses; without sam2, which is of gigabytes, and torchvision.
$(LABEL_ENV)/.installed: pyproject.toml constraints-label.txt
	test -x $(LABEL_ENV)/bin/python || $(PYTHON) -m venv $(LABEL_ENV)
	$(LABEL_ENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-deps --requirement constraints-label.txt
	$(LABEL_ENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-deps --editable .
	touch $@
