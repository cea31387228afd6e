"""Products that sum over dimensions: where a weight meets the data, and products of parameters."""

import functools
import string
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    ALONE,
    FACTORS,
    MASK,
    Case,
    check,
    conv,
    dense,
    f32,
    fan_in_of,
    images,
    named,
    one,
    scanned,
    x,
)
from jax import lax

from gc_optax import infer_axes

USES = [
    Case("x @ w", lambda w, x: x @ w, dense, (x,), (0,)),
    Case("x @ w.T", lambda w, x: x @ w.T, f32(6, 4), (x,), (1,)),
    Case("w @ x", lambda w, x: w @ x.T, f32(6, 4), (x,), (1,)),
    Case("a vector", lambda w, x: x @ w, f32(4), (x,), (0,)),
    Case("not used", lambda w, x: x, dense, (x,), ALONE),
    Case("fan-in 1", lambda w, x: x[:, :1] @ w, f32(1, 6), (x,), ALONE),
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


# Products of parameters, in kernels and beside them.


def spectral_norm(w, u, x):
    v = u @ w.T
    v = v / jnp.linalg.norm(v)
    u = v @ w
    u = u / jnp.linalg.norm(u)
    u, v = lax.stop_gradient((u, v))
    return x @ (w / (v @ w @ u.T)[0, 0]), u


def lora(p, base, x):
    return x @ (base + 0.5 * p["a"] @ p["b"])


def dora(p, x):
    w = p["w"] + p["a"] @ p["b"]
    return x @ (p["m"] * w / jnp.linalg.norm(w, axis=0))


def dora_on_an_argument(p, base, x):
    w = base + p["a"] @ p["b"]
    return x @ (w / jnp.linalg.norm(w, axis=0) * p["m"])


def taught(p, base, i, x):
    return x @ (base + p["a"][i] @ p["b"][i])


PRODUCTS = [
    Case("spectral norm", spectral_norm, dense, (f32(1, 6), x), (0,)),
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
    Case(
        "masked by an argument, and corrected",
        lambda p, m, x: x @ (p["w"] * m + p["a"] @ p["b"]),
        {"w": dense, **FACTORS},
        (f32(4, 6), x),
        {"w": (0,), "a": (0,), "b": (0,)},
    ),
    Case(
        "DoRA on an argument",
        dora_on_an_argument,
        {**FACTORS, "m": f32(6)},
        (f32(4, 6), x),
        {"a": (0,), "b": (0,), "m": ALONE},
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
]


@pytest.mark.parametrize("case", PRODUCTS, ids=named)
def test_products_of_parameters(case):
    check(case)


# Networks that make kernels, and scales of kernels.


def spectral_norm_with_its_gradient(w, u, x):
    v = u @ w.T
    v = v / jnp.linalg.norm(v)
    u = v @ w
    u = u / jnp.linalg.norm(u)
    return x @ (w / (v @ w @ u.T)[0, 0])


code = f32(5)
HYPER = [
    Case("spectral norm with its gradient", spectral_norm_with_its_gradient, dense, (f32(1, 6), x), (0,)),
    Case(
        "spectral norm with its gradient, from a constant",
        lambda w, x: spectral_norm_with_its_gradient(w, jnp.ones((1, 6)), x),
        dense,
        (x,),
        (0,),
    ),
    Case("divided by its norm afterwards", lambda w, x: (x @ w) / jnp.linalg.norm(w), dense, (x,), (0,)),
    Case(
        "a scale of a kernel",
        lambda p, z, x: x @ (p["w"] * jnp.tanh(z @ p["h"])),
        {"w": dense, "h": f32(5)},
        (code, x),
        {"w": (0,), "h": (0,)},
    ),
    Case(
        "an average scale of a kernel",
        lambda p, z, x: x @ (p["w"] * (z @ p["h"]).mean()),
        {"w": dense, "h": f32(5, 7)},
        (f32(3, 5), x),
        {"w": (0,), "h": (0,)},
    ),
    Case(
        "a scale of each output",
        lambda p, z, x: x @ (p["w"] * jax.nn.sigmoid(z @ p["h"])),
        {"w": dense, "h": f32(5, 6)},
        (code, x),
        {"w": (0,), "h": (0,)},
    ),
    Case(
        "a scale of each input",
        lambda p, z, x: x @ (p["w"] * jax.nn.sigmoid(z @ p["h"])[:, None]),
        {"w": dense, "h": f32(5, 4)},
        (code, x),
        {"w": (0,), "h": (0,)},
    ),
]


@pytest.mark.parametrize("case", HYPER, ids=named)
def test_a_scale_that_a_network_computes_keeps_the_axes_of_both(case):
    check(case)


# Matrices that the function closes over: rotations, or batches.

# Matrices.
rotation = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
turn = rotation[:4, :4]
TOLD_APART = "cannot be told"
ROTATED = [
    Case("outputs", lambda w, x: x @ (w @ rotation), dense, (x,), ALONE, TOLD_APART),
    Case("outputs, masked", lambda w, x: x @ ((w * MASK) @ rotation), dense, (x,), ALONE, TOLD_APART),
    Case(
        "outputs, masked by an argument",
        lambda w, m, x: x @ ((w * m) @ rotation),
        dense,
        (f32(4, 6), x),
        ALONE,
        TOLD_APART,
    ),
    Case("inputs and outputs", lambda w, x: x @ (turn @ w @ rotation), dense, (x,), ALONE, TOLD_APART),
    Case("inputs, transposed", lambda w, x: x @ (rotation @ w).T, f32(6, 4), (x,), ALONE, TOLD_APART),
    Case(
        "outputs, after positions",
        lambda p, x: (x + p["p"]) @ (p["w"] @ rotation),
        {"w": dense, "p": f32(3, 4)},
        (x,),
        {"w": ALONE, "p": ALONE},
        "which side of it is the kernel",
    ),
    Case("gates", lambda w, x: x * (w @ turn)[1], f32(2, 4), (x,), ALONE, "only constants are contracted"),
    Case(
        "gates, in tanh",
        lambda w, x: x * jnp.tanh(w @ turn)[1],
        f32(2, 4),
        (x,),
        ALONE,
        "only constants are contracted",
    ),
]


@pytest.mark.parametrize("case", ROTATED, ids=named)
def test_what_a_closed_over_matrix_rotates_is_left_alone_with_a_warning(case):
    check(case)


def test_what_a_closed_over_matrix_does_to_the_inputs_changes_nothing():
    assert fan_in_of(lambda w, x: x @ (turn @ w), dense, x) == (0,)


# The other axes.


WHOLE = [
    ("conv", conv, (3, 3, 4, 8), (2, 8, 8, 4), (0, 1, 2), (3,)),
    ("grouped", functools.partial(conv, feature_group_count=2), (3, 3, 2, 8), (2, 8, 8, 4), (0, 1, 2), (3,)),
    (
        "batch grouped",
        functools.partial(conv, batch_group_count=2),
        (3, 3, 4, 8),
        (2, 8, 8, 4),
        (0, 1, 2),
        (3,),
    ),
    ("vmap", jax.vmap(conv), (7, 3, 3, 4, 8), (7, 2, 8, 8, 4), (1, 2, 3), (4,)),
    ("vmap of the data", jax.vmap(conv, (0, None)), (3, 3, 4, 8), (7, 2, 8, 8, 4), (0, 1, 2), (3,)),
    ("vmap of the kernels", jax.vmap(conv, (None, 0)), (7, 3, 3, 4, 8), (2, 8, 8, 4), (1, 2, 3), (0, 4)),
    ("vmap of the last axis", jax.vmap(conv, (0, 4)), (3, 3, 4, 8, 7), (7, 2, 8, 8, 4), (0, 1, 2), (3,)),
    ("vmap of vmap", jax.vmap(jax.vmap(conv)), (2, 7, 3, 3, 4, 8), (2, 7, 2, 8, 8, 4), (2, 3, 4), (5,)),
    (
        "vmap, grouped",
        jax.vmap(functools.partial(conv, feature_group_count=2)),
        (7, 3, 3, 2, 8),
        (7, 2, 8, 8, 4),
        (1, 2, 3),
        (4,),
    ),
]


@pytest.mark.parametrize(
    ("fn", "kernel", "image", "fan_in", "fan_out"),
    [case[1:] for case in WHOLE],
    ids=[case[0] for case in WHOLE],
)
def test_fan_in_and_fan_out_of_convolutions(fn, kernel, image, fan_in, fan_out):
    axes = infer_axes(lambda w, x: fn(x, w), f32(*kernel), f32(*image))
    assert (axes.fan_in, axes.fan_out) == (fan_in, fan_out)


def test_batch_axes_are_neither_fan_in_nor_fan_out():
    axes = infer_axes(jax.vmap(lambda w, x: conv(x, w)), f32(2, 3, 3, 4, 8), images[:, None])
    assert (axes.fan_in, axes.fan_out, axes.op) == ((1, 2, 3), (4,), "conv_general_dilated")
    axes = infer_axes(scanned, f32(5, 4, 4), x)
    assert (axes.fan_in, axes.fan_out, axes.op) == ((1,), (2,), "dot_general")
    axes = infer_axes(lambda w, x: conv(x, w, feature_group_count=4), f32(3, 3, 1, 8), images)
    assert (axes.fan_in, axes.fan_out) == ((0, 1, 2), (3,))


def test_only_axes_that_are_fan_out_in_all_uses_are_fan_out():
    def fn(w, x):
        return jnp.einsum("ti,eio->teo", x, w).sum() + jnp.einsum("eti,eio->eto", jnp.stack([x, x]), w).sum()

    axes = infer_axes(fn, f32(2, 4, 6), x)
    assert (axes.fan_in, axes.fan_out) == ((1,), (2,))


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


@pytest.mark.thorough
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
