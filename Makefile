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
# What builds the package is pinned too, for which older and newer pips have one of these.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
INSTALL = $(PINNED) $(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt \
	$(EDITABLE)

.DEFAULT_GOAL := help
.PHONY: help demo demo-short setup check test test-heavy test-without-native test-native test-arm bench format dist \
	lock clean try-again

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

test-without-native: $(VENV)/.installed-dev ## install without a compiler and without Python's headers, and test that
	$(BIN)/python -m pytest -m slow --timeout=1800 tests/test_install.py

# Three builds of the kernels with tests/native/driver.cc: as they are shipped, under AddressSanitizer and UBSan, and
# under ThreadSanitizer. The first must hold no function of a file for one instruction set that the linker could take
# for another file's of the same name: on a processor without that set it would crash.
test-native: ## test the C++ kernels without Python, plain and under sanitizers
	$(call need,c++,g++)
	$(call need,nm,binutils)
	$(call need,cmake,cmake)
	$(call build-driver,plain,)
	@! nm -A -C --defined-only build/native/plain/src/native/libunrolled_kernels.a | grep -E ':isa_avx[^:]*:[0-9a-f]* W ' \
		| grep -v __clang_call_terminate || \
		{ echo 'these must be inlined, or stand in an unnamed namespace or in that of the instruction set' >&2; exit 1; }
	build/native/plain/driver
	$(call build-driver,memory,-DUNROLLED_SANITIZE=address$(comma)undefined $(DEBUG))
	build/native/memory/driver
	$(call build-driver,thread,-DUNROLLED_SANITIZE=thread $(DEBUG) -DUNROLLED_SETS=)
	$(shell setarch -R true 2>/dev/null && echo setarch -R) build/native/thread/driver

# Where the libraries of Debian's cross-compiler are.
ARM_LIBRARIES ?= /usr/aarch64-linux-gnu
test-arm: ## test the C++ kernels for 64-bit ARM, in an emulator
	$(call need,aarch64-linux-gnu-g++,g++-aarch64-linux-gnu)
	$(call need,qemu-aarch64,qemu-user)
	$(call need,cmake,cmake)
	$(call build-driver,arm,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++)
	qemu-aarch64 -L $(ARM_LIBRARIES) build/native/arm/driver --quick

comma := ,
# Assertions on, and optimised enough to be quick. Of the instruction sets the smallest and the largest: the others are
# the same code with other constants, and take long to build. For threads, which they all share, the smallest is enough.
DEBUG := -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG='-O1 -g' -DUNROLLED_SETS=avx512bf16
need = @command -v $(1) >/dev/null || { echo '"make $@" needs $(1); on Debian or Ubuntu: apt install $(2)' >&2; exit 1; }
define build-driver
cmake -S . -B build/native/$(1) -DUNROLLED_PYTHON=OFF -DUNROLLED_DRIVER=ON $(2)
MAKEFLAGS=--no-print-directory cmake --build build/native/$(1) --parallel $$(nproc 2>/dev/null || echo 2)
endef

bench: $(VENV)/.installed-dev ## measure against torch on this machine
	$(BIN)/python -m benchmarks

format: $(VENV)/.installed-dev ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.installed-dev ## build the sdist and the wheel into dist/
	$(PINNED) $(BIN)/python -m build

# The pins come from a resolution of their own, so that nothing installed by hand slips in. torch stays at its pin
# unless TORCH=2.14.0 says otherwise; its local version (+cpu) and the CUDA packages, which it pins itself, are left out.
lock: ## resolve the newest dependencies and rewrite constraints.txt
	rm -rf build/lock && $(find-python) && "$$python" -m venv build/lock
	build/lock/bin/python -c 'import tomllib; system = tomllib.load(open("pyproject.toml", "rb"))["build-system"]; \
		print(*system["requires"], sep="\n")' > build/lock/requires
	build/lock/bin/python -m pip --disable-pip-version-check install --upgrade --upgrade-strategy eager \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(if $(TORCH),torch==$(TORCH)) '.[dev]' -r build/lock/requires
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

# The stamps: installed once, and again when what is to be installed has changed. An editable install knows its modules
# by name, so a module that is added, moved or removed counts too.
NATIVE := CMakeLists.txt $(wildcard src/native/*)
MODULES := $(VENV)/.modules-$(shell find src/unrolled -name '*.py' | LC_ALL=C sort | cksum | cut -d' ' -f1)
# Where the extension could not be built, `make setup` tries again; the other targets go on without it.
AGAIN := $(if $(filter setup,$(MAKECMDGOALS)),$(if $(wildcard $(VENV)/.without-native),try-again))

define tell-native
@if $(BIN)/python -c 'import unrolled._native' 2>/dev/null; then rm -f $(VENV)/.without-native; \
else touch $(VENV)/.without-native; \
	echo 'Installed without the C++ extension, so with slower layers. Why, and what mends it: $(BIN)/unrolled doctor'; fi
endef

$(MODULES): | $(BIN)/python
	@rm -f $(VENV)/.modules-* && touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) $(MODULES) $(AGAIN) | $(BIN)/python
	$(tell-size)
	$(INSTALL) .
	$(tell-native)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(NATIVE) $(MODULES) $(AGAIN) | $(BIN)/python
	$(tell-size)
	$(INSTALL) '.[dev]'
	$(tell-native)
	@touch $@ $(VENV)/.installed
