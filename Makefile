# make help lists the targets. Everything runs in .venv, made from requirements.lock on first use.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
PY     := .venv/bin/python
WORKERS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")

SUITE  ?= auto
DEVICE ?= auto

# only what was set on the command line is handed on; the rest is the suite's
CHOICES := $(if $(TASK),task=$(TASK)) $(if $(PATTERN),pattern=$(PATTERN)) $(if $(ATTENTION),attention=$(ATTENTION)) $(if $(BACKBONE),backbone=$(BACKBONE)) \
	$(if $(BUDGET),budget=$(BUDGET)) $(if $(SEEDS),'seed=range($(SEEDS))') $(if $(RESULTS),results=$(RESULTS)) $(ARGS)

.PHONY: help setup bench report list test lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | awk -F'\t' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo "  settings: TASK=mqar PATTERN=causal_cross SUITE=recall ATTENTION=softmax,based BACKBONE=decoder BUDGET=small SEEDS=3 DEVICE=cpu RESULTS=folder ARGS='key=value ...'"

setup: .venv/.ready  ## make .venv from requirements.lock (done by every other target when needed)

.venv/.ready: requirements.lock
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else 'Python 3.11 to 3.13 is needed, found %d.%d; type make PYTHON=python3.12' % v)"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

bench: setup  ## train and rank the mechanisms of a suite on a task: make bench TASK=mqar
	@$(PY) -m bench suite=$(SUITE) device=$(DEVICE) $(CHOICES)

report: setup  ## rebuild tables, plots and leaderboards from the records alone
	@$(PY) -m bench.report $(if $(RESULTS),--results $(RESULTS))

list: setup  ## list tasks, backbones, attentions, budgets and suites
	@$(PY) -m bench.list

test: setup  ## run all tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

lint: setup  ## check style and types
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

clean:  ## remove .venv and caches; results stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
