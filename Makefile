# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv if there is none.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

JOBS ?= 2
SECONDS ?= 60
ARGS ?=
VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
STAMP := $(VENV)/.torchweld-installed
export PYTHON

.PHONY: help demo test prove venv compiler lint types imports format wheel fuzz clean

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1|\2/p' Makefile | column -t -s '|'

demo: $(STAMP) compiler ## load SmolLM2, optimize, check, dump kernels, print the ledger and a completion
	@$(PYTHON_IN_VENV) -m examples.demo $(ARGS)

test: $(STAMP) compiler ## the whole suite; ARGS="-k name" narrows it
	@$(PYTHON_IN_VENV) -m pytest -n $(JOBS) --dist=loadfile --no-loadscope-reorder --hypothesis-profile=ci $(ARGS)

prove: $(STAMP) compiler ## every decoding strategy against plain decoding on real models, 20 prompts x 256 tokens (half an hour)
	@$(PYTHON_IN_VENV) -m scripts.prove_strategies $(ARGS)

venv: $(STAMP) ## only make the environment

$(STAMP): requirements.txt requirements-dev.txt requirements-models.txt requirements-lock.txt pyproject.toml
	@bash scripts/setup_env.sh $(VENV)
	@touch $@

compiler:
	@bash scripts/explain_compiler.sh $(PYTHON_IN_VENV)

lint: $(STAMP) ## style (ruff)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(STAMP) ## types (mypy, strict)
	@$(VENV)/bin/mypy -p torchweld
	@$(VENV)/bin/mypy scripts/*.py

imports: $(STAMP) ## the import contract
	@$(VENV)/bin/lint-imports --no-logo --no-cache

format: $(STAMP) ## rewrite the files in the house style
	@$(VENV)/bin/ruff check --fix-only --quiet .
	@$(VENV)/bin/ruff format .

wheel: $(STAMP) ## build the wheel, install it into an empty environment, use it there
	@$(PYTHON_IN_VENV) scripts/check_wheel.py

fuzz: $(STAMP) compiler ## random programs with fresh seeds for SECONDS=60
	@$(PYTHON_IN_VENV) scripts/fuzz.py --seconds $(SECONDS) $(ARGS)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
