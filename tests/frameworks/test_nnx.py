"""`infer_axes` for models of `flax.nnx`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gc_optax.nnx
from gc_optax import WeightAxes, centralize

x = jnp.linspace(0, 1, 96).reshape(2, 4, 4, 3)
y = jnp.array([[1.0], [0.0]])


class Model(nnx.Module):
    """A model with all kinds of state: parameters, statistics, random streams and a counter."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 8, decode=False, dropout_rate=0.1, deterministic=False, rngs=rngs
        )
        self.head = nnx.Linear(8, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.dropout(x.reshape(x.shape[0], -1, 8))
        return self.head(self.attention(x).mean(1))


EXPECTED = {
    "attention/key/kernel": (0,),
    "attention/out/kernel": (0, 1),
    "attention/query/kernel": (0,),
    "attention/value/kernel": (0,),
    "conv/kernel": (0, 1, 2),
    "head/kernel": (0,),
}


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def kernels(axes):
    flat = nnx.to_flat_state(axes)
    read = {"/".join(map(str, path)): jax.tree.leaves(variable)[0].fan_in for path, variable in flat}
    return {path: fan_in for path, fan_in in read.items() if fan_in}


def test_a_model_with_every_kind_of_state():
    assert kernels(gc_optax.nnx.infer_axes(loss, Model(nnx.Rngs(0)), x, y)) == EXPECTED


def test_the_structure_is_that_of_the_gradients_and_of_the_state():
    model = Model(nnx.Rngs(0))
    axes = gc_optax.nnx.infer_axes(loss, model, x, y)
    assert jax.tree.structure(axes) == jax.tree.structure(nnx.grad(loss)(model, x, y))
    assert jax.tree.structure(axes) == jax.tree.structure(nnx.state(model, nnx.Param))
    assert all(isinstance(leaf, WeightAxes) for leaf in jax.tree.leaves(axes))


def test_the_model_stays_as_it_is():
    model = Model(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.RngKey)))
    gc_optax.nnx.infer_axes(loss, model, x, y)
    after = nnx.state(model, nnx.Not(nnx.RngKey))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


def test_the_batch_may_come_from_outside_and_the_model_may_be_abstract():
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    axes = gc_optax.nnx.infer_axes(lambda model: (loss(model, x, y), {"aux": "any"}), model)
    assert kernels(axes) == EXPECTED


def test_keyword_arguments():
    axes = gc_optax.nnx.infer_axes(loss, Model(nnx.Rngs(0)), x=x, y=y)
    assert kernels(axes) == EXPECTED


def test_wrt_selects_what_is_trained():
    model = nnx.LoRALinear(8, 5, lora_rank=2, rngs=nnx.Rngs(0))

    def loss(model, x):
        return model(x).sum()

    inputs = jnp.ones((3, 8))
    assert kernels(gc_optax.nnx.infer_axes(loss, model, inputs, wrt=nnx.LoRAParam)) == {
        "lora/lora_a": (0,),
        "lora/lora_b": (0,),
    }
    everything = kernels(gc_optax.nnx.infer_axes(loss, model, inputs, wrt=(nnx.Param, nnx.LoRAParam)))
    assert everything == {"kernel": (0,), "lora/lora_a": (0,), "lora/lora_b": (0,)}
    with pytest.raises(ValueError, match=r"the model, a LoRALinear, has no variables .*BatchStat'> selects"):
        gc_optax.nnx.infer_axes(loss, model, inputs, wrt=nnx.BatchStat)


def test_an_optimizer_trains_with_the_axes():
    model = Model(nnx.Rngs(0))
    axes = gc_optax.nnx.infer_axes(loss, model, x, y)
    optimizer = nnx.Optimizer(model, optax.chain(centralize(axes), optax.sgd(0.1)), wrt=nnx.Param)
    start = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model, x, y))

    for _ in range(3):
        step(model, optimizer)
    moved = {"conv": (0, 1, 2), "head": 0}
    for name, fan_in in moved.items():
        kernel, first = getattr(model, name).kernel[...], start[name]["kernel"][...]
        assert not np.allclose(kernel, first)
        np.testing.assert_allclose(kernel.sum(fan_in), first.sum(fan_in), atol=1e-5)


def test_muon_takes_the_axes_of_an_nnx_model():
    model = Model(nnx.Rngs(0))
    axes = gc_optax.nnx.infer_axes(loss, model, x, y)

    as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # its name before Flax 0.12.7
    matrices = jax.tree.map(WeightAxes.to_muon, as_pure(axes))
    muon = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=matrices)
    optimizer = nnx.Optimizer(model, optax.chain(centralize(axes), muon), wrt=nnx.Param)
    first = float(loss(model, x, y))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model, x, y))

    for _ in range(20):
        step(model, optimizer)
    assert float(loss(model, x, y)) < first


def test_arguments_of_the_function_may_have_any_name():
    def fn(model, x, *, rest, params):
        return loss(model, x, y) + rest + params

    axes = gc_optax.nnx.infer_axes(fn, Model(nnx.Rngs(0)), x, rest=jnp.ones(()), params=jnp.ones(()))
    assert kernels(axes) == EXPECTED


def test_a_table_of_the_axes():
    model = Model(nnx.Rngs(0))
    axes = gc_optax.nnx.infer_axes(loss, model, x, y)
    table = gc_optax.summarize(nnx.state(model, nnx.Param), axes, gradients=nnx.grad(loss)(model, x, y))
    assert any(line.startswith("conv/kernel ") for line in table.splitlines())  # its box is no name
    assert "6 of 14 parameters are centralized" in table


@pytest.mark.parametrize(
    ("fn", "model", "error", "message"),
    [
        (None, Model(nnx.Rngs(0)), TypeError, "fn must be a function of the model, got None"),
        (loss, {"kernel": x}, ValueError, "the model, a dict, has no variables"),
        (Model(nnx.Rngs(0)), loss, ValueError, "the model, a function, has no variables"),
    ],
)
def test_bad_arguments(fn, model, error, message):
    with pytest.raises(error, match=message):
        gc_optax.nnx.infer_axes(fn, model, x, y)


def test_flax_is_needed_for_this_module_only():
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import gc_optax\n"
        "try:\n    import gc_optax.nnx\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "gc_optax.nnx needs Flax: pip install flax\n"
