# Everything runs in .venv, which is made on first use: Python 3.11 or newer and make are all that is needed.
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV_INSTALL = $(PIP_INSTALL) uv && $(BIN)/uv pip install --python $(BIN)/python --quiet
INSTALL = $(PIP_INSTALL)
# One process for each processor. What is in one file shares fixtures, or a page's names, and stays together.
PYTEST = $(BIN)/python -m pytest --numprocesses auto --dist loadfile
# Of most modules of the package what compiles little. The first run takes longer than those that find its programs again.
QUICK = $(addprefix tests/, \
	axes/test_axes.py axes/test_conventions.py axes/test_files.py axes/test_resolve.py \
	centralize/test_arithmetic.py::test_is_its_own_transpose centralize/test_centralize.py \
	centralize/test_clip.py::test_matches_the_oracle optimizers/test_optimizers.py \
	$(addprefix infer_axes/test_, contractions.py entrywise.py moves.py roles.py uses.py verdict.py walk.py) \
	keras/test_keras.py::test_every_optimizer_sees_centralized_gradients_and_keeps_its_variables \
	frameworks/test_nnx.py::test_a_model_with_every_kind_of_state report \
	sharding/test_mesh.py::test_nothing_is_sent_but_the_means_of_weight_vectors_that_are_split)

.PHONY: help demo demo-pod examples evidence test test-quick test-slow test-oldest test-newest test-tpu lint docs docs-serve build clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         train a small Flax model with and without gradient centralization"
	@echo "make demo-pod     train a sharded language model on eight simulated devices"
	@echo "make examples     run every example with small settings, a few minutes in all"
	@echo "make evidence     make the tables and pictures of docs/evidence.md from the runs that are kept"
	@echo "make test         run the tests, the docstrings' examples and the Python blocks of README.md and docs/,"
	@echo "                  but for those of make test-slow"
	@echo "make test-quick   run some of them, for most modules: between two edits"
	@echo "make test-slow    run the tests that take long: whole trainings, every combination, other processes"
	@echo "make test-oldest  run what is not slow with the oldest versions that pyproject.toml allows"
	@echo "make test-newest  run what is not slow with the newest versions, on Python 3.13"
	@echo "make test-tpu     run the tests that compile for a TPU pod; no TPU is needed"
	@echo "make lint         check format, style and types"
	@echo "make docs         build the documentation into site/; a broken link or a public name without a page fails"
	@echo "make docs-serve   show the documentation at http://127.0.0.1:8000, and follow changes"
	@echo "make build        build the wheel and the source distribution into dist/"
	@echo "make clean        remove the environments and what was built"

demo: .venv/examples.installed
	$(BIN)/python examples/quickstart.py

# The script does not write over checkpoints: each demo has a new folder for them, and none is deleted.
demo-pod: .venv/examples.installed
	$(BIN)/python examples/pod_training.py --simulated-devices 8 --checkpoints "$$(mktemp -d)"

# The settings are so small that nothing is learned: what the examples show is in docs/gallery.md.
examples: .venv/examples.installed
	@pictures="$$(mktemp -d)"; set -e; \
	for example in \
		"quickstart --epochs 2 --seeds 1" \
		"image_folder --size 8 --epochs 1 --seeds 1" \
		"image_classification --subset 128 --epochs 1 --seeds 1" \
		"tabular_regression --epochs 2 --seeds 1" \
		"nnx_language_model --layers 1 --width 16 --length 16 --batch-size 8 --steps 20 --measure-every 10 --seeds 1" \
		"equinox_regression --epochs 2 --seeds 1" \
		"haiku_classification --epochs 2 --seeds 1" \
		"keras_fit --epochs 1 --seeds 1" \
		"finetuning --epochs 2 --seeds 1" \
		"gradient_distribution --epochs 1 --seeds 1" \
		"pod_training --simulated-devices 8 --layers 1 --embed 16 --heads 4 --length 16 --batch-size 16 --steps 4"; \
	do \
		set -- $$example; name="$$1"; shift; \
		echo; echo "python examples/$$name.py $$*"; \
		$(BIN)/python "examples/$$name.py" "$$@" --output "$$pictures/$$name.png"; \
	done

