# make demo     protect a photograph and a folder, see demo_out/report.html
# make test     everything the continuous integration runs
# make install  a development environment in .venv
# make docs     README.md from nbs/index.ipynb, and an HTML page per notebook in _docs
# make help     all targets

PYTHON      ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV        ?= .venv
TORCH       ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
DEMO_OUT    ?= demo_out
BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
NB_WORKERS  ?= 2

# settings for everything that runs here: no display, no surprises from the user's own packages, threads that fit the workers
export MPLBACKEND := Agg
export PYTHONNOUSERSITE := 1
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test install docs readme clean notebooks nbtest pytest smoke check-tree check-notebooks

help: ; @sed -n 's/^# make/make/p' Makefile

# -- environment: built once, again only when pyproject.toml changes --------------------------------------------------
# torch first and torchvision without its dependencies: a looser order pulls another torch of several gigabytes.

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11 or later, or run make PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or later is needed, run make PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	@if ! cmp -s pyproject.toml $@; then echo "Installing into $(VENV) (about two minutes) ..." && $(PIP) install "$(TORCH)" && $(PIP) install -e .; fi
	@cp pyproject.toml $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@if ! cmp -s pyproject.toml $@; then echo "Installing into $(VENV) (about three minutes) ..." && $(PIP) install "$(TORCH)" && $(PIP) install --no-deps "$(TORCHVISION)" && $(PIP) install -e '.[dev]'; fi
	@cp pyproject.toml $@; cp pyproject.toml $(VENV)/.base

install: $(VENV)/.dev

# -- for people -------------------------------------------------------------------------------------------------------

demo: $(VENV)/.base
	@$(BIN)/deidnb assets pull demo >/dev/null
	@$(BIN)/deidnb demo -o $(DEMO_OUT)

readme: $(VENV)/.dev
	@$(BIN)/python tools/render_readme.py

docs: readme
	@$(BIN)/jupyter nbconvert --to html --log-level WARN --output-dir _docs nbs/*.ipynb nbs/*/*.ipynb && echo "HTML pages are in _docs"

clean:
	rm -rf _docs _proc demo_out reports/smoke .pytest_cache build dist

# -- tests: the order of the continuous integration -------------------------------------------------------------------

test: $(VENV)/.dev
	@$(BIN)/deidnb assets pull core test >/dev/null
	@tools/test.sh

check-notebooks: $(VENV)/.dev
	@$(BIN)/python tools/check_notebooks.py

notebooks nbtest pytest smoke check-tree: $(VENV)/.dev
	@tools/test.sh $@
