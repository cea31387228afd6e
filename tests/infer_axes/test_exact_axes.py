"""`infer_axes` on the layers of the frameworks, one table for each: the layer, its inputs and the truth.

The rows of the README's table of axes are among them, each in the framework that it comes from.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import pytest
from flax import nnx

import gc_optax.nnx
from gc_optax import infer_axes

ALONE = ()

tokens = jnp.arange(6).reshape(2, 3)
sequence = jnp.ones((2, 3, 8))
images = jnp.ones((2, 6, 6, 4))
vectors = jnp.ones((2, 8))


def kernels(axes):
    """The fan-in of every leaf that has one, by its path without boxes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(axes)
    paths = [[key for key in path if key != jax.tree_util.GetAttrKey("value")] for path, _ in leaves]
    names = [jax.tree_util.keystr(tuple(path), simple=True, separator="/") for path in paths]
    return {name: leaf.fan_in for name, (_, leaf) in zip(names, leaves, strict=True) if leaf.fan_in != ALONE}


# Flax Linen


def stacked(layer):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return layer()(x), None

    scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
    return scanned(name="layers")


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        def block():
            return nn.Sequential([nn.LayerNorm(name="norm"), nn.Dense(8, name="dense")])

        return stacked(block)(x, None)[0]


class ScannedAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return stacked(lambda: nn.MultiHeadDotProductAttention(num_heads=2, name="attention"))(x, None)[0]


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(3, name="router")(x))
        w1 = self.param("w1", nn.initializers.lecun_normal(batch_axis=0), (3, 8, 16))
        w2 = self.param("w2", nn.initializers.lecun_normal(batch_axis=0), (3, 16, 8))
        h = nn.relu(jnp.einsum("...d,edf->...ef", x, w1))
        return jnp.einsum("...ef,efd,...e->...d", h, w2, gates)


class TiedEmbedding(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        return embed.attend(nn.Dense(8)(embed(tokens)))


def ensemble():
    return nn.vmap(
        nn.Dense,
        in_axes=None,
        out_axes=0,
        axis_size=5,
        variable_axes={"params": 0},
        split_rngs={"params": True},
    )(4)


LINEN = [
    (nn.Dense(5), vectors, {"kernel": (0,)}),
    (nn.Dense(1), vectors, {"kernel": (0,)}),
    (nn.Dense(5), jnp.ones((2, 1)), {}),
    (nn.DenseGeneral((2, 5), axis=-1), sequence, {"kernel": (0,)}),
    (nn.DenseGeneral(5, axis=(-2, -1)), sequence, {"kernel": (0, 1)}),
    (nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), sequence, {"kernel": (1,)}),
    (nn.Einsum((8, 2, 5), "abc,cde->abde"), sequence, {"kernel": (0,)}),
    (nn.Conv(5, (3, 3)), images, {"kernel": (0, 1, 2)}),
    (nn.Conv(5, (3,), padding="CAUSAL"), sequence, {"kernel": (0, 1)}),
    (nn.Conv(8, (3, 3), feature_group_count=2), images, {"kernel": (0, 1, 2)}),
    (nn.Conv(4, (3, 3), feature_group_count=4), images, {"kernel": (0, 1, 2)}),
    (nn.Conv(4, (1, 1), feature_group_count=4), images, {}),
    (nn.ConvLocal(5, (3, 3)), images, {"kernel": (2,)}),
    (nn.ConvTranspose(5, (3, 3), strides=(2, 2)), images, {"kernel": (0, 1, 2)}),
    (nn.ConvTranspose(5, (3, 3), strides=(2, 2), transpose_kernel=True), images, {"kernel": (0, 1, 3)}),
    (nn.Embed(11, 8), tokens, {}),
    (TiedEmbedding(), tokens, {"Dense_0/kernel": (0,)}),
    (nn.LayerNorm(), vectors, {}),
    (nn.GroupNorm(2), images, {}),
    (nn.PReLU(), vectors, {}),
    (nn.WeightNorm(nn.Dense(5)), vectors, {"layer_instance/kernel": (0,)}),
    (
        nn.MultiHeadDotProductAttention(num_heads=2),
        sequence,
        {"query/kernel": (0,), "key/kernel": (0,), "value/kernel": (0,), "out/kernel": (0, 1)},
    ),
    (nn.RNN(nn.SimpleCell(6)), sequence, {"cell/i/kernel": (0,), "cell/h/kernel": (0,)}),
    (
        nn.RNN(nn.LSTMCell(6)),
        sequence,
        {f"cell/{side}{gate}/kernel": (0,) for side in "ih" for gate in "ifgo"},
    ),
    (nn.RNN(nn.GRUCell(6)), sequence, {f"cell/{side}{gate}/kernel": (0,) for side in "ih" for gate in "rzn"}),
    (nn.RNN(nn.ConvLSTMCell(5, (3,))), images, {"cell/ih/kernel": (0, 1), "cell/hh/kernel": (0, 1)}),
    (ScannedBlock(), vectors, {"layers/dense/kernel": (1,)}),
    (
        ScannedAttention(),
        sequence,
        {
            "layers/attention/query/kernel": (1,),
            "layers/attention/key/kernel": (1,),
            "layers/attention/value/kernel": (1,),
            "layers/attention/out/kernel": (1, 2),
        },
    ),
    (ensemble(), vectors, {"kernel": (1,)}),
    (Experts(), vectors, {"router/kernel": (0,), "w1": (1,), "w2": (1,)}),
    (
        nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)]),
        vectors,
        {"layers_0/kernel": (0,), "layers_2/kernel": (0,)},
    ),
]


