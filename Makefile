# make demo, make test: everything else (environment, native build) is set up on the way, once.
#
#   NO_VENV=1 PYTHON=python3   use that Python as it is, with its own torch; nothing is installed
#   ARGS="--device cuda"       passed on to the command
#   TORCH="torch==2.13.0"      which torch goes into the virtual environment
#   MAX_JOBS=4 VERBOSE=1       for the native build

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
TORCH ?= torch==2.13.0
ARGS ?=
OLDEST := 5.17.0
OLDEST_TORCH := 2.11.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifdef NO_VENV
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
PY := $(or $(PYTHON),python3)
CLANG_FORMAT := clang-format
INSTALLED := check-python
LINTERS := check-python
else
PY := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters
endif

# pip's progress on a terminal, its errors always, its remarks about package indexes never.
PIP_INSTALL = $(PY) -m pip install --no-input $$([ -t 1 ] || echo --quiet) \
  2> >(grep -v -e '^WARNING: ' -e '^$$' >&2 || true)
# A worker a core, where pytest-xdist is installed.
WORKERS = $$($(PY) -c 'import importlib.util as u; print("-n auto --dist worksteal" if u.find_spec("xdist") else "")')
SAY = @printf 'torch_pagedkv: %s\n'
NATIVE_SOURCES = $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cuh csrc/*/*.inl csrc/*/*.cpp csrc/*/*.cu tests/emulate/*.h tests/emulate/*.cpp tests/emulate/*.cu)

.PHONY: help demo test test-all test-oldest test-oldest-torch bench env build lint types format clean distclean check-python

help:
	@echo 'make demo      a real model, stock and patched generate() side by side (ARGS="--device cuda --json out.json")'
	@echo 'make test      the tests (ARGS="-k norm" for some); make test-all: the slow ones too'
	@echo 'make test-oldest, make test-oldest-torch: on the oldest transformers, on the oldest torch'
	@echo 'make bench     time the operators'
	@echo 'make env       what is installed, loaded and missing'
	@echo 'make build     compile what changed in csrc/'
	@echo 'make lint      ruff, clang-format and mypy; make format: let them rewrite'
	@echo 'make clean     remove what was built; make distclean: the virtual environment too'

demo: build
	@$(PY) -m torch_pagedkv.cli demo $(ARGS)

test: build
	@$(PY) -m pytest $(WORKERS) -m 'not slow' $(ARGS)

test-all: build
	@$(PY) -m pytest $(WORKERS) $(ARGS)

# The patched models on the oldest transformers that is supported.
test-oldest: build
	@[ -d build/transformers-$(OLDEST) ] || \
	  $(PIP_INSTALL) --target build/transformers-$(OLDEST) transformers==$(OLDEST)
	@PYTHONPATH=build/transformers-$(OLDEST) $(PY) -m pytest $(WORKERS) -m 'not slow' \
	  tests/patches tests/reliability tests/quant $(ARGS)

# The ops and torch.compile on the oldest torch that is supported: a download of gigabytes the first time.
test-oldest-torch: build
	@[ -d build/torch-$(OLDEST_TORCH) ] || $(PIP_INSTALL) --target build/torch-$(OLDEST_TORCH) torch==$(OLDEST_TORCH)
	@PYTHONPATH=build/torch-$(OLDEST_TORCH) $(PY) -m pytest $(WORKERS) \
	  tests/ops/test_contract.py tests/ops/test_cache.py tests/patches/test_compile.py tests/patches/test_patch.py $(ARGS)

bench: build
	@$(PY) -m torch_pagedkv.cli bench $(ARGS)

env: build
	@$(PY) -m torch_pagedkv.cli env $(ARGS)

build: $(INSTALLED)
	@$(PY) torch_pagedkv/build.py > /dev/null

lint: $(LINTERS)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(CLANG_FORMAT) --dry-run -Werror $(NATIVE_SOURCES)
	@$(MAKE) types

types: $(LINTERS)
	@rm -rf build/typing && mkdir -p build/typing/torch_pagedkv
	@ln -s $(addprefix $(CURDIR)/,$(wildcard torch_pagedkv/*) patches evals) build/typing/torch_pagedkv/
	@$(PY) -m mypy

format: $(LINTERS)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(CLANG_FORMAT) -i $(NATIVE_SOURCES)

clean:
	rm -rf build dist torch_pagedkv/lib *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find torch_pagedkv patches evals tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# ---- the environment -------------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@found=; for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10 python; do \
	  "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2> /dev/null && found=$$p && break; \
	done || true; \
	if [ -z "$$found" ]; then \
	  echo 'torch_pagedkv: no Python >= 3.10 with its venv module here (for example: apt install python3 python3-venv),' \
	    'or name one: make PYTHON=/path/to/python3' >&2; exit 1; \
	fi; \
	if ! command -v $${CXX:-c++ g++ clang++} > /dev/null; then \
	  echo "torch_pagedkv: no C++ compiler ($${CXX:-c++}) here; install one with C++20 (for example: apt install g++)" >&2; exit 1; \
	fi; \
	echo "torch_pagedkv: making $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/bin/python
	$(SAY) 'installing $(TORCH) and transformers (a large download the first time)'
	@TORCH_PAGEDKV_BUILD=0 $(PIP_INSTALL) '$(TORCH)' --editable '.[test,demo,bench]'
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(SAY) 'installing the linters'
	@TORCH_PAGEDKV_BUILD=0 $(PIP_INSTALL) '$(TORCH)' --editable '.[dev]'
	@touch $@

check-python:
	@$(PY) -c 'import importlib.util as u, sys; \
	missing = [m for m in ("torch", "transformers", "ninja", "tqdm") if u.find_spec(m) is None]; \
	sys.exit("torch_pagedkv: " + sys.executable + " lacks " + ", ".join(missing) + ": pip install them, or leave out NO_VENV=1" if missing else 0)'
