"""What `infer_axes` reads off a computation, against truth written by hand and truth by construction."""

import contextlib
import functools
import math
import string
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend import core as jex
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from gc_optax import WeightAxes, infer_axes

ALONE = ()


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
dense = f32(4, 6)
conv = functools.partial(
    lax.conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


# A weight and the data, in one operation.


@jax.custom_vjp
def int8_dense(w, x):
    return (x.astype(jnp.int8) @ w.astype(jnp.int8)).astype(jnp.float32)


int8_dense.defvjp(lambda w, x: (int8_dense(w, x), (w, x)), lambda wx, g: (wx[1].T @ g, g @ wx[0].T))


@jax.custom_jvp
def dense_with_own_tangent(w, x):
    return x @ w


dense_with_own_tangent.defjvp(lambda primals, tangents: (primals[1] @ primals[0], tangents[1] @ primals[0]))

USES = [
    Case("x @ w", lambda w, x: x @ w, dense, (x,), (0,)),
    Case("x @ w.T", lambda w, x: x @ w.T, f32(6, 4), (x,), (1,)),
    Case("w @ x", lambda w, x: w @ x.T, f32(6, 4), (x,), (1,)),
    Case("a vector", lambda w, x: x @ w, f32(4), (x,), (0,)),
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
    Case("not used", lambda w, x: x, dense, (x,), ALONE),
    Case("fan-in 1", lambda w, x: x[:, :1] @ w, f32(1, 6), (x,), ALONE),
    Case("a multiplication and a sum", lambda w, x: (x[:, :, None] * w).sum(1), dense, (x,), (0,)),
    Case("conv", lambda w, x: conv(x, w), f32(3, 3, 4, 8), (images,), (0, 1, 2)),
    Case(
        "grouped conv", lambda w, x: conv(x, w, feature_group_count=2), f32(3, 3, 2, 8), (images,), (0, 1, 2)
    ),
    Case(
        "depthwise conv",
        lambda w, x: conv(x, w, feature_group_count=4),
        f32(3, 3, 1, 4),
        (images,),
        (0, 1, 2),
    ),
    Case(
        "depthwise 1x1 conv",
        lambda w, x: conv(x, w, feature_group_count=4),
        f32(1, 1, 1, 4),
        (images,),
        ALONE,
    ),
    Case(
        "conv in PyTorch's layout",
        lambda w, x: lax.conv(x, w, (1, 1), "SAME"),
        f32(8, 4, 3, 3),
        (f32(2, 4, 8, 8),),
        (1, 2, 3),
    ),
    Case(
        "transposed conv",
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        f32(3, 3, 4, 5),
        (images,),
        (0, 1, 2),
    ),
    Case(
        "transposed conv, transpose_kernel=True",
        lambda w, x: lax.conv_transpose(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
        ),
        f32(3, 3, 5, 4),
        (images,),
        (0, 1, 3),
    ),
    Case("conv over a learned image", lambda w, k: conv(w, k), f32(1, 8, 8, 4), (f32(3, 3, 4, 8),), ALONE),
    Case("experts", lambda w, x: jnp.einsum("eti,eio->eto", x, w), f32(2, 4, 6), (f32(2, 3, 4),), (1,)),
    Case("vmap of the weights", jax.vmap(lambda w, x: x @ w, (0, None)), f32(2, 4, 6), (x,), (1,)),
    Case("vmap of the data", jax.vmap(lambda w, x: w @ x, (None, 0)), f32(6, 4), (x,), (1,)),
    Case(
        "vmap of a conv's kernels",
        jax.vmap(lambda w, x: conv(x, w), (0, None)),
        f32(7, 3, 3, 4, 8),
        (images,),
        (1, 2, 3),
    ),
    Case(
        "ragged experts", lambda w, x, n: lax.ragged_dot(x, w, n), f32(2, 4, 6), (x, jnp.array([1, 2])), (1,)
    ),
    Case("a lookup", lambda e, i: e[i], f32(10, 4), (tokens,), ALONE),
    Case("jnp.take", lambda e, i: jnp.take(e, i, axis=0), f32(10, 4), (tokens,), ALONE),
    Case("a lookup of one row", lambda e, i: e[i], f32(10, 4), (jnp.int32(3),), ALONE),
    Case("jax.nn.one_hot", lambda e, i: jax.nn.one_hot(i, 10) @ e, f32(10, 4), (tokens,), ALONE),
    Case(
        "one-hot, masked",
        lambda e, i, m: (jax.nn.one_hot(i, 10) * m[:, None]) @ e,
        f32(10, 4),
        (tokens, jnp.ones(2)),
        ALONE,
    ),
    Case(
        "one-hot by comparison",
        lambda e, i: (jnp.arange(10) == i[:, None]).astype(jnp.float32) @ e,
        f32(10, 4),
        (tokens,),
        ALONE,
    ),
    Case("one-hot by jnp.eye", lambda e, i: jnp.eye(10)[i] @ e, f32(10, 4), (tokens,), ALONE),
    Case("a padding row", lambda e, i: e.at[0].set(0.0)[i], f32(10, 4), (tokens,), ALONE),
    Case(
        "a class token",
        lambda p, x: jnp.concatenate([p["cls"], x]) @ p["w"],
        {"cls": f32(1, 4), "w": dense},
        (x,),
        {"cls": ALONE, "w": (0,)},
    ),
    Case(
        "a mask token",
        lambda p, x: jnp.where(x > 0, x, p["m"]) @ p["w"],
        {"m": f32(4), "w": dense},
        (x,),
        {"m": ALONE, "w": (0,)},
    ),
    Case("custom_vjp", int8_dense, dense, (x,), (0,)),
    Case("custom_jvp", dense_with_own_tangent, dense, (x,), (0,)),
    Case("jax.checkpoint", jax.checkpoint(lambda w, x: x @ w), dense, (x,), (0,)),
    Case("jit", jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w)), dense, (x,), (0,)),
]


@pytest.mark.parametrize("case", USES, ids=named)
def test_a_weight_meets_the_data(case):
    check(case)


