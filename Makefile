# make demo       create .venv, install, plan and sample the demo model, write difa-report/index.html
# make test       create .venv, install, run the tests, but for those marked slow
# make test-slow  run those
# make lint       format, lint and types (./lint.sh --fix mends what it can)
#
# PYTHON=python3.12   the interpreter .venv is made with (3.11 to 3.13)
# TORCH=2.12.0        another torch; it is installed first, and nothing that follows may replace it
# WORKERS=4           test processes, one thread each; by default as many as cores, 8 at most
# ARGS="tests/passes -x"  passed on to difa demo or pytest

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One empty file per finished install step; the names carry what the step depends on besides files.
TORCH_DONE := $(VENV)/.torch-$(TORCH).done
DEMO_DONE := $(VENV)/.demo.done
DEV_DONE := $(VENV)/.dev.done
HELD := $(VENV)/held.txt

# worksteal: a worker starts with tests that stand together, which share fixtures, and takes over others at the end.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test test-slow lint clean
.DELETE_ON_ERROR:

demo: $(DEMO_DONE)
	$(BIN)/difa demo $(ARGS)

test: $(DEV_DONE)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(DEV_DONE)
	$(PYTEST) -m slow $(ARGS)

lint: $(DEV_DONE)
	PATH="$(abspath $(BIN)):$$PATH" ./lint.sh

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "difa-compile needs Python 3.11 to 3.13; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null \
	  || { echo "torch.compile needs a C++ compiler: install g++ or set CXX" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(TORCH_DONE): | $(BIN)/python
	$(PIP) install torch==$(TORCH)
	@rm -f $(VENV)/.*.done
	@echo "torch==$(TORCH)" > $(HELD)
	@touch $@

$(DEMO_DONE): pyproject.toml $(TORCH_DONE)
	$(PIP) install --constraint $(HELD) --editable ".[diffusers,report,export,train]"
	@touch $@

$(DEV_DONE): pyproject.toml $(TORCH_DONE)
	$(PIP) install --constraint $(HELD) --editable ".[diffusers,report,export,tensorrt,train,dev]"
	@touch $@ $(DEMO_DONE)

clean:
	rm -rf $(VENV) build dist *.egg-info difa-report .mypy_cache .ruff_cache .pytest_cache
