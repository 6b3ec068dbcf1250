# Everything lives in .venv; nothing is installed outside it, except Chromium for the browser tests (test-slow).
VENV    := .venv
BIN     := $(VENV)/bin
WORKERS ?= 2
PYTHON  ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$python && break; done)

# -qq hides progress and warnings; errors are still shown.
PIP     := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# The workers of pytest would fight over the cores.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-adapters chromium lint types bench docs clean

help:  ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

setup: $(VENV)/.stamp-dev  ## install all that development needs into .venv

demo: $(VENV)/.stamp-demo  ## train a small tool-using agent and show that it got better
	@$(BIN)/prefloop run examples/booking.toml

test: setup lint types  ## lint, types and the quick tests
	$(PYTEST) -m "not slow"

test-slow: setup chromium  ## fault, browser, server and adapter tests
	$(PYTEST) -m slow --dist worksteal

test-adapters: setup  ## of test-slow: the environments of other packages (reasoning-gym, MCP, AgentDojo), run as they are
	$(PYTEST) -m adapter

lint: setup  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy, strict
	$(BIN)/mypy

bench: setup  ## every benchmark, one after the other (hours at full size; BENCH=--quick for minutes)
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script $(BENCH) || exit 1; done

docs: $(VENV)/.stamp-docs  ## the documentation as HTML, in site/
	$(BIN)/zensical build --clean

clean:  ## remove what was installed and built; runs/ stays
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

chromium:
	@command -v chromium >/dev/null && exit 0; \
	if ! command -v apt-get >/dev/null; then \
		echo "the browser tests need Chromium as /usr/bin/chromium: install it with your system's package manager"; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then root=""; elif command -v sudo >/dev/null; then root=sudo; else \
		echo "the browser tests need Chromium: as root, run 'apt-get install chromium'"; exit 1; fi; \
	echo "installing Chromium from Debian's packages"; \
	$$root apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$root apt-get install -qq -y --no-install-recommends \
		chromium fonts-dejavu-core >/dev/null

$(BIN)/pip:
	@if [ -z "$(PYTHON)" ]; then echo "prefloop needs Python 3.11 or newer: none was found on PATH" \
		"(say where it is with 'make PYTHON=/path/to/python3.11')"; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prefloop needs Python 3.11 or newer, not %d.%d" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environment could be made with $(PYTHON)" \
		"(Debian keeps the venv module in the package python3-venv)"; rm -rf $(VENV); exit 1; }

# pip is made last in a virtual environment: where it is, the environment is whole. Its age says nothing.
$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing prefloop and what its development needs into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.stamp-demo $@

$(VENV)/.stamp-demo: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing prefloop into $(VENV) (a few minutes the first time)"
	@$(PIP) -e '.[train,report]'
	@touch $@

$(VENV)/.stamp-docs: pyproject.toml constraints.txt | $(BIN)/pip
	@$(PIP) -e '.[docs]'
	@touch $@
