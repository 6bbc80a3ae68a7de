# A fresh machine needs Python 3.11+ and make, and a C compiler with Python's headers for the quick resize of images;
# everything else is installed into .venv at the top of the checkout.
PYTHON ?= python3
# The torch requirement: constraints.txt pins it unless another is given here; see README.md, "GPUs".
TORCH ?= torch
DEMO ?= .demo

BIN := .venv/bin
RUN := $(BIN)/python
STAMP := .venv/.installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-fast check format lint types clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 14

install: $(STAMP) ## make .venv and install the project, with everything for development

$(STAMP): pyproject.toml constraints.txt pipeline/model/resample.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "twotower needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@grep -vE '$(if $(filter torch,$(TORCH)),^#,^torch==)' constraints.txt > .venv/constraints.txt
	@echo "installing into .venv (a few minutes the first time)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt $(TORCH)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt --editable '.[dev]'
	@rm -f .venv/.installed-* && touch $@

demo: $(STAMP) ## draw the demo catalog, embed it on a local Ray, search it, write a contact sheet
	@$(RUN) -m jobs.demo --out $(DEMO)

test: $(STAMP) ## all tests but the slow ones
	@$(RUN) -m pytest -m 'not slow'

test-slow: $(STAMP) ## the slow tests
	@$(RUN) -m pytest -m slow

test-fast: $(STAMP) ## the tests that need no Ray
	@$(RUN) -m pytest -m 'not slow and not ray'

check: format lint types test-fast ## format, lint, types, import rules and the fast tests

format: $(STAMP) ## fail on unformatted files
	@$(BIN)/ruff format --check .

lint: $(STAMP) ## ruff's rules
	@$(BIN)/ruff check .

types: $(STAMP) ## mypy, strict
	@$(BIN)/mypy

clean: ## remove .venv, the demo's output and the caches
	rm -rf .venv $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
