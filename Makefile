# make run     install into .venv and serve the demo model
# make test    all tests                   make check   linters, types, import contracts, generated code
# make bench   benchmarks                  make lock    resolve requirements.lock anew
#
# PYTHON=python3.12         another interpreter (3.11 or 3.12)
# PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"    a torch without CUDA, where pip finds the big one
# ARGS="--prefill 2"        for `cluster launch`, pytest (ARGS="-k launch") or the benchmarks (ARGS=--dry-run)

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell sh tools/find_python.sh)
NATIVE_SOURCES := $(shell find cluster -name '*.c' -o -name '*.cpp' -o -name '*.h')
INSTALL_INPUTS := pyproject.toml requirements.lock $(wildcard setup.py) $(NATIVE_SOURCES)
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c requirements.lock $(PIP_FLAGS)

.PHONY: run test check bench lock docs install install-dev clean

run: install
	$(BIN)/cluster launch demo $(ARGS)

test: install-dev
	$(BIN)/python -m pytest $(ARGS)

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m cluster.rpc.generate --check

bench: install-dev
	$(BIN)/python -m benchmarks.correctness $(ARGS)
	$(BIN)/python -m benchmarks.exactness $(ARGS)
	$(BIN)/python -m benchmarks.cpu_engine $(ARGS)

docs: install
	$(BIN)/python -m cluster.config_reference > docs/config.md
	$(BIN)/python tools/helm_readme.py
	$(BIN)/python -m cluster.router.metrics_reference > docs/metrics.md

lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python tools/lock.py
	rm -rf build/lock

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: $(INSTALL_INPUTS) | venv
	$(PIP_INSTALL) pip setuptools wheel
	$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS) | venv
	$(PIP_INSTALL) pip setuptools wheel
	$(PIP_INSTALL) --no-build-isolation -e '.[bench,dev,ray]'
	@touch $@ $(VENV)/.installed

.PHONY: venv
venv:
	@sh tools/make_venv.sh "$(PYTHON)" $(VENV)

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
