# Everything works on a fresh Debian or Ubuntu with Python >= 3.11; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One build at a time, also when several targets run side by side.
LOCKED := flock build/.lock

.PHONY: help demo test build lint types bench asan dist clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

build/.system: apt-packages.txt scripts/install-packages
	mkdir -p build && scripts/install-packages && touch $@

build/.venv: pyproject.toml build/.system
	$(LOCKED) sh -ec '$(PYTHON) -m venv $(VENV); $(BIN)/pip install -q -U pip; $(BIN)/pip install -q --group dev' && touch $@

build: build/.venv ## compile the core and install svcdp into .venv, editable
	$(LOCKED) $(BIN)/pip install -q --no-build-isolation -e '.[node]'

demo: build ## real clients, real servers, real traffic, in network namespaces
	$(BIN)/svcdp demo

test: build ## all tests
	$(BIN)/pytest

clean: ## remove what was built
	rm -rf build dist $(VENV) src/*.egg-info && find src pyx -name '*.so' -delete -o -name '*.c' -delete
