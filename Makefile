# make install | demo | test | test-all | test-cluster | check | bench | gpu: each first installs requirements.lock into .venv
# if it is out of date.
# `make lock` regenerates requirements.lock from pyproject.toml.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: install demo test test-all test-cluster check bench gpu format lock

# The first interpreter that is Python 3.11 or 3.12; override with PYTHON=...
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$python && break; done)
UV := .venv/uv/bin/uv
BIN := .venv/bin
STAMP := .venv/up-to-date

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/tcan demo --out demo

# Tests run in two processes, each with modules of its own, in the order of tests/conftest.py.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not cluster" $(PARALLEL)

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(PARALLEL)

# Needs root: the machines are namespaces. Also an autoscaling cluster, and the jobs of `make gpu` on the CPU.
test-cluster: $(STAMP)
	$(BIN)/pytest -m cluster

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	KINETO_LOG_LEVEL=99 $(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks.preprocess
	$(BIN)/python -m tests.benchmarks.trainer

gpu: $(STAMP)
	$(BIN)/python -m tests.gpu --minutes 8

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(UV)
	$(UV) pip compile --universal --generate-hashes --no-emit-index-url --extra app --extra onnx --extra dev --python-version 3.11 \
		pyproject.toml -o requirements.lock

# deepspeed is distributed as source only; building it takes about 30 s.
$(STAMP): requirements.lock pyproject.toml $(UV)
	$(UV) pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# uv has its own environment, because `uv pip sync` removes packages that are not in the lock.
$(UV):
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or 3.12 not found; set PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PYTHON) -m venv .venv/uv
	.venv/uv/bin/pip install --quiet 'uv>=0.8,<1'
