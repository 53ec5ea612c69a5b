# Two commands do all set-up on a fresh machine:
#   make demo   attributes the sample queries to the sample data and ends with the path of a report
#   make test   installs what testing needs and runs the checks and the tests
# On Linux without a GPU, name an index that has torch's CPU builds if yours does not:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
DEMO ?= demo

.PHONY: demo test check install clean

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[test]"
	touch $@

install: $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/lightning-unlearn attribute --config configs/sample.yaml --output $(DEMO)

# Types are checked on a staged tree: an editable install of mapped folders is invisible to mypy.
check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .stage
	$(BIN)/python -m pip install --quiet --no-deps --target .stage .
	cd .stage && ../$(BIN)/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p lightning_unlearn

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered --cov-fail-under=85

clean:
	rm -rf $(VENV) .stage build *.egg-info
