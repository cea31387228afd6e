"""What each axis of a parameter means, and what it converts to."""

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
