"""The arithmetic, against a float64 oracle and against the algebra of a projection."""

import math

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given

from gc_optax._arithmetic import subtract_mean

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64]
EPS32 = float(jnp.finfo(jnp.float32).eps)


def array(seed, shape, dtype=jnp.float32):
    numbers = np.random.default_rng(seed).normal(size=(2, *shape))
    return jnp.asarray(numbers[0] + 1j * numbers[1] if dtype == jnp.complex64 else numbers[0], dtype)


@st.composite
def shapes_and_axes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axes = draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    return shape, tuple(sorted(axes))


seeds = st.integers(0, 2**32 - 1)
cases = shapes_and_axes()


def rounding(values, axes, dtype):
    """A bound on the error of a sum over `axes`, a subtraction and a cast to `dtype`."""
    n = math.prod(values.shape[axis] for axis in axes)
    largest = float(np.max(np.abs(np.asarray(values, np.complex128)), initial=0.0))
    return (2 * n * EPS32 + float(jnp.finfo(dtype).eps) / 2) * 2 * largest


@given(cases, seeds, st.sampled_from(DTYPES))
def test_matches_the_oracle(case, seed, dtype):
    shape, axes = case
    gradient = array(seed, shape, dtype)
    result = subtract_mean(gradient, axes)
    chex.assert_shape(result, shape)
    assert result.dtype == dtype
    expected = oracle.centralize(gradient, axes)
    np.testing.assert_allclose(
        np.asarray(result, expected.dtype), expected, rtol=0, atol=rounding(gradient, axes, dtype)
    )


dtypes = st.sampled_from(DTYPES)


def wide(values):
    return np.asarray(values, np.complex128)


def assert_close(actual, desired, atol):
    np.testing.assert_allclose(wide(actual), wide(desired), rtol=0, atol=atol)


@pytest.mark.thorough
@given(cases, seeds, dtypes)
def test_is_idempotent(case, seed, dtype):
    shape, axes = case
    gradient = array(seed, shape, dtype)
    once = subtract_mean(gradient, axes)
    assert_close(subtract_mean(once, axes), once, 2 * rounding(gradient, axes, dtype))


@pytest.mark.slow
@given(cases, seeds, dtypes, st.integers(-3, 3))
def test_is_linear(case, seed, dtype, factor):
    shape, axes = case
    g, h = array(seed, shape, dtype), array(seed + 1, shape, dtype)
    factor = jnp.asarray(factor, dtype)
    combined = subtract_mean(g + factor * h, axes)
    separate = subtract_mean(g, axes) + factor * subtract_mean(h, axes)
    assert_close(combined, separate, 8 * rounding(abs(g) + 3 * abs(h), axes, dtype))


@pytest.mark.thorough
@given(cases, seeds, dtypes)
def test_is_self_adjoint(case, seed, dtype):
    shape, axes = case
    g, h = array(seed, shape, dtype), array(seed + 1, shape, dtype)
    left = np.vdot(wide(subtract_mean(g, axes)), wide(h))
    right = np.vdot(wide(g), wide(subtract_mean(h, axes)))
    bound = rounding(g, axes, dtype) * np.sum(abs(wide(h))) + rounding(h, axes, dtype) * np.sum(abs(wide(g)))
    assert abs(left - right) <= bound


@given(cases, seeds, dtypes)
def test_leaves_every_weight_vector_with_mean_zero(case, seed, dtype):
    shape, axes = case
    gradient = array(seed, shape, dtype)
    means = wide(subtract_mean(gradient, axes)).mean(axes)
    assert_close(means, np.zeros_like(means), rounding(gradient, axes, dtype))


@pytest.mark.thorough
@given(cases, seeds, dtypes)
def test_never_increases_the_norm(case, seed, dtype):
    shape, axes = case
    gradient = array(seed, shape, dtype)
    before = np.linalg.norm(np.asarray(gradient, np.complex128))
    after = np.linalg.norm(np.asarray(subtract_mean(gradient, axes), np.complex128))
    assert after <= before * (1 + float(jnp.finfo(dtype).eps)) + gradient.size * EPS32


