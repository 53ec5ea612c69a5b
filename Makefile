# Two commands do all set-up on a fresh machine:
#   make demo   attributes the sample queries to the sample data and ends with the path of a report
#   make test   installs what testing needs and runs the checks and the tests
# and make docs builds the documentation into site/.
# On Linux without a GPU, name an index that has torch's CPU builds if yours does not:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
DEMO ?= demo

# What is installed is compiled when it is first imported, which is a small part of it.
PIP := $(BIN)/python -m pip install --quiet --no-compile

COVERAGE :=
SEED ?= 0

.PHONY: demo test check style stage types imports docs suite coverage families drills install install-test clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

# All of it at once, the demo's packages too.
$(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_FLAGS) -c constraints.txt -e ".[test]"
	touch $(VENV)/.demo $@

install: $(VENV)/.demo

install-test: $(VENV)/.test

demo: $(VENV)/.demo
	$(BIN)/lightning-unlearn attribute --config configs/sample.yaml --output $(DEMO)

check: style types imports docs

style: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types and imports are checked on a staged tree: an editable install of mapped folders is invisible to both checkers.
stage: $(VENV)/.test
	rm -rf .stage build  # setuptools leaves modules in build/ that are gone
	$(PIP) --no-deps --target .stage .

types: stage
	cd .stage && ../$(BIN)/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p lightning_unlearn

imports: stage
	cd .stage && ../$(BIN)/lint-imports --no-logo --no-cache ../pyproject.toml

# The documentation, into site/; a link that leads nowhere is an error. Nothing is fetched from elsewhere, nor will the pages.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Files are dealt to the two workers in the order of tests/conftest.py.
suite: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(COVERAGE)

# The tests, a quarter slower, with the lines that none of them reaches.
coverage: COVERAGE := --cov --cov-report=term-missing:skip-covered --cov-fail-under=85
coverage: suite

# Each family from pictures to scores by the commands; the tests take some of them.
families: $(VENV)/.test
	EVERY_FAMILY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/lightning_unlearn/diffusion/families -k end_to_end

test: check suite

# The drills in full, some ten minutes: what killed, signalled, starved and damaged runs leave and say. A drill that has seen a fault fails.
drills: $(VENV)/.test
	for name in malformed_tars full_disk altered_files kills signals asks; do \
		OMP_NUM_THREADS=1 $(BIN)/python tests/drills/$$name.py --seed $(SEED) || exit 1; done

clean:
	rm -rf $(VENV) .stage build site *.egg-info
