# One command each; `make help` lists them. Every command first sets up what
# it needs in .venv, again whenever pyproject.toml has changed.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help train test check notebooks export book lab bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: .venv/.run ## train a small GPT-2 on real text: loss curve and sample
	$(BIN)/llmnb train $(ARGS)

test: .venv/.test ## run every test and verify every notebook
	$(BIN)/python -m pytest --nbval $(ARGS)

check: .venv/.test ## the fast checks: package and notebooks in step, linter
	$(BIN)/python -m llmnb.export --check
	$(BIN)/python -m llmnb.notebook --check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest -q -p no:nbval -o addopts= tests/test_export.py \
		tests/test_package.py

export: .venv/.test ## write llmnb/ from the notebooks' marked cells
	$(BIN)/python -m llmnb.export

notebooks: export ## run the notebooks (ARGS="05 06" for some) and keep outputs
	$(BIN)/python -m llmnb.notebook $(ARGS)

book: .venv/.book ## build the book into book/_build/html
	rm -rf book/_build
	$(BIN)/jupyter-book build . --config book/_config.yml \
		--toc book/_toc.yml --path-output book -W -n --keep-going

# opens a .py as a notebook, in this environment's JupyterLab only
VIEWER := {"@jupyterlab/docmanager-extension:plugin": \
	{"defaultViewers": {"python": "Jupytext Notebook"}}}

lab: .venv/.test ## open the notebooks' sources in JupyterLab
	mkdir -p .venv/share/jupyter/lab/settings
	echo '$(VIEWER)' > .venv/share/jupyter/lab/settings/overrides.json
	cd notebooks && ../$(BIN)/jupyter lab $(ARGS)

bench: .venv/.run ## time a training step on this machine
	$(BIN)/llmnb bench $(ARGS)

clean: ## remove the environment, the built book and caches
	rm -rf .venv book/_build build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	touch $@

.venv/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@ .venv/.run

.venv/.book: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[test,book]"
	touch $@ .venv/.test .venv/.run
