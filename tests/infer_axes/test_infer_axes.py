"""The function itself: its arguments and results, its errors, and that it computes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALONE, dense, f32, fan_in_of, x

from gc_optax import WeightAxes, infer_axes


def test_outputs_besides_the_loss_may_be_parts_of_parameters():
    def loss(p, x):
        return (x @ p).sum(), {"p": p, "flat": p.ravel(), "norms": jnp.linalg.norm(p, axis=1)}

    assert fan_in_of(loss, dense, x) == (0,)


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
    assert axes["w"] == WeightAxes((0,), (1,), "dot_general", "dot_general over axis 0", "output")
    assert axes["none"] is None
    assert {name: axes[name].why for name in ("activation", "rate", "scale", "empty")} == {
        "activation": "no array",
        "rate": "no array",
        "scale": "no array",
        "empty": "empty",
    }
    assert axes["steps"].why.startswith("no array of floats")


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
