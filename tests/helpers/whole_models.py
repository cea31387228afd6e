"""Whole models of Flax, Haiku and Equinox, each with a truth table of its axes that was written by hand."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx


class Case(NamedTuple):
    """A model and what is true of it.

    Args:
        loss: `loss(params, *args)`, a scalar or a pair of a scalar and something else.
        params: its parameters.
        args: its other arguments.
        fan_in: by path, the fan-in of every parameter that has one; all others are to be left alone.
        roles: by path, the role of every weight and lookup table that is not hidden.
    """

    loss: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    fan_in: dict[str, tuple[int, ...]]
    roles: dict[str, str]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# A ResNet with batch normalization, in Flax Linen.


class ResidualBlock(nn.Module):
    features: int
    strides: int
    train: bool

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train, momentum=0.9)
        y = conv((3, 3), self.strides, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = conv((3, 3), name="conv2")(y)
        y = norm(scale_init=nn.initializers.zeros, name="norm2")(y)
        if x.shape != y.shape:
            x = conv((1, 1), self.strides, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images, train=True):
        x = nn.Conv(8, (5, 5), use_bias=False, name="stem")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = ResidualBlock(8, 1, train, name="block1")(x)
        x = ResidualBlock(12, 2, train, name="block2")(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def resnet():
    model = ResNet(classes=7)
    images = jax.random.normal(jax.random.key(1), (4, 10, 10, 3))
    labels = jnp.arange(4)
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def loss(params, batch_stats, images, labels):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats}, images, mutable=["batch_stats"]
        )
        return cross_entropy(logits, labels), updates["batch_stats"]

    return Case(
        loss,
        variables["params"],
        (variables["batch_stats"], images, labels),
        {
            "stem/kernel": (0, 1, 2),
            "block1/conv1/kernel": (0, 1, 2),
            "block1/conv2/kernel": (0, 1, 2),
            "block2/conv1/kernel": (0, 1, 2),
            "block2/conv2/kernel": (0, 1, 2),
            "block2/shortcut/kernel": (0, 1, 2),
            "head/kernel": (0,),
        },
        {"stem/kernel": "input", "head/kernel": "output"},
    )


# A vision transformer with dropout, in Flax Linen.


class EncoderBlock(nn.Module):
    heads: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm(name="norm1")(x)
        y = nn.MultiHeadDotProductAttention(
            self.heads, dropout_rate=self.dropout, deterministic=not train, name="attention"
        )(y)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.LayerNorm(name="norm2")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(y))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.Dense(x.shape[-1], name="down")(y)
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)


class VisionTransformer(nn.Module):
    classes: int
    embed: int
    depth: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(self.embed, (4, 4), strides=(4, 4), padding="VALID", name="patches")(images)
        x = x.reshape(len(images), -1, self.embed)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.embed))
        x = jnp.concatenate([jnp.tile(token, (len(images), 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for number in range(self.depth):
            x = EncoderBlock(2, 14, self.dropout, name=f"block{number}")(x, train)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm(name="norm")(x)[:, 0])


def vision_transformer():
    model = VisionTransformer(classes=7, embed=10, depth=2)
    images = jax.random.normal(jax.random.key(1), (4, 8, 12, 3))
    labels = jnp.arange(4)
    params = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)["params"]

    def loss(params, rng, images, labels):
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": rng})
        return cross_entropy(logits, labels)

    block = {
        "attention/query/kernel": (0,),
        "attention/key/kernel": (0,),
        "attention/value/kernel": (0,),
        "attention/out/kernel": (0, 1),
        "up/kernel": (0,),
        "down/kernel": (0,),
    }
    return Case(
        loss,
        params,
        (jax.random.key(2), images, labels),
        {
            "patches/kernel": (0, 1, 2),
            **{f"block0/{path}": fan_in for path, fan_in in block.items()},
            **{f"block1/{path}": fan_in for path, fan_in in block.items()},
            "head/kernel": (0,),
        },
        {"patches/kernel": "input", "head/kernel": "output"},
    )


# A GPT with scanned and rematerialized blocks and tied embeddings, in Flax Linen.


class DecoderBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, mask):
        embed = x.shape[-1]
        y = nn.LayerNorm(name="norm1")(x)
        qkv = nn.DenseGeneral((3, self.heads, embed // self.heads), name="qkv")(y)
        query, key, value = jnp.moveaxis(qkv, -3, 0)
        y = nn.dot_product_attention(query, key, value, mask=mask)
        x = x + nn.DenseGeneral(embed, axis=(-2, -1), name="out")(y)
        y = nn.LayerNorm(name="norm2")(x)
        y = nn.gelu(nn.Dense(4 * embed, name="up")(y))
        return x + nn.Dense(embed, name="down")(y), None


class GPT(nn.Module):
    vocabulary: int
    context: int
    embed: int
    heads: int
    layers: int

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(self.vocabulary, self.embed, name="embedding")
        positions = nn.Embed(self.context, self.embed, name="positions")
        x = embedding(tokens) + positions(jnp.arange(tokens.shape[1]))
        blocks = nn.scan(
            nn.remat(DecoderBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        x, _ = blocks(self.heads, name="blocks")(x, nn.make_causal_mask(tokens))
        return embedding.attend(nn.LayerNorm(name="norm")(x))


def gpt():
    model = GPT(vocabulary=13, context=9, embed=10, heads=2, layers=3)
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 13)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return cross_entropy(logits, tokens[:, 1:])

    return Case(
        loss,
        params,
        (tokens,),
        {
            "blocks/qkv/kernel": (1,),
            "blocks/out/kernel": (1, 2),
            "blocks/up/kernel": (1,),
            "blocks/down/kernel": (1,),
        },
        {"embedding/embedding": "lookup"},
    )


# An LSTM tagger with a learned initial state, in Flax Linen.


class Tagger(nn.Module):
    vocabulary: int
    tags: int
    hidden: int

    @nn.compact
    def __call__(self, words, lengths):
        x = nn.Embed(self.vocabulary, 5, name="embedding")(words)
        state = [self.param(name, nn.initializers.zeros, (self.hidden,)) for name in ("cell0", "output0")]
        carry = tuple(jnp.tile(vector, (len(words), 1)) for vector in state)
        lstm = nn.RNN(nn.OptimizedLSTMCell(self.hidden, name="lstm"))
        x = lstm(x, initial_carry=carry, seq_lengths=lengths)
        return nn.Dense(self.tags, name="head")(x)


def lstm_tagger():
    model = Tagger(vocabulary=11, tags=6, hidden=7)
    words = jax.random.randint(jax.random.key(1), (4, 8), 0, 11)
    tags = words % 6
    lengths = jnp.array([8, 3, 5, 7])
    params = jax.jit(model.init)(jax.random.key(0), words, lengths)["params"]

    def loss(params, words, tags, lengths):
        logits = model.apply({"params": params}, words, lengths)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tags)
        return losses.mean(where=jnp.arange(words.shape[1]) < lengths[:, None])

    gates = [f"lstm/{side}{gate}/kernel" for side in "ih" for gate in "ifgo"]
    return Case(
        loss,
        params,
        (words, tags, lengths),
        {**dict.fromkeys(gates, (0,)), "head/kernel": (0,)},
        {"embedding/embedding": "lookup", "head/kernel": "output"},
    )


# A U-Net with transposed convolutions in both layouts, in Flax Linen.


class ConvBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (3, 3), name="conv")(x)
        return nn.relu(nn.GroupNorm(num_groups=2, name="norm")(x))


class UNet(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images):
        fine = ConvBlock(4, name="down1")(images)
        coarse = ConvBlock(6, name="down2")(nn.max_pool(fine, (2, 2), (2, 2)))
        x = ConvBlock(10, name="bottom")(nn.max_pool(coarse, (2, 2), (2, 2)))
        x = nn.ConvTranspose(6, (2, 2), strides=(2, 2), name="grow2")(x)
        x = ConvBlock(8, name="up2")(jnp.concatenate([coarse, x], axis=-1))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=True, name="grow1")(x)
        x = ConvBlock(6, name="up1")(jnp.concatenate([fine, x], axis=-1))
        return nn.Conv(self.classes, (1, 1), name="head")(x)


def unet():
    model = UNet(classes=5)
    images = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    labels = jax.random.randint(jax.random.key(2), (2, 8, 12), 0, 5)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]

    def loss(params, images, labels):
        return cross_entropy(model.apply({"params": params}, images), labels)

    return Case(
        loss,
        params,
        (images, labels),
        {
            "down1/conv/kernel": (0, 1, 2),
            "down2/conv/kernel": (0, 1, 2),
            "bottom/conv/kernel": (0, 1, 2),
            "grow2/kernel": (0, 1, 2),
            "up2/conv/kernel": (0, 1, 2),
            "grow1/kernel": (0, 1, 3),
            "up1/conv/kernel": (0, 1, 2),
            "head/kernel": (0, 1, 2),
        },
        {"down1/conv/kernel": "input", "head/kernel": "output"},
    )


# A transformer block with a mixture of experts, in Flax Linen.


class MixtureOfExperts(nn.Module):
    """Sends each token to its best experts, as GShard does, each of which takes `capacity` tokens."""

    experts: int
    hidden: int
    capacity: int
    choices: int = 2

    @nn.compact
    def __call__(self, x):
        tokens, embed = x.shape
        probabilities = nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))
        gates, chosen = jax.lax.top_k(probabilities, self.choices)
        gates = gates / gates.sum(-1, keepdims=True)

        # All first choices stand in line before all second choices.
        chosen = jax.nn.one_hot(chosen, self.experts, dtype=int)
        line = chosen.swapaxes(0, 1).reshape(self.choices * tokens, self.experts)
        ahead = (jnp.cumsum(line, axis=0) - line).reshape(self.choices, tokens, self.experts).swapaxes(0, 1)
        slots = chosen[..., None] * jax.nn.one_hot(ahead, self.capacity)
        dispatch = slots.sum(1)
        combine = jnp.einsum("tk,tkec->tec", gates, slots)

        init = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", init, (self.experts, embed, self.hidden))
        up_bias = self.param("up_bias", nn.initializers.zeros, (self.experts, 1, self.hidden))
        down = self.param("down", init, (self.experts, self.hidden, embed))
        inputs = jnp.einsum("tec,td->ecd", dispatch, x)
        hidden = nn.gelu(jnp.einsum("ecd,edh->ech", inputs, up) + up_bias)
        outputs = jnp.einsum("ech,ehd->ecd", hidden, down)

        imbalance = self.experts * jnp.sum(chosen[:, 0].mean(0) * probabilities.mean(0))
        return jnp.einsum("tec,ecd->td", combine, outputs), imbalance


class ExpertBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y)
        y = nn.LayerNorm(name="norm2")(x)
        y, imbalance = MixtureOfExperts(experts=3, hidden=14, capacity=16, name="mixture")(
            y.reshape(-1, y.shape[-1])
        )
        return x + y.reshape(x.shape), imbalance


def mixture_of_experts():
    model = ExpertBlock()
    inputs, targets = jax.random.normal(jax.random.key(1), (2, 4, 5, 8))
    params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]

    def loss(params, inputs, targets):
        outputs, imbalance = model.apply({"params": params}, inputs)
        return jnp.mean((outputs - targets) ** 2) + 0.01 * imbalance

    return Case(
        loss,
        params,
        (inputs, targets),
        {
            "attention/query/kernel": (0,),
            "attention/key/kernel": (0,),
            "attention/value/kernel": (0,),
            "attention/out/kernel": (0, 1),
            "mixture/router/kernel": (0,),
            "mixture/up": (1,),
            "mixture/down": (1,),
        },
        # It has no layer in front or behind, and what the router says weighs what the experts have made.
        {
            **{f"attention/{name}/kernel": "input" for name in ("query", "key", "value")},
            "mixture/router/kernel": "output",
            "mixture/down": "output",
        },
    )


# LoRA, merged into the frozen kernels of a transformer block, in plain JAX.


def transformer_block(kernels, x):
    query, key, value = (jnp.einsum("bse,ehd->bshd", x, kernels[name]) for name in ("query", "key", "value"))
    y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    x = x + jnp.einsum("bshd,hde->bse", y, kernels["out"])
    return x + jax.nn.gelu(x @ kernels["up"]) @ kernels["down"]


def merged_lora():
    rank, alpha = 2, 4.0
    embed, heads, head_dim, hidden = (12,), 3, 5, (20,)
    ins_and_outs = {
        "query": (embed, (heads, head_dim)),
        "key": (embed, (heads, head_dim)),
        "value": (embed, (heads, head_dim)),
        "out": ((heads, head_dim), embed),
        "up": (embed, hidden),
        "down": (hidden, embed),
    }
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(ins_and_outs)))
    base, adapters = {}, {}
    for name, (ins, outs) in ins_and_outs.items():
        base[name] = jax.random.normal(next(keys), (*ins, *outs)) / np.sqrt(np.prod(ins))
        down = jax.random.normal(next(keys), (*ins, rank)) / np.sqrt(np.prod(ins))
        adapters[name] = {"a": down, "b": jnp.zeros((rank, *outs))}
    inputs, targets = jax.random.normal(jax.random.key(1), (2, 4, 6, *embed))

    def merge(kernel, adapter):
        return kernel + alpha / rank * jnp.tensordot(adapter["a"], adapter["b"], axes=1)

    def loss(adapters, base, inputs, targets):
        kernels = {name: merge(kernel, adapters[name]) for name, kernel in base.items()}
        return jnp.mean((transformer_block(kernels, inputs) - targets) ** 2)

    return Case(
        loss,
        adapters,
        (base, inputs, targets),
        {
            **{f"{name}/a": (0,) for name in ("query", "key", "value", "up", "down")},
            "out/a": (0, 1),
            **{f"{name}/b": (0,) for name in ins_and_outs},
        },
        {
            **{f"{name}/{side}": "input" for name in ("query", "key", "value") for side in "ab"},
            "down/a": "output",
            "down/b": "output",
        },
    )


# LoRA beside the frozen kernels, in Flax NNX.


class AdaptedMLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.LoRALinear(6, 11, lora_rank=2, rngs=rngs)
        self.norm = nnx.LayerNorm(11, rngs=rngs)
        self.down = nnx.LoRALinear(11, 5, lora_rank=3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.norm(self.up(x))))


def unmerged_lora():
    graph, adapters, frozen = nnx.split(AdaptedMLP(nnx.Rngs(0)), nnx.LoRAParam, ...)
    inputs = jax.random.normal(jax.random.key(1), (8, 6))
    labels = jnp.arange(8) % 5

    def loss(adapters, frozen, inputs, labels):
        return cross_entropy(nnx.merge(graph, adapters, frozen)(inputs), labels)

    return Case(
        loss,
        adapters,
        (frozen, inputs, labels),
        {
            "up/lora/lora_a": (0,),
            "up/lora/lora_b": (0,),
            "down/lora/lora_a": (0,),
            "down/lora/lora_b": (0,),
        },
        {"up/lora/lora_a": "input", "down/lora/lora_b": "output"},
    )


# A transformer with stacked and scanned layers, in Equinox: kernels are (layers, out, in).


class EquinoxBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, embed, hidden, key):
        attention_key, mlp_key = jax.random.split(key)
        self.norm1 = eqx.nn.LayerNorm(embed)
        self.attention = eqx.nn.MultiheadAttention(2, embed, qk_size=3, vo_size=7, key=attention_key)
        self.norm2 = eqx.nn.LayerNorm(embed)
        self.mlp = eqx.nn.MLP(embed, embed, hidden, depth=1, activation=jax.nn.gelu, key=mlp_key)

    def __call__(self, x):
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask=jnp.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))


class EquinoxTransformer(eqx.Module):
    embedding: eqx.nn.Embedding
    positions: jax.Array
    blocks: EquinoxBlock
    head: eqx.nn.Linear

    def __init__(self, vocabulary, context, embed, layers, key):
        embedding_key, positions_key, blocks_key, head_key = jax.random.split(key, 4)
        self.embedding = eqx.nn.Embedding(vocabulary, embed, key=embedding_key)
        self.positions = 0.02 * jax.random.normal(positions_key, (context, embed))
        self.blocks = eqx.filter_vmap(lambda key: EquinoxBlock(embed, 4 * embed, key))(
            jax.random.split(blocks_key, layers)
        )
        self.head = eqx.nn.Linear(embed, vocabulary, use_bias=False, key=head_key)

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens) + self.positions[: len(tokens)]
        layers, static = eqx.partition(self.blocks, eqx.is_array)
        x, _ = jax.lax.scan(lambda x, layer: (eqx.combine(layer, static)(x), None), x, layers)
        return jax.vmap(self.head)(x)


def equinox_transformer():
    build = functools.partial(EquinoxTransformer, vocabulary=11, context=8, embed=5, layers=3)
    model = eqx.filter_jit(build)(key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tokens = jax.random.randint(jax.random.key(1), (4, 7), 0, 11)

    def loss(params, tokens):
        model = eqx.combine(params, static)
        return cross_entropy(jax.vmap(model)(tokens[:, :-1]), tokens[:, 1:])

    return Case(
        loss,
        params,
        (tokens,),
        {
            "blocks/attention/query_proj/weight": (2,),
            "blocks/attention/key_proj/weight": (2,),
            "blocks/attention/value_proj/weight": (2,),
            "blocks/attention/output_proj/weight": (2,),
            "blocks/mlp/layers/0/weight": (2,),
            "blocks/mlp/layers/1/weight": (2,),
            "head/weight": (1,),
        },
        {"embedding/weight": "lookup", "head/weight": "output"},
    )


# Convolution, attention and recurrence, in Haiku.


def line_reader(images, is_training):
    """Reads images column by column."""
    x = hk.Conv2D(6, kernel_shape=(3, 5), stride=2)(images)
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training)
    x = jax.nn.relu(x)
    x = hk.Linear(10, name="embed")(hk.Flatten(preserve_dims=2)(x.swapaxes(1, 2)))
    attention = hk.MultiHeadAttention(
        num_heads=2, key_size=3, model_size=10, w_init=hk.initializers.VarianceScaling()
    )
    x = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x + attention(x, x, x))
    gru = hk.GRU(7)
    x, _ = hk.dynamic_unroll(gru, x, gru.initial_state(len(images)), time_major=False)
    return hk.Linear(9, name="head")(x)


def haiku_line_reader():
    model = hk.without_apply_rng(hk.transform_with_state(line_reader))
    images = jax.random.normal(jax.random.key(1), (4, 8, 12, 3))
    labels = jnp.arange(24).reshape(4, 6) % 9
    params, state = jax.jit(functools.partial(model.init, is_training=True))(jax.random.key(0), images)

    def loss(params, state, images, labels):
        logits, state = model.apply(params, state, images, is_training=True)
        return cross_entropy(logits, labels), state

    return Case(
        loss,
        params,
        (state, images, labels),
        {
            "conv2_d/w": (0, 1, 2),
            "embed/w": (0,),
            "multi_head_attention/query/w": (0,),
            "multi_head_attention/key/w": (0,),
            "multi_head_attention/value/w": (0,),
            "multi_head_attention/linear/w": (0,),
            "gru/w_i": (0,),
            "gru/w_h": (0,),
            "head/w": (0,),
        },
        {"conv2_d/w": "input", "head/w": "output"},
    )


MODELS = [
    resnet,
    vision_transformer,
    gpt,
    lstm_tagger,
    unet,
    mixture_of_experts,
    merged_lora,
    unmerged_lora,
    equinox_transformer,
    haiku_line_reader,
]


# Two of them, of nested dictionaries and of boxes, for `make test`; the others wait for `make test-slow`.
SOME_OF_THE_MODELS = [
    pytest.param(build, marks=() if build in (gpt, merged_lora) else pytest.mark.thorough) for build in MODELS
]


def by_path(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # Flax NNX keeps each parameter in a box, under the name "value".
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in leaves
    }