def name_of(row):
    return type(row[0]).__name__


@pytest.mark.parametrize(("layer", "inputs", "expected"), LINEN, ids=map(name_of, LINEN))
def test_linen(layer, inputs, expected):
    variables = jax.eval_shape(layer.init, jax.random.key(0), inputs)
    axes = infer_axes(layer.apply, variables, inputs)
    assert kernels(axes["params"]) == expected


def test_linen_spectral_norm_with_its_statistics_apart():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.SpectralNorm(nn.Dense(5))(x, update_stats=True)

    variables = Model().init(jax.random.key(0), vectors)

    def loss(params, stats):
        outputs, mutated = Model().apply(
            {"params": params, "batch_stats": stats}, vectors, mutable=["batch_stats"]
        )
        return outputs.sum(), mutated

    axes = infer_axes(loss, variables["params"], variables["batch_stats"])
    assert kernels(axes) == {"Dense_0/kernel": (0,)}


# Flax NNX


class NNXLowRank(nnx.Module):
    def __init__(self):
        self.linear = nnx.LoRALinear(8, 5, lora_rank=2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


class NNXStack(nnx.Module):
    def __init__(self):
        @nnx.split_rngs(splits=5)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return nnx.relu(layer(x))

        return forward(self.layers, x)


NNX = [
    (lambda: nnx.Linear(8, 5, rngs=nnx.Rngs(0)), vectors, {"kernel": (0,)}),
    (lambda: nnx.Linear(1, 5, rngs=nnx.Rngs(0)), jnp.ones((2, 1)), {}),
    (lambda: nnx.LinearGeneral((3, 8), 5, axis=(-2, -1), rngs=nnx.Rngs(0)), sequence, {"kernel": (0, 1)}),
    (lambda: nnx.Einsum("abc,cde->abde", (8, 2, 5), rngs=nnx.Rngs(0)), sequence, {"kernel": (0,)}),
    (lambda: nnx.Conv(4, 5, (3, 3), rngs=nnx.Rngs(0)), images, {"kernel": (0, 1, 2)}),
    (lambda: nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)), images, {"kernel": (0, 1, 2)}),
    (lambda: nnx.ConvTranspose(4, 5, (3, 3), rngs=nnx.Rngs(0)), images, {"kernel": (0, 1, 2)}),
    (
        lambda: nnx.ConvTranspose(4, 5, (3, 3), transpose_kernel=True, rngs=nnx.Rngs(0)),
        images,
        {"kernel": (0, 1, 3)},
    ),
    (lambda: nnx.Embed(11, 8, rngs=nnx.Rngs(0)), tokens, {}),
    (lambda: nnx.LayerNorm(8, rngs=nnx.Rngs(0)), vectors, {}),
    (lambda: nnx.BatchNorm(8, rngs=nnx.Rngs(0)), vectors, {}),
    (
        lambda: nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0)),
        sequence,
        {"query/kernel": (0,), "key/kernel": (0,), "value/kernel": (0,), "out/kernel": (0, 1)},
    ),
    (
        lambda: nnx.RNN(nnx.GRUCell(8, 6, rngs=nnx.Rngs(0))),
        sequence,
        {"cell/dense_h/kernel": (0,), "cell/dense_i/kernel": (0,)},
    ),
    (lambda: nnx.LoRA(8, 2, 5, rngs=nnx.Rngs(0)), vectors, {"lora_a": (0,), "lora_b": (0,)}),
    (
        NNXLowRank,
        vectors,
        {"linear/kernel": (0,), "linear/lora/lora_a": (0,), "linear/lora/lora_b": (0,)},
    ),
    (NNXStack, vectors, {"layers/kernel": (1,)}),
]
# Their shapes are enough, and take no compiling.
NNX = [(nnx.eval_shape(build), inputs, expected) for build, inputs, expected in NNX]


