# Needs make and Python 3.10 or newer; everything else goes into .venv. A stamp file per set of
# requirements makes the next run start at once; editing pyproject.toml or constraints.txt installs anew.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread per process: the tests are many small computations in JOBS processes.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test slow zoo lint types docs clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	$(BIN)/python examples/quickstart.py

test: lint types docs
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow" -n $(JOBS)

slow: .venv/dev.stamp
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

zoo: .venv/dev.stamp
	$(BIN)/python benchmarks/zoo.py --write docs/zoo.md

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp
	$(BIN)/mypy

docs: .venv/dev.stamp
	$(ONE_THREAD) $(BIN)/sphinx-build -E -W --keep-going -q -d docs/_build/trees -b html docs docs/_build/html
	$(ONE_THREAD) $(BIN)/sphinx-build -W --keep-going -q -d docs/_build/trees -b doctest docs docs/_build/doctest

clean:
	rm -rf .venv build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "lightning_split needs Python 3.10 or newer; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing lightning_split and what its examples need into .venv (once)"
	$(PIP) -e ".[examples]"
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing lightning_split and what its tests need into .venv (once)"
	$(PIP) -e ".[dev,docs]"
	@touch $@ .venv/demo.stamp
