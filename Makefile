# `make demo` and `make test` are all the set-up there is: each makes .venv with pinned, tested versions if it is not there.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(PY) examples/quickstart.py

test: $(READY)
	$(PY) -m pytest -n auto --maxprocesses 4

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