evidence: .venv/evidence.installed
	$(BIN)/python benchmarks/evidence_analysis.py

# CI adds COVERAGE=--cov: it has a floor in pyproject.toml, and takes time.
test: .venv/dev.installed
	$(PYTEST) -m "not slow and not thorough" $(COVERAGE)

test-quick: .venv/dev.installed
	$(PYTEST) -m "not slow and not thorough" $(QUICK)

test-slow: .venv/dev.installed
	$(PYTEST) -m "slow or thorough"

# pip always takes the newest versions; uv can take the lowest of what pyproject.toml names. Where a floor does not go with
# another requirement it takes a higher version, so floors.py looks at what is there. The documents need newer versions.
test-oldest: BIN := .venv-oldest/bin
test-oldest: INSTALL = $(UV_INSTALL) --resolution lowest-direct
test-oldest: .venv-oldest/test.installed
	$(BIN)/python tests/package/floors.py test
	$(PYTEST) -m "not slow" tests gc_optax

# The newest JAX does not run on Python 3.11. What was released since the last time is installed first; the list
# shows what some requirement holds back.
test-newest: PYTHON = python3.13
test-newest: BIN := .venv-newest/bin
test-newest: INSTALL = $(UV_INSTALL)
test-newest: .venv-newest/dev.installed
	$(BIN)/uv pip install --python $(BIN)/python --quiet --upgrade --editable '.[dev]'
	$(BIN)/uv pip list --python $(BIN)/python --outdated
	$(PYTEST) -m "not slow"

# The compiler for TPUs has an environment of its own: where it is installed, JAX looks for a TPU at every start.
test-tpu: BIN := .venv-tpu/bin
test-tpu: .venv-tpu/tpu.installed
	$(BIN)/python -m pytest --noconftest tests/sharding/test_tpu_pod.py

lint: .venv/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The variable keeps quiet what the theme says about its successor at every start.
docs: .venv/dev.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: .venv/dev.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

build: .venv/dev.installed
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-nightly .venv-tpu .venv-wheel dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache

# One stamp for each set of extras in pyproject.toml: the demo does not wait for the tests' dependencies.
%.installed: pyproject.toml
	@echo "Setting up $(@D) for '$(*F)' (a minute or so)"
	@$(PYTHON) -m venv $(@D)
	@$(INSTALL) --editable '.[$(*F)]'
	@touch $@

# What CI calls besides, in .github/workflows.

.PHONY: test-nightly test-wheel check-tag

# JAX's documentation names the index of its nightly builds: make test-nightly JAX_NIGHTLY_INDEX=...
test-nightly: PYTHON = python3.13
test-nightly: BIN := .venv-nightly/bin
test-nightly: INSTALL = $(UV_INSTALL)
test-nightly: .venv-nightly/dev.installed
	$(PIP_INSTALL) --upgrade --pre --index-url $(or $(JAX_NIGHTLY_INDEX),$(error JAX_NIGHTLY_INDEX is empty)) jax jaxlib
	$(PYTEST) -m "not slow"

# What `make build` left in dist/: the tests of the source distribution, run on the wheel. Its own gc_optax is taken
# away, so that nothing but the wheel can be imported.
test-wheel: BIN := $(CURDIR)/.venv-wheel/bin
test-wheel:
	$(PYTHON) -m venv --clear .venv-wheel
	$(PIP_INSTALL) "$$(ls dist/*.whl)[test]"
	sources="$$(mktemp -d)" && tar -xzf dist/*.tar.gz -C "$$sources" --strip-components 1 && \
	rm -r "$$sources/gc_optax" && cd "$$sources" && $(PYTEST) -m "not slow" tests

# make check-tag TAG=v0.1.0
check-tag:
	@version="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"; \
	[ "$$TAG" = "v$$version" ] || { echo "the tag is '$$TAG', and pyproject.toml has version $$version"; exit 1; }
