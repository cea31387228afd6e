"""What the tests of `infer_axes` share: a computation with its truth, and the arrays that it is about."""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gc_optax import infer_axes

ALONE = ()
MASK = np.tril(np.ones((4, 6), np.float32))


class Case(NamedTuple):
    """A computation, its parameters and other arguments, and the fan-in of each parameter."""

    name: str
    fn: Any
    params: Any
    args: tuple[Any, ...]
    fan_in: Any
    unclear: str = ""  # what the warning has to say, where there has to be one


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def fan_in_of(fn, params, *args, **kwargs):
    return jax.tree.map(lambda axes: axes.fan_in, infer_axes(fn, params, *args, **kwargs))


def check(case):
    warns = pytest.warns(UserWarning, match=case.unclear) if case.unclear else contextlib.nullcontext()
    with warns:
        assert fan_in_of(case.fn, case.params, *case.args) == case.fan_in


def named(case):
    return case.name


x = jnp.ones((3, 4))
images = jnp.ones((2, 8, 8, 4))
tokens = jnp.array([1, 2])
one = f32(1, 3, 4)  # a batch of one
dense = f32(4, 6)
square = f32(4, 4)
FACTORS = {"a": f32(4, 2), "b": f32(2, 6)}
conv = functools.partial(
    lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def scanned(w, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]
