"""What is computed entry by entry: with the data, or with a weight before it meets them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALONE, MASK, Case, check, conv, dense, f32, fan_in_of, images, named, one, x
from jax import lax

row, row_means = jnp.ones((3, 1)), x.mean(1, keepdims=True)
BESIDE_DATA = [
    Case("a bias", lambda b, x: x + b, f32(4), (x,), ALONE),
    Case("learned positions", lambda p, x: x + p, f32(3, 4), (x,), ALONE),
    Case("a scale", lambda s, x: x * s, f32(4), (x,), ALONE),
    Case("a gate", lambda g, x: jax.nn.sigmoid(g) * x, f32(3, 4), (x,), ALONE),
    Case(
        "a temperature",
        lambda p, x: (x / p["t"]) @ p["w"],
        {"t": f32(), "w": dense},
        (x,),
        {"t": ALONE, "w": (0,)},
    ),
    Case("a norm in a residual block", lambda s: (x + x * (row_means * s)).sum(), f32(4), (), ALONE),
    Case("the same, masked", lambda s: (row * (x + x * (row_means * s))).sum(), f32(4), (), ALONE),
    Case("a multiplication and a sum", lambda w, x: (x[:, :, None] * w).sum(1), dense, (x,), (0,)),
    Case(
        "a mask token",
        lambda p, x: jnp.where(x > 0, x, p["m"]) @ p["w"],
        {"m": f32(4), "w": dense},
        (x,),
        {"m": ALONE, "w": (0,)},
    ),
]


@pytest.mark.parametrize("case", BESIDE_DATA, ids=named)
def test_what_meets_the_data_entry_by_entry(case):
    check(case)


# Arithmetic with weights before they meet the data.


def weight_norm(p, x):
    return x @ (p["v"] * p["g"] / jnp.linalg.norm(p["v"], axis=0))


def weight_standardization(w, x):
    return x @ ((w - w.mean(0)) / w.std(0))


def fake_quantization(w, x):
    scale = jnp.abs(w).max() / 127
    return x @ (jnp.round(w / scale) * scale)


def straight_through(w, x):
    return x @ (w + lax.stop_gradient(jnp.sign(w) - w))


def magnitude_pruning(w, x):
    return x @ (w * (jnp.abs(w) > jnp.sort(jnp.abs(w).ravel())[5]))


def dropped_weights(w, key, x):
    return x @ (w * jax.random.bernoulli(key, 0.5, w.shape))


def bayes_by_backprop(p, key, x):
    return x @ (p["mean"] + jnp.exp(p["log_std"]) * jax.random.normal(key, (4, 6)))


def modulated_conv(p, style, x):
    scale = style @ p["style"]
    kernel = p["w"] * scale[:, None]
    return conv(x, kernel * lax.rsqrt((kernel**2).sum((0, 1, 2))))


WEIGHT_LIKE = [
    Case("a constant factor", lambda w, x: x @ (w * 2 / math.sqrt(4)), dense, (x,), (0,)),
    Case(
        "half precision",
        lambda w, x: (x.astype("bfloat16") @ w.astype("bfloat16")).astype("float32"),
        dense,
        (x,),
        (0,),
    ),
    Case("weight norm", weight_norm, {"v": dense, "g": f32(6)}, (x,), {"v": (0,), "g": ALONE}),
    Case("weight standardization", weight_standardization, dense, (x,), (0,)),
    Case("fake quantization", fake_quantization, dense, (x,), (0,)),
    Case("a straight-through estimator", straight_through, dense, (x,), (0,)),
    Case("magnitude pruning", magnitude_pruning, dense, (x,), (0,)),
    Case("a constant mask", lambda w, x: x @ (w * MASK), dense, (x,), (0,)),
    Case("jnp.tril", lambda w, x: x @ jnp.tril(w), dense, (x,), (0,)),
    Case("a mask as an argument", lambda w, m, x: x @ (w * m), dense, (f32(4, 6), x), (0,)),
    Case("dropped weights", dropped_weights, dense, (jax.random.key(0), x), (0,)),
    Case("dropped weights, raw key", dropped_weights, dense, (jax.random.PRNGKey(0), x), (0,)),
    Case(
        "random weights",
        bayes_by_backprop,
        {"mean": dense, "log_std": dense},
        (jax.random.key(0), x),
        {"mean": (0,), "log_std": (0,)},
    ),
    Case("stop_gradient", lambda w, x: x @ lax.stop_gradient(w), dense, (x,), ALONE),
    Case(
        "modulated conv",
        modulated_conv,
        {"w": f32(3, 3, 4, 8), "style": f32(5, 4)},
        (f32(5), images),
        {"w": (0, 1, 2), "style": (0,)},
    ),
    Case("a loss with weight decay", lambda w, x: (x @ w).sum() + 0.1 * (w**2).sum(), dense, (x,), (0,)),
]


@pytest.mark.parametrize("case", WEIGHT_LIKE, ids=named)
def test_arithmetic_with_weights_keeps_their_axes(case):
    check(case)


# What the data scales or masks may be a kernel still; what is used otherwise is none.


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def scaled_norm(p, x):
    return ((x - x.mean(-1, keepdims=True)) * (lax.rsqrt(x.var(-1, keepdims=True)) * p["scale"])) @ p["w"]


def quantized(w, scale, x):
    return x @ (jnp.clip(jnp.round(w / scale), -127, 127) * scale)


CANDIDATES = [
    Case("masked by what an argument is not", lambda w, m, x: x @ (w * (1 - m)), dense, (f32(4, 6), x), (0,)),
    Case(
        "masked by a comparison with an argument",
        lambda w, m, x: x @ jnp.where(m == 2, w, 0),
        dense,
        (f32(4, 6), x),
        (0,),
    ),
    Case("a diagonal matrix", lambda d, x: x @ jnp.diag(d), f32(4), (x,), ALONE),
    Case("a scaled unit matrix", lambda d, x: x @ (d[:, None] * jnp.eye(4)), f32(4), (x,), ALONE),
    Case(
        "one kernel and deltas to it",
        lambda p, x: x @ p["w"] + x @ (p["w"] * p["s"]),
        {"w": dense, "s": f32(6)},
        (x,),
        {"w": (0,), "s": ALONE},
    ),
    Case(
        "random features of a time",
        lambda p, t: jnp.sin(t[:, None] * p["f"]) @ p["w"],
        {"f": f32(4), "w": dense},
        (jnp.ones(3),),
        {"f": ALONE, "w": (0,)},
    ),
    Case("divided by it", lambda w, x: (x[:, :, None] / w).sum(1), dense, (x,), ALONE),
    Case(
        "chosen against the data, and summed",
        lambda w, x: jnp.where(x[:, :, None] > 0, x[:, :, None], w).sum(1),
        dense,
        (x,),
        ALONE,
    ),
    Case("scaled by the data", lambda w, x: x @ (w / x.std()), dense, (x,), (0,)),
    Case("quantized with a scale as an argument", quantized, dense, (jnp.float32(0.1), x), (0,)),
    Case(
        "between two weights",
        lambda p, t, x: x @ ((1 - t) * p[0] + t * p[1]),
        [dense, dense],
        (jnp.float32(0.1), x),
        [(0,), (0,)],
    ),
    Case(
        "a penalty with an argument",
        lambda w, f, x: (x @ w).sum() + (f * w**2).sum(),
        dense,
        (f32(4, 6), x),
        (0,),
    ),
    Case(
        "a penalty on the way from an argument",
        lambda w, f, x: (x @ w).sum() + ((w - f) ** 2).sum(),
        dense,
        (f32(4, 6), x),
        (0,),
    ),
    Case(
        "a scale that first scales the data's scale",
        scaled_norm,
        {"scale": f32(4), "w": dense},
        (x,),
        {"scale": ALONE, "w": (0,)},
    ),
    Case(
        "positions on a batch of one",
        lambda p, x: layer_norm(x + p["p"]) @ p["w"],
        {"p": one, "w": dense},
        (one,),
        {"p": ALONE, "w": (0,)},
    ),
    Case(
        "positions on a batch of one, closed over",
        lambda p: layer_norm(np.ones((1, 3, 4), np.float32) + p["p"]) @ p["w"],
        {"p": one, "w": dense},
        (),
        {"p": ALONE, "w": (0,)},
    ),
    Case(
        "a scale of the inputs in a kernel",
        lambda p, x: x @ (p["s"][:, None] * p["w"]),
        {"s": f32(4), "w": dense},
        (x,),
        {"s": ALONE, "w": (0,)},
    ),
    Case(
        "a learned image, modulated",
        lambda p, s, k: conv(p * s, k),
        f32(1, 8, 8, 4),
        (jnp.float32(2), f32(3, 3, 4, 8)),
        ALONE,
    ),
]


@pytest.mark.parametrize("case", CANDIDATES, ids=named)
def test_what_the_data_scales_or_masks(case):
    check(case)


# Products entry by entry that are added up make a contraction.

taps, channels = f32(3, 5), f32(2, 9, 5)


def causal_taps(w, x):
    """A depthwise convolution of what came before."""
    before = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
    return sum(before[:, tap : tap + 9] * w[tap] for tap in range(3))


SUMMED = [
    Case("a state", lambda w, s: jnp.sum(s * w, 1), f32(4, 5), (f32(3, 4, 5),), (0,)),
    Case("a state, averaged", lambda w, s: (s * w).mean(1), f32(4, 5), (f32(3, 4, 5),), (0,)),
    Case("patches", lambda w, s: (s * w).sum((1, 2)), f32(2, 2, 5), (f32(3, 2, 2, 5),), (0, 1)),
    Case(
        "patches, to outputs",
        lambda w, s: (s[..., None] * w).sum((1, 2, 3)),
        f32(2, 2, 5, 6),
        (f32(3, 2, 2, 5),),
        (0, 1, 2),
    ),
    Case(
        "columns times rows", lambda w, x: sum(x[:, k, None] * w[k] for k in range(4)), f32(4, 5), (x,), (0,)
    ),
    Case("taps", lambda w, x: sum(x[:, tap : tap + 7] * w[tap] for tap in range(3)), taps, (channels,), (0,)),
    Case(
        "rolled taps",
        lambda w, x: sum(jnp.roll(x, tap, 1) * w[tap] for tap in range(3)),
        taps,
        (channels,),
        (0,),
    ),
    Case("taps of what came before", causal_taps, taps, (channels,), (0,)),
    Case(
        "taps and a bias",
        lambda p, x: causal_taps(p["w"], x) + p["b"],
        {"w": taps, "b": f32(5)},
        (channels,),
        {"w": (0,), "b": ALONE},
    ),
]


@pytest.mark.parametrize("case", SUMMED, ids=named)
def test_products_that_are_added_up_are_a_contraction(case):
    check(case)


GATES = [
    Case("of two branches", lambda g, a, b: a * g[0] + b * g[1], f32(2, 4), (x, x), ALONE),
    Case("of two branches, one number each", lambda g, a, b: a * g[0] + b * g[1], f32(2), (x, x), ALONE),
    Case("of two branches, in a loss", lambda g, a, b: (a * g[0] + b * g[1]).sum(), f32(2, 4), (x, x), ALONE),
    Case(
        "of an array and of what is computed of it",
        lambda g, a: a * g[0] + jnp.tanh(a) * g[1],
        f32(2, 4),
        (x,),
        ALONE,
    ),
    Case(
        "of which one is not used",
        lambda g, x: sum(x[:, k, None] * g[k] for k in range(3)),
        f32(4, 5),
        (x,),
        ALONE,
    ),
    Case(
        "of two sums",
        lambda g, x: jnp.tanh(x[:, :1] * g[0] + x[:, 1:2] * g[1]) + x[:, 2:3] * g[2] + x[:, 3:] * g[3],
        dense,
        (x,),
        ALONE,
    ),
]


@pytest.mark.parametrize("case", GATES, ids=named)
def test_gates_in_one_array_are_no_kernel(case):
    check(case)


@jax.checkpoint
def scaled_activation(x, gate):
    return jax.nn.relu(x) * gate


OTHER_ARRAYS = {
    "two calls of one function": lambda w, x, y: scaled_activation(x, w[0]) + scaled_activation(y, w[1]),
    "two powers": lambda w, x, y: x**2 * w[0] + x**3 * w[1],
    "two rows, of two arrays each": lambda w, x, y: (
        jnp.concatenate([x, y]) * w[0] + jnp.concatenate([y, x]) * w[1]
    ),
    "two roundings": lambda w, x, y: x.astype(jnp.float16).astype(jnp.float32) * w[0] + x * w[1],
}


@pytest.mark.parametrize("name", OTHER_ARRAYS)
def test_what_is_computed_in_two_ways_is_not_one_array(name):
    assert fan_in_of(OTHER_ARRAYS[name], f32(2, 4), x, x) == ALONE


CLOSED_MASK = np.float32(np.tri(4))


def test_a_mask_that_is_closed_over_is_no_data_beside_the_weight():
    def network(p):
        return jnp.tanh(x @ p["a"]) @ (p["b"] * CLOSED_MASK)

    assert fan_in_of(network, {"a": f32(4, 4), "b": f32(4, 4)}) == {"a": (0,), "b": (0,)}
    assert fan_in_of(lambda w, x: jnp.convolve(x[0], w * CLOSED_MASK[3]), f32(4), x) == (0,)


def test_outputs_that_are_summed_too_are_no_fan_out():
    with pytest.warns(UserWarning, match="axis 1 reduced before it meets the data"):
        assert fan_in_of(lambda w, x: (x[:, :, None] * w).sum((1, 2)), dense, x) == ALONE
