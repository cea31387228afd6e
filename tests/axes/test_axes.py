"""What each axis of a parameter means, and what it converts to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gc_optax
from gc_optax import WeightAxes, centralize, centralize_gradients


def test_weight_axes_are_one_leaf_and_compare_by_value():
    axes = WeightAxes((0,), (1,), "dot_general", "because")
    assert jax.tree.leaves({"a": axes}) == [axes]
    assert axes == WeightAxes((0,), (1,), "dot_general", "because")
    assert hash(axes) == hash(WeightAxes((0,), (1,), "dot_general", "because"))
    with pytest.raises(AttributeError):
        axes.fan_in = (1,)
    # What it knows of the rank is no part of what one types to make it.
    read = gc_optax.out_last(jnp.ones((3, 2)))
    assert read.rank == 2
    assert eval(repr(read)) == read
    assert "rank" not in repr(read)


@pytest.mark.parametrize("bad", [0, [0], ("0",), (0.0,), (True,), None])
def test_weight_axes_refuse_what_is_no_tuple_of_ints(bad):
    with pytest.raises(TypeError, match=r"WeightAxes\.fan_in must be a tuple of ints"):
        WeightAxes(bad)
    with pytest.raises(TypeError, match=r"WeightAxes\.fan_out must be a tuple of ints"):
        WeightAxes((0,), bad)


# Muon


def test_axes_convert_to_those_of_muon():
    numbers = optax.contrib.MuonDimensionNumbers
    assert WeightAxes((0,), (1,)).to_muon() == numbers((0,), (1,))
    assert WeightAxes((1, 2), (3,)).to_muon() == numbers((1, 2), (3,))
    assert WeightAxes(()).to_muon() is None
    assert WeightAxes((0,)).to_muon() is None


def test_one_tree_of_axes_for_centralization_and_for_muon():
    def loss(params, x):
        h = jnp.tanh(jnp.einsum("bi,lio->blo", x, params["stack"]).sum(1) + params["bias"])
        return jnp.mean((h @ params["head"].T - 1) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "stack": jax.random.normal(keys[0], (2, 4, 6)) / 2,
        "bias": jnp.zeros(6),
        "head": jax.random.normal(keys[1], (3, 6)) / 3,
    }
    x = jax.random.normal(keys[2], (16, 4))
    axes = gc_optax.infer_axes(loss, params, x)
    matrices = jax.tree.map(WeightAxes.to_muon, axes)
    assert matrices["bias"] is None
    muon = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=matrices)
    optimizer = optax.chain(centralize(axes), muon)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(50):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2
    # A tree of Muon's dimension numbers says the same as the axes that it was made from.
    gradients = jax.grad(loss)(params, x)
    by_axes, by_numbers = (centralize_gradients(gradients, tree) for tree in (axes, matrices))
    assert jax.tree.all(jax.tree.map(np.array_equal, by_axes, by_numbers))


# Experts, and other axes that count matrices


@functools.partial(jax.jit, static_argnums=1)
def muon_step(gradient, numbers):
    """One step of Muon for one parameter."""
    muon = optax.contrib.muon(1.0, ns_steps=2, muon_weight_dimension_numbers={"w": numbers})
    params = {"w": jnp.ones_like(gradient)}
    return muon.update({"w": gradient}, muon.init(params), params)[0]["w"]


def test_an_expert_axis_that_the_data_lack_is_fan_out_until_it_is_said_to_count_matrices():
    def loss(params, x):
        h = jnp.einsum("btd,edf->btef", x, params["up"])
        return jnp.sum(jnp.einsum("btef,efd->bted", h, params["down"]) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (3, 4, 6)), "down": jax.random.normal(keys[1], (3, 6, 4))}
    x = jax.random.normal(keys[2], (2, 5, 4))
    axes = gc_optax.infer_axes(loss, params, x)
    assert (axes["up"].fan_in, axes["up"].fan_out) == ((1,), (0, 2))
    assert (axes["down"].fan_in, axes["down"].fan_out) == ((1,), (2,))
    each = jax.tree.map(lambda leaf: leaf.with_batch_axes(0), axes)
    gradients = jax.grad(loss)(params, x)
    for name, gradient in gradients.items():
        assert (each[name].fan_in, each[name].fan_out) == ((1,), (2,))
        matrix = WeightAxes((0,), (1,)).to_muon()
        one_each = jnp.stack([muon_step(expert, matrix) for expert in gradient])
        np.testing.assert_allclose(muon_step(gradient, each[name].to_muon()), one_each, atol=1e-5)
    together = muon_step(gradients["up"], axes["up"].to_muon())
    wide = muon_step(jnp.moveaxis(gradients["up"], 1, 0).reshape(4, -1), WeightAxes((0,), (1,)).to_muon())
    np.testing.assert_allclose(together, jnp.moveaxis(wide.reshape(4, 3, 6), 0, 1), atol=1e-5)
    assert np.abs(together - muon_step(gradients["up"], each["up"].to_muon())).max() > 0.05
    # To centralization an axis of fan-out and a batch axis are the same.
    by_axes, by_each = (centralize_gradients(gradients, tree) for tree in (axes, each))
    assert jax.tree.all(jax.tree.map(np.array_equal, by_axes, by_each))


def test_query_key_and_value_in_one_array_are_three_matrices_where_that_is_said():
    def loss(kernel, x):
        query, key, value = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", x, kernel), 2, 0)
        return jnp.sum(query * jnp.tanh(key) * value**2)

    kernel = jax.random.normal(jax.random.key(0), (4, 3, 2, 5))
    axes = gc_optax.infer_axes(loss, kernel, jnp.ones((2, 6, 4)))
    assert (axes.fan_in, axes.fan_out) == ((0,), (1, 2, 3))
    numbers = axes.with_batch_axes(1).to_muon()
    assert numbers == optax.contrib.MuonDimensionNumbers((0,), (2, 3))
    alone = WeightAxes((0,), (1, 2)).to_muon()
    one_each = jnp.stack([muon_step(kernel[:, part], alone) for part in range(3)], axis=1)
    np.testing.assert_allclose(muon_step(kernel, numbers), one_each, atol=1e-5)
    assert np.abs(muon_step(kernel, axes.to_muon()) - one_each).max() > 0.05


def test_a_batch_axis_taken_out_of_the_fan_in_has_a_mean_of_its_own():
    axes = WeightAxes((0, 1), (2,)).with_batch_axes(1)
    assert axes == WeightAxes((0,), (2,))
    gradient = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    projected = centralize_gradients(gradient, axes)
    np.testing.assert_allclose(projected, gradient - gradient.mean(0, keepdims=True), atol=1e-6)
    # With no fan-in left the parameter is left alone, and is a weight for weight decay all the same.
    alone = WeightAxes((0,), (1,)).with_batch_axes(-0)
    assert alone == WeightAxes((), (1,), role="weight")
    assert alone.is_weight
    assert WeightAxes((0,), role="hidden").with_batch_axes(0).role == "hidden"


def read_from(*shape):
    """The axes of a kernel that know its rank: the last is fan-out, the others fan-in."""
    return gc_optax.out_last({"kernel": jnp.ones(shape)})["kernel"]


def test_what_is_said_of_a_parameter_stays():
    axes = dataclasses.replace(read_from(2, 3, 4), role="hidden")
    object.__setattr__(axes, "rank", 3)
    changed = axes.with_batch_axes(-3)
    assert (changed.fan_in, changed.fan_out, changed.rank) == ((1,), (2,), 3)
    assert (changed.role, changed.why, changed.op) == ("hidden", axes.why, axes.op)
    assert (axes.fan_in, axes.rank) == ((0, 1), 3)
    with pytest.raises(ValueError, match="they were read from a parameter of rank 3"):
        centralize(changed).init(jnp.ones((5, 2, 3, 4)))
    assert WeightAxes((0, 1), (2,)).with_batch_axes(0).rank is None


@pytest.mark.parametrize(
    ("axes", "batch", "expected"),
    [
        (read_from(2, 3, 4), (-3, 1), ((), (2,))),
        (read_from(2, 3, 4), (np.int64(0),), ((1,), (2,))),
        (WeightAxes((1,), (2,)), (0,), ((1,), (2,))),  # a batch axis already
        (WeightAxes((-3,), (-1,)), (-2,), ((-3,), (-1,))),
        (WeightAxes((-2,), (-1,)), (-1,), ((-2,), ())),
        (WeightAxes((0,), (-1,)), (-1,), ((0,), ())),  # as it is written
        (WeightAxes((0, 1), (2,)), (), ((0, 1), (2,))),
        (WeightAxes(()), (0,), ((), ())),  # a bias among the parameters of the experts
    ],
)
def test_batch_axes_count_from_either_end_where_it_is_known_what_they_are(axes, batch, expected):
    changed = axes.with_batch_axes(*batch)
    assert (changed.fan_in, changed.fan_out) == expected


@pytest.mark.parametrize(
    ("axes", "batch", "error", "message"),
    [
        (read_from(2, 3, 4), (3,), ValueError, "axis 3 is out of range for rank 3: name one of 0 to 2"),
        (read_from(2, 3, 4), (-4,), ValueError, "axis -4 is out of range for rank 3"),
        (read_from(2, 3, 4), (0, -3), ValueError, r"an axis is repeated in \(0, -3\); name it once"),
        (WeightAxes((1,), (2,)), (1, 1), ValueError, r"repeated in \(1, 1\)"),
        (
            WeightAxes((1,), (2,)),
            (-1,),
            ValueError,
            r"axis -1 is cannot be told from fan_in \(1,\), fan_out \(2,\): count it from the same end",
        ),
        (WeightAxes((1,), (2,)), (3,), ValueError, "leave it out where it is in neither"),
        (WeightAxes((-2,), (-1,)), (0,), ValueError, "axis 0 is cannot be told"),
        (WeightAxes((-2,), (-1,)), (-3,), ValueError, "axis -3 is cannot be told"),
        (WeightAxes((-3,), (2,)), (0,), ValueError, "axis 0 is cannot be told"),  # -3 may be axis 0
        (WeightAxes((1,), (2,)), ((0,),), TypeError, r"with_batch_axes takes ints, got \(\(0,\),\)"),
        (WeightAxes((1,), (2,)), (True,), TypeError, r"takes ints, got \(True,\)"),
    ],
)
def test_batch_axes_that_a_parameter_is_not_known_to_have_are_refused(axes, batch, error, message):
    with pytest.raises(error, match=message):
        axes.with_batch_axes(*batch)
