"""What is picked by indices: a row of a table, an expert, or all entries in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALONE, Case, check, dense, f32, named, tokens, x
from jax import lax

TABLES = [
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
]


@pytest.mark.parametrize("case", TABLES, ids=named)
def test_a_lookup_by_the_data_makes_a_table(case):
    check(case)


def routed(w, i, x):
    return jnp.einsum("te,td,edf->tf", jax.nn.one_hot(i, 2), x, w)


rows = jnp.array([0, 1, 1])
PICKED = [
    Case(
        "one token, closed over",
        lambda p: jax.nn.relu(p["e"][np.array([5])] @ p["w"]) @ p["v"],
        {"e": f32(10, 4), "w": dense, "v": f32(6, 2)},
        (),
        {"e": ALONE, "w": (0,), "v": (0,)},
    ),
    Case(
        "one-hot or not",
        lambda w, q, i, x: lax.cond(q, lambda: jax.nn.one_hot(i, 4), lambda: x) @ w,
        dense,
        (jnp.array(True), jnp.arange(3), x),
        (0,),
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
]


@pytest.mark.parametrize("case", PICKED, ids=named)
def test_what_the_data_picks_may_be_a_kernel(case):
    check(case)


PERMUTED = [
    Case("counted down", lambda w, x: x @ w[3 - jnp.arange(4)], dense, (x,), (0,)),
]


@pytest.mark.parametrize("case", PERMUTED, ids=named)
def test_constant_indices_that_leave_nothing_out_keep_the_axes(case):
    check(case)
