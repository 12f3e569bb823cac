# make demo       prunes a small real model and prints one table (no GPU needed)
# make test       compiles every kernel, checks what ptxas said about it, lints, runs all tests
# make test-gpu   the tests that need a GPU, alone
# make fuzz       damaged folders, GGUFs and headers by the thousand (SECURITY.md)
# make lint       formatters and linters of Python and C++, types, the layering; changes nothing
# make format     what the formatters want, written
# make wheel      dist/*.whl with the kernels for 80, 89 and 90a, for machines without a compiler
# make docs       the site of docs/ and the API reference in build/site; warnings are errors
# make bench-mma  every tile of the mma.sp kernel, the one for Ampere and Ada, on two layers
# make bench      measures on the GPU and appends to bench/records
# make clean      removes what was built here (not the virtual environment)
#
# Set-up happens by itself, once: in the active virtual environment when there is one, in .venv
# otherwise. A torch that is already there is kept; else TORCH_SPEC is installed, for example
#   make test TORCH_SPEC=torch==2.13.0       make demo PYTHON=python3.12 VENV=/path/to/env

PYTHON ?= python3
VENV ?= $(or $(VIRTUAL_ENV),.venv)
TORCH_SPEC ?= torch>=2.8

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# listed,NAME: the entries of the one-line list NAME in pyproject.toml, quoted for the shell
listed = $(shell sed -n '/^$(1) = \[/{s/.*= \[//;s/\].*//;s/,//g;p;}' pyproject.toml)
BUILD_REQUIRES := $(call listed,requires)
SOURCES := setup.py pyproject.toml CMakeLists.txt sparsekern/__init__.py \
  $(shell find csrc -type f ! -name '*.md')

# Everything but the sources that decides what set-up installs; a change of it repeats the set-up.
SETTINGS := $(abspath $(VENV)) $(shell command -v nvcc) $(CUDA_HOME) $(CUDA_PATH) \
  $(wildcard $(VENV)/lib/python*/site-packages/nvidia/*/bin/nvcc) \
  $(SPARSEKERN_NO_CUDA) $(SPARSEKERN_CUDA_ARCHS) $(SPARSEKERN_WERROR) \
  $(SPARSEKERN_RACECHECK)
STAMPS := build/stamps
$(shell mkdir -p $(STAMPS); echo '$(SETTINGS)' | cmp -s - $(STAMPS)/settings \
  || echo '$(SETTINGS)' > $(STAMPS)/settings)

# What clang-format looks at: all but the generated file, which has a layout of its own.
CPP := $(shell find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')
CPP := $(filter-out csrc/ptx/wgmma_sp.cuh,$(CPP))

.PHONY: demo test test-gpu fuzz docs lint format wheel bench bench-mma setup setup-test kernels clean
.DELETE_ON_ERROR:
MAKEFLAGS += --jobs=2

demo: $(STAMPS)/hf
	$(PY) -m sparsekern.demo

# One process per core; one process where there is a GPU (python_tests/conftest.py).
test: lint $(STAMPS)/test kernels
	$(PY) -m pytest -q -n auto --dist loadfile

test-gpu: $(STAMPS)/test
	$(PY) -m pytest -q -m gpu

fuzz: $(STAMPS)/test
	$(PY) -m python_tests.fuzz 3500

lint: $(STAMPS)/lint
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(VENV)/bin/lint-imports --no-logo --no-cache pyproject.toml
	$(PY) -m mypy

format: $(STAMPS)/lint
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

wheel: $(STAMPS)/wheel
	$(PY) .ci/wheel.py dist

docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(STAMPS)/bench
	$(PY) -m bench

bench-mma: $(STAMPS)/bench
	$(PY) -m bench linear --sweep mma --dtype bfloat16 --shapes 4096x4096,28672x4096
	$(PY) -m bench linear --providers cuda-mma,dense --dtype bfloat16 --shapes 4096x4096,28672x4096

setup: $(STAMPS)/hf
setup-test: $(STAMPS)/test

# The gate on every kernel's registers, spills and wgmma notes; the logs come from the build.
kernels: $(STAMPS)/test
	@if $(PY) -c "import sys; from sparsekern import _native; sys.exit(not _native.available())"; \
	then $(PY) csrc/tools/ptxas_log.py check build/ptxas csrc; \
	else $(PY) -c "from sparsekern import _native; print('kernels not checked:', _native.reason())"; \
	fi

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/tools: $(VENV)/pyvenv.cfg $(STAMPS)/settings pyproject.toml
	$(PIP) install -q $(BUILD_REQUIRES)
	@touch $@

# The compiler needs no torch: it works while pip installs it, and while the linters run.
$(STAMPS)/objects: $(STAMPS)/tools $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# torch comes first and alone: which build of it (CPU, CUDA) is the user's choice.
$(STAMPS)/torch: $(STAMPS)/tools
	$(PY) -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH_SPEC)"
	@touch $@

$(STAMPS)/lint: $(STAMPS)/torch pyproject.toml
	$(PIP) install -q $(call listed,dependencies) $(call listed,lint)
	@touch $@

# Without isolation the compiled objects are reused, so a repeated set-up takes seconds.
$(STAMPS)/test: $(STAMPS)/lint # one pip at a time
$(STAMPS)/hf $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/docs: $(STAMPS)/torch $(STAMPS)/objects $(SOURCES)
	$(PIP) install -q --no-build-isolation -e ".[$(@F)]"
	@touch $@

$(STAMPS)/wheel: $(STAMPS)/tools pyproject.toml
	$(PIP) install -q $(call listed,wheel)
	@touch $@

clean:
	rm -rf build dist *.egg-info sparsekern/_C.*.so
