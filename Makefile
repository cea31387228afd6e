# Everything runs in .venv, which is made on first use: Python 3.11 or newer and make are all that is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo demo-pod test test-tpu lint build clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      train a small Flax model with and without gradient centralization"
	@echo "make demo-pod  train a sharded language model on eight simulated devices"
	@echo "make test      run the tests, the docstrings' examples and the Python blocks of README.md and docs/"
	@echo "make test-tpu  run the tests that compile for a TPU pod; no TPU is needed"
	@echo "make lint      check format, style and types"
	@echo "make build     build the wheel and the source distribution into dist/"
	@echo "make clean     remove the environments and what was built"

demo: .venv/examples.installed
	$(BIN)/python examples/quickstart.py

# The script does not write over checkpoints: each demo has a new folder for them, and none is deleted.
demo-pod: .venv/examples.installed
	$(BIN)/python examples/pod_training.py --simulated-devices 8 --checkpoints "$$(mktemp -d)"

test: .venv/dev.installed
	$(BIN)/python -m pytest --cov

# The compiler for TPUs has an environment of its own: where it is installed, JAX looks for a TPU at every start.
test-tpu: BIN := .venv-tpu/bin
test-tpu: .venv-tpu/tpu.installed
	$(BIN)/python -m pytest --noconftest tests/test_tpu_pod.py

lint: .venv/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

build: .venv/dev.installed
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf .venv .venv-tpu dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

# One stamp for each set of extras in pyproject.toml: the demo does not wait for the tests' dependencies.
%.installed: pyproject.toml
	@echo "Setting up $(@D) for '$(*F)' (a minute or so)"
	@$(PYTHON) -m venv $(@D)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(*F)]'
	@touch $@