@pytest.mark.parametrize(
    "spelling",
    [
        "bi,io->bo",
        "io,bi->bo",
        "bi,oi->bo",
        "bij,ijo->bo",
        "bij,oji->ob",
        "bi,ibo->bo",
        "bi,io->ob",
        "i,io->o",
        "...i,io->...o",
    ],
)
def test_einsum_in_every_spelling(spelling):
    sizes = {"b": 3, "i": 4, "j": 2, "o": 5, ".": 7}
    names = [operand.replace("...", ".") for operand in spelling.split("->")[0].split(",")]
    number = next(n for n, operand in enumerate(names) if "o" in operand)
    operands = [f32(*(sizes[letter] for letter in operand)) for operand in names]
    weight = operands.pop(number)

    def product(w, x):
        return jnp.einsum(spelling, *((w, x) if number == 0 else (x, w)))

    assert fan_in_of(product, weight, *operands) == tuple(n for n, s in enumerate(names[number]) if s in "ij")


# Arithmetic with weights before they meet the data.


def weight_norm(p, x):
    return x @ (p["v"] * p["g"] / jnp.linalg.norm(p["v"], axis=0))


def spectral_norm(w, u, x):
    v = u @ w.T
    v = v / jnp.linalg.norm(v)
    u = v @ w
    u = u / jnp.linalg.norm(u)
    u, v = lax.stop_gradient((u, v))
    return x @ (w / (v @ w @ u.T)[0, 0]), u


def weight_standardization(w, x):
    return x @ ((w - w.mean(0)) / w.std(0))


def fake_quantization(w, x):
    scale = jnp.abs(w).max() / 127
    return x @ (jnp.round(w / scale) * scale)


def straight_through(w, x):
    return x @ (w + lax.stop_gradient(jnp.sign(w) - w))


def magnitude_pruning(w, x):
    return x @ (w * (jnp.abs(w) > jnp.sort(jnp.abs(w).ravel())[5]))


def lora(p, base, x):
    return x @ (base + 0.5 * p["a"] @ p["b"])


def dora(p, x):
    w = p["w"] + p["a"] @ p["b"]
    return x @ (p["m"] * w / jnp.linalg.norm(w, axis=0))


def dropped_weights(w, key, x):
    return x @ (w * jax.random.bernoulli(key, 0.5, w.shape))


def bayes_by_backprop(p, key, x):
    return x @ (p["mean"] + jnp.exp(p["log_std"]) * jax.random.normal(key, (4, 6)))


def modulated_conv(p, style, x):
    scale = style @ p["style"]
    kernel = p["w"] * scale[:, None]
    return conv(x, kernel * lax.rsqrt((kernel**2).sum((0, 1, 2))))


MASK = np.tril(np.ones((4, 6), np.float32))
FACTORS = {"a": f32(4, 2), "b": f32(2, 6)}
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
    Case("spectral norm", spectral_norm, dense, (f32(1, 6), x), (0,)),
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
        "LoRA on a parameter",
        lambda p, x: lora(p, p["w"], x),
        {**FACTORS, "w": dense},
        (x,),
        {"a": (0,), "b": (0,), "w": (0,)},
    ),
    Case(
        "LoRA on a frozen parameter",
        lambda p, x: lora(p, lax.stop_gradient(p["w"]), x),
        {**FACTORS, "w": dense},
        (x,),
        {"a": (0,), "b": (0,), "w": ALONE},
    ),
    Case("LoRA on an argument", lora, FACTORS, (f32(4, 6), x), {"a": (0,), "b": (0,)}),
    Case("LoRA on a constant", lambda p, x: lora(p, MASK, x), FACTORS, (x,), {"a": (0,), "b": (0,)}),
    Case("LoRA beside the product", lambda p, x: x @ p["a"] @ p["b"], FACTORS, (x,), {"a": (0,), "b": (0,)}),
    Case(
        "LoRA in PyTorch's layout",
        lambda p, x: x @ (p["w"] + p["b"] @ p["a"]).T,
        {"a": f32(2, 4), "b": f32(6, 2), "w": f32(6, 4)},
        (x,),
        {"a": (1,), "b": (1,), "w": (1,)},
    ),
    Case(
        "DoRA",
        dora,
        {**FACTORS, "w": dense, "m": f32(6)},
        (x,),
        {"a": (0,), "b": (0,), "w": (0,), "m": ALONE},
    ),
    Case(
        "modulated conv",
        modulated_conv,
        {"w": f32(3, 3, 4, 8), "style": f32(5, 4)},
        (f32(5), images),
        {"w": (0, 1, 2), "style": (0,)},
    ),
    Case("a loss with weight decay", lambda w, x: (x @ w).sum() + 0.1 * (w**2).sum(), dense, (x,), (0,)),
    Case(
        "a loss with an orthogonality term",
        lambda w, x: (x @ w).sum() + ((w.T @ w - jnp.eye(6)) ** 2).sum(),
        dense,
        (x,),
        (0,),
    ),
    Case(
        "a constant transform of the inputs",
        lambda w, x: x @ (np.ones((4, 5), np.float32) @ w),
        f32(5, 6),
        (x,),
        (0,),
    ),
]


@pytest.mark.parametrize("case", WEIGHT_LIKE, ids=named)
def test_arithmetic_with_weights_keeps_their_axes(case):
    check(case)


# Weights cut, joined and reshaped before they meet the data.


def attend(q, k, v):
    return jax.nn.dot_product_attention(q[None], k[None], v[None])


def qkv_split_after(w, x):
    return attend(*(part.reshape(3, 2, 5) for part in jnp.split(x @ w, 3, -1)))


def qkv_split_before(w, x):
    return attend(*((x @ part).reshape(3, 2, 5) for part in jnp.split(w, 3, -1)))


def qkv_reshaped_before(w, x):
    w = w.reshape(4, 3, 2, 5)
    return attend(*(jnp.einsum("ti,ihd->thd", x, w[:, part]) for part in range(3)))


