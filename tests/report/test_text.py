"""How long a message is, and where a warning points."""

import re

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
    assert not re.search(r"and -?\d+ more", str(caught[0].message))  # a list that is short is not cut


MANY = {f"a_parameter_with_a_long_name_{number}": jnp.ones((64, 64)) for number in range(1000)}
NAMED = {"a" * 5000: jnp.ones((4, 4))}


def loss(params):
    return sum(map(jnp.sum, params.values()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gc_optax.infer_axes(MANY, loss),
            TypeError,
            "992 more; it comes first: infer_axes(",
        ),
        (lambda: gc_optax.infer_axes(lambda p: "a" * 5000, MANY), TypeError, "it returned 'aaa"),
        (lambda: gc_optax.conv_only(MANY), TypeError, "an array of dtype float32 and shape (64, 64)"),
        (
            lambda: gc_optax.centralized(optax.adam(0.1), MANY),
            TypeError,
            "centralization=gc_optax.centralize(axes)",
        ),
        (lambda: gc_optax.centralized(MANY), TypeError, "optimizer must be an optax.GradientTransformation"),
        (
            lambda: gc_optax.centralized(gc_optax.centralize(), optax.adam(0.1)).init(MANY),
            ValueError,
            "centralized(optimizer, centralize(...))",
        ),
        (lambda: gc_optax.centralize(mask={**MANY, "a": MANY}).init({"a": 1}), ValueError, "993 more"),
        (lambda: gc_optax.centralize(3).init(NAMED), ValueError, "a ... a"),
        (lambda: gc_optax.centralize(("a" * 5000,)).init(jnp.ones((2, 2))), TypeError, "axes for the root"),
        (
            lambda: gc_optax.centralize((0,) * 5000).init(jnp.ones((2, 2))),
            ValueError,
            "repeated in fan_in (0",
        ),
        (
            lambda: gc_optax.centralize(mask=10**5000).init(jnp.ones((2, 2))),
            TypeError,
            "object of type int",
        ),
        (lambda: gc_optax.centralized(optax.adam(0.1), where=MANY), ValueError, "992 more"),
        (lambda: gc_optax.WeightAxes(MANY), TypeError, "must be a tuple of ints"),
        (lambda: gc_optax.optimizers.adam(1e-3, gc_optax.out_last), TypeError, "adam got axes"),
        (lambda: gc_optax.centralize("a" * 5000).init(jnp.ones((2, 2))), TypeError, "axes for the root"),
    ],
)
def test_messages_stay_short_whatever_is_given(call, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        call()
    assert len(str(raised.value)) < 2000
