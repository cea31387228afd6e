"""Where a warning points."""

import jax.numpy as jnp
import optax
import pytest
from jax import ShapeDtypeStruct as Shape

import gc_optax


@pytest.mark.parametrize(
    "optimizer",
    [
        gc_optax.centralize(),
        gc_optax.centralized(optax.sgd(0.1)),
        optax.chain(optax.masked(gc_optax.centralize(), True), optax.sgd(0.1)),
    ],
)
def test_the_warning_points_at_the_line_that_initializes(optimizer):
    with pytest.warns(UserWarning, match="more than one reading") as caught:
        optimizer.init({"kernel": Shape((2, 3, 4), jnp.float32)})
    assert [warning.filename for warning in caught] == [__file__]
