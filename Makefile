# Two commands matter to a newcomer: `make train` and `make test`. Both do all of their own set-up.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/fuji-tiny
PROMPT ?= def read_lines(path):

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev setup-tpu-aot train test test-scale test-faults test-plan plans check format lint types layers fix golden lock clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup:
	@$(PYTHON) scripts/bootstrap.py core

setup-dev:
	@$(PYTHON) scripts/bootstrap.py dev

setup-tpu-aot:
	@$(PYTHON) scripts/bootstrap.py tpu-aot

train: setup  ## Train fuji-tiny on the sources of Python's standard library, then sample from it.
	$(BIN)/python -m axlearn.common.launch_trainer_main --config=fuji-tiny --trainer_dir=$(RUN)
	$(BIN)/axlearn generate $(RUN) --prompt "$(PROMPT)"
	$(BIN)/axlearn report $(RUN)

# A file's tests share compiled functions and stay on one worker; tests/conftest.py knows the order of the files.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Compiled as for users, and not as quickly as may be; see tests/launcher.py.
AS_FOR_USERS := XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true"

test: setup-dev  ## Run the tests.
	$(PYTEST)

# What `make test` samples: every mesh rule, every layout, every kernel.
test-scale: setup-dev  ## Run the long tables of layouts, mesh rules and kernels.
	$(AS_FOR_USERS) $(PYTEST) -m scale

test-faults: setup-dev  ## Run the slow fault tests: 20 kills at random moments, 400 bit flips.
	$(BIN)/python -m pytest -m slow -v

test-plan: setup-tpu-aot  ## Compile kernels and two plans for TPUs that are not there (installs libtpu, 640 MB).
	$(AS_FOR_USERS) $(BIN)/python -m pytest -n 2 -m tpu_aot

plans: setup-dev  ## Write the table of plans again, of the plans that are kept beside it.
	$(BIN)/python benchmarks/plan_benchmark.py

check: setup-dev format lint types layers test  ## Everything that a change has to pass.

format: setup-dev
	$(BIN)/ruff format --check .

lint: setup-dev
	$(BIN)/ruff check .

types: setup-dev
	$(BIN)/mypy axlearn/common axlearn/cli experiments launch

layers: setup-dev
	$(BIN)/lint-imports --no-logo

fix: setup-dev  ## Format the tree and apply what the linter can mend itself.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: setup-dev  ## Write tests/golden from what the code produces now; read the difference before committing.
	$(PYTEST) --update-golden

lock:  ## Resolve the pins again (needs uv).
	for v in 11 12; do \
	  uv pip compile pyproject.toml --extra build --python-version 3.$$v --generate-hashes --no-header --no-annotate -q -o requirements/core-py3$$v.txt && \
	  uv pip compile pyproject.toml --extra build --extra dev --python-version 3.$$v --generate-hashes --no-header --no-annotate -q -o requirements/py3$$v.txt || exit 1; \
	done

clean:  ## Remove the environment and the caches of this checkout; runs stay.
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
