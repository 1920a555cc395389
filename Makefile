# The checks of .ci/run, each by itself. PYTHON is one that has the package with the extra "test" (make install).
PYTHON ?= .venv/bin/python

.PHONY: help install test fuzz lint types report report-check docs gate static static-all

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

install:  ## .venv with all that the checks need
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt -e '.[test]'

test:  ## all tests, on all cores
	$(PYTHON) -m pytest -n auto

fuzz:  ## 5,000 random calls by each backend, others in every run (hours in the interpreter)
	FUZZ=5000 $(PYTHON) -m pytest tests/ops/test_properties.py

lint:  ## style and format of the code
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## types of the public modules
	$(PYTHON) -m mypy

report:  ## write the recorded figures into README and docs/
	$(PYTHON) -m bench report

report-check:  ## fail if a page does not have the figures of the records
	$(PYTHON) -m bench report --check

docs: report-check  ## figures, examples, links and commands of README and docs/
	$(PYTHON) -m pytest tests/project

gate:  ## times on the CPU, as ratios to plain attention
	$(PYTHON) -m bench gate

static:  ## compile the kernels with the installed triton, and compare with its baseline
	$(PYTHON) -m bench static --quick

static-%:
	test -d build/triton-$* || $(PYTHON) -m pip install --quiet --no-deps --target build/triton-$* triton==$*
	PYTHONPATH=$(CURDIR)/build/triton-$* $(PYTHON) -m bench static --quick

static-all: static static-3.6.0 static-3.9.0  ## the same with every version of triton that has a baseline
