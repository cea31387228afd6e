"""Weights that are cut, joined, reshaped and put in a row before they meet the data."""

import jax
import jax.numpy as jnp
import pytest
from cases import ALONE, Case, check, dense, f32, named, one, scanned, square, x


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
