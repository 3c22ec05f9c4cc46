# make setup   a virtual environment in .venv with everything in it (about 2 GB; done once)
# make test    the tests, two workers
# make demo    the notebooks on the shipped data and checkpoint, headless, into outputs/demo
# make lab     JupyterLab on the notebooks (only this machine can reach it)
# make clean   remove .venv and what tools leave behind; outputs/ stays

# the first Python on the path that is new enough; `make setup PYTHON=/path/to/python` chooses another
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PORT ?= 8888

.PHONY: help setup test demo lab constraints clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)

# torch goes first and by its pin: left to another package's open range, pip may choose a different build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "ovisnb needs Python 3.11 or newer, and none is on the path" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv module: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 2 GB, some minutes"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# Each worker keeps to one thread, so that two of them do not fight over two cores. Nothing is fetched from a hub.
# loadfile: the tests of a file share a worker, and so what is slow to set up, a JupyterLab and a Chromium for one.
test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

demo: setup
	HF_HUB_OFFLINE=1 $(BIN)/ovisnb demo

lab: setup
	$(BIN)/jupyter-lab --ServerApp.ip=127.0.0.1 --port $(PORT) --ServerApp.root_dir=$(CURDIR) \
		--LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root --no-browser)

# Install without the pins in a fresh environment first (or raise one by hand), test, then write down what is there.
constraints:
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache *.egg-info
	find ovisnb tests notebooks benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
