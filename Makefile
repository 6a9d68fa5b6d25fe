# The menu of common tasks: `make` prints it.

.DEFAULT_GOAL := help
.PHONY: help setup test lint types docs figures train clean

help: ## Print this menu
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv with everything for development
	@scripts/setup.sh dev

test: ## Lint, check types, build the site and run the tests: ten minutes on two cores
	@scripts/test.sh

lint: setup ## Sort imports, format, and report what is left to mend
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

types: setup ## Check types
	@.venv/bin/pyrefly check

docs: setup ## Build the site into build/site
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build

figures: setup ## Draw every figure of the docs anew from its record
	@.venv/bin/python scripts/figures.py

train: ## Train a small model through both stages: minutes on two cores
	@./run_train.sh

clean: ## Delete what the tools cached and built; .venv and outputs/ stay
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find lighthouse lighthouse_commands torchtitan scripts tests -name __pycache__ -prune -exec rm -rf {} +
