# `make demo` and `make test` need only Python, a C++ compiler and make: each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu bench-gpu test-tpu test-browser lint clean

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*.cc csrc/*.h csrc/*/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[test]'
# Enough of JAX's CUDA plugin to lower for GPUs with none present; what it depends on is for running there.
	test "$$(uname)" != Linux || $(BIN)/python -m pip install -q --no-deps \
	  "jax-cuda13-plugin==$$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/dlm-kernels generate "def binary_search(" --steps 16 --block 64

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2
# The best instruction set ran above.
	for isa in $$($(BIN)/python -c 'from dlm_kernels import _cpu; print(*_cpu.available_isas()[1:])'); do \
	  DLM_KERNELS_ISA=$$isa $(BIN)/python -m pytest -n 2 tests/leaves -k cpu || exit 1; done

# Need an NVIDIA GPU, and JAX with its CUDA plugin, Triton and pytest in .venv where there is one, else in $(PYTHON); fetch nothing.
test-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/on_gpu.py

bench-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) tests/on_gpu.py --bench

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