RESHAPED = [
    Case("qkv split after", qkv_split_after, f32(4, 30), (x,), (0,)),
    Case("qkv split before", qkv_split_before, f32(4, 30), (x,), (0,)),
    Case("qkv reshaped before", qkv_reshaped_before, f32(4, 30), (x,), (0,)),
    Case("qkv joined", lambda p, x: x @ jnp.concatenate(p, 1), [f32(4, 3), f32(4, 5)], (x,), [(0,), (0,)]),
    Case("inputs joined", lambda p, x: x @ jnp.concatenate(p), [f32(1, 5), f32(3, 5)], (x,), [ALONE, (0,)]),
    Case("heads split", lambda w, x: jnp.einsum("ti,ihd->thd", x, w.reshape(4, 2, 3)), f32(4, 6), (x,), (0,)),
    Case("heads joined", lambda w, x: x @ w.reshape(4, 5), f32(2, 2, 5), (x,), (0, 1)),
    Case("padded", lambda w, x: x @ jnp.pad(w, ((1, 0), (0, 3))), f32(3, 6), (x,), (0,)),
    Case("flipped", lambda w, x: x @ w[::-1, ::-1], dense, (x,), (0,)),
    Case("a part of the outputs", lambda w, x: x @ w[:, :3], dense, (x,), (0,)),
    Case("layers indexed", lambda w, x: x @ w[0] @ w[1], f32(2, 4, 4), (x,), (1,)),
    Case(
        "layers picked", lambda w, x: jnp.einsum("ti,lio->lto", x, w[jnp.arange(2)]), f32(3, 4, 6), (x,), (1,)
    ),
    Case("layers on the last axis", lambda w, x: x @ w[..., 1], f32(4, 6, 2), (x,), (0,)),
]


@pytest.mark.parametrize("case", RESHAPED, ids=named)
def test_weights_are_followed_through_reshapes(case):
    check(case)


# Loops and branches.


def rnn(p, xs):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, h

    return lax.scan(step, p["h0"], xs)


def scanned(w, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


def with_weights_in_the_carry(w, x):
    (_, h), _ = lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (w, x), length=3)
    return h


def power(w, x):
    return x @ lax.fori_loop(0, 3, lambda _, m: m @ w, jnp.eye(4))


def churned(w):
    return lax.fori_loop(0, 3, lambda _, m: m.T.reshape(2, 2, 4).transpose(1, 2, 0).reshape(4, 4), w)


square = f32(4, 4)


def unrolled_rnn(p, xs):
    h = jnp.zeros(6)
    for step in range(3):
        h = jnp.tanh(xs[step] @ p["w"] + h @ p["u"])
    return h


LOOPS = [
    Case(
        "constants contracted in a loop, and returned",
        lambda w, x: (lax.scan(lambda c, t: (c, jnp.ones((3, 4)) @ w), 0.0, None, length=2)[1], x),
        dense,
        (x,),
        (0,),
    ),
    Case("an RNN, unrolled", unrolled_rnn, {"w": f32(4, 6), "u": f32(6, 6)}, (x,), {"w": (0,), "u": (0,)}),
    Case("scan over layers", scanned, f32(5, 4, 4), (x,), (1,)),
    Case(
        "scan in reverse",
        lambda w, x: lax.scan(lambda h, w: (h @ w, None), x, w, reverse=True)[0],
        f32(5, 4, 4),
        (x,),
        (1,),
    ),
    Case(
        "scan, remat",
        lambda w, x: lax.scan(jax.checkpoint(lambda h, w: (h @ w, None)), x, w)[0],
        f32(5, 4, 4),
        (x,),
        (1,),
    ),
    Case(
        "scan of a scan",
        lambda w, x: lax.scan(lambda h, w: (scanned(w, h), None), x, w)[0],
        f32(2, 5, 4, 4),
        (x,),
        (2,),
    ),
    Case("vmap of a scan", jax.vmap(scanned, (0, None)), f32(2, 5, 4, 4), (x,), (2,)),
    Case(
        "scan of a vmap",
        lambda w, x: lax.scan(lambda h, w: (jax.vmap(jnp.matmul)(h, w), None), x, w)[0],
        f32(5, 2, 4, 4),
        (f32(2, 3, 4),),
        (2,),
    ),
    Case(
        "lax.map of the weights, then scan",
        lambda w, x: scanned(lax.map(lambda w: w / jnp.linalg.norm(w), w), x),
        f32(5, 4, 4),
        (x,),
        (1,),
    ),
    Case(
        "an RNN",
        rnn,
        {"w": f32(4, 6), "u": f32(6, 6), "b": f32(6), "h0": f32(6)},
        (x,),
        {"w": (0,), "u": (0,), "b": ALONE, "h0": ALONE},
    ),
    Case("weights in the carry", with_weights_in_the_carry, square, (x,), (0,)),
    Case(
        "fori_loop over layers",
        lambda w, x: lax.fori_loop(0, 5, lambda i, h: h @ w[i], x),
        f32(5, 4, 4),
        (x,),
        (1,),
    ),
    Case("a power of the weights", power, square, (x,), (0,)),
    Case(
        "while_loop",
        lambda w, x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] @ w[c[0]]), (0, x))[1],
        f32(5, 4, 4),
        (x,),
        (1,),
    ),
    Case(
        "while_loop until the data says so",
        lambda w, x: lax.while_loop(lambda h: h.sum() < 5, lambda h: h @ w, x),
        square,
        (x,),
        (0,),
    ),
    Case(
        "cond",
        lambda w, x, p: lax.cond(p, lambda: x @ w, lambda: 2 * x @ w),
        dense,
        (x, jnp.array(True)),
        (0,),
    ),
    Case(
        "cond, one branch without it",
        lambda w, x, p: lax.cond(p, lambda: x @ w, lambda: jnp.zeros((3, 6))),
        dense,
        (x, jnp.array(True)),
        (0,),
    ),
    Case(
        "switch among weights",
        lambda p, x, i: x @ lax.switch(i, [lambda: p[0], lambda: p[1]]),
        [dense, dense],
        (x, jnp.int32(0)),
        [(0,), (0,)],
    ),
    Case(
        "cond of a parameter and data",
        lambda p, x, q: lax.cond(q, lambda: p["h"], lambda: x) @ p["w"],
        {"h": f32(3, 4), "w": dense},
        (x, jnp.array(True)),
        {"h": ALONE, "w": (0,)},
    ),
]


@pytest.mark.parametrize("case", LOOPS, ids=named)
def test_loops_and_branches(case):
    check(case)


# What the data scales, masks or picks may be a kernel still; what is used otherwise is none.


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def scaled_norm(p, x):
    return ((x - x.mean(-1, keepdims=True)) * (lax.rsqrt(x.var(-1, keepdims=True)) * p["scale"])) @ p["w"]


def quantized(w, scale, x):
    return x @ (jnp.clip(jnp.round(w / scale), -127, 127) * scale)


def routed(w, i, x):
    return jnp.einsum("te,td,edf->tf", jax.nn.one_hot(i, 2), x, w)


def dora_on_an_argument(p, base, x):
    w = base + p["a"] @ p["b"]
    return x @ (w / jnp.linalg.norm(w, axis=0) * p["m"])


one = f32(1, 3, 4)
rows = jnp.array([0, 1, 1])


