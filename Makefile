# `make demo` and `make test` do everything on a machine with Python >= 3.11, make and git.

PYTHON ?= python3
UV_VERSION := 0.13.8
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?= -n 2
# Journeys wait for processes of their own: a third worker uses the time. By file: their fixtures are runs.
JOURNEY_ARGS ?= -n 3 --dist loadfile
# Of all that pyproject.toml allows, the versions that were tested.
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraints requirements.txt

# One thread a worker: two workers share the cores better than one process that waits for its own threads.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: install demo test test-journeys test-faults extras check docs bench bench-quality clean help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## .venv with everything for the lines below, and the commands mpq-search, mpq-run, mpq-report, ...

demo: $(STAMP) ## a search on handwritten digits beside float, int4 and int8 (4 minutes on 2 cores)
	$(BIN)/python -m benchmarks.demo $(DEMO_ARGS)

test: $(STAMP) ## the whole test suite but journeys and faults
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS) --ignore=tests/journeys --ignore=tests/faults

test-journeys: extras ## what users do, end to end, with real processes; installs the extras (13 minutes on 2 cores)
	$(TEST_ENV) $(BIN)/python -m pytest $(JOURNEY_ARGS) tests/journeys

test-faults: $(STAMP) ## what a launch survives: killed processes and nodes, a full disk (4 minutes on 2 cores)
	$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/faults

extras: $(STAMP) ## what exports, latencies, wandb, the site and the peers of the benchmarks need besides
	$(INSTALL) --editable ".[dev,export,tracking,bench,docs]"

check: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## README's pages as one searchable site: site/index.html
	$(INSTALL) --editable ".[dev,docs]"
	$(BIN)/python -m mkdocs build --strict

bench: extras ## rounding over clone(), steps and memory over float training, peers, a report, the launcher's overhead
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.launcher

bench-quality: $(STAMP) ## the search and its competitors at one budget, over seeds (hours; goes on where it was)
	$(BIN)/python -m benchmarks.quality --shared ../shared
	$(BIN)/python -m benchmarks.ablation --shared ../shared
	$(BIN)/python -m benchmarks.budgets --shared ../shared

clean: ## remove the virtual environment, the runs and every cache
	rm -rf $(VENV) output site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last: an interrupted installation is taken up again by the next call.
$(STAMP): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("Python >= 3.11 is needed, $(PYTHON) is %d.%d: call make with PYTHON=<interpreter>" % v)'
	@test -x $(BIN)/uv || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(INSTALL) --editable ".[dev]"
	@touch $@
