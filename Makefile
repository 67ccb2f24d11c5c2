# `make` lists the targets. Each makes .venv by itself; the only things that must be there are make and Python.

PYTHON ?= python3
SCALE ?= laptop
SEEDS ?=
CORES ?= all
ROW ?=
COMPLETE ?=
KILLS ?= 100
INPUTS ?= 100000
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
# Tests use one thread each (tests/conftest.py), so two run side by side. Among all tests, a file stays in one process with
# its fixtures, some of which run a whole workflow, and files keep their order; fast ones go wherever a process is idle.
PYTEST := $(RUN) pytest -n 2
ifneq ($(and $(COMPLETE),$(filter-out laptop,$(SCALE))),)
$(error COMPLETE=1 is for SCALE=laptop, not for SCALE=$(SCALE))
endif
SNAKEMAKE := $(RUN) snakemake --cores $(CORES) $(if $(COMPLETE),--configfile config/complete.yaml) \
	--config scale=$(SCALE) $(if $(SEEDS),seeds=$(SEEDS))

# An environment is complete when a stamp exists whose *name* holds the checksum of what it was made from. File times say
# nothing in a git checkout; and the stamp comes last, so an interrupted installation is begun again from nothing.
# The folder is part of the sum because a virtual environment stops working when it is moved.
checksum = $(shell { cat $(1) && printf %s '$(CURDIR)'; } | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(call checksum,requirements.lock)
READY := $(VENV)/ready-$(call checksum,pyproject.toml)

# One that no longer starts, or is of another version than the PYTHON that was asked for, is stale too.
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ACTUAL := $(call version,$(BIN)/python)
WANTED := $(if $(filter file,$(origin PYTHON)),$(or $(ACTUAL),any),$(call version,$(PYTHON)))

.DEFAULT_GOAL := help
.PHONY: help reproduce ablation snapshot test fast oldest torture lint format env clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "variables: SCALE=laptop SEEDS=(the scale's) CORES=all PYTHON=python3 (3.11 or newer)"

reproduce: $(READY) ## train, prune, measure, report. SCALE=ci|laptop|fashion|workstation|paper SEEDS=3; laptop: COMPLETE=1 for more rows
	$(SNAKEMAKE)
	@echo "The report lies in $(CURDIR)/results/$(SCALE)/report.html"

ablation: $(READY) ## one row of the ablations beside its baseline: make ablation ROW=no_mlp SEEDS=3
	@test -n "$(ROW)" || { echo 'Name the row, as in config/experiments/ablations.yaml: make ablation ROW=...' >&2; exit 2; }
	$(SNAKEMAKE) row=$(if $(findstring /,$(ROW)),,ablations/)$(ROW) -- compare

snapshot: $(READY) ## copy the executed notebooks of a finished run to docs/rendered/, their numbers to the README
	$(RUN) workflow.paper.snapshot results/$(SCALE) $(if $(filter-out laptop,$(SCALE)),--under $(SCALE))

test: $(READY) ## all tests but those that need a GPU
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not gpu"

fast: $(READY) ## the fast tests, a minute
	$(PYTEST) --dist worksteal

# The oldest versions are read from pyproject.toml; the two packages after them are those that this transformers needs.
OLDEST := $(shell sed -n 's/.*"\(timm\|transformers\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml) huggingface_hub==0.36.0 tokenizers==0.22.1
oldest: $(READY) ## tests of the library with the oldest timm and transformers that it takes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/oldest $(OLDEST)
	PYTHONPATH=$(VENV)/oldest $(PYTEST) --dist loadfile -m "not gpu" tests/cropr

torture: $(READY) ## kills and broken input, an hour: make torture KILLS=100 INPUTS=100000 SEED=0
	$(BIN)/python tests/torture --kills $(KILLS) --inputs $(INPUTS) --seed $(SEED)

lint: $(READY) ## ruff, mypy, snakefmt, snakemake --lint
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) snakefmt --check Snakefile workflow
	$(RUN) snakemake --lint

format: $(READY) ## rewrite the sources in the project's format
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	$(RUN) snakefmt Snakefile workflow

env: $(READY) ## make or renew .venv, nothing else

clean: ## delete results/ after asking (YES=1: without); .venv stays
	@test -n "$(YES)" || { printf 'Delete results/ and .snakemake/, trained weights included? [y/N] ' && read answer && test "$$answer" = y; } \
		|| { echo 'Nothing deleted.' >&2; exit 1; }
	rm -rf results .snakemake .pytest_cache .mypy_cache .ruff_cache

ifneq ($(ACTUAL),$(WANTED))
$(INSTALLED): FORCE
endif
$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "cropr needs Python 3.11 or newer;" \
		"PYTHON=$(PYTHON) says: $$($(PYTHON) --version 2>&1 | head -n 1). Name another: make ... PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module;" \
		"on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@# One installation at a time: a second one would empty the folder under the first.
	@mkdir $(VENV).lock 2>/dev/null || { echo "Another make is installing $(VENV). Wait for it, or delete the folder $(VENV).lock" \
		"if none is running." >&2; exit 1; }
	@echo "Making $(VENV) from requirements.lock: once, some minutes, 6 GB on Linux."
	@trap 'rmdir $(VENV).lock' EXIT; trap 'exit 130' INT TERM; set -ex; rm -f $(VENV)/installed-* $(VENV)/ready-*; \
		$(PYTHON) -m venv --clear $(VENV); \
		$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock; \
		touch $@

$(READY): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@# Notebooks that JupyterLab starts in notebooks/ find the package `workflow`, which is not installed, by this path.
	@$(BIN)/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "reproduction.pth").write_text("$(CURDIR)\n")'
	rm -f $(VENV)/ready-*
	touch $@
