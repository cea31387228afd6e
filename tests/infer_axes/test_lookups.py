"""What is picked by indices: a row of a table, an expert, or all entries in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALONE, Case, check, dense, f32, fan_in_of, named, tokens, x
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


def test_what_is_one_hot_along_a_dimension_in_the_middle_is_a_table():
    def looked_up(table, indices):
        hot = lax.broadcasted_iota(int, (2, 10, 3), 1) == indices[:, None, :]
        return jnp.einsum("bev,ed->bvd", hot.astype(jnp.float32), table)

    assert fan_in_of(looked_up, f32(10, 4), jnp.arange(6).reshape(2, 3)) == ALONE


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


# Constant indices.

inputs, outputs = np.array([2, 0, 1, 3]), np.array([5, 0, 1, 4, 3, 2])
PERMUTED = [
    Case("counted down", lambda w, x: x @ w[3 - jnp.arange(4)], dense, (x,), (0,)),
    Case("counted up", lambda w, x: x @ w[jnp.arange(4)], dense, (x,), (0,)),
    Case("inputs", lambda w, x: x @ w[inputs], dense, (x,), (0,)),
    Case("inputs, by an array of JAX", lambda w, x: x @ w[jnp.array(inputs)], dense, (x,), (0,)),
    Case("inputs, by negative indices", lambda w, x: x @ w[np.array([-1, -2, 0, 1])], dense, (x,), (0,)),
    Case("inputs, by jnp.take", lambda w, x: x @ jnp.take(w, inputs, axis=0), dense, (x,), (0,)),
    Case("inputs, and stacked", lambda w, x: x @ jnp.stack([*w[inputs]]), dense, (x,), (0,)),
    Case("outputs", lambda w, x: x @ w[:, outputs], dense, (x,), (0,)),
    Case("outputs, by jnp.take", lambda w, x: x @ jnp.take(w, outputs, axis=1), dense, (x,), (0,)),
    Case("inputs and outputs", lambda w, x: x @ w[inputs][:, outputs], dense, (x,), (0,)),
    Case(
        "experts",
        lambda w, x: jnp.einsum("ti,eio->eto", x, w[np.array([2, 0, 1])]),
        f32(3, 4, 6),
        (x,),
        (1,),
    ),
    Case(
        "experts, each with inputs of its own",
        lambda w, x: jnp.einsum("eti,eio->eto", x, w[np.array([2, 0, 1])]),
        f32(3, 4, 6),
        (f32(3, 3, 4),),
        (1,),
    ),
    Case(
        "inputs in two dimensions",
        lambda w, x: jnp.einsum("tab,abo->to", x, w[np.array([[0, 1], [2, 3]])]),
        dense,
        (f32(3, 2, 2),),
        (0,),
    ),
    Case("inputs, one twice", lambda w, x: x @ w[np.array([0, 1, 1, 2])], f32(3, 6), (x,), (0,)),
    Case("inputs, each twice", lambda w, x: x @ jnp.repeat(w, 2, 0), f32(2, 6), (x,), (0,)),
    Case("outputs, one twice", lambda w, x: x @ w[:, np.array([0, 0, 1, 2, 3, 4, 5])], dense, (x,), (0,)),
    Case("some outputs", lambda w, x: x @ w[:, np.array([0, 2])], dense, (x,), (0,)),
    Case(
        "some experts",
        lambda w, x: jnp.einsum("ti,eio->eto", x, w[np.array([2, 0])]),
        f32(3, 4, 6),
        (x,),
        (1,),
    ),
]


@pytest.mark.parametrize("case", PERMUTED, ids=named)
def test_constant_indices_keep_the_axes(case):
    check(case)


PART = "only a part of axis 0 is contracted"
PARTIAL = [
    Case("some inputs", lambda w, x: x[:, :2] @ w[np.array([0, 2])], dense, (x,), ALONE, PART),
    Case(
        "inputs and outputs from one axis",
        lambda w, x: jnp.einsum("ta,abo->tbo", x, w[np.array([[0, 1], [2, 3]])]),
        dense,
        (f32(3, 2),),
        ALONE,
        PART,
    ),
]


@pytest.mark.parametrize("case", PARTIAL, ids=named)
def test_constant_indices_of_a_part_of_the_inputs_leave_a_weight_alone(case):
    check(case)


# One-hot arrays entry by entry: labels in a loss.

labels = jnp.array([0, 2, 1])


def cross_entropy(logits, labels):
    return -(jax.nn.one_hot(labels, logits.shape[-1]) * jax.nn.log_softmax(logits)).sum(-1).mean()


LABELS = [
    Case(
        "a dense layer, a scale and a bias",
        lambda p, x, y: cross_entropy(x @ p["w"] * p["s"] + p["b"], y),
        {"w": dense, "s": f32(6), "b": f32(6)},
        (x, labels),
        {"w": (0,), "s": ALONE, "b": ALONE},
    ),
    Case(
        "labels that are closed over",
        lambda p, x: cross_entropy(x @ p["w"] + p["b"], labels),
        {"w": dense, "b": f32(6)},
        (x,),
        {"w": (0,), "b": ALONE},
    ),
    Case(
        "a scale and a bias of the inputs",
        lambda p, x, y: cross_entropy(x * p["s"] + p["b"], y),
        {"s": f32(4), "b": f32(4)},
        (x, labels),
        {"s": ALONE, "b": ALONE},
    ),
    Case(
        "a scale and a bias of the inputs, without a logarithm",
        lambda p, x, y: (jax.nn.one_hot(y, 4) * (x * p["s"] + p["b"])).sum(-1),
        {"s": f32(4), "b": f32(4)},
        (x, labels),
        {"s": ALONE, "b": ALONE},
    ),
    Case(
        "a value for each entry of the inputs",
        lambda p, x, y: (jax.nn.one_hot(y, 4) * (x + p)).sum(-1),
        f32(3, 4),
        (x, labels),
        ALONE,
    ),
    Case("a value for each class", lambda p, y: (jax.nn.one_hot(y, 4) * p).sum(-1), f32(4), (labels,), ALONE),
    Case(
        "a vector for each class",
        lambda e, y: (jax.nn.one_hot(y, 10)[:, :, None] * e).sum(1),
        f32(10, 4),
        (labels,),
        ALONE,
    ),
    Case(
        "by einsum",
        lambda w, x, y: jnp.einsum("tk,tk->t", jax.nn.one_hot(y, 6), x @ w),
        dense,
        (x, labels),
        (0,),
    ),
]


@pytest.mark.parametrize("case", LABELS, ids=named)
def test_one_hot_labels_make_no_kernel_of_what_they_pick(case):
    check(case)
