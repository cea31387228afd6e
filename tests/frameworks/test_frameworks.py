"""The conventions on the parameters that the frameworks themselves make, and training through them."""

import equinox as eqx
import flax.linen as nn
import flax.traverse_util
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from gc_optax import centralize, out_first, out_last

ALONE = ()


def by_path(axes):
    """The fan-in of every leaf, by its path without boxes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(axes)
    return {
        "/".join(
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))))
            for key in path
            if key != jax.tree_util.GetAttrKey("value")
        ): leaf.fan_in
        for path, leaf in leaves
    }


# Flax Linen


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens, image):
        x = nn.Embed(11, 8)(tokens)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        x = nn.LayerNorm()(x)
        x = nn.RMSNorm()(x)
        x = nn.RNN(nn.LSTMCell(6))(x)
        x = nn.WeightNorm(nn.Dense(5))(x)
        x = nn.PReLU()(x)
        y = nn.Conv(8, (3, 3))(image)
        y = nn.Conv(8, (3, 3), feature_group_count=8)(y)
        y = nn.Conv(4, (1, 1), feature_group_count=4)(y[..., :4])
        y = nn.BatchNorm(use_running_average=False)(y)
        y = nn.GroupNorm(num_groups=2)(y)
        return x.sum() + y.sum()


def linen_params():
    model = LinenModel()
    variables = model.init(jax.random.key(0), jnp.zeros((2, 3), int), jnp.zeros((2, 8, 8, 3)))
    return variables["params"]


def test_out_last_on_linen():
    read = by_path(out_last(linen_params()))
    kernels = {path: axes for path, axes in read.items() if axes != ALONE}
    attention = (
        "MultiHeadDotProductAttention_0"
        if "MultiHeadDotProductAttention_0" in str(read)
        else "SelfAttention_0"
    )
    lstm = "OptimizedLSTMCell_0" if "OptimizedLSTMCell_0" in str(read) else "LSTMCell_0"
    gates = [f"{lstm}/{side}{gate}/kernel" for side in "ih" for gate in "ifgo"]
    assert kernels == {
        f"{attention}/query/kernel": (0,),
        f"{attention}/key/kernel": (0,),
        f"{attention}/value/kernel": (0,),
        f"{attention}/out/kernel": (0, 1),
        "Dense_0/kernel": (0,),
        "Conv_0/kernel": (0, 1, 2),
        "Conv_1/kernel": (0, 1, 2),
        **dict.fromkeys(gates, (0,)),
    }
    for path in (
        "Embed_0/embedding",
        "LayerNorm_0/scale",
        "WeightNorm_0/Dense_0/kernel/scale",
        "Conv_2/kernel",
    ):
        assert read[path] == ALONE, path


def test_out_last_leaves_the_vectors_of_scanned_linen_layers_alone():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm(name="norm")(nn.Dense(4, name="dense")(x)), None

    stacked = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = stacked.init(jax.random.key(0), jnp.ones((2, 4)), None)["params"]
    read = by_path(out_last(params))
    assert {path: axes for path, axes in read.items() if path != "dense/kernel"} == {
        "dense/bias": ALONE,
        "norm/bias": ALONE,
        "norm/scale": ALONE,
    }
    with pytest.warns(UserWarning, match=r"\['dense'\]\['kernel'\], shape \(3, 4, 4\)"):
        centralize().init(params)


def test_the_default_is_silent_on_linen_and_warns_of_an_ensemble():
    centralize().init(linen_params())
    critics = nn.vmap(
        nn.Dense,
        in_axes=None,
        out_axes=0,
        axis_size=10,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )
    params = critics(1, name="value").init(jax.random.key(0), jnp.ones((2, 32)))
    with pytest.warns(UserWarning, match=r"shape \(10, 32, 1\)"):
        centralize().init({"value": params["params"]})


def test_a_partitioned_linen_kernel_keeps_its_name():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    params = nn.Dense(4, kernel_init=init, bias_init=nn.initializers.zeros).init(
        jax.random.key(0), jnp.ones((1, 3))
    )
    assert by_path(out_last(params)) == {"params/kernel": (0,), "params/bias": ALONE}


@pytest.mark.parametrize("sep", [None, "/", "."])
def test_flattened_linen_params_keep_their_names(sep):
    flat = flax.traverse_util.flatten_dict(linen_params(), sep=sep)
    nested = flax.traverse_util.unflatten_dict(out_last(flat), sep=sep)
    assert by_path(nested) == by_path(out_last(linen_params()))
    centralize().init(flat)


def test_train_state_trains():
    model = nn.Dense(3)
    x = jnp.arange(8.0).reshape(2, 4) / 8
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.chain(centralize(), optax.sgd(0.1))
    )

    @jax.jit
    def step(state):
        gradients = jax.grad(lambda params: jnp.sum(state.apply_fn({"params": params}, x) ** 2))(state.params)
        return state.apply_gradients(grads=gradients)

    trained = step(step(state))
    assert not np.allclose(trained.params["kernel"], params["kernel"])
    np.testing.assert_allclose(trained.params["kernel"].sum(0), params["kernel"].sum(0), atol=1e-5)


# Flax NNX


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)])
        self.lora = nnx.LoRA(6, 2, 4, rngs=rngs)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.value = nnx.Param(jnp.ones((4, 4)))

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        for layer in self.layers:
            x = layer(x)
        return self.lora(x) @ self.value[...]


def test_out_last_on_nnx():
    state = nnx.state(NNXModel(nnx.Rngs(0)), nnx.Param)
    expected = {
        "attention/query/kernel": (0,),
        "attention/key/kernel": (0,),
        "attention/value/kernel": (0,),
        "attention/out/kernel": (0, 1),
        "layers/0/kernel": (0,),
        "lora/lora_a": (0,),
        "lora/lora_b": (0,),
        "conv/kernel": (0, 1, 2),
        "value": (0,),
    }
    for params in (state, nnx.to_pure_dict(state)):
        kernels = {path: axes for path, axes in by_path(out_last(params)).items() if axes != ALONE}
        assert kernels == expected


def is_param(node):
    return isinstance(node, nnx.Param)


def unboxed(param):
    return jax.tree.leaves(param)[0]


# `nnx.Optimizer` gives boxed parameters to `init` and bare gradients to `update`.
@pytest.mark.parametrize(
    "axes",
    [
        None,
        lambda model: out_last(nnx.state(model, nnx.Param)),
        lambda model: jax.tree.map(unboxed, out_last(nnx.state(model, nnx.Param)), is_leaf=is_param),
    ],
    ids=["convention", "boxed tree", "bare tree"],
)
def test_nnx_optimizer_trains(axes):
    model = NNXModel(nnx.Rngs(0))
    axes = axes and axes(model)
    optimizer = nnx.Optimizer(model, optax.chain(centralize(axes), optax.sgd(0.1)), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    tokens = jnp.arange(6).reshape(2, 3)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.mean((model(tokens) - 1.0) ** 2))(model)
        optimizer.update(model, gradients)

    step(model, optimizer)
    step(model, optimizer)
    for projection, axes in (("query", 0), ("out", (0, 1))):
        kernel = getattr(model.attention, projection).kernel[...]
        start = before["attention"][projection]["kernel"][...]
        assert not np.allclose(kernel, start)
        np.testing.assert_allclose(kernel.sum(axes), start.sum(axes), atol=1e-5)


# Haiku


def test_out_last_on_haiku():
    def forward(tokens, image):
        x = hk.Embed(11, 8)(tokens)
        x = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())(x, x, x)
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x, _ = hk.dynamic_unroll(hk.LSTM(6), x, hk.LSTM(6).initial_state(3))
        x = hk.nets.MLP([5, 4])(x)
        y = hk.Conv2D(8, 3)(image)
        y = hk.DepthwiseConv2D(2, (3, 3))(y)
        y = hk.Conv2DTranspose(5, 3)(y)
        return x, y

    params = hk.transform(forward).init(jax.random.key(0), jnp.zeros((2, 3), int), jnp.zeros((2, 8, 8, 3)))
    read = by_path(out_last(params))
    kernels = {path: axes for path, axes in read.items() if axes != ALONE}
    assert kernels == {
        "multi_head_attention/query/w": (0,),
        "multi_head_attention/key/w": (0,),
        "multi_head_attention/value/w": (0,),
        "multi_head_attention/linear/w": (0,),
        "lstm/linear/w": (0,),
        "mlp/~/linear_0/w": (0,),
        "mlp/~/linear_1/w": (0,),
        "conv2_d/w": (0, 1, 2),
        "depthwise_conv2_d/w": (0, 1, 2),
        "conv2_d_transpose/w": (0, 1, 3),
    }


# Keras


def test_out_last_on_keras():
    keras.utils.clear_session()  # the names of its layers count on from model to model
    layers = keras.layers
    tokens, image = keras.Input((3,), dtype="int32"), keras.Input((8, 8, 3))
    x = layers.Embedding(11, 8)(tokens)
    x = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.LayerNormalization()(x)
    x = layers.LSTM(6)(x)
    x = layers.Dense(5)(x)
    y = layers.Conv2D(8, 3)(image)
    y = layers.SeparableConv2D(6, 3)(y)
    y = layers.DepthwiseConv2D(3, depth_multiplier=2)(y)
    y = layers.Conv2DTranspose(5, 3)(y)
    y = layers.BatchNormalization()(y)
    y = layers.PReLU()(y)
    model = keras.Model([tokens, image], [x, y])
    params = {variable.path: jnp.asarray(variable.value) for variable in model.trainable_variables}
    kernels = {path: axes for path, axes in by_path(out_last(params)).items() if axes != ALONE}
    assert {
        path.split("/", 1)[1] if path.startswith("functional") else path: axes
        for path, axes in kernels.items()
    } == {
        "multi_head_attention/query/kernel": (0,),
        "multi_head_attention/key/kernel": (0,),
        "multi_head_attention/value/kernel": (0,),
        "multi_head_attention/attention_output/kernel": (0, 1),
        "lstm/lstm_cell/kernel": (0,),
        "lstm/lstm_cell/recurrent_kernel": (0,),
        "dense/kernel": (0,),
        "conv2d/kernel": (0, 1, 2),
        "separable_conv2d/depthwise_kernel": (0, 1),
        "separable_conv2d/pointwise_kernel": (0, 1, 2),
        "depthwise_conv2d/kernel": (0, 1),
        "conv2d_transpose/kernel": (0, 1, 3),
    }


# Equinox


class EquinoxModel(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    gru: eqx.nn.GRUCell
    conv: eqx.nn.Conv2d
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(11, 8, key=key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=key)
        self.norm = eqx.nn.LayerNorm((3, 8))
        self.gru = eqx.nn.GRUCell(8, 6, key=key)
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=key)
        self.mlp = eqx.nn.MLP(6, 2, 4, 1, key=key)


def test_out_first_on_equinox():
    model = EquinoxModel(jax.random.key(0))
    read = by_path(out_first(eqx.filter(model, eqx.is_inexact_array)))
    kernels = {path: axes for path, axes in read.items() if axes != ALONE}
    assert kernels == {
        "attention/query_proj/weight": (1,),
        "attention/key_proj/weight": (1,),
        "attention/value_proj/weight": (1,),
        "attention/output_proj/weight": (1,),
        "gru/weight_ih": (1,),
        "gru/weight_hh": (1,),
        "conv/weight": (1, 2, 3),
        "mlp/layers/0/weight": (1,),
        "mlp/layers/1/weight": (1,),
    }


def test_an_equinox_model_trains():
    model = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))
    optimizer = optax.chain(centralize(out_first(model)), optax.sgd(0.1))
    x = jnp.arange(8.0).reshape(2, 4) / 8

    @eqx.filter_jit
    def step(model, state):
        gradients = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(x) - 1) ** 2))(model)
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(model, updates), state

    trained, _ = step(model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)))
    for layer, start in zip(trained.layers, model.layers, strict=True):
        assert not np.allclose(layer.weight, start.weight)
        np.testing.assert_allclose(layer.weight.sum(1), start.weight.sum(1), atol=1e-5)