def median_free(w, x):
    return x @ (w - jnp.median(w, 0))


def solved(w, x):
    return x @ jnp.linalg.solve(w, w[:, 0])


def taught(p, base, i, x):
    return x @ (base + p["a"][i] @ p["b"][i])


def resized_positions(p, x):
    return x @ p["w"] + jax.image.resize(p["positions"], (3, 6), "bilinear")


CANDIDATES = [
    Case(
        "LoRA scaled by an argument",
        lambda p, base, s, x: x @ (base + s * p["a"] @ p["b"]),
        FACTORS,
        (f32(4, 6), jnp.float32(2), x),
        {"a": (0,), "b": (0,)},
    ),
    Case(
        "LoRA scaled by the data",
        lambda p, x: x @ (p["w"] + jnp.tanh(x.mean()) * p["a"] @ p["b"]),
        {**FACTORS, "w": dense},
        (x,),
        {"a": (0,), "b": (0,), "w": (0,)},
    ),
    Case(
        "LoRA with masked ranks",
        lambda p, base, m, x: x @ (base + (p["a"] * m) @ p["b"]),
        FACTORS,
        (f32(4, 6), f32(2), x),
        {"a": (0,), "b": (0,)},
    ),
    Case(
        "LoRA of a task",
        taught,
        {"a": f32(3, 4, 2), "b": f32(3, 2, 6)},
        (f32(4, 6), jnp.int32(1), x),
        {"a": (1,), "b": (1,)},
    ),
    Case("masked by what an argument is not", lambda w, m, x: x @ (w * (1 - m)), dense, (f32(4, 6), x), (0,)),
    Case(
        "masked by a comparison with an argument",
        lambda w, m, x: x @ jnp.where(m == 2, w, 0),
        dense,
        (f32(4, 6), x),
        (0,),
    ),
    Case(
        "masked kernels in two branches",
        lambda p, m, q, x: x @ lax.cond(q, lambda: p[0] * m, lambda: p[1]),
        [dense, dense],
        (f32(4, 6), jnp.array(True), x),
        [(0,), (0,)],
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
        "a batch of ones inside",
        lambda p: jax.nn.relu(jnp.ones((3, 4)) @ p["w"] + p["b"]) @ p["v"],
        {"w": dense, "b": f32(6), "v": f32(6, 2)},
        (),
        {"w": (0,), "b": ALONE, "v": (0,)},
    ),
    Case(
        "one token, closed over",
        lambda p: jax.nn.relu(p["e"][np.array([5])] @ p["w"]) @ p["v"],
        {"e": f32(10, 4), "w": dense, "v": f32(6, 2)},
        (),
        {"e": ALONE, "w": (0,), "v": (0,)},
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
    Case(
        "one-hot or not",
        lambda w, q, i, x: lax.cond(q, lambda: jax.nn.one_hot(i, 4), lambda: x) @ w,
        dense,
        (jnp.array(True), jnp.arange(3), x),
        (0,),
    ),
    Case("scaled by the data", lambda w, x: x @ (w / x.std()), dense, (x,), (0,)),
    Case("quantized with a scale as an argument", quantized, dense, (jnp.float32(0.1), x), (0,)),
    Case(
        "masked by an argument, and joined",
        lambda p, m, x: x @ jnp.concatenate([p[0] * m, p[1] * m], 1),
        [dense, dense],
        (f32(4, 6), x),
        [(0,), (0,)],
    ),
    Case(
        "masked by an argument, and corrected",
        lambda p, m, x: x @ (p["w"] * m + p["a"] @ p["b"]),
        {"w": dense, **FACTORS},
        (f32(4, 6), x),
        {"w": (0,), "a": (0,), "b": (0,)},
    ),
    Case(
        "between two weights",
        lambda p, t, x: x @ ((1 - t) * p[0] + t * p[1]),
        [dense, dense],
        (jnp.float32(0.1), x),
        [(0,), (0,)],
    ),
    Case(
        "DoRA on an argument",
        dora_on_an_argument,
        {**FACTORS, "m": f32(6)},
        (f32(4, 6), x),
        {"a": (0,), "b": (0,), "m": ALONE},
    ),
    Case("experts picked", lambda w, i, x: jnp.einsum("bi,bio->bo", x, w[i]), f32(2, 4, 6), (rows, x), (1,)),
    Case("an expert picked", lambda w, i, x: x @ w[i], f32(2, 4, 6), (jnp.int32(1), x), (1,)),
    Case("experts picked by a one-hot array", routed, f32(2, 4, 6), (rows, x), (1,)),
    Case("rows picked", lambda e, i, x: e[i] @ x.T, f32(10, 4), (tokens, x), ALONE),
    Case(
        "a window of rows",
        lambda e, i, x: lax.dynamic_slice(e, (i, 0), (3, 4)) @ x.T,
        f32(10, 4),
        (jnp.int32(1), x),
        ALONE,
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
        "positions, averaged",
        lambda p, x: (x + p["p"]).mean(1) @ p["w"],
        {"p": one, "w": dense},
        (one,),
        {"p": ALONE, "w": (0,)},
    ),
    Case(
        "positions in an attention without projections",
        lambda p, x: jax.nn.softmax((x + p["p"])[0] @ (x + p["p"])[0].T) @ x[0] @ p["w"],
        {"p": one, "w": dense},
        (one,),
        {"p": ALONE, "w": (0,)},
    ),
    Case(
        "a bias of learned queries",
        lambda p, x: (p["q"] + p["b"]) @ x.T,
        {"q": f32(5, 4), "b": f32(4)},
        (x,),
        {"q": (1,), "b": ALONE},
    ),
    Case(
        "a scale of the inputs in a kernel",
        lambda p, x: x @ (p["s"][:, None] * p["w"]),
        {"s": f32(4), "w": dense},
        (x,),
        {"s": ALONE, "w": (0,)},
    ),
    Case(
        "kernels stacked",
        lambda p, x: jnp.einsum("ti,cio->cto", x, jnp.stack(p)),
        [dense, dense],
        (x,),
        [(0,), (0,)],
    ),
    Case(
        "a kernel unstacked", lambda w, x: sum(x @ part for part in jnp.unstack(w)), f32(3, 4, 6), (x,), (1,)
    ),
    Case("a kernel tiled", lambda w, x: x @ jnp.tile(w, (1, 2)), dense, (x,), (0,)),
    Case(
        "a layer's kernels stacked for a scan",
        lambda p, x: scanned(jnp.stack(p), x),
        [square, square],
        (x,),
        [(0,), (0,)],
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
def test_what_the_data_scales_masks_or_picks(case):
    check(case)


# The batch may come from anywhere.


def weight_normed(p, x):
    def norm(v, g):
        return v / jnp.linalg.norm(v, axis=0) * g

    return jax.nn.relu(x @ norm(p["v"], p["g"])) @ norm(p["w"], p["h"])


def residual(p, x):
    h, _ = lax.scan(lambda h, _: (h + jnp.tanh(h @ p["a"]) @ p["b"], None), x, length=3)
    return h @ p["c"]


def language_model(p, tokens):
    h = jnp.tanh((p["e"][tokens] + p["p"]) @ p["w"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ p["h"], tokens).mean()


def merged(p, x):
    return jax.nn.relu(x @ (MASK + p["a"] @ p["b"]) + p["c"]) @ p["h"]


ANYWHERE = {
    "weight norm": (
        weight_normed,
        {"v": dense, "g": f32(6), "w": f32(6, 2), "h": f32(2)},
        x,
        {"v": (0,), "g": ALONE, "w": (0,), "h": ALONE},
    ),
    "residual blocks in a loop": (
        residual,
        {"a": f32(4, 8), "b": f32(8, 4), "c": f32(4, 2)},
        x,
        {"a": (0,), "b": (0,), "c": (0,)},
    ),
    "a language model": (
        language_model,
        {"e": f32(9, 4), "p": f32(5, 4), "w": dense, "h": f32(6, 9)},
        jnp.zeros((3, 5), int),
        {"e": ALONE, "p": ALONE, "w": (0,), "h": (0,)},
    ),
    "LoRA": (
        merged,
        {**FACTORS, "c": f32(6), "h": f32(6, 2)},
        x,
        {"a": (0,), "b": (0,), "c": ALONE, "h": (0,)},
    ),
    "dropout": (
        lambda p, x: (x @ p["v"] * jax.random.bernoulli(jax.random.key(0), 0.5, (6,))) @ p["w"],
        {"v": dense, "w": f32(6, 2)},
        x,
        {"v": (0,), "w": (0,)},
    ),
}


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize(
    "place", ["argument", "closed over", "one, closed over", "made inside", "drawn inside"]
)
def test_the_batch_may_come_from_anywhere(name, place):
    fn, params, batch, expected = ANYWHERE[name]
    if place == "argument":
        assert fan_in_of(fn, params, batch) == expected
        return
    batch = np.asarray(batch)[:1] if place == "one, closed over" else np.asarray(batch)
    inside = {
        "made inside": lambda: jnp.ones(batch.shape, batch.dtype),
        "drawn inside": lambda: jax.random.uniform(jax.random.key(0), batch.shape).astype(batch.dtype),
    }
    make = inside.get(place, lambda: batch)
    assert fan_in_of(lambda p: fn(p, make()), params) == expected
    assert fan_in_of(lambda p: fn(p, make()).mean(), params) == expected


# What is certain to be no weight of one fan-in, and what is not certain.

DISAGREEING = [
    Case("tied embeddings, closed over", lambda e: e[np.array([1, 2])] @ e.T, f32(10, 4), (), ALONE),
    Case(
        "tied embeddings, masked",
        lambda e, m, i: (e * m)[i] @ (e * m).T,
        f32(10, 4),
        (f32(10, 1), tokens),
        ALONE,
    ),
    Case("tied embeddings", lambda e, i: e[i] @ e.T, f32(10, 4), (tokens,), ALONE),
    Case("a tied autoencoder", lambda w, x: jax.nn.relu(x @ w) @ w.T, dense, (x,), ALONE),
    Case(
        "one branch the other way",
        lambda w, x, p: lax.cond(p, lambda: x @ w, lambda: x @ w.T),
        square,
        (x, jnp.array(True)),
        ALONE,
    ),
    Case("symmetrized", lambda w, x: x @ (w + w.T), square, (x,), ALONE),
    Case(
        "a gradient in the loss",
        lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x),
        dense,
        (x,),
        ALONE,
    ),
]


@pytest.mark.parametrize("case", DISAGREEING, ids=named)
def test_uses_that_disagree_leave_a_weight_alone_and_are_all_named(case):
    check(case)
    axes = infer_axes(case.fn, case.params, *case.args)
    assert axes.why.startswith("used in more than one way: ")
    assert axes.why.count(";") == 1
    assert "dot_general over axis" in axes.why


def residual_queries(p, x):
    return (p["z"] + jnp.tanh(p["z"] @ p["w"]) @ p["v"]) @ x.T


def deep_queries(p, x):
    z = p["z"]
    for layer in p["layers"]:
        z = z + jnp.tanh(z @ layer["w"]) @ layer["v"]
    return z @ x.T


def rotated(p, x):
    def turn(_, carry):
        x, weights = carry
        return jnp.tanh(x @ weights[0]), (*weights[1:], weights[0])

    return lax.fori_loop(0, 40, turn, (x, tuple(p)))[0]


QUERIES = {"z": f32(5, 4), "wq": square}
UNCLEAR_QUERIES = {"z": ALONE, "wq": ALONE}
PRODUCT = r"\['a'\], shape \(4, 2\): .*product of parameters"
UNCLEAR = [
    Case(
        "a product of parameters",
        lambda p, x: x @ (p["a"] @ p["b"]),
        FACTORS,
        (x,),
        {"a": ALONE, "b": ALONE},
        PRODUCT,
    ),
    Case(
        "a product of parameters as a bias",
        lambda p, x: x[0, 0] + p["a"] @ p["b"],
        FACTORS,
        (x,),
        {"a": ALONE, "b": ALONE},
        PRODUCT,
    ),
    Case(
        "a product of parameters, returned",
        lambda p, x: p["a"] @ p["b"],
        FACTORS,
        (x,),
        {"a": ALONE, "b": ALONE},
        PRODUCT,
    ),
    Case(
        "learned queries",
        lambda p, x: jax.nn.softmax((p["q"] @ p["wq"]) @ (x @ p["wk"]).T),
        {"q": f32(7, 4), "wq": dense, "wk": dense},
        (x,),
        {"q": ALONE, "wq": ALONE, "wk": (0,)},
        "'wq'",
    ),
    Case(
        "learned queries with dropout",
        lambda p, key, x: jnp.where(jax.random.bernoulli(key, 0.9, (5, 4)), p["z"] @ p["wq"], 0) @ x.T,
        QUERIES,
        (jax.random.key(0), x),
        UNCLEAR_QUERIES,
        "'wq'",
    ),
    Case(
        "learned queries with fixed positions",
        lambda p, x: (p["z"] @ p["wq"] + np.ones((5, 4), np.float32)) @ x.T,
        QUERIES,
        (x,),
        UNCLEAR_QUERIES,
        "'wq'",
    ),
    Case(
        "learned queries with a bias",
        lambda p, x: (p["z"] @ p["wq"] + p["b"]) @ x.T,
        {**QUERIES, "b": f32(4)},
        (x,),
        {**UNCLEAR_QUERIES, "b": ALONE},
        "'wq'",
    ),
    Case(
        "learned queries after an MLP",
        residual_queries,
        {"z": f32(5, 4), "w": square, "v": square},
        (x,),
        {"z": (1,), "w": ALONE, "v": ALONE},
        "'w'",
    ),
    Case(
        "a graph from learned embeddings",
        lambda p, x: jax.nn.softmax(jax.nn.relu(p["a"] @ p["b"])) @ x @ p["w"],
        {"a": f32(3, 2), "b": f32(2, 3), "w": dense},
        (x,),
        {"a": ALONE, "b": ALONE, "w": (0,)},
        "'a'",
    ),
    Case(
        "a weight times itself", lambda w, x: x @ (w + w.T @ w), square, (x,), ALONE, "product of parameters"
    ),
    Case("weights that take turns", rotated, [square] * 20, (x,), [ALONE] * 20, "from round to round"),
    Case(
        "added to an argument of its shape",
        lambda w, base, x: x @ (base + w),
        dense,
        (f32(4, 6), x),
        ALONE,
        "may be a kernel or an input",
    ),
    Case(
        "positions resized",
        resized_positions,
        {"w": dense, "positions": f32(9, 6)},
        (x,),
        {"w": (0,), "positions": ALONE},
        "only constants are contracted with it",
    ),
    Case(
        "constants in one branch",
        lambda w, q, x: lax.cond(q, lambda: MASK @ w, lambda: MASK[:, :4]) @ x.T,
        f32(6, 4),
        (jnp.array(True), x),
        ALONE,
        "which are the inputs cannot be told",
    ),
    Case(
        "learned queries with computed positions",
        lambda p, x: (p["z"] @ p["wq"] + jnp.sin(jnp.arange(128.0).reshape(16, 8))) @ x.T,
        {"z": f32(16, 4), "wq": f32(4, 8)},
        (f32(3, 8),),
        UNCLEAR_QUERIES,
        "'wq'",
    ),
    Case(
        "a product masked by an argument",
        lambda p, m, x: x @ ((p["a"] * m) @ p["b"]),
        FACTORS,
        (f32(4, 2), x),
        {"a": ALONE, "b": ALONE},
        PRODUCT,
    ),
    Case("less its median", median_free, dense, (x,), ALONE, r"shape \(4, 6\)"),
    Case("a solution of equations", solved, square, (x,), ALONE, "what became of it"),
    Case(
        "diagonal matrices",
        lambda d, x: jnp.einsum("lio,bi->lbo", jax.vmap(lambda d: d[:, None] * jnp.eye(4))(d), x),
        f32(2, 4),
        (x,),
        ALONE,
        "spread over an array",
    ),
    Case(
        "cropped",
        lambda w, x: x[:, :3] @ lax.pad(w, 0.0, [(-1, 0, 0), (0, 0, 0)]),
        dense,
        (x,),
        ALONE,
        "only a part of axis 0",
    ),
    Case(
        "blurred",
        lambda w, x: conv(x, conv(w, np.ones((3, 3, 4, 4), np.float32))),
        f32(3, 3, 4, 4),
        (images,),
        ALONE,
        "what became of it",
    ),
    Case(
        "constants on the other side, clipped",
        lambda w, x: jnp.clip(MASK.T @ w, -1, 1) @ x.T,
        f32(4, 4),
        (x,),
        ALONE,
        "which are the inputs cannot be told",
    ),
    Case(
        "constants on the other side, and another kernel",
        lambda p, x: (MASK.T @ p[0] + p[1]) @ x.T,
        [f32(4, 4), f32(6, 4)],
        (x,),
        [ALONE, ALONE],
        "which are the inputs cannot be told",
    ),
    Case(
        "a convolution of parameters",
        lambda p, x: x * conv(p[0], p[1]).sum(),
        [f32(1, 5, 5, 4), f32(3, 3, 4, 8)],
        (x,),
        [ALONE, ALONE],
        "conv_general",
    ),
    Case(
        "a part of the inputs",
        lambda w, x: x @ w[:4] + x[::-1] @ w[4:],
        f32(8, 6),
        (x,),
        ALONE,
        "only a part of axis 0",
    ),
    Case(
        "permuted",
        lambda w, x: x @ w[3 - jnp.arange(4)],
        dense,
        (x,),
        ALONE,
        "only a part of axis 0",
    ),
    Case(
        "a part of an axis",
        lambda w, x: jnp.einsum("bhd,hdo->bho", x.reshape(3, 2, 2), w.reshape(2, 2, 5)),
        f32(4, 5),
        (x,),
        ALONE,
        "only a part of axis 0",
    ),
    Case(
        "constants on the other side",
        lambda w, x: x @ (w @ np.ones((6, 5), np.float32)),
        dense,
        (x,),
        ALONE,
        "which are the inputs cannot be told",
    ),
    Case("summed over besides", lambda w, x: x @ w.sum(2), f32(4, 6, 3), (x,), ALONE, "axis 2 reduced"),
    Case(
        "an operation that mixes axes",
        lambda w, x: x @ jnp.cumsum(w, 0),
        dense,
        (x,),
        ALONE,
        "what became of it",
    ),
    Case(
        "an unknown operation with data",
        lambda w, x: lax.linalg.triangular_solve(w, x.T, left_side=True),
        square,
        (x,),
        ALONE,
        "triangular_solve",
    ),
    Case(
        "reshaped from round to round",
        lambda w, x: x @ churned(w),
        square,
        (x,),
        ALONE,
        "only a part of axes 0, 1",
    ),
]


@pytest.mark.parametrize("case", UNCLEAR, ids=named)
def test_what_cannot_be_read_with_certainty_is_left_alone_with_a_warning(case):
    check(case)


def test_a_deep_network_of_nothing_but_parameters_is_left_alone():
    layer = {"w": square, "v": square}
    params = {"z": f32(5, 4), "layers": [layer] * 40}
    with pytest.warns(UserWarning, match=r"\['layers'\]\[39\]\['w'\]"):
        axes = fan_in_of(deep_queries, params, x)
    assert axes["layers"] == [{"w": ALONE, "v": ALONE}] * 40


def test_outputs_besides_the_loss_may_be_parts_of_parameters():
    def loss(p, x):
        return (x @ p).sum(), {"p": p, "flat": p.ravel(), "norms": jnp.linalg.norm(p, axis=1)}

    assert fan_in_of(loss, dense, x) == (0,)


def test_one_warning_lists_all_unclear_parameters_and_points_at_the_caller():
    with pytest.warns(UserWarning, match="'a'") as caught:
        infer_axes(lambda p, x: x @ (p["a"] @ p["b"]), FACTORS, x)
    assert len(caught) == 1
    assert "'b'" in str(caught[0].message)
    assert caught[0].filename == __file__


# What surrounds the computation.


def test_the_batch_may_come_from_outside_of_the_function():
    def loss(p):
        h = jax.nn.relu(x @ p["first"] + p["bias"])
        h = (h - h.mean(-1, keepdims=True)) * p["scale"] + p["embedding"][tokens].sum()
        return jnp.mean((h @ p["second"]) ** 2)

    shapes = {
        "first": f32(4, 6),
        "bias": f32(6),
        "scale": f32(6),
        "embedding": f32(10, 6),
        "second": f32(6, 2),
    }
    assert fan_in_of(loss, shapes) == {
        "first": (0,),
        "bias": ALONE,
        "scale": ALONE,
        "embedding": ALONE,
        "second": (0,),
    }


def test_aux_outputs_static_arguments_keys_and_collections():
    def loss(params, state, batch, key, *, train, name):
        assert train is True
        h = batch["x"] @ params["w"]
        mean = h.mean(0) if train else state["mean"]
        h = (h - mean) * jax.random.bernoulli(key, 0.9, h.shape)
        return (h**2).mean(), {"state": {"mean": mean}, "name": name, "nothing": None, "rate": 0.9}

    axes = fan_in_of(
        loss, {"w": dense}, {"mean": jnp.zeros(6)}, {"x": f32(3, 4)}, jax.random.key(0), train=True, name="it"
    )
    assert axes == {"w": (0,)}


def test_leaves_of_every_kind():
    params = {
        "w": dense,
        "none": None,
        "activation": jnp.tanh,
        "rate": 0.5,
        "scale": np.float32(2),
        "steps": jnp.arange(3),
        "empty": f32(0, 4),
    }

    def fn(p, x):
        return p["activation"](x @ p["w"]) * p["rate"] * p["scale"] + p["steps"].sum() + p["empty"].sum()

    axes = infer_axes(fn, params, x)
    assert axes["w"] == WeightAxes((0,), (1,), "dot_general", "dot_general over axis 0")
    assert axes["none"] is None
    assert {name: axes[name].why for name in ("activation", "rate", "scale", "empty")} == {
        "activation": "no array",
        "rate": "no array",
        "scale": "no array",
        "empty": "empty",
    }
    assert axes["steps"].why.startswith("no array of floats")


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda w, x: x.sum(), "it never meets the data, or only a statistic of it does"),
        (lambda w, x: x @ lax.stop_gradient(w), "no gradient comes back to it"),
        (lambda w, x: (x @ w).argmax(), "no gradient comes back to it"),
        (lambda w, x: x.sum() + (w**2).sum(), "it never meets the data, or only a statistic of it does"),
        (lambda w, x: x + w.sum(1), "add: only a statistic of it meets the data"),
        (lambda w, x: x @ w, "dot_general over axis 0"),
        (lambda w, x: w[x.astype(int)], "gather: a lookup table"),
    ],
)
def test_the_reason_is_said(fn, why):
    assert infer_axes(fn, dense, x).why == why


