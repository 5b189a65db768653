# Each target but gpu makes .venv if it is missing, installs what it needs there, and passes ARGS= on.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# For gpu, which downloads nothing: a Python that has torch for CUDA, and which parts to run (none: all).
GPU_PYTHON ?= python3
PART ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# One stamp per torch version asked for, so that another TORCH= is installed and not ignored.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' -)
# Likewise, one for each USE_CUDA=, which setup.py reads.
STAMP := $(VENV)/.installed$(USE_CUDA:%=-cuda-%)
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/build/hypothesis

.DEFAULT_GOAL := help
.PHONY: help run test bench gpu lint format wheel clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

.PHONY: venv
venv: $(STAMP) ## Make .venv: torch, the tools, and an editable build
	@:

run: $(STAMP) ## Train on real digits with and without clipping; tables and charts go to ./fastclip-demo
	@$(BIN)/python -m fastclip demo $(ARGS)

test: $(STAMP) ## Run the tests
	@$(BIN)/python -m pytest $(ARGS)

bench: $(STAMP) ## Compare speed and error with torch
	@$(BIN)/python -m fastclip bench $(ARGS)

gpu: ## On a machine with a CUDA GPU and nvcc: build for it, test, benchmark, sanitize
	@GPU_PYTHON='$(GPU_PYTHON)' ARGS='$(ARGS)' bash .ci/gpu $(PART)

lint: $(STAMP) ## Check style: ruff for Python, clang-format for C++
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(STAMP) ## Rewrite the sources in the style that lint checks
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

wheel: $(STAMP) ## Build a wheel into dist/
	@rm -rf build/lib* build/bdist*
	@$(PIP) wheel . --no-deps --wheel-dir dist
	@ls dist/*.whl

clean: ## Remove all that the other targets made
	rm -rf $(VENV) build dist fastclip/*.so fastclip.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first and is then held by a constraint: no other package may pull a different build of it.
$(TORCH_STAMP): | $(VENV)/bin/python
	@echo "Installing $(TORCH)"
	@$(PIP) install '$(TORCH)'
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	@rm -f $(VENV)/.torch-*
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml setup.py $(SOURCES)
	@echo "Building fastclip"
	@$(PIP) install 'setuptools>=77' ninja
	@rm -f $(VENV)/.installed* fastclip/*.so
	@$(PIP) install --no-build-isolation --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@
