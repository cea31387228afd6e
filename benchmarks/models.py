"""The models that the benchmarks measure, in Flax Linen."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """A transformer block with pre-normalization: activations (batch, length, embed) to the same."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        """Attends, and applies the MLP."""
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h), None


class Decoder(nn.Module):
    """A language model as GPT-2: tokens (batch, length) to logits (batch, length, vocabulary)."""

    layers: int
    embed: int
    heads: int
    vocabulary: int
    scanned: bool = False
    longest: int = 1024

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Predicts the next token at each position."""
        embedding = nn.Embed(self.vocabulary, self.embed)
        positions = self.param("positions", nn.initializers.normal(0.02), (self.longest, self.embed))
        x = embedding(tokens) + positions[: tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        if self.scanned:
            blocks = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.layers,
            )
            x, _ = blocks(self.heads)(x, mask)
        else:
            for _ in range(self.layers):
                x, _ = Block(self.heads)(x, mask)
        return embedding.attend(nn.LayerNorm()(x))


class VisionTransformer(nn.Module):
    """A ViT: images (batch, height, width, 3) to logits (batch, classes)."""

    layers: int
    embed: int
    heads: int
    patch: int
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Classifies by what a token of its own has gathered from the patches."""
        x = nn.Conv(self.embed, (self.patch, self.patch), (self.patch, self.patch), "VALID")(images)
        x = x.reshape(x.shape[0], -1, self.embed)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.embed))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.embed)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.layers):
            x, _ = Block(self.heads)(x, None)
        return nn.Dense(self.classes)(nn.LayerNorm()(x)[:, 0])


class ResidualBlock(nn.Module):
    """Two or, with a bottleneck, three convolutions beside a shortcut: NHWC to NHWC."""

    features: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Adds what the convolutions make of `x` to it."""
        if self.bottleneck:
            layers = [(self.features, 1, 1), (self.features, 3, self.stride), (4 * self.features, 1, 1)]
        else:
            layers = [(self.features, 3, self.stride), (self.features, 3, 1)]
        y = x
        for index, (features, window, stride) in enumerate(layers):
            y = nn.Conv(features, (window, window), stride, use_bias=False)(nn.relu(y) if index else y)
            y = nn.BatchNorm(use_running_average=not train)(y)
        if x.shape != y.shape:
            x = nn.Conv(y.shape[-1], (1, 1), self.stride, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet: images (batch, height, width, 3) to logits (batch, classes)."""

    stages: Sequence[int]
    bottleneck: bool
    classes: int = 1000

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies; `train` normalizes by the batch and updates the collection `batch_stats`."""
        x = nn.Conv(64, (7, 7), 2, use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = ResidualBlock(64 * 2**stage, stride, self.bottleneck)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class LSTM(nn.Module):
    """A language model of stacked LSTMs: tokens (batch, length) to logits (batch, length, vocabulary)."""

    layers: int
    hidden: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Predicts the next token at each position."""
        x = nn.Embed(self.vocabulary, self.hidden)(tokens)
        for _ in range(self.layers):
            x = nn.RNN(nn.OptimizedLSTMCell(self.hidden))(x)
        return nn.Dense(self.vocabulary)(x)


def shapes(model: nn.Module, inputs: jax.ShapeDtypeStruct) -> Any:
    """The variables of a model as shapes, nothing computed."""
    return jax.eval_shape(model.init, jax.random.key(0), inputs)


def are_matrices(params: Any) -> Any:
    """The mask that many write, for weight decay or for centralization: what has more than one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