def test_the_reasons_of_parameters_in_one_value_are_their_own():
    params = {"picked": f32(2, 3, 4), "bias": f32(3, 4)}
    axes = infer_axes(
        lambda p, i, x: (p["picked"][i] + p["bias"]) * jnp.cumsum(x, 0), params, jnp.int32(1), x
    )
    assert axes["picked"].why == "dynamic_slice: a lookup table"
    assert axes["bias"].why == "mul: a bias, a scale or a gate"


def test_only_axes_that_are_fan_out_in_all_uses_are_fan_out():
    def fn(w, x):
        return jnp.einsum("ti,eio->teo", x, w).sum() + jnp.einsum("eti,eio->eto", jnp.stack([x, x]), w).sum()

    axes = infer_axes(fn, f32(2, 4, 6), x)
    assert (axes.fan_in, axes.fan_out) == ((1,), (2,))


@pytest.mark.parametrize("in_a_tuple", [False, True])
def test_a_new_primitive_that_holds_a_jaxpr_needs_no_change(in_a_tuple):
    later = jex.Primitive("later")
    later.def_abstract_eval(lambda w, x, *, work: jax.core.ShapedArray((3, 6), jnp.float32))
    body = jax.make_jaxpr(lambda w, x: jnp.tanh(x @ w))(dense, x)
    work = (body, body) if in_a_tuple else body
    assert fan_in_of(lambda w, x: later.bind(w, x, work=work), dense, x) == (0,)


