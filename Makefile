# make demo    the whole pipeline on the embedded model, in a few minutes
# make test    everything a change must pass: style, types, import rules, tests
# make help    this list
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help demo test check fast slow bench clean

help:
	@sed -n 's/^# //p' Makefile
	@echo 'make check   style, types and import rules alone'
	@echo 'make fast    the tests alone, without style and types'
	@echo 'make slow    tests that take minutes'
	@echo 'make bench   the measurements that the README quotes'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: nothing that follows may exchange it for another build.
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.demo

# Waiting threads sleep instead of spinning: on a busy machine that is the difference between minutes and an hour.
demo: export OMP_WAIT_POLICY ?= PASSIVE
demo: $(VENV)/.demo
	$(BIN)/moeprune run recipes/quickstart.yaml --out runs/quickstart

test: check fast

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'not slow and not gpu and not engine'

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) runs build dist
