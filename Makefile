# Everything works on a fresh Debian or Ubuntu with Python >= 3.11; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Network namespaces need root.
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
# Compiled modules that have stubs.
STUBS = $(subst /,.,$(patsubst src/%.pyi,%,$(wildcard src/svcdp/*/*.pyi)))
# One build at a time, also when several targets run side by side.
LOCKED := flock build/.lock

.PHONY: help demo test build lint types bench asan dist clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

build/.system: apt-packages.txt scripts/install-packages
	mkdir -p build && scripts/install-packages && touch $@

build/.venv: pyproject.toml build/.system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	    'svcdp needs Python >= 3.11 and $(PYTHON) is older: apt-get install python3.11-dev python3.11-venv,' \
	    'then make PYTHON=python3.11' >&2; exit 1; }
	$(LOCKED) sh -ec '$(PYTHON) -m venv $(VENV); $(BIN)/pip install -q -U pip; $(BIN)/pip install -q --group dev' && touch $@

build: build/.venv ## compile the core and install svcdp into .venv, editable
	$(LOCKED) $(BIN)/pip install -q --no-build-isolation -e '.[node]'

demo: build ## real clients, real servers, real traffic, in network namespaces
	$(SUDO) $(BIN)/svcdp demo

test: build ## all tests; those in network namespaces need root
	$(BIN)/pytest

lint: build ## ruff and cython-lint
	$(BIN)/ruff check && $(BIN)/ruff format --check
	PATH=$(BIN):$$PATH cython-lint pyx

types: build ## mypy --strict, stubs against the compiled modules, pyright
	$(BIN)/mypy && $(BIN)/stubtest --allowlist tests/typing/stubtest.allow $(STUBS)
	$(BIN)/pyright

dist: build ## sdist and wheel, into dist/
	rm -rf dist && $(BIN)/python -m build --no-isolation

clean: ## remove what was built
	rm -rf build dist $(VENV) src/*.egg-info && find src pyx -name '*.so' -delete -o -name '*.c' -delete
