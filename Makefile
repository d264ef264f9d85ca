# Two commands for a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
# Each first installs requirements.lock (with hashes) into .venv through uv, unless it is up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
OWN_UV := $(filter .uv/bin/uv,$(UV))
# One thread per process: for small models, two runs at a time are faster than two threads per run.
export OMP_NUM_THREADS ?= 1
export UV_LINK_MODE ?= hardlink

.PHONY: setup demo test lint types unit notebooks results bench lock clean

demo: $(READY)
	$(BIN)/scaling demo

test: lint types unit notebooks

setup: $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest -n 2

notebooks: $(READY)
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 -p no:cacheprovider -W default notebooks

# Regenerate the kept results from their tables: reports of ladders, comparisons of arms at one budget.
results: $(READY)
	for table in results/*/runs.csv; do folder=$${table%/runs.csv}; \
	    if [ -f $$folder/compare.md ]; then verb=compare; else verb=report; fi; $(BIN)/scaling $$verb $$folder || exit 1; done

bench: $(READY)
	for file in tests/bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

lock: $(OWN_UV)
	$(UV) pip compile --generate-hashes --universal --python-version 3.11 --extra data --extra dev \
	    --no-emit-index-url --quiet --output-file requirements.lock pyproject.toml

.uv/bin/uv:
	@$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet 'uv>=0.8,<1'

$(READY): requirements.lock pyproject.toml | $(OWN_UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip sync --quiet --require-hashes --compile-bytecode --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --no-deps --python $(BIN)/python --editable .
	@touch $@

clean:
	rm -rf $(VENV) .uv .mypy_cache .pytest_cache .ruff_cache .hypothesis
