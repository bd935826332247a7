# One command each; `make help` lists them. Every command first sets up what
# it needs in .venv, again whenever pyproject.toml has changed. A Python named in
# the command gets an environment of its own: `make test PYTHON=python3.13`.
ifeq ($(origin PYTHON),command line)
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
PYTHON ?= python3
VENV := .venv
endif
BIN := $(VENV)/bin
ARGS ?=
# chapters, such as 2.4 or "1.6 2.2"; none means all
CHAPTER ?=
# a part of the book, such as 1, or A for the appendix; none means all
PART ?=

.DEFAULT_GOAL := help
.PHONY: help train test tiles check notebooks export poster book pdf epub plain \
	lab bench gpu clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.run ## train a small GPT-2 on real text: loss curve and sample
	$(BIN)/llmnb train $(ARGS)

test: $(VENV)/.test ## run all tests, verify all notebooks (CHAPTER=2.4: its own)
	$(BIN)/python tests/chapter.py $(CHAPTER) -- --durations=10 $(ARGS)

tiles: $(VENV)/.test ## verify the notebooks on every tile shape and on one thread
	$(BIN)/python tests/tiles.py $(ARGS)

check: $(VENV)/.test ## the fast checks: package and notebooks in step, linter
	$(BIN)/python -m llmnb.book.notebook --check
	$(BIN)/python -m llmnb.book.poster --check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest -q -p no:nbval tests/test_export.py \
		tests/test_house.py tests/test_package.py

export: $(VENV)/.test ## write llmnb/ from the notebooks' marked cells
	$(BIN)/python -m llmnb.book.export

notebooks: export ## run the notebooks (CHAPTER=1.6: that one), keep the outputs
	$(BIN)/python -m llmnb.book.notebook $(CHAPTER) $(ARGS)

poster: export ## draw the sheet that holds the model: book/poster.pdf
	$(BIN)/python -m llmnb.book.poster

book: $(VENV)/.book ## build the book into book/_build/html
	rm -rf book/_build
	$(BIN)/jupyter-book build . --config book/_config.yml \
		--toc book/_toc.yml --path-output book -W -n --keep-going

pdf: $(VENV)/.book ## print the built book: build/llmnb.pdf (PART=1: that part)
	$(BIN)/python -m llmnb.book.pdf $(PART)

epub: $(VENV)/.book ## pack the built book for a reading device: build/llmnb.epub
	$(BIN)/python -m llmnb.book.epub

plain: export ## write the chapters as plain and as practice notebooks to build/
	$(BIN)/python -m llmnb.book.practice

# opens a .py as a notebook, in this environment's JupyterLab only
VIEWER := {"@jupyterlab/docmanager-extension:plugin": \
	{"defaultViewers": {"python": "Jupytext Notebook"}}}

lab: $(VENV)/.test ## open the notebooks' sources in JupyterLab
	mkdir -p $(VENV)/share/jupyter/lab/settings
	echo '$(VIEWER)' > $(VENV)/share/jupyter/lab/settings/overrides.json
	cd notebooks && ../$(BIN)/jupyter lab $(ARGS)

bench: $(VENV)/.run ## time a training step on this machine
	$(BIN)/llmnb bench $(ARGS)

gpu: ## check and time everything on this NVIDIA GPU, in eight minutes
	$(PYTHON) llmnb/bench/start.py $(ARGS)

clean: ## remove the environment, the built book and caches
	rm -rf .venv .venv-* book/_build build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@ $(VENV)/.run

$(VENV)/.book: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[test,book]"
	touch $@ $(VENV)/.test $(VENV)/.run
