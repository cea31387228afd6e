"""Weights that are cut, joined, reshaped and put in a row before they meet the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALONE, Case, check, conv, dense, f32, images, named, one, scanned, square, x
from jax import lax
from jax.flatten_util import ravel_pytree


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
    Case(
        "a class token",
        lambda p, x: jnp.concatenate([p["cls"], x]) @ p["w"],
        {"cls": f32(1, 4), "w": dense},
        (x,),
        {"cls": ALONE, "w": (0,)},
    ),
    Case(
        "masked by an argument, and joined",
        lambda p, m, x: x @ jnp.concatenate([p[0] * m, p[1] * m], 1),
        [dense, dense],
        (f32(4, 6), x),
        [(0,), (0,)],
    ),
    Case(
        "positions, averaged",
        lambda p, x: (x + p["p"]).mean(1) @ p["w"],
        {"p": one, "w": dense},
        (one,),
        {"p": ALONE, "w": (0,)},
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
]


@pytest.mark.parametrize("case", RESHAPED, ids=named)
def test_weights_are_followed_through_reshapes(case):
    check(case)


# Kernels that are taken apart and put together again.


def conv1d(x, w):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


def normed(v):
    return v / jnp.linalg.norm(v)


def concatenated(*parts):
    return jnp.concatenate(parts)


@jax.jit
def two_rows(a, b, x):
    return x @ jnp.stack([a, b])


sequences = f32(2, 9, 8)
pairs = f32(3, 2)
RESTACKED = [
    Case("rows stacked", lambda w, x: x @ jnp.stack([*w]), dense, (x,), (0,)),
    Case("rows stacked by vstack", lambda w, x: x @ jnp.vstack([*w]), dense, (x,), (0,)),
    Case("rows in a row", lambda w, x: x @ concatenated(*(row[None] for row in w)), dense, (x,), (0,)),
    Case(
        "slices in a row", lambda w, x: x @ concatenated(*(w[k : k + 1] for k in range(4))), dense, (x,), (0,)
    ),
    Case("rows normed", lambda w, x: x @ jnp.stack([normed(row) for row in w]), dense, (x,), (0,)),
    Case("rows normed by vmap", lambda w, x: x @ jax.vmap(normed)(w), dense, (x,), (0,)),
    Case("rows normed by lax.map", lambda w, x: x @ lax.map(normed, w), dense, (x,), (0,)),
    Case("columns normed", lambda w, x: x @ jnp.stack([normed(v) for v in w.T], 1), dense, (x,), (0,)),
    Case("columns stacked", lambda w, x: x @ jnp.stack([w[:, k] for k in range(6)], 1), dense, (x,), (0,)),
    Case("some columns stacked", lambda w, x: x @ jnp.stack([w[:, 0], w[:, 2]], 1), dense, (x,), (0,)),
    Case("rows stacked to columns", lambda w, x: x @ jnp.stack([*w], 1), f32(6, 4), (x,), (1,)),
    Case("unstacked and stacked", lambda w, x: x @ jnp.stack(jnp.unstack(w)), dense, (x,), (0,)),
    Case("halves", lambda w, x: x @ concatenated(w[:2], w[2:]), dense, (x,), (0,)),
    Case("halves swapped", lambda w, x: x @ concatenated(w[2:], w[:2]), dense, (x,), (0,)),
    Case(
        "halves split and swapped", lambda w, x: x @ concatenated(*jnp.split(w, 2)[::-1]), dense, (x,), (0,)
    ),
    Case("unequal parts swapped", lambda w, x: x @ concatenated(w[1:], w[:1]), dense, (x,), (0,)),
    Case("rolled", lambda w, x: x @ jnp.roll(w, 1, 0), dense, (x,), (0,)),
    Case("rolled along the outputs", lambda w, x: x @ jnp.roll(w, 1, 1), dense, (x,), (0,)),
    Case(
        "taps mirrored",
        lambda w, x: conv1d(x, jnp.stack([w[0], w[1], w[0]])),
        f32(2, 8, 6),
        (sequences,),
        (0, 1),
    ),
    Case(
        "taps and their reverse",
        lambda w, x: conv1d(x, concatenated(w, w[::-1])),
        f32(2, 8, 6),
        (sequences,),
        (0, 1),
    ),
    Case(
        "a parameter for each tap",
        lambda p, x: conv1d(x, jnp.stack(p)),
        [f32(8, 6)] * 3,
        (sequences,),
        [(0,)] * 3,
    ),
    Case("rows and a row of zeros", lambda w, x: x @ jnp.stack([*w, jnp.zeros(6)]), f32(3, 6), (x,), (0,)),
    Case(
        "layers normed, for a scan",
        lambda w, x: scanned(jnp.stack([normed(layer) for layer in w]), x),
        f32(5, 4, 4),
        (x,),
        (1,),
    ),
    Case(
        "experts stacked",
        lambda w, x: jnp.einsum("ti,eio->eto", x, jnp.stack([w[1], w[0]])),
        f32(2, 4, 6),
        (x,),
        (1,),
    ),
    Case(
        "rows stacked, in vmap",
        jax.vmap(lambda w, x: two_rows(*w, x), (0, None)),
        f32(3, 2, 6),
        (pairs,),
        (1,),
    ),
    Case(
        "all rows, twice",
        lambda w, x: two_rows(w[0], w[1], x) + jnp.tanh(two_rows(w[1], w[0], x)),
        f32(2, 6),
        (pairs,),
        (0,),
    ),
    Case(
        "sums of rows",
        lambda w, x: x @ jnp.stack([w[k] + w[(k + 1) % 4] for k in range(4)]),
        dense,
        (x,),
        (0,),
    ),
]


@pytest.mark.parametrize("case", RESTACKED, ids=named)
def test_a_kernel_that_is_put_together_of_all_its_parts_keeps_its_axes(case):
    check(case)


PART = "only a part of axis 0 is contracted"
IN_PARTS = [
    Case("some rows", lambda w, x: x[:, :3] @ jnp.stack([w[0], w[1], w[2]]), dense, (x,), ALONE, PART),
    Case(
        "rows in two products",
        lambda w, x: two_rows(w[0], w[1], x[:, :2]) + two_rows(w[2], w[3], x[:, 2:]),
        dense,
        (x,),
        ALONE,
        PART,
    ),
    Case(
        "rows in two products, some in both",
        lambda w, x: x[:, 1:] @ jnp.stack([*w[:3]]) + jnp.tanh(x[:, :3] @ jnp.stack([*w[1:]])),
        dense,
        (x,),
        ALONE,
        PART,
    ),
    Case(
        "slices in two products",
        lambda w, x: x[:, :2] @ concatenated(w[:1], w[1:2]) + x[:, 2:] @ concatenated(w[2:3], w[3:]),
        dense,
        (x,),
        ALONE,
        PART,
    ),
    Case(
        "two rows in each round",
        lambda w, x: lax.scan(
            lambda h, w: (h + two_rows(*w, x), None), jnp.zeros((3, 6)), w.reshape(2, 2, 6)
        )[0],
        dense,
        (pairs,),
        ALONE,
        PART,
    ),
    Case(
        "one of two rows, by where",
        lambda w, q, x: x @ jnp.stack([jnp.where(q, w[0], w[1]), w[2], w[3], w[4]]),
        f32(5, 6),
        (jnp.array(True), x),
        ALONE,
        PART,
    ),
    Case(
        "two rows or their reverse, by where",
        lambda w, q, x: two_rows(jnp.where(q, w[0], w[1]), jnp.where(q, w[1], w[0]), x),
        f32(2, 6),
        (jnp.array(True), pairs),
        ALONE,
        PART,
    ),
    Case(
        "one of two rows, by cond",
        lambda w, q, x: x @ jnp.stack([lax.cond(q, lambda: w[0], lambda: w[1]), w[2], w[3], w[4]]),
        f32(5, 6),
        (jnp.array(True), x),
        ALONE,
        PART,
    ),
    Case(
        "the larger of two rows",
        lambda w, x: two_rows(jnp.maximum(w[0], w[1]), w[2], x),
        f32(3, 6),
        (pairs,),
        ALONE,
        PART,
    ),
]


@pytest.mark.parametrize("case", IN_PARTS, ids=named)
def test_a_kernel_of_which_not_all_parts_are_put_together_is_left_alone(case):
    check(case)


# Several parameters in one flat array.

tree = {"w": np.ones((4, 6), np.float32), "b": np.ones(6, np.float32), "v": np.ones((6, 5), np.float32)}


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def raveled_and_restored(p, x):
    flat, restored = ravel_pytree(p)
    return mlp(restored(flat), x)


RAVELED = [
    Case("raveled and restored", lambda w, x: x @ w.ravel().reshape(4, 6), dense, (x,), (0,)),
    Case("raveled and restored, transposed", lambda w, x: x @ w.T.ravel().reshape(6, 4).T, dense, (x,), (0,)),
    Case("ravel_pytree", raveled_and_restored, tree, (x,), {"w": (0,), "b": ALONE, "v": (0,)}),
    Case("one column, flat", lambda w, x: x @ w.reshape(4, 1), f32(4), (x,), (0,)),
    Case("one output's kernel, flat", lambda w, x: conv(x, w.reshape(3, 3, 4, 1)), f32(36), (images,), (0,)),
]


@pytest.mark.parametrize("case", RAVELED, ids=named)
def test_what_is_raveled_and_restored_keeps_its_axes(case):
    check(case)


FLAT = [
    Case("a flat model", lambda w, x: mlp(ravel_pytree(tree)[1](w), x), f32(60), (x,), ALONE, PART),
    Case("a flat matrix", lambda w, x: x @ w.reshape(4, 6), f32(24), (x,), ALONE, PART),
    Case("a flat matrix, transposed", lambda w, x: x @ w.reshape(6, 4).T, f32(24), (x,), ALONE, PART),
    Case("a flat kernel", lambda w, x: conv(x, w.reshape(3, 3, 4, 8)), f32(288), (images,), ALONE, PART),
    Case("two flat vectors", lambda w, x: x @ w[:4] + jnp.tanh(x @ w[4:]), f32(8), (x,), ALONE, PART),
    Case("flat columns, stacked", lambda w, x: x @ jnp.stack(jnp.split(w, 6), 1), f32(24), (x,), ALONE, PART),
    Case(
        "a matrix in a flat array",
        lambda w, x: x @ lax.dynamic_slice(w, (6,), (24,)).reshape(4, 6),
        f32(40),
        (x,),
        ALONE,
        PART,
    ),
    Case("a matrix in another shape", lambda w, x: x @ w.reshape(4, 6), f32(8, 3), (x,), ALONE, PART),
    Case(
        "a matrix in its shape reversed",
        lambda w, x: x @ w.reshape(4, 6),
        f32(6, 4),
        (x,),
        ALONE,
        "axes 0, 1",
    ),
]


@pytest.mark.parametrize("case", FLAT, ids=named)
def test_flat_storage_is_left_alone(case):
    check(case)
