# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test lint types docs unit starter clean

install: $(STAMP)

# The last releases of the OpenAI SDK's older majors lie beside: the server is tried with all three.
# torch first and alone: its exact pin takes the CPU build where one is at hand; a looser one pulls gigabytes of CUDA
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	for release in 1.109.1 2.54.0; do $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/openai$${release%%.*} openai==$$release; done
	touch $@

quickstart: install
	$(BIN)/tunesmith quickstart

test: install lint types docs unit

lint:
	$(BIN)/ruff check src tests tools benchmarks docs
	$(BIN)/ruff format --check src tests tools benchmarks docs

types:
	$(BIN)/mypy

# the site, docs/_build/html/index.html: a link that leads nowhere is an error
docs: install
	$(BIN)/sphinx-build -q -W --keep-going -n -b html docs docs/_build/html

unit:
	$(BIN)/pytest -n 2

# rebuild the starter model from its sources (about 80 minutes on two cores)
starter: install
	$(BIN)/python tools/starter/build.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
