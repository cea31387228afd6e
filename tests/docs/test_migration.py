"""What the docs promise to those who come from another implementation."""

import pathlib
import re

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import gc_optax
import gc_optax.keras

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "migration.md").read_text()

PARAMS = {"conv_kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros((4,))}
TARGET = {"conv_kernel": jnp.arange(72.0).reshape(3, 3, 2, 4) ** 2, "bias": jnp.arange(4.0)}


def loss(params):
    return sum(jax.tree.leaves(jax.tree.map(lambda w, target: jnp.sum((w - target) ** 2), params, TARGET)))


GRADIENTS = jax.grad(loss)(PARAMS)
NAMES = {
    **{name: getattr(gc_optax, name) for name in dir(gc_optax) if not name.startswith("_")},
    "axes": gc_optax.out_last(PARAMS),
    "gc_optax": gc_optax,
    "gradient": GRADIENTS["conv_kernel"],
    "gradients": GRADIENTS,
    "jax": jax,
    "learning_rate": 0.1,
    "loss": loss,
    "optax": optax,
    "optimizer": optax.sgd(0.1),
    "params": PARAMS,
}
LINES = re.findall(r"^\| .+ \| `([^`]+\))`[^|]*\|$", PAGE, re.MULTILINE)


def step(optimizer):
    updates, _ = optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)
    return updates


def step_in_keras(optimizer):
    names = {"conv_kernel": "conv2d_kernel", "bias": "bias"}  # as Keras names them
    variables = {name: keras.Variable(value, name=names[name]) for name, value in PARAMS.items()}
    optimizer.apply([GRADIENTS[name] for name in variables], list(variables.values()))
    return {name: variable.value - PARAMS[name] for name, variable in variables.items()}


def mean_over(axes, kernel):
    return float(jnp.abs(kernel.mean(axes)).max() / jnp.abs(kernel).max())


def test_every_row_but_that_of_the_variants_has_a_line():
    assert len(LINES) == PAGE.count("\n| ") - 2


@pytest.mark.parametrize("line", LINES)
def test_the_line_centralizes(line):
    if "keras" in line:
        updates = step_in_keras(eval(line, NAMES | {"optimizer": keras.optimizers.SGD(0.1)}))
    else:
        result = eval(line, NAMES)
        updates = step(result) if isinstance(result, optax.GradientTransformation) else result
    kernel = updates["conv_kernel"] if isinstance(updates, dict) else updates
    inputs = (1, 2, 3) if "out_first" in line else (0, 1, 2)
    assert mean_over(inputs, GRADIENTS["conv_kernel"]) > 0.1
    if ".adam(" in line:
        # Adam's first step is the sign of what it gets.
        centralized = gc_optax.centralize_gradients(GRADIENTS)["conv_kernel"]
        np.testing.assert_array_equal(jnp.sign(kernel), -jnp.sign(centralized))
        assert (jnp.sign(kernel) != -jnp.sign(GRADIENTS["conv_kernel"])).any()
    else:
        assert mean_over(inputs, kernel) < 1e-6
    assert kernel is updates or jnp.abs(updates["bias"]).max() > 0


def test_checkpoints_of_optax_centralize_load():
    there = optax.chain(optax.centralize(), optax.adam(0.1)).init(PARAMS)
    here = optax.chain(gc_optax.centralize(), optax.adam(0.1)).init(PARAMS)
    assert jax.tree.structure(there) == jax.tree.structure(here)


def test_the_numbers_are_those_of_the_tables():
    quoted = re.findall(r"\b\d+\.\d{2,4}\b", PAGE)
    tables = [line for line in (DOCS / "axes.md").read_text().split("\n") if line.startswith("| ")]
    assert len(quoted) == 4
    for number in quoted:
        assert any(f"| {number} ± " in line for line in tables), number


def test_the_models_of_keras_train_with_centralized_gradients():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        namespace = {}
        exec(block, namespace)
        model = namespace["model"]
        inputs = np.random.default_rng(0).uniform(size=(16, 8)).astype(np.float32)
        model.fit(inputs, inputs.sum(1, keepdims=True), epochs=1, batch_size=16, verbose=0)
        first_moments = {
            variable.path: np.asarray(variable.value)
            for variable in model.optimizer.variables
            if variable.path.endswith("_momentum")
        }
        assert len(first_moments) == len(model.trainable_variables) == 4
        for path, moment in first_moments.items():
            assert np.abs(moment).max() > 0
            is_kernel = "kernel" in path
            assert (np.abs(moment.mean(0)).max() < 1e-6 * np.abs(moment).max()) == is_kernel
