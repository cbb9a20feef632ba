# `make` lists what can be made. Nothing here needs a network but pip's own.

VENV ?= .venv
# Empty: the first of python3, python3.13, python3.12, python3.11 that will do.
PYTHON ?=
# Linux only: address of PyTorch's CPU index (see pytorch.org/get-started), to be spared the several GB of the CUDA build.
TORCH_INDEX ?=
# --editable: the code in src/ is what runs. Empty: the package is built and installed as a user gets it.
EDITABLE ?= --editable
# `make lock` keeps this version of torch.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt $(EDITABLE)

.DEFAULT_GOAL := help
.PHONY: help demo demo-short setup check test test-heavy bench format dist lock clean

help: ## list these targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON=python3.12, VENV=.venv, TORCH_INDEX=<address of PyTorch's CPU index, see pytorch.org/get-started>"

demo: $(VENV)/.installed ## install into .venv and show what unrolled does
	$(BIN)/unrolled demo --force

demo-short: $(VENV)/.installed ## the same demo, shortened for CI
	$(BIN)/unrolled demo --short --force

setup: $(VENV)/.installed-dev ## install into .venv, with the tools for development

check: $(VENV)/.installed-dev ## lint, format check and types, without the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## everything that everyone runs: check, then the tests
	$(BIN)/python -m pytest

test-heavy: $(VENV)/.installed-dev ## the heavy samples (pytest -m slow), minutes each
	$(BIN)/python -m pytest -m slow --timeout=1800

bench: $(VENV)/.installed-dev ## measure against torch on this machine
	$(BIN)/python -m benchmarks

format: $(VENV)/.installed-dev ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.installed-dev ## build the sdist and the wheel into dist/
	$(BIN)/python -m build

# The pins come from a resolution of their own, so that nothing installed by hand slips in. torch stays at its pin
# unless TORCH=2.14.0 says otherwise; its local version (+cpu) and the CUDA packages, which it pins itself, are left out.
lock: ## resolve the newest dependencies and rewrite constraints.txt
	rm -rf build/lock && $(find-python) && "$$python" -m venv build/lock
	build/lock/bin/python -m pip --disable-pip-version-check install --upgrade --upgrade-strategy eager \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(if $(TORCH),torch==$(TORCH)) '.[dev]'
	{ echo '# The exact versions that are tested, written by `make lock`; pyproject.toml holds the ranges.'; \
	  build/lock/bin/python -m pip freeze --all --exclude unrolled --exclude pip \
	  | sed -E 's/\+.*//; s/ @ .*//' | grep -viE '^(nvidia-|cuda-|triton)'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt && rm -rf build/lock

clean: ## remove .venv, caches and what builds leave
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# Sets the shell variable `python`, or says what is missing. Trying beats looking: a name can exist and not run.
define find-python
for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11) ''; do \
	test -z "$$python" || ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || break; \
done; \
if test -z "$$python"; then \
	echo 'unrolled needs Python 3.11 or newer: install it, or name it with PYTHON=/path/to/python3.12' >&2; exit 1; \
elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	echo "$$python cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; \
fi
endef

$(BIN)/python:
	@$(find-python); echo "$$python -m venv $(VENV)"; "$$python" -m venv $(VENV)

# Said before torch is first installed, where its default build is the large one.
define tell-size
@test -n "$(TORCH_INDEX)" || test "$$(uname)" != Linux || $(BIN)/python -c 'import torch' 2>/dev/null || \
	echo "Installing torch. If pip now fetches several GB for CUDA and you have no use for them, stop it and see: make help"
endef

# The stamps: installed once, and again when what is to be installed has changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(tell-size)
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(tell-size)
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.installed
