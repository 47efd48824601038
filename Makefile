PYTHON ?= python3
VENV := .venv
OCCULT := $(VENV)/bin/occult
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

N ?= 20

.PHONY: help setup train test test-slow test-cluster soak lint check-tools clean

help:
	@echo "make train      set up, train the demo model, export it, report"
	@echo "make test       set up, lint, run the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-cluster  as root: tests on hosts made of namespaces; says what is missing where it cannot"
	@echo "make soak N=20  train under 20 more random faults; what came of them is in runs/soak/log.jsonl"

check-tools:
	@missing=""; \
	for t in git g++ $(PYTHON); do command -v $$t >/dev/null || missing="$$missing $$t"; done; \
	if [ -z "$$missing" ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || missing="$$missing python 3.11 to 3.13 (found $$($(PYTHON) -V 2>&1 | cut -d" " -f2))"; \
	  $(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	  $(PYTHON) -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' 2>/dev/null || missing="$$missing python3-dev"; \
	fi; \
	if [ -n "$$missing" ]; then \
	  echo "missing:$$missing"; \
	  echo "on Debian or Ubuntu: sudo apt-get install -y make git g++ python3-venv python3-dev"; exit 2; \
	fi

$(VENV)/.installed: setup.py constraints.txt | check-tools
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.installed

train: setup
	$(OCCULT) demo

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: lint
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile

test-slow: setup
	$(VENV)/bin/python -m pytest -m slow

test-cluster: setup
	$(VENV)/bin/python -m pytest -m cluster -rs tests/cluster

soak: setup
	$(VENV)/bin/python tests/cluster/soak.py $(N)

clean:
	rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
