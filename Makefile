# What can be done here: `make help`. Needs make, a POSIX shell and Python 3.11 or later; the rest is installed into .venv.
.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := /bin/sh
# Chapters and checks see the packages of .venv and no others.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1
BIN := .venv/bin
INSTALLED := .venv/.installed
BUILT := _build/.built

# The Python that makes .venv: the reference version first. Override with `make book PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# Set to the address of PyTorch's CPU index to avoid the CUDA build on Linux (README.md, "Hardware").
TORCH_INDEX ?=
# One chapter by its file name, for `make execute`; empty means all.
CHAPTER ?=
# Test processes. Every file, and so every chapter, stays on one of them.
WORKERS ?= 2

# Folders tell of deleted files. Names with a space, which no page has, would be two names to make.
SEEN := ! -path '*/.*' ! -path '* *' ! -path 'book/axe*' ! -name __pycache__ ! -name '*.pyc'
SOURCES := _config.yml _toc.yml $(shell find chapters book ecomlib -type f $(SEEN) 2>/dev/null) \
  $(patsubst book,book/.,$(shell find chapters book ecomlib -type d ! -path book/tools $(SEEN) 2>/dev/null))

.PHONY: help book test test-extended execute run-times diagrams browser clean

help:
	@echo 'make book              install into .venv if needed, then build the book: _build/html/index.html'
	@echo 'make test              the same environment, then every check (builds the book first when it is out of date)'
	@echo 'make test-extended     a hundred kills, a load test, learners of other libraries: the checks that take minutes each'
	@echo 'make execute           run every chapter and store its outputs; CHAPTER=pricing for one'
	@echo 'make run-times         verify every chapter alone, one after another, and record how long each took'
	@echo 'make diagrams          draw book/diagrams/*.mmd again where the source changed (needs npm and a browser)'
	@echo 'make browser           install Chromium for the page tests (apt), unless a browser is there'
	@echo 'make clean             delete what was built; .venv stays'

$(INSTALLED): requirements.txt pyproject.toml
	@test -n '$(PYTHON)' || { echo 'error: Python 3.11 or later was not found; name one with PYTHON=/path/to/python' >&2; exit 1; }
	@test -x $(BIN)/pip || '$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo 'Creating .venv with $(PYTHON)'; '$(PYTHON)' -m venv .venv; }
	@echo 'Installing the exact versions of requirements.txt into .venv (minutes the first time; log: .venv/install.log)'
	@{ { test -z '$(TORCH_INDEX)' || $(BIN)/pip install --index-url '$(TORCH_INDEX)' "$$(grep '^torch==' requirements.txt)"; } && \
	  $(BIN)/pip install -r requirements.txt && \
	  $(BIN)/pip install --no-deps --no-build-isolation -e . ; } >.venv/install.log 2>&1 || { \
	  grep -v '^WARNING' .venv/install.log | tail -n 15 >&2; echo 'error: installing failed; all of it: .venv/install.log' >&2; exit 1; }
	@touch $@

# Always from nothing: a second, incremental build would forget the warnings of the first.
define BUILD
	@echo 'Building the book from the stored outputs of its chapters (warnings are errors)'
	@rm -rf _build/html _build/.doctrees $(BUILT)
	@$(BIN)/jupyter-book build . -q -W -n --keep-going --all >.venv/build.log 2>&1 || { \
	  cat .venv/build.log >&2; echo 'error: the book was not built' >&2; exit 1; }
	@touch $(BUILT)
endef

$(BUILT): $(INSTALLED) $(SOURCES)
	$(BUILD)

book: $(INSTALLED)
	$(BUILD)
	@echo 'The book: _build/html/index.html'

test: $(BUILT)
	@echo 'Checking: library, equations, chapters (each is executed once), pages'
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-extended: $(INSTALLED)
	@echo 'Checking what takes longer: kills at random moments, the service under load'
	@$(BIN)/python -m pytest -m extended -p no:nbval -o addopts='-rx --import-mode=importlib --strict-markers' tests

execute: $(INSTALLED)
	@$(BIN)/python book/tools/execute.py $(CHAPTER)

run-times: $(INSTALLED)
	@echo 'Verifying the chapters one after another; seconds go to book/run_times.json'
	@$(BIN)/python -m pytest chapters --record-run-times

diagrams: $(INSTALLED)
	@$(BIN)/python book/tools/diagrams.py

browser:
	@sh book/tools/install_browser.sh

clean:
	@echo 'Deleting what was built, and caches'
	@rm -rf _build build .pytest_cache .ruff_cache .hypothesis
	@find chapters ecomlib tests book -name __pycache__ -type d -prune -exec rm -rf {} +
