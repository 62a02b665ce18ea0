# Every target sets up what it needs in .venv and reuses it. PYTHON names the interpreter (3.11 or later),
# SSL_KERNELS_CUDA=0 builds without the CUDA kernels (see setup.py).
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
BIN := .venv/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
CARD_ARGS ?=
TEST_ARGS ?=
# Processes of the tests: one a core, up to eight.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal
# They share the cores, which OpenMP's threads would take from each other if they spun while they wait.
test test-all test-oldest sanitize: export OMP_WAIT_POLICY = passive

# The folders too: a file that goes changes nothing else.
SOURCES := ssl_kernels/_sources.py $(shell find csrc -type d -o -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-all test-peers test-oldest sanitize bench card lint docs docs-links wheel info clean

help:
	@echo "make demo      pretrain an encoder with the fused loss and with plain PyTorch's, and compare"
	@echo "make test      build and run the tests (make test-all: the slow sweeps too)"
	@echo "make test-peers  compare the adapters with the libraries they stand for, write the table of docs/migration.md, run all examples"
	@echo "make test-oldest  the tests with the oldest torch that is supported and its Triton"
	@echo "make sanitize  test the C++ kernels under address and undefined-behaviour sanitizers"
	@echo "make bench     measure against plain PyTorch, torch.compile and lightly"
	@echo "make card      on a machine with a GPU: build, check, time and store (CARD_ARGS=--dry: try that without one)"
	@echo "make info      what is built and what can run here"
	@echo "make lint      ruff"
	@echo "make wheel     a wheel and a source distribution in dist/, the wheel built from the latter and checked"
	@echo "make docs      the site in build/docs/index.html (make docs-links: follow its links to other sites too)"

demo: .venv/built
	$(BIN)/python -m ssl_kernels pretrain $(DEMO_ARGS)

test: .venv/built
	$(BIN)/python -m pytest $(PARALLEL) $(TEST_ARGS)

test-all: .venv/built
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow" $(TEST_ARGS)

test-peers: .venv/built .venv/peers
	$(BIN)/python -m pytest tests/adapters tests/test_examples.py $(TEST_ARGS)
	$(BIN)/python -m pytest tests/test_typing.py -m "slow or not slow" $(TEST_ARGS)
	$(BIN)/python -m tests.adapters.table

# A copy of the repository with an extension of its own, for another torch. What the emulator builds is shared.
# OLDEST_BUILD=build_py leaves the extension out.
OLDEST := build/oldest/package
OLDEST_BUILD ?= build --build-base build/oldest
test-oldest: $(OLDEST)/built
	@mkdir -p $(OLDEST)/build build/gpu_emulation && ln -sfn ../../../gpu_emulation $(OLDEST)/build/gpu_emulation
	cd $(OLDEST) && rm -rf tests benchmarks csrc docs examples
	cp -r tests benchmarks csrc docs examples README.md CHANGELOG.md MANIFEST.in Makefile setup.py pyproject.toml $(OLDEST)
	cd $(OLDEST) && $(CURDIR)/.venv-oldest/bin/python -m pytest $(PARALLEL) $(TEST_ARGS)

$(OLDEST)/built: .venv-oldest/installed setup.py $(SOURCES) $(wildcard ssl_kernels/*.py ssl_kernels/*/*.py)
	@mkdir -p $(OLDEST)
	.venv-oldest/bin/python setup.py -q $(OLDEST_BUILD) --build-lib $(OLDEST) \
		> build/oldest/build.log 2>&1 || { cat build/oldest/build.log; exit 1; }
	@grep '^ssl_kernels:' build/oldest/build.log
	@touch $@

# A copy of the package with an extension of its own. The libraries of the sanitizers must be in the process before Python
# is, which leaks by design. torch.compile, opcheck, processes of their own and larger sizes add time, not kernels.
SANITIZED := build/sanitize/package
sanitize: $(SANITIZED)/built
	rm -rf $(SANITIZED)/tests && cp -r tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(CURDIR)/$(BIN)/python -m pytest tests/ops --hypothesis-profile=short \
		-k "native and not compile and not opcheck and not sets_agree and not large \
		and not usual_sizes and not many_tiles and not threads and not bad_input and not fake_tensors"

$(SANITIZED)/built: .venv/installed setup.py $(SOURCES) $(wildcard ssl_kernels/*.py ssl_kernels/*/*.py)
	@mkdir -p $(SANITIZED)
	SSL_KERNELS_SANITIZE=1 SSL_KERNELS_CUDA=0 $(BIN)/python setup.py -q build --build-base build/sanitize \
		--build-lib $(SANITIZED) > build/sanitize/build.log 2>&1 || { cat build/sanitize/build.log; exit 1; }
	@touch $@

bench: .venv/built .venv/peers
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# With the Python at hand and what it has: a machine with a GPU may have nothing to install from.
card:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.card $(CARD_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package is read from its source, built or not.
docs: .venv/docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs build/docs
	@echo "build/docs/index.html"

docs-links: .venv/docs
	$(BIN)/python -m sphinx --quiet --builder linkcheck docs build/docs-links

# The wheel is made from the source distribution, so that this is known to be whole. It is tried in an environment of its
# own, with the torch of .venv and nothing else that is installed there.
wheel: .venv/installed .venv/wheel
	rm -rf dist build/wheel && mkdir -p build
	$(BIN)/python -m build --no-isolation > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet --disable-pip-version-check $(shell grep ^torch== requirements-dev.txt) dist/*.whl
	cd build/wheel && bin/python -m ssl_kernels info && bin/ssl-kernels check
	@ls dist/*

info: .venv/built
	$(BIN)/python -m ssl_kernels info

clean:
	rm -rf build out .venv/built ssl_kernels/_C*.so

.venv/installed: requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv-oldest/installed: requirements-oldest.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -r requirements-oldest.txt \
		-r <(grep -v ^torch requirements-dev.txt)
	@touch $@

.venv/peers: .venv/installed requirements-bench.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
# It asks for a torch of 2021 and cannot be imported beside this one; its files of losses can.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps solo-learn==1.0.2
	@touch $@

.venv/wheel: .venv/installed requirements-wheel.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-wheel.txt
	@touch $@

.venv/docs: .venv/installed requirements-docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

.venv/built: .venv/installed setup.py $(SOURCES)
	@mkdir -p build
	$(BIN)/python setup.py build_ext --inplace > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@grep '^ssl_kernels:' build/build.log
	@touch $@
