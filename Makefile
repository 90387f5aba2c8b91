# make demo   set up and run the main job on the embedded example
# make test   set up and run every check: lint, types, tests
# Both start from nothing but Python 3.11+, make and a package index. PYTHON=/path/to/python picks
# the interpreter.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# Tests run in two processes of one thread each: faster than one process of two threads, and the
# same sums on every machine. Models come from packages and local folders, never from the network.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST_ARGS ?= -n 2 --dist loadscope --no-loadscope-reorder

# What a release is looked at with; an environment of its own keeps these out of the project's.
TOOLS := build/tools
TOOL_PACKAGES := cyclonedx-bom==7.5.0 pip-audit==2.10.1

# What machines with a card usually lack of our dependencies.
GPU_WHEELS := annotated-types datasets dill multiprocess omegaconf pydantic pydantic-core timm typing-inspection
GLIBC := _2_28_x86_64 _2_17_x86_64 2014_x86_64

SBOM := dist/sbom.cdx.json

.PHONY: help demo test lint types tests gpu-check gpu-wheels audit sbom clean

help:
	@echo "make demo   set up and run the main job on the embedded example (minutes)"
	@echo "make test   set up and run every check: lint, types, tests"
	@echo "make lint | types | tests   one of them"
	@echo "make gpu-check   what needs a CUDA card, in eight minutes, with the python3 that is there"
	@echo "make audit  look every pinned version up in the database of known holes (needs the network)"
	@echo "make sbom   write the bill of materials of this environment to $(SBOM)"
	@echo "make clean  remove the environment and everything that was built"

demo: $(VENV)/.ready-demo
	$(BIN)/mdpd demo

test: lint types tests

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/python tests/typing/link_tree.py
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(VENV)/.ready-dev
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

# On a machine that has the libraries, whatever their versions: nothing is installed.
gpu-wheels: $(VENV)/.made
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--constraint constraints.txt --python-version 3.12 $(addprefix --platform manylinux,$(GLIBC)) \
		--dest build/gpu-wheels $(GPU_WHEELS)

gpu-check:
	$(or $(CHECK_PYTHON),python3) benchmarks/gpu_check.py

# --strict: a package that could not be looked up fails the audit, it does not pass it.
audit: $(TOOLS)/.ready
	$(TOOLS)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict \
		--progress-spinner off

sbom: $(TOOLS)/.ready $(VENV)/.ready-demo
	@mkdir -p $(dir $(SBOM))
	$(TOOLS)/bin/cyclonedx-py environment $(VENV) --pyproject pyproject.toml \
		--output-reproducible --output-file $(SBOM)
	@sed -i 's#file://[^"]*#.#' $(SBOM)  # where the project lies on this machine is nobody's business

$(TOOLS)/.ready: Makefile | $(VENV)/.made
	$(BIN)/python -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --no-input $(TOOL_PACKAGES)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.ready-%: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "Installing mdpd-deploy[$*] into $(VENV): a few minutes and several GB the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
		--constraint constraints.txt --editable '.[$*]'
	@touch $@

$(VENV)/.made:
	@found=; for python in $(CANDIDATES); do \
	  if "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "mdpd-deploy needs Python 3.11 or newer; tried: $(CANDIDATES)" \
	       "(python3 is $$(python3 --version 2>&1))." \
	       "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; \
	fi; \
	echo "Creating $(VENV) with $$("$$found" --version) ($$found)"; \
	"$$found" -m venv --clear $(VENV) || { \
	  echo "$$found could not create an environment: on Debian or Ubuntu install python3-venv." >&2; \
	  exit 2; }
	@touch $@