@pytest.mark.parametrize(("model", "inputs", "expected"), NNX, ids=map(name_of, NNX))
def test_nnx(model, inputs, expected):
    axes = gc_optax.nnx.infer_axes(lambda model, x: model(x), model, inputs, wrt=(nnx.Param, nnx.LoRAParam))
    assert kernels(axes) == expected


# Equinox

key = jax.random.key(0)


class EquinoxStack(eqx.Module):
    layers: eqx.nn.Linear

    def __init__(self):
        self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(jax.random.split(key, 5))

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def step(x, arrays):
            return jax.nn.relu(eqx.combine(arrays, static)(x)), None

        return jax.lax.scan(step, x, arrays)[0]


EQUINOX = [
    (lambda: eqx.nn.Linear(8, 5, key=key), vectors, {"weight": (1,)}),
    (lambda: eqx.nn.MLP(8, 5, 7, 1, key=key), vectors, {"layers/0/weight": (1,), "layers/1/weight": (1,)}),
    (lambda: eqx.nn.Conv1d(3, 5, 3, key=key), sequence, {"weight": (1, 2)}),
    (lambda: eqx.nn.Conv2d(6, 4, 3, groups=2, key=key), images, {"weight": (1, 2, 3)}),
    (lambda: eqx.nn.ConvTranspose2d(6, 5, 3, stride=2, key=key), images, {"weight": (1, 2, 3)}),
    (lambda: eqx.nn.Embedding(11, 8, key=key), tokens[:, 0], {}),
    (lambda: eqx.nn.LayerNorm(8), vectors, {}),
    (lambda: eqx.nn.PReLU(), vectors, {}),
    (lambda: eqx.nn.WeightNorm(eqx.nn.Linear(8, 5, key=key)), vectors, {"layer/weight": (1,)}),
    (EquinoxStack, vectors, {"layers/weight": (2,)}),
]
EQUINOX = [(eqx.filter_eval_shape(build), inputs, expected) for build, inputs, expected in EQUINOX]


@pytest.mark.parametrize(("model", "inputs", "expected"), EQUINOX, ids=map(name_of, EQUINOX))
def test_equinox(model, inputs, expected):
    assert kernels(infer_axes(lambda model, x: jax.vmap(model)(x), model, inputs)) == expected


def test_equinox_layers_with_several_inputs():
    attention = eqx.nn.MultiheadAttention(2, 8, key=key)
    axes = infer_axes(lambda layer, x: jax.vmap(lambda x: layer(x, x, x))(x), attention, sequence)
    assert kernels(axes) == {f"{name}_proj/weight": (1,) for name in ("query", "key", "value", "output")}
    cell = eqx.nn.GRUCell(8, 6, key=key)
    axes = infer_axes(
        lambda layer, x: layer(x[0], jnp.zeros(6)).sum() + layer(x[1], x[0, :6]).sum(), cell, vectors
    )
    assert kernels(axes) == {"weight_ih": (1,), "weight_hh": (1,)}


# dm-haiku


def recurrent(cell):
    def forward(x):
        core = cell(6)
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    return forward


def haiku_attention(x):
    return hk.MultiHeadAttention(2, 4, w_init=hk.initializers.RandomNormal())(x, x, x)


