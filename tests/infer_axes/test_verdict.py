"""What all uses of a parameter say together: where they disagree or are not clear, and the reasons."""

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
    square,
    tokens,
    x,
)
from jax import lax

from gc_optax import infer_axes

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


def test_a_penalty_by_an_operation_that_cannot_be_read_is_no_use():
    def loss(w, x):
        return jnp.sum(x @ w) + 1e-3 * jnp.sum(jnp.sort(w, axis=0))

    assert infer_axes(loss, f32(4, 4), x).fan_in == (0,)


def test_the_order_of_the_uses_is_that_of_their_axes():
    axes = infer_axes(lambda w, x: x @ w.T @ w @ w, f32(4, 4), x)
    assert axes.why == "used in more than one way: dot_general over axis 0; dot_general over axis 1"


# What is not certain.


def churned(w):
    return lax.fori_loop(0, 3, lambda _, m: m.T.reshape(2, 2, 4).transpose(1, 2, 0).reshape(4, 4), w)


def median_free(w, x):
    return x @ (w - jnp.median(w, 0))


def solved(w, x):
    return x @ jnp.linalg.solve(w, w[:, 0])


def resized_positions(p, x):
    return x @ p["w"] + jax.image.resize(p["positions"], (3, 6), "bilinear")


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
        lambda w, x: x @ jnp.sort(w, 0),
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


def test_one_warning_lists_all_unclear_parameters_and_points_at_the_caller():
    with pytest.warns(UserWarning, match="'a'") as caught:
        infer_axes(lambda p, x: x @ (p["a"] @ p["b"]), FACTORS, x)
    assert len(caught) == 1
    assert "'b'" in str(caught[0].message)
    assert caught[0].filename == __file__


# The reasons.


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda w, x: x.sum(), "no gradient comes back to it"),
        (lambda w, x: x @ lax.stop_gradient(w), "no gradient comes back to it"),
        (lambda w, x: (x @ w).argmax(), "no gradient comes back to it"),
        (lambda w, x: x.sum() + (w**2).sum(), "add: only a statistic of it meets the data"),
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
    assert axes["bias"].why == "add: a bias, a scale or a gate"


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("squeezed", [False, True])
def test_the_bias_of_a_layer_with_one_output_is_a_bias(batch, squeezed):
    def loss(params, x, y):
        predicted = x @ params["kernel"] + params["bias"]
        return jnp.mean(((predicted[:, 0] if squeezed else predicted) - y) ** 2)

    params = {"kernel": jnp.ones((3, 1)), "bias": jnp.ones((1,))}
    axes = infer_axes(loss, params, jnp.ones((batch, 3)), jnp.ones((batch,) if squeezed else (batch, 1)))
    assert axes["bias"].why == "add: a bias, a scale or a gate"
    assert axes["kernel"].fan_in == (0,)


def test_very_many_unclear_parameters_are_named_up_to_a_bound():
    params = {f"w{number:03}": jnp.ones((4, 4)) for number in range(120)}

    def loss(params, x):
        return sum(jnp.sum(x @ jnp.linalg.inv(w)) for w in params.values())

    with pytest.warns(UserWarning, match=r"\['w099'\]") as caught:
        infer_axes(loss, params, jnp.ones((2, 4)))
    (message,) = (str(warning.message) for warning in caught)
    assert "\n  and 20 more\n" in message
    assert "['w100']" not in message