def test_a_new_primitive_that_holds_what_does_not_fit_is_unclear():
    later = jex.Primitive("later")
    later.def_abstract_eval(lambda w, x, *, work: jax.core.ShapedArray((3, 6), jnp.float32))
    body = jax.make_jaxpr(jnp.tanh)(x)
    with pytest.warns(UserWarning, match="later: an operation on it together with the data"):
        assert fan_in_of(lambda w, x: later.bind(w, x, work=body), dense, x) == ALONE


def test_batch_axes_are_neither_fan_in_nor_fan_out():
    axes = infer_axes(jax.vmap(lambda w, x: conv(x, w)), f32(2, 3, 3, 4, 8), images[:, None])
    assert (axes.fan_in, axes.fan_out, axes.op) == ((1, 2, 3), (4,), "conv_general_dilated")
    axes = infer_axes(scanned, f32(5, 4, 4), x)
    assert (axes.fan_in, axes.fan_out, axes.op) == ((1,), (2,), "dot_general")
    axes = infer_axes(lambda w, x: conv(x, w, feature_group_count=4), f32(3, 3, 1, 8), images)
    assert (axes.fan_in, axes.fan_out) == ((0, 1, 2), (3,))


def test_nothing_is_computed():
    # These parameters would need four petabytes.
    huge = {"w": f32(2**25, 2**25), "b": f32(2**25)}
    before = len(jax.live_arrays())
    axes = fan_in_of(lambda p, x: x @ p["w"] + p["b"], huge, f32(2**20, 2**25))
    assert axes == {"w": (0,), "b": ALONE}
    assert len(jax.live_arrays()) == before