def haiku_stack(x):
    return hk.experimental.layer_stack(5)(lambda x: jax.nn.relu(hk.Linear(8)(x)))(x)


HAIKU = [
    (lambda x: hk.Linear(5)(x), vectors, {"linear/w": (0,)}),
    (lambda x: hk.nets.MLP([5, 4])(x), vectors, {"mlp/~/linear_0/w": (0,), "mlp/~/linear_1/w": (0,)}),
    (lambda x: hk.Conv2D(5, 3)(x), images, {"conv2_d/w": (0, 1, 2)}),
    (lambda x: hk.Conv2DTranspose(5, 3)(x), images, {"conv2_d_transpose/w": (0, 1, 3)}),
    (lambda x: hk.DepthwiseConv2D(2, (3, 3))(x), images, {"depthwise_conv2_d/w": (0, 1, 2)}),
    (lambda x: hk.Embed(11, 8)(x), tokens, {}),
    (lambda x: hk.Embed(11, 8, lookup_style="ONE_HOT")(x), tokens, {}),
    (lambda x: hk.LayerNorm(-1, create_scale=True, create_offset=True)(x), vectors, {}),
    (lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True), images, {}),
    (
        haiku_attention,
        sequence,
        {f"multi_head_attention/{name}/w": (0,) for name in ("query", "key", "value", "linear")},
    ),
    (recurrent(hk.LSTM), sequence, {"lstm/linear/w": (0,)}),
    (
        recurrent(hk.VanillaRNN),
        sequence,
        {"vanilla_rnn/linear/w": (0,), "vanilla_rnn/linear_1/w": (0,)},
    ),
    (haiku_stack, vectors, {"__layer_stack_no_per_layer/linear/w": (1,)}),
]


@pytest.mark.parametrize(("forward", "inputs", "expected"), HAIKU, ids=range(len(HAIKU)))
def test_haiku(forward, inputs, expected):
    model = hk.transform_with_state(forward)
    params, state = jax.eval_shape(model.init, jax.random.key(0), inputs)
    assert kernels(infer_axes(model.apply, params, state, jax.random.key(0), inputs)) == expected


# Keras

# With a name, a layer does not count among those that Keras gives numbers to.
KERAS = [
    (keras.layers.Dense(5, name="it"), vectors, {"kernel": (0,)}),
    (keras.layers.EinsumDense("abc,cde->abde", (None, 2, 5), name="it"), sequence, {"kernel": (0,)}),
    (keras.layers.Conv2D(5, 3, name="it"), images, {"kernel": (0, 1, 2)}),
    (keras.layers.Conv2DTranspose(5, 3, name="it"), images, {"kernel": (0, 1, 3)}),
    (keras.layers.DepthwiseConv2D(3, depth_multiplier=2, name="it"), images, {"kernel": (0, 1)}),
    (
        keras.layers.SeparableConv2D(5, 3, name="it"),
        images,
        {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2)},
    ),
    (keras.layers.Embedding(11, 8, name="it"), tokens, {}),
    (
        keras.layers.LSTM(6, name="it"),
        sequence,
        {"lstm_cell/kernel": (0,), "lstm_cell/recurrent_kernel": (0,)},
    ),
    (
        keras.layers.MultiHeadAttention(2, 4, name="it"),
        sequence,
        {"query/kernel": (0,), "key/kernel": (0,), "value/kernel": (0,), "attention_output/kernel": (0, 1)},
    ),
]


@pytest.mark.parametrize(("layer", "inputs", "expected"), KERAS, ids=map(name_of, KERAS))
def test_keras(layer, inputs, expected):
    several = 2 if isinstance(layer, keras.layers.MultiHeadAttention) else 1
    layer(*[inputs] * several)
    params = [variable.value for variable in layer.trainable_variables]
    state = [variable.value for variable in layer.non_trainable_variables]

    def fn(params, state, inputs):
        outputs, _ = layer.stateless_call(params, state, *[inputs] * several)
        return outputs

    names = [variable.path.split("/", 1)[1] for variable in layer.trainable_variables]
    axes = infer_axes(fn, params, state, inputs)
    assert kernels(dict(zip(names, axes, strict=True))) == expected
