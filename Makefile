# Everything works on a fresh Debian or Ubuntu with Python >= 3.11; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Network namespaces need root.
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
# Compiled modules that have stubs.
STUBS = $(subst /,.,$(patsubst src/%.pyi,%,$(wildcard src/svcdp/*/*.pyi)))
# What real kernels judge: IPVS in user-mode Linux and rules, clients in network namespaces.
kernel_TESTS = tests/differential/kernel tests/netns/rules
netns_TESTS = $(wildcard tests/netns/test_*.py)
# What is compiled.
CORE = $(wildcard include/svcdp/*.h pyx/svcdp/*/*.pxd pyx/svcdp/*/*.pyx)
# One build at a time, also when several targets run side by side.
LOCKED := flock build/.lock

# The interpreter itself leaks at exit, so leaks are not looked for; with malloc() for every object
# the sanitizer sees where each buffer ends.
SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc

.PHONY: help build demo test test-kernel test-netns test-library test-cluster lint types dist bench asan clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

build/.system: apt-packages.txt scripts/install-packages
	mkdir -p build && scripts/install-packages && touch $@

build/.venv: pyproject.toml build/.system
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	    'svcdp needs Python >= 3.11 and $(PYTHON) is older: apt-get install python3.11-dev python3.11-venv,' \
	    'then make PYTHON=python3.11' >&2; exit 1; }
	$(LOCKED) sh -ec '$(PYTHON) -m venv $(VENV); $(BIN)/pip install -q -U pip; $(BIN)/pip install -q --group dev' && touch $@

build/.installed: build/.venv setup.py $(CORE)
	$(LOCKED) $(BIN)/pip install -q --no-build-isolation -e '.[node]' && touch $@

build: build/.installed ## compile the core and install svcdp into .venv, editable

demo: build ## real clients, real servers, real traffic, in network namespaces
	$(SUDO) $(BIN)/svcdp demo

# What waits for kernels, what waits for daemons and what computes share two cores well.
test: build ## all tests; those in network namespaces need root
	@$(MAKE) --no-print-directory -j3 test-kernel test-netns test-library

test-kernel test-netns: test-%: build
	@$(BIN)/pytest $($*_TESTS) >build/$*-tests.log 2>&1; status=$$?; \
	cat build/$*-tests.log; exit $$status

test-library: build
	$(BIN)/pytest $(addprefix --ignore=,$(kernel_TESTS) tests/netns)

# Go finds what it compiled before in its own cache; without that it takes some ten minutes.
build/cluster/apiserver: $(addprefix tests/cluster/,go.mod go.sum main.go)
	@cd tests/cluster && version=$$(go list -m -f '{{.Version}}' k8s.io/kubernetes) || { echo \
	    'test-cluster needs Go >= 1.26 as `go` in PATH, or >= 1.21 with GOTOOLCHAIN=auto' >&2; exit 1; }; \
	nice go build -buildvcs=false -trimpath -o $(CURDIR)/$@ \
	    -ldflags="-s -w -X k8s.io/component-base/version.gitVersion=$$version" .

test-cluster: build build/cluster/apiserver ## what follows a real Kubernetes API server; needs Go
	$(BIN)/pytest tests/cluster

bench: build ## the core beside a plain C loop, clusters of 5,000 Services, the queue path
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.bench_sync
	$(SUDO) $(BIN)/python benchmarks/bench_queue.py

lint: build ## ruff and cython-lint
	$(BIN)/ruff check && $(BIN)/ruff format --check
	PATH=$(BIN):$$PATH cython-lint pyx

types: build ## mypy --strict, stubs against the compiled modules, pyright
	$(BIN)/mypy && $(BIN)/stubtest --allowlist tests/typing/stubtest.allow $(STUBS)
	$(BIN)/pyright

asan: build ## two million mutated packets under AddressSanitizer and UBSan
	$(LOCKED) env SVCDP_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/asan --build-lib build/asan/lib
	env $(SANITIZED) PYTHONPATH=build/asan/lib:tests/support $(BIN)/python tests/fuzz/driver.py 2000000

dist: build ## sdist and wheel, into dist/
	rm -rf dist && $(BIN)/python -m build --no-isolation

clean: ## remove what was built
	rm -rf build dist $(VENV) src/*.egg-info && find src pyx -name '*.so' -delete -o -name '*.c' -delete
