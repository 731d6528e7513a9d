# Everything a user types, from a fresh clone. `make help` lists the targets; each makes what it needs first.
#
# Recipes keep to relative names or quote "$(CURDIR)", so that a clone may lie in a folder with spaces.

PYTHON ?= python3
OUTPUT ?= out/run
ADDRESS ?= 127.0.0.1
PORT ?= 8000
# More words for `make train`, `make evaluate` and `make serve`, as in ARGS="--max_epochs 5", ARGS="--settings my.toml".
ARGS ?=
PYTEST_ARGS ?=
# Processes that share the test files; each takes up to 5 GB.
TEST_PROCESSES ?= 2
BENCHMARKS ?= $(sort $(wildcard benchmarks/[!_]*.py))

# The demo's folders, and what makes its training short.
DEMO := $(CURDIR)/out/demo
DEMO_PHANTOM ?= --patients 16
DEMO_TRAIN ?= --max_epochs 1 --episodes_per_epoch 60 --val_interval 1 --val_max_cases 12
DEMO_EVALUATE ?=
DEMO_INFER ?= --model_file "$(DEMO)/run/model.pt"
# The phantoms come in these looks, each with a support set and queries of its own.
DEMO_LOOKS ?= ct mr us rgb

INSTALLED := .venv/.installed
PHANTOM := out/demo/.phantom
VENV_PYTHON := "$(CURDIR)/.venv/bin/python"
PIP := .venv/bin/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet -c constraints.txt
# Configs name their files relative to the bundle, so every job runs from there; paths given by the user don't.
BUNDLE := cd bundle && $(VENV_PYTHON) -m monai.bundle run
absolute = $(if $(filter /%,$(firstword $(1))),$(1),$(CURDIR)/$(1))

.DEFAULT_GOAL := help
.PHONY: help setup demo train evaluate serve test lint docs bench clean need-dataset need-studies
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## make .venv and install everything (first time: several minutes, 9 GB)
	@echo 'sam2sgp is installed in .venv'

# torch comes first because sam2's build imports it: with --no-build-isolation it takes the torch that is there
# instead of a second copy in a temporary folder. That build needs setuptools < 80, which constraints.txt pins.
$(INSTALLED): $(wildcard requirements*.txt) constraints.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
	  echo 'Python 3.11 or 3.12 with its venv module is needed, and "$(PYTHON)" is not that: install it (Debian: python3-venv) or name one, as in "make setup PYTHON=python3.11".' >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { echo '[1/5] making .venv'; "$(PYTHON)" -m venv .venv; }
	@echo '[2/5] installing torch'
	@$(PIP_INSTALL) setuptools wheel torch torchvision
	@echo '[3/5] building sam2'
	@SAM2_BUILD_CUDA=0 $(PIP_INSTALL) --no-build-isolation sam2
	@echo '[4/5] installing the rest'
	@$(PIP_INSTALL) -r requirements.txt -r requirements-dev.txt
	@echo '[5/5] installing sam2sgp, editable'
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(PHANTOM): $(wildcard bundle/sam2sgp/data/phantom*.py) | $(INSTALLED)
	@echo '== phantom data set'
	rm -rf out/demo/phantom
	mkdir -p out/demo
	$(VENV_PYTHON) -m sam2sgp.data.phantom --output_dir "$(DEMO)/phantom" $(DEMO_PHANTOM)
	@touch $@

demo: $(INSTALLED) $(PHANTOM) ## phantom data, training, evaluation, inference and reports, in out/demo
	rm -rf out/demo/run out/demo/inferred
	@echo '== training'
	$(BUNDLE) training --config_file configs/train.json --dataset_dir "$(DEMO)/phantom" --output_dir "$(DEMO)/run" $(DEMO_TRAIN)
	@echo '== evaluating'
	$(BUNDLE) evaluating --config_file "['configs/train.json','configs/evaluate.json']" --dataset_dir "$(DEMO)/phantom" --output_dir "$(DEMO)/run" $(DEMO_EVALUATE)
	@set -e; for look in $(DEMO_LOOKS); do echo "== inferring, $$look"; ( $(BUNDLE) inferring --config_file configs/inference.json --support_dir "$(DEMO)/phantom/support/$$look" --dataset_dir "$(DEMO)/phantom/queries/$$look" --output_dir "$(DEMO)/inferred/$$look" $(DEMO_INFER) ); done
	@echo '== reports'
	@find out/demo/run out/demo/inferred -name '*.html' | sort

train: need-dataset $(INSTALLED) ## train on DATASET=dir into OUTPUT (out/run); run again to resume
	$(BUNDLE) training --config_file configs/train.json --dataset_dir "$(call absolute,$(DATASET))" --output_dir "$(call absolute,$(OUTPUT))" $(ARGS)

evaluate: need-dataset $(INSTALLED) ## Dice, HD95 and NSD of the network in OUTPUT (out/run) on DATASET=dir
	$(BUNDLE) evaluating --config_file "['configs/train.json','configs/evaluate.json']" --dataset_dir "$(call absolute,$(DATASET))" --output_dir "$(call absolute,$(OUTPUT))" $(ARGS)

serve: need-studies $(INSTALLED) ## MONAI Label server for STUDIES=dir (or a DICOMweb URL) at ADDRESS:PORT
	. .venv/bin/activate && exec sam2sgp serve "$(STUDIES)" --host "$(ADDRESS)" --port "$(PORT)" $(ARGS)

test: $(INSTALLED) ## the whole test suite (PYTEST_ARGS="-m 'not slow'" for a part)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(INSTALLED) ## rules, format and types, which package may import which, and the Dockerfile
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	PYTHONPATH=bundle:apps/sam2sgp $(VENV_PYTHON) .venv/bin/lint-imports --no-logo --no-cache
	$(VENV_PYTHON) -m mypy
	.venv/bin/hadolint Dockerfile

docs: $(INSTALLED) ## the pages as a site with a reference and a search, in out/site; a broken link fails
	$(VENV_PYTHON) -m sphinx --fail-on-warning --keep-going --quiet --builder html --conf-dir docs . out/site
	@echo '== out/site/index.html'

bench: $(INSTALLED) ## the scripts behind the README's figures (BENCHMARKS="benchmarks/x.py" for some)
	@test -n "$(BENCHMARKS)" || { echo 'No benchmark found in benchmarks/.' >&2; exit 1; }
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(VENV_PYTHON) "$$script"; done

clean: ## delete the output of the demo and of docs, caches and builds; .venv and trained runs stay
	rm -rf out/demo out/site build dist bundle/build bundle/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find bundle apps tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

need-dataset:
	@test -n "$(DATASET)" || { echo 'Say which data: make train DATASET=dir (or evaluate), where dir holds images/ and labels/ or a dataset.json.' >&2; exit 2; }

need-studies:
	@test -n "$(STUDIES)" || { echo 'Say which images: make serve STUDIES=dir (or a DICOMweb URL).' >&2; exit 2; }
