# The commands people type; `make` lists them.
.PHONY: help setup test lint docs pictures

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1  /p' Makefile

setup: ## install everything, with the versions tested together
	pip install -c constraints.txt -e '.[dev]'

test: ## the tests that are not marked "full"
	pytest

lint: ## style and types
	ruff check && ruff format --check && mypy

docs: ## the site, in docs/_build/html
	python docs/build.py

pictures: ## the drawings and pictures of README and docs that scripts make (needs chromium)
	python -m benchmarks.house && python -m benchmarks.thumbnails && python -m benchmarks.animation && python -m benchmarks.tour
