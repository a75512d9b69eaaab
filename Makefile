# `make demo` and `make test` need only Python, a C++ compiler and make: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-sanitize test-gpu bench-gpu test-tpu test-browser lint clean

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*.cc csrc/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[test]'
# Enough of JAX's CUDA plugin to lower for GPUs with none present; what it depends on is for running there.
	test "$$(uname)" != Linux || $(BIN)/python -m pip install -q --no-deps \
	  "jax-cuda13-plugin==$$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/dlm-kernels generate "def binary_search(" --steps 16 --block 64

# XLA compiles a test's program for one instruction set of ours, and finds it here for the others and the sanitized copy.
test test-sanitize: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/build/jax-cache
test test-sanitize: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
# With its older emitters, into one part, XLA compiles tests in half the time. They are of a process and not of a module.
# jaxlib ends a process over a flag that it does not know: delete here what it drops.
test test-sanitize: export XLA_FLAGS := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
# What these compare XLA compiles as for users, and tests/conftest.py has it optimise too.
AS_FOR_USERS := tests/torch tests/ops/test_properties.py

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 $(AS_FOR_USERS:%=--ignore=%)
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 $(AS_FOR_USERS)
# The best instruction set ran above.
	for isa in $$($(BIN)/python -c 'from dlm_kernels import _cpu; print(*_cpu.available_isas()[1:])'); do \
	  DLM_KERNELS_ISA=$$isa $(BIN)/python -m pytest -n 2 tests/leaves -k cpu || exit 1; done
	case "$$(c++ -print-file-name=libasan.so)" in /*) $(MAKE) test-sanitize SANITIZE=portable;; \
	  *) echo "Left out, for this compiler comes without libasan: make test-sanitize";; esac

# The CPU kernels under AddressSanitizer and UBSan, in a second copy of the package that comes before the first on the path:
# every instruction set of this machine, or with SANITIZE=portable that one alone. Python was built without the sanitizers, so they
# are loaded before it, and what it never frees would be reported as leaks.
SANITIZE ?= 1
SANITIZED := build/sanitized-$(SANITIZE)
SANITIZED_PYTHON = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) $(BIN)/python

$(SANITIZED)/.installed: $(VENV)/.installed
	rm -rf $(SANITIZED)
	DLM_KERNELS_SANITIZE=$(SANITIZE) $(BIN)/python -m pip install -q --no-deps --target $(SANITIZED) .
	touch $@

test-sanitize: $(SANITIZED)/.installed
	set -e; isas=$$($(SANITIZED_PYTHON) -c \
	  'from dlm_kernels import _cpu; assert "$(SANITIZED)" in _cpu.__file__; print(*_cpu.available_isas())'); \
	for isa in $$isas; do DLM_KERNELS_ISA=$$isa $(SANITIZED_PYTHON) -m pytest -n 2 tests/leaves -k cpu; done

# Need an NVIDIA GPU, and JAX with its CUDA plugin, Triton and pytest in .venv where there is one, else in $(PYTHON); fetch nothing.
# ONLY=oracle: the step alone whose name has this word. ONLY=benchmarks BENCH="--minutes 7": no tests, and these options for bench.
test-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/on_gpu.py --only "$(ONLY)"

bench-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/on_gpu.py --bench="$(BENCH)" --only "$(ONLY)"

# Opens the page of `generate --html` in a headless browser: needs Chromium on the path.
test-browser: $(VENV)/.installed
	$(BIN)/python -m pytest -m browser tests/denoiser

# Compiles the TPU kernels for every chip with libtpu, the real compiler (0.7 GB); needs no TPU.
test-tpu: $(VENV)/.installed
	$(BIN)/python -m pip install -q 'libtpu>=0.0.42'
	$(BIN)/python -m pytest -n 2 tests/pallas

lint: $(VENV)/.installed
	$(BIN)/ruff check .

clean:
	rm -rf build dist .venv python/dlm_kernels/*.so python/*.egg-info