def test_under_jit_and_with_numpy_arrays():
    @jax.jit
    def traced(w, x):
        assert infer_axes(lambda w, x: x @ w, w, x).fan_in == (0,)
        return w

    traced(np.ones((4, 6), np.float32), np.ones((3, 4), np.float32))


@pytest.mark.parametrize("fn", [lambda w, x: None, lambda w, x: {"loss": "forgotten", "rate": 0.1}])
def test_fn_has_to_return_an_array(fn):
    with pytest.raises(TypeError, match="fn has to return what depends on the parameters"):
        infer_axes(fn, dense, x)


def test_fn_has_to_be_a_function():
    with pytest.raises(TypeError, match="fn must be a function of the parameters, got 3"):
        infer_axes(3, dense)


def test_errors_of_the_function_are_not_hidden():
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        infer_axes(lambda w, x: x @ w.T, dense, x)


def gathered(w, x):
    return x @ lax.all_gather(w, "d", axis=0, tiled=True)


def summed(w, x):
    return lax.psum(x @ w, "d")


def scattered(w, x):
    return lax.psum_scatter(x @ w, "d", scatter_dimension=1, tiled=True)


def exchanged(w, x):
    return x @ lax.ppermute(w, "d", [(0, 1), (1, 2), (2, 3), (3, 0)])