def test_float64_is_kept_and_accumulated_in_float64():
    with jax.enable_x64(True):
        gradient = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)) + 1e6)
        result = subtract_mean(gradient, (0,))
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, oracle.centralize(gradient, (0,)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    gradient = (array(0, (4096, 8)) + 3).astype(dtype)
    exact = oracle.centralize(gradient, (0,))
    eps = float(jnp.finfo(dtype).eps)
    one_rounding = eps / 2 * abs(exact) + 1e-5  # the rest is for the sum in float32

    assert np.all(abs(np.float64(subtract_mean(gradient, (0,))) - exact) <= one_rounding)
    in_half = gradient - gradient.mean(0, keepdims=True)
    assert np.any(abs(np.float64(in_half) - exact) > one_rounding), "the bound must tell one from two"


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("fan_in", [3, 7, 41, 100, 4097])
def test_of_equal_entries_in_half_precision_nothing_is_left(dtype, fan_in):
    gradient = jnp.full((fan_in, 3), 1.7, dtype)
    np.testing.assert_array_equal(np.asarray(subtract_mean(gradient, (0,)), np.float32), 0)


def test_float8_is_accumulated_in_float32():
    gradient = jnp.full((300, 1), 1.0, jnp.float8_e4m3fn)  # a sum in float8 ends at 16
    result = subtract_mean(gradient, (0,))
    assert result.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(np.float32(result), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_own_weight_vector(bad):
    gradient = array(0, (64, 5, 7))
    spoiled = subtract_mean(gradient.at[3, 2, 4].set(bad), (0,))
    clean = subtract_mean(gradient, (0,))
    other = np.ones((5, 7), bool)
    other[2, 4] = False
    np.testing.assert_array_equal(np.asarray(spoiled)[:, other], np.asarray(clean)[:, other])
    assert not np.isfinite(spoiled[3, 2, 4])


ADVERSARIAL = {
    "normal": lambda noise: noise,
    "positive": abs,
    "a large common offset": lambda noise: 1e4 + noise,
    "nearly constant": lambda noise: 0.1 + 1e-3 * noise,
    "alternating signs": lambda noise: (
        noise + 1e3 * (-1) ** np.arange(len(noise)).reshape(-1, *[1] * (noise.ndim - 1))
    ),
    "from 1e-30 to 1e30": lambda noise: np.sign(noise) * 10 ** np.clip(10 * noise, -30, 30),
}


@pytest.mark.parametrize("make", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((4096, 64), (0,)),
        ((64, 4096), (0,)),
        ((50000, 16), (0,)),
        ((64, 4096), (1,)),
        ((4096, 64), (1,)),
        ((3, 3, 64, 128), (0, 1, 2)),
        ((3, 3, 64, 128), (0, 1, 3)),
        ((4, 768, 100), (1,)),
        ((12, 64, 96), (0, 1)),
        ((33, 17), (0,)),
        ((4096, 1024), (0,)),
        ((1024, 4096), (0,)),
    ],
)
def test_is_as_accurate_as_a_mean_of_jax(make, shape, axes):
    gradient = make(np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    wide = gradient.astype(np.float64)
    exact = wide - wide.mean(axes, keepdims=True)

    def error(centralize):
        return np.max(abs(np.float64(jax.jit(centralize)(gradient)) - exact))

    by_hand = error(lambda g: g - jnp.mean(g, axes, keepdims=True))
    assert error(lambda g: subtract_mean(g, axes)) <= by_hand
    inputs = math.prod(shape[axis] for axis in axes)
    assert by_hand <= inputs * EPS32 * np.max(abs(wide)), "the oracle and JAX must agree"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2)])
def test_is_its_own_transpose(axes, dtype):
    gradient = array(0, (5, 7, 3), dtype)
    (transposed,) = jax.linear_transpose(lambda g: subtract_mean(g, axes), gradient)(gradient)
    assert_close(transposed, subtract_mean(gradient, axes), 2 * rounding(gradient, axes, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_over_a_batch(dtype):
    gradients = array(0, (5, 7, 3), dtype)
    batched = jax.vmap(lambda gradient: subtract_mean(gradient, (0,)))(gradients)
    assert_close(batched, subtract_mean(gradients, (1,)), rounding(gradients, (1,), dtype))
