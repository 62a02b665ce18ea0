# Every target sets up what it needs in .venv and reuses it. PYTHON names the interpreter (3.11 or later),
# SSL_KERNELS_CUDA=0 builds without the CUDA kernels (see setup.py).
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?=

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-all bench lint info clean

help:
	@echo "make demo      pretrain an encoder with the fused loss and with plain PyTorch's, and compare"
	@echo "make test      build and run the tests (make test-all: the slow sweeps too)"
	@echo "make bench     measure against plain PyTorch, torch.compile and lightly"
	@echo "make info      what is built and what can run here"
	@echo "make lint      ruff"

demo: .venv/built
	$(BIN)/python -m ssl_kernels pretrain $(DEMO_ARGS)

test: .venv/built
	$(BIN)/python -m pytest $(TEST_ARGS)

test-all: .venv/built
	$(BIN)/python -m pytest -m "slow or not slow" $(TEST_ARGS)

bench: .venv/built .venv/peers
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

info: .venv/built
	$(BIN)/python -m ssl_kernels info

clean:
	rm -rf build out .venv/built ssl_kernels/_C*.so

.venv/installed: requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/peers: .venv/installed requirements-bench.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

.venv/built: .venv/installed setup.py $(SOURCES)
	@mkdir -p build
	$(BIN)/python setup.py build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@grep '^ssl_kernels:' build/build.log
	@touch $@
