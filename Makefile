# Each target makes its own virtual environment from the pinned constraints, once.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.graphopt-installed
PYTHON ?= $(firstword $(shell command -v python3.11) $(shell command -v python3.12) python3)
PYTEST_ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs benchmarks

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

demo: $(STAMP) ## train a small Llama in about half of its memory
	$(BIN)/python examples/demo.py --out demo-out

# Workers share the cores: threads of operators would spin while they wait for those of the other worker.
test: export OMP_NUM_THREADS ?= 1
test: lint ## the quick suite
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: lint ## every test that this machine can run
	$(BIN)/python -m pytest --hypothesis-profile=search $(PYTEST_ARGS)

lint: $(STAMP) ## formatting, types and layers
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-logo

docs: $(STAMP) ## the reference pages, from the code
	$(BIN)/python -m graphopt.reference docs/reference

benchmarks: $(STAMP) ## the figures of docs/benchmarks.md
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# The stamp stands for "these two files are installed"; touching either installs again.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
