"""The way through a program: functions, loops and branches, devices, and where the batch comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ALONE, FACTORS, MASK, Case, check, dense, f32, fan_in_of, named, scanned, square, tokens, x
from jax import lax
from jax.extend import core as jex
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

# Functions that are called.


@jax.custom_vjp
def int8_dense(w, x):
    return (x.astype(jnp.int8) @ w.astype(jnp.int8)).astype(jnp.float32)


int8_dense.defvjp(lambda w, x: (int8_dense(w, x), (w, x)), lambda wx, g: (wx[1].T @ g, g @ wx[0].T))


@jax.custom_jvp
def dense_with_own_tangent(w, x):
    return x @ w


dense_with_own_tangent.defjvp(lambda primals, tangents: (primals[1] @ primals[0], tangents[1] @ primals[0]))

FUNCTIONS = [
    Case("custom_vjp", int8_dense, dense, (x,), (0,)),
    Case("custom_jvp", dense_with_own_tangent, dense, (x,), (0,)),
    Case("jax.checkpoint", jax.checkpoint(lambda w, x: x @ w), dense, (x,), (0,)),
    Case("jit", jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w)), dense, (x,), (0,)),
]


@pytest.mark.parametrize("case", FUNCTIONS, ids=named)
def test_functions_that_are_called(case):
    check(case)


# Loops and branches.


def rnn(p, xs):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, h

    return lax.scan(step, p["h0"], xs)


def with_weights_in_the_carry(w, x):
    (_, h), _ = lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (w, x), length=3)
    return h


def power(w, x):
    return x @ lax.fori_loop(0, 3, lambda _, m: m @ w, jnp.eye(4))


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
    Case(
        "masked kernels in two branches",
        lambda p, m, q, x: x @ lax.cond(q, lambda: p[0] * m, lambda: p[1]),
        [dense, dense],
        (f32(4, 6), jnp.array(True), x),
        [(0,), (0,)],
    ),
    Case(
        "a batch of ones inside",
        lambda p: jax.nn.relu(jnp.ones((3, 4)) @ p["w"] + p["b"]) @ p["v"],
        {"w": dense, "b": f32(6), "v": f32(6, 2)},
        (),
        {"w": (0,), "b": ALONE, "v": (0,)},
    ),
]


@pytest.mark.parametrize("case", LOOPS, ids=named)
def test_loops_and_branches(case):
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


# Primitives that JAX does not have yet.


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


# Devices.


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