@pytest.mark.parametrize(
    ("body", "w_spec", "x_spec", "out_spec"),
    [
        (gathered, P("d"), P("d"), P("d")),
        (summed, P("d"), P(None, "d"), P()),
        (scattered, P("d"), P(None, "d"), P(None, "d")),
        (exchanged, P("d"), P(None, "d"), P("d")),
        (lambda w, x: x @ w, P(None, "d"), P(), P(None, "d")),
        (
            lambda w, x: jnp.einsum("ti,ihd->thd", x, w.reshape(8, 3, -1)),
            P(None, "d"),
            P(),
            P(None, None, "d"),
        ),
    ],
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_bodies(body, w_spec, x_spec, out_spec, check_vma):
    mesh = AbstractMesh((4,), ("d",), axis_types=(AxisType.Auto,))
    fn = jax.shard_map(body, mesh=mesh, in_specs=(w_spec, x_spec), out_specs=out_spec, check_vma=check_vma)
    assert fan_in_of(fn, f32(8, 12), f32(4, 8)) == (0,)


# Truth by construction: a contraction of which every axis is known, written in a random way.

ROLES = ("contracted", "free", "batch")


class Kernel(NamedTuple):
    """The shape and the role of each axis of a kernel, and what is done to it before it is used."""

    sizes: list[int]
    roles: list[str]
    steps: list[tuple[str, int]]


@st.composite
def kernels(draw):
    rank = draw(st.integers(2, 4))
    sizes = draw(st.lists(st.sampled_from([2, 3, 4, 5, 6]), min_size=rank, max_size=rank))
    roles = draw(st.lists(st.sampled_from(ROLES), min_size=rank, max_size=rank))
    hypothesis.assume("contracted" in roles)
    step = st.sampled_from(["move", "join", "split", "cast", "scale", "flip", "add a dimension", "remat"])
    return Kernel(sizes, roles, draw(st.lists(st.tuples(step, st.integers(0, 5)), max_size=6)))


def prepared(w, kernel):
    """The kernel after all its steps, with the role of each of its dimensions."""
    roles = list(kernel.roles)
    for step, number in kernel.steps:
        dim = number % w.ndim
        if step == "move":
            w, roles = jnp.moveaxis(w, dim, 0), [roles[dim], *roles[:dim], *roles[dim + 1 :]]
        elif step == "join" and dim + 1 < w.ndim and roles[dim] == roles[dim + 1]:
            w = w.reshape(*w.shape[:dim], -1, *w.shape[dim + 2 :])
            del roles[dim]
        elif step == "split" and w.shape[dim] % 2 == 0:
            w = w.reshape(*w.shape[:dim], 2, -1, *w.shape[dim + 1 :])
            roles.insert(dim, roles[dim])
        elif step == "cast":
            w = w.astype(jnp.bfloat16)
        elif step == "scale":
            w = jnp.tanh(w) * 2 / jnp.linalg.norm(w)
        elif step == "flip":
            w = jnp.flip(w, dim)
        elif step == "add a dimension":
            w = jnp.expand_dims(w, dim)
            roles.insert(dim, "free")
        elif step == "remat":
            w = jax.checkpoint(jnp.sin)(w)
    return w, roles


@hypothesis.settings(max_examples=300)
@hypothesis.given(kernels(), st.randoms(use_true_random=False), st.booleans())
def test_random_contractions(kernel, random, kernel_first):
    def product(w, key):
        w, roles = prepared(w, kernel)
        letters = string.ascii_lowercase[: w.ndim]
        extent = dict(zip(letters, w.shape, strict=True)) | {"z": 7}
        shared = [a for a, role in zip(letters, roles, strict=True) if role != "free"] + ["z"]
        kept = [a for a, role in zip(letters, roles, strict=True) if role != "contracted"] + ["z"]
        random.shuffle(shared)
        random.shuffle(kept)
        x = jnp.sin(jnp.zeros([extent[letter] for letter in shared]) + key)
        operands = [(letters, w), ("".join(shared), x)]
        (a, left), (b, right) = operands if kernel_first else operands[::-1]
        return jnp.einsum(f"{a},{b}->{''.join(kept)}", left, right)

    axes = infer_axes(product, f32(*kernel.sizes), f32())
    expected = tuple(axis for axis, role in enumerate(kernel.roles) if role == "contracted")
    assert axes.fan_in == expected
    assert {axis for axis, role in enumerate(kernel.roles) if role == "batch"}.isdisjoint(axes.fan_out)
