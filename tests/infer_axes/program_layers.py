"""The layers of a generated program, and where it starts.

Every layer takes an array of shape (batch, tokens, channels) and returns one. It is told the numbers of
tokens and of channels, and returns the function that applies it and those numbers after it, or None where it
has no place. No layer counts on the size of the batch, which is one under `vmap`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from program_parts import LAYERS, STARTS, Builder, Kernel, part

Layer = tuple[Any, int, int] | None

# Starts.


@part(STARTS, "floats", entrywise=True)
def floats(b: Builder) -> Layer:
    tokens, channels = b.random.choice([3, 4, 6]), b.size()
    name = b.batch_of(tokens, channels)
    return lambda v: v[name], tokens, channels


@part(STARTS, "images")
def images(b: Builder) -> Layer:
    channels = b.random.choice([2, 3])
    name = b.batch_of(2, 3, channels)
    return lambda v: v[name].reshape(-1, 6, channels), 6, channels


@part(STARTS, "tokens in a table")
def lookup(b: Builder) -> Layer:
    tokens, channels = b.random.choice([3, 4, 6]), b.size()
    name, table = b.batch_of(tokens, dtype=jnp.int32), b.alone(11, channels)
    b.needs_arguments = True
    b.table = (table, channels)
    if b.chance(0.3):
        return lambda v: jax.nn.one_hot(v[name], 11) @ v[table], tokens, channels
    return lambda v: v[table][v[name]], tokens, channels


# Dense layers.


@part(LAYERS, "dense", entrywise=True)
def dense(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.matrix(channels, size)
    return lambda v, h: h @ w(v), tokens, size


@part(LAYERS, "dense with a bias")
def dense_with_bias(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w, bias = b.matrix(channels, size), b.alone(size)
    return lambda v, h: jax.nn.relu(h @ w(v) + v[bias]), tokens, size


@part(LAYERS, "dense, outputs first", entrywise=True)
def dense_outputs_first(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.kernel((size, channels), "oi")
    return lambda v, h: lax.dot_general(h, w(v), (((2,), (1,)), ((), ()))), tokens, size


@part(LAYERS, "weight on the left", entrywise=True)
def weight_on_the_left(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.kernel((size, tokens), "oi")
    return lambda v, h: w(v) @ h, size, channels


@part(LAYERS, "dense in bfloat16")
def low_precision(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.matrix(channels, size)

    def apply(v, h):
        return (h.astype(jnp.bfloat16) @ w(v).astype(jnp.bfloat16)).astype(jnp.float32)

    return apply, tokens, size


@part(LAYERS, "einsum", entrywise=True)
def einsum(b: Builder, tokens: int, channels: int) -> Layer:
    """Any of tokens and channels are contracted, shared or not the weight's, in a random order."""
    extent, letters = {"t": tokens, "c": channels}, "tc"
    if channels in (4, 6):
        extent, letters = {"t": tokens, "c": 2, "d": channels // 2}, "tcd"
    roles = {letter: b.random.choice("iib-") for letter in letters}
    roles[b.random.choice(letters)] = "i"
    for letter in "xy"[: b.random.choice([1, 1, 2])]:
        extent[letter], roles[letter] = b.random.choice([2, 3, 4]), "o"
    order = [letter for letter, role in roles.items() if role != "-"]
    b.random.shuffle(order)
    w = b.kernel(tuple(extent[n] for n in order), "".join(roles[n] for n in order))
    kept = [letter for letter, role in roles.items() if role != "i"]
    b.random.shuffle(kept)
    data, weight = "a" + letters, "".join(order)
    first = b.chance(0.5)
    spelling = f"{weight},{data}->a{''.join(kept)}" if first else f"{data},{weight}->a{''.join(kept)}"
    shape = tuple(extent[letter] for letter in letters)

    def apply(v, h):
        h = h.reshape(-1, *shape)
        y = jnp.einsum(spelling, *((w(v), h) if first else (h, w(v))))
        return y.reshape(len(y), -1, y.shape[-1])

    size = extent[kept[-1]]
    return apply, math.prod(extent[n] for n in kept) // size, size


@part(LAYERS, "product, then sum", entrywise=True)
def product_then_sum(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.matrix(channels, size)
    return lambda v, h: (h[..., None] * w(v)).sum(-2), tokens, size


@part(LAYERS, "state times weight, then sum", entrywise=True)
def state_times_weight(b: Builder, tokens: int, channels: int) -> Layer:
    w = b.kernel((tokens, channels), "is")
    return lambda v, h: jnp.sum(h * w(v), 1, keepdims=True), 1, channels


@part(LAYERS, "patches times weight, then sum", entrywise=True)
def patches_times_weight(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.kernel((tokens, channels, size), "iio")
    return lambda v, h: (h[..., None] * w(v)).sum((1, 2))[:, None], 1, size


@part(LAYERS, "rolled taps", entrywise=True)
def rolled_taps(b: Builder, tokens: int, channels: int) -> Layer:
    taps = b.random.choice([2, 3])
    if tokens < 3:
        return None
    w = b.kernel((taps, channels), "is")

    def apply(v, h):
        kernel = w(v)
        return sum(jnp.roll(h, k, 1) * kernel[k] for k in range(taps))

    return apply, tokens, channels


@part(LAYERS, "a matrix for each tap")
def matrix_for_each_tap(b: Builder, tokens: int, channels: int) -> Layer:
    """What one operation sums is fan-in: the sum over the taps is not."""
    size = b.size()
    w = b.kernel((tokens, channels, size), "bio")

    def apply(v, h):
        kernel = w(v)
        return sum(h[:, k] @ kernel[k] for k in range(tokens))[:, None]

    return apply, 1, size


@part(LAYERS, "gated MLP")
def gated(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    gate, up, down = b.matrix(channels, size), b.matrix(channels, size), b.matrix(size, channels)
    return lambda v, h: h + (jax.nn.silu(h @ gate(v)) * (h @ up(v))) @ down(v), tokens, channels


@part(LAYERS, "GLU of one kernel")
def glu(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.matrix(channels, 2 * size)
    return lambda v, h: jax.nn.glu(h @ w(v)), tokens, size


@part(LAYERS, "kernel split into two")
def split_kernel(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.matrix(channels, 2 * size)

    def apply(v, h):
        left, right = jnp.split(w(v), 2, 1)
        return jnp.tanh(h @ left) * (h @ right)

    return apply, tokens, size


@part(LAYERS, "kernels joined")
def joined_kernels(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    left, right = b.matrix(channels, size), b.matrix(channels, size)
    return lambda v, h: h @ jnp.concatenate([left(v), right(v)], 1), tokens, 2 * size


@part(LAYERS, "kernels joined and taken apart")
def joined_and_split(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    left, right = b.matrix(channels, size), b.matrix(channels, size)
    axis = b.random.choice([0, 1])

    def apply(v, h):
        first, second = jnp.split(jnp.concatenate([left(v), right(v)], axis), 2, axis)
        return jnp.tanh(h @ first) * (h @ second)

    return apply, tokens, size


@part(LAYERS, "outputs beside the inputs")
def dense_net(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.matrix(channels, size)
    return lambda v, h: jnp.concatenate([h, jnp.tanh(h @ w(v))], -1), tokens, channels + size


@part(LAYERS, "halves of the inputs", entrywise=True)
def halves(b: Builder, tokens: int, channels: int) -> Layer:
    """Each half of the rows has outputs of its own: no axes can say the fan-in."""
    if channels % 2:
        return None
    size, half = b.size(), channels // 2
    name = b.parameter(Kernel((channels, size), "io", has_axes=False))

    def apply(v, h):
        w = v[name]
        return jnp.concatenate([h[..., :half] @ w[:half], h[..., half:] @ w[half:]], -1)

    return apply, tokens, 2 * size


@part(LAYERS, "low rank")
def low_rank(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    down, up = b.matrix(channels, 2), b.matrix(2, size)
    return lambda v, h: h @ down(v) @ up(v), tokens, size


@part(LAYERS, "low rank beside an argument")
def lora(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    base, down, up = b.floats(channels, size), b.matrix(channels, 2), b.matrix(2, size)
    return lambda v, h: h @ v[base] + h @ down(v) @ up(v), tokens, size


@part(LAYERS, "low rank added to an argument")
def merged_lora(b: Builder, tokens: int, channels: int) -> Layer:
    """Without preparations: what a mask does to a factor, data would do to a table."""
    size = b.size()
    base, down, up = b.floats(channels, size), b.kernel((channels, 2), "io", 0), b.kernel((2, size), "io", 0)
    return lambda v, h: h @ (v[base] + 0.5 * down(v) @ up(v)), tokens, size


@part(LAYERS, "low rank added to a frozen parameter")
def frozen_lora(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    base, down, up = b.alone(channels, size), b.kernel((channels, 2), "io", 0), b.kernel((2, size), "io", 0)
    b.has_frozen = True

    def apply(v, h):
        return h @ (lax.stop_gradient(v[base]) + 0.5 * down(v) @ up(v))

    return apply, tokens, size


@part(LAYERS, "complex", entrywise=True)
def complex_dense(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    real, imaginary = b.matrix(channels, size), b.matrix(channels, size)

    def apply(v, h):
        w = real(v) + 1j * imaginary(v)
        y = (h + 0.5j * h) @ w
        return jnp.concatenate([y.real, y.imag], -1)

    return apply, tokens, 2 * size


@part(LAYERS, "used twice the same way")
def used_twice(b: Builder, tokens: int, channels: int) -> Layer:
    w = b.matrix(channels, channels)

    def apply(v, h):
        kernel = w(v)
        return jnp.tanh(h @ kernel) @ kernel

    return apply, tokens, channels


@part(LAYERS, "used both ways")
def used_both_ways(b: Builder, tokens: int, channels: int) -> Layer:
    """A tied autoencoder: the two uses have different fan-ins."""
    size = b.size()
    if min(channels, size) < 2:
        return None
    name = b.alone(channels, size)
    return lambda v, h: jnp.tanh(h @ v[name]) @ v[name].T, tokens, channels


# Convolutions.


def image_of(h: Any, rows: int) -> Any:
    return h.reshape(len(h), rows, -1, h.shape[-1])


def rows_of(tokens: int) -> int:
    return 2 if tokens in (4, 6) else 1


@part(LAYERS, "conv 1-d", entrywise=True)
def conv_1d(b: Builder, tokens: int, channels: int) -> Layer:
    size, width, dilation = b.size(), b.random.choice([1, 2, 3]), b.random.choice([1, 1, 2])
    letters = list("WIO")
    b.random.shuffle(letters)
    extent = {"W": width, "I": channels, "O": size}
    w = b.kernel(tuple(extent[n] for n in letters), "".join("o" if n == "O" else "i" for n in letters))
    numbers = ("NWC", "".join(letters), "NWC")

    def apply(v, h):
        return lax.conv_general_dilated(
            h, w(v), (1,), "SAME", rhs_dilation=(dilation,), dimension_numbers=numbers
        )

    return apply, tokens, size


@part(LAYERS, "conv 2-d", entrywise=True)
def conv_2d(b: Builder, tokens: int, channels: int) -> Layer:
    size, height, width = b.size(), b.random.choice([1, 2]), b.random.choice([2, 3])
    if rows_of(tokens) == 1:
        return None
    w = b.kernel((height, width, channels, size), "iiio")
    rows = rows_of(tokens)

    def apply(v, h):
        y = lax.conv_general_dilated(
            image_of(h, rows), w(v), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y.reshape(len(h), tokens, size)

    return apply, tokens, size


@part(LAYERS, "conv 2-d, channels first", entrywise=True)
def conv_channels_first(b: Builder, tokens: int, channels: int) -> Layer:
    size, width = b.size(), b.random.choice([2, 3])
    if rows_of(tokens) == 1:
        return None
    w = b.kernel((size, channels, 2, width), "oiii")
    rows = rows_of(tokens)

    def apply(v, h):
        image = jnp.moveaxis(image_of(h, rows), -1, 1)
        y = lax.conv(image, w(v), (1, 1), "SAME")
        return jnp.moveaxis(y, 1, -1).reshape(len(h), tokens, size)

    return apply, tokens, size


@part(LAYERS, "conv of patches", entrywise=True)
def conv_of_patches(b: Builder, tokens: int, channels: int) -> Layer:
    if tokens % 2:
        return None
    size = b.size()
    w = b.kernel((2, channels, size), "iio")

    def apply(v, h):
        return lax.conv_general_dilated(h, w(v), (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    return apply, tokens // 2, size


@part(LAYERS, "grouped conv", entrywise=True)
def grouped_conv(b: Builder, tokens: int, channels: int) -> Layer:
    if channels % 2:
        return None
    groups = b.random.choice([2, channels])
    size = groups * b.random.choice([1, 2])
    w = b.kernel((b.random.choice([2, 3]), channels // groups, size), "iio")

    def apply(v, h):
        return lax.conv_general_dilated(
            h, w(v), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
        )

    return apply, tokens, size


@part(LAYERS, "depthwise conv", entrywise=True)
def depthwise_conv(b: Builder, tokens: int, channels: int) -> Layer:
    w = b.kernel((b.random.choice([2, 3]), 1, channels), "iio")

    def apply(v, h):
        return lax.conv_general_dilated(
            h, w(v), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=channels
        )

    return apply, tokens, channels


@part(LAYERS, "transposed conv")
def transposed_conv(b: Builder, tokens: int, channels: int) -> Layer:
    size, width, transpose = b.size(), b.random.choice([2, 3]), b.chance(0.5)
    shape, roles = ((width, size, channels), "ioi") if transpose else ((width, channels, size), "iio")
    w = b.kernel(shape, roles)

    def apply(v, h):
        return lax.conv_transpose(
            h, w(v), (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel=transpose
        )

    return apply, 2 * tokens, size


@part(LAYERS, "conv by FFT")
def conv_by_fft(b: Builder, tokens: int, channels: int) -> Layer:
    """A convolution as long as the sequence: every output sums over all taps of its channel."""
    if tokens < 2:
        return None
    w = b.kernel((tokens, channels), "is")

    def apply(v, h):
        product = jnp.fft.rfft(h, axis=1) * jnp.fft.rfft(w(v), axis=0)
        return jnp.fft.irfft(product, n=tokens, axis=1)

    return apply, tokens, channels


# Ensembles and experts.


@part(LAYERS, "ensemble of dense layers", entrywise=True)
def ensemble(b: Builder, tokens: int, channels: int) -> Layer:
    count, size = b.random.choice([2, 3]), b.size()
    axis = b.random.randrange(3)
    shape, roles = [channels, size], ["i", "o"]
    shape.insert(axis, count)
    roles.insert(axis, "b")
    w = b.kernel(tuple(shape), "".join(roles))

    def apply(v, h):
        y = jax.vmap(lambda u: h @ u, in_axes=axis)(w(v))
        return jnp.moveaxis(y, 0, 2).reshape(len(h), tokens, count * size)

    return apply, tokens, count * size


@part(LAYERS, "ensemble of convs", entrywise=True)
def ensemble_of_convs(b: Builder, tokens: int, channels: int) -> Layer:
    count, size = b.random.choice([2, 3]), b.random.choice([2, 3])
    w = b.kernel((count, 2, channels, size), "biio")

    def conv(u, h):
        return lax.conv_general_dilated(h, u, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def apply(v, h):
        y = jax.vmap(conv, (0, None))(w(v), h)
        return jnp.moveaxis(y, 0, 2).reshape(len(h), tokens, count * size)

    return apply, tokens, count * size


@part(LAYERS, "a matrix for each token", entrywise=True)
def locally_connected(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w = b.kernel((tokens, channels, size), "bio")
    if b.chance(0.5):
        return lambda v, h: jnp.einsum("btc,tco->bto", h, w(v)), tokens, size
    return lambda v, h: jax.vmap(jnp.matmul, (1, 0), 1)(h, w(v)), tokens, size


@part(LAYERS, "experts picked by index")
def picked_experts(b: Builder, tokens: int, channels: int) -> Layer:
    count, size = b.random.choice([2, 3]), b.size()
    index = b.batch_of(dtype=jnp.int32)
    w = b.kernel((count, channels, size), "bio")
    b.needs_arguments = True
    return lambda v, h: jnp.einsum("btc,bco->bto", h, w(v)[v[index]]), tokens, size


@part(LAYERS, "an expert picked by index")
def picked_expert(b: Builder, tokens: int, channels: int) -> Layer:
    count, size = b.random.choice([2, 3]), b.size()
    index = b.integers()
    w = b.kernel((count, channels, size), "bio")
    return lambda v, h: h @ w(v)[v[index]], tokens, size


@part(LAYERS, "experts, one-hot routing")
def one_hot_experts(b: Builder, tokens: int, channels: int) -> Layer:
    count, size = b.random.choice([2, 3]), b.size()
    index = b.batch_of(tokens, dtype=jnp.int32)
    w = b.kernel((count, channels, size), "bio")
    b.needs_arguments = True

    def apply(v, h):
        dispatch = jax.nn.one_hot(v[index], count)
        sent = jnp.einsum("bte,btc->betc", dispatch, h)
        return jnp.einsum("bte,beto->bto", dispatch, jnp.einsum("betc,eco->beto", sent, w(v)))

    return apply, tokens, size


@part(LAYERS, "experts, gated")
def gated_experts(b: Builder, tokens: int, channels: int) -> Layer:
    count, size = b.random.choice([2, 3]), b.size()
    router, w = b.matrix(channels, count), b.kernel((count, channels, size), "bio")

    def apply(v, h):
        gates = jax.nn.softmax(h @ router(v))
        return jnp.einsum("bte,bteo->bto", gates, jnp.einsum("btc,eco->bteo", h, w(v)))

    return apply, tokens, size


@part(LAYERS, "ragged experts")
def ragged_experts(b: Builder, tokens: int, channels: int) -> Layer:
    count, size = b.random.choice([2, 3]), b.size()
    sizes = b.integers(count)
    w = b.kernel((count, channels, size), "bio")
    b.can_be_vmapped = False

    def apply(v, h):
        y = lax.ragged_dot(h.reshape(-1, channels), w(v), v[sizes])
        return y.reshape(len(h), tokens, size)

    return apply, tokens, size


# Attention.


def attend(q: Any, k: Any, value: Any) -> Any:
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


@part(LAYERS, "attention with heads")
def attention(b: Builder, tokens: int, channels: int) -> Layer:
    heads, depth = 2, b.random.choice([2, 3])
    q, k, u = (b.kernel((channels, heads, depth), "ioo") for _ in range(3))
    out = b.kernel((heads, depth, channels), "iio")

    def apply(v, h):
        y = attend(*(jnp.einsum("btc,chd->bthd", h, w(v)) for w in (q, k, u)))
        return h + jnp.einsum("bthd,hdc->btc", y, out(v))

    return apply, tokens, channels


@part(LAYERS, "attention, fused and split after")
def fused_attention(b: Builder, tokens: int, channels: int) -> Layer:
    heads, depth = 2, b.random.choice([2, 3])
    w, out = b.matrix(channels, 3 * heads * depth), b.matrix(heads * depth, channels)

    def apply(v, h):
        parts = jnp.split(h @ w(v), 3, -1)
        y = attend(*(part.reshape(len(h), tokens, heads, depth) for part in parts))
        return h + y.reshape(len(h), tokens, -1) @ out(v)

    return apply, tokens, channels


@part(LAYERS, "attention, fused and split before")
def split_attention(b: Builder, tokens: int, channels: int) -> Layer:
    heads, depth = 2, b.random.choice([2, 3])
    w, out = b.kernel((channels, 3, heads, depth), "iooo"), b.matrix(heads * depth, channels)

    def apply(v, h):
        kernel = w(v)
        y = attend(*(jnp.einsum("btc,chd->bthd", h, kernel[:, n]) for n in range(3)))
        return h + y.reshape(len(h), tokens, -1) @ out(v)

    return apply, tokens, channels


@part(LAYERS, "learned queries")
def learned_queries(b: Builder, tokens: int, channels: int) -> Layer:
    """The queries are summed with the keys over their channels."""
    count, depth = b.random.choice([2, 3]), b.random.choice([2, 3])
    key, value = b.matrix(channels, depth), b.matrix(channels, depth)
    queries = b.parameter(Kernel((count, depth), "oi"))

    def apply(v, h):
        scores = jnp.einsum("nd,btd->bnt", v[queries], h @ key(v))
        return jax.nn.softmax(scores) @ (h @ value(v))

    return apply, count, depth


# Recurrences and stacks of layers.


def rnn_step(v, w, u, bias):
    return lambda state, h: jnp.tanh(h @ w + state @ u + v[bias])


@part(LAYERS, "RNN")
def rnn(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w, u, bias = b.matrix(channels, size), b.matrix(size, size), b.alone(size)
    inside = b.chance(0.5)  # the kernels are made in every step, and not before

    def apply(v, h):
        made = None if inside else (w(v), u(v))

        def step(state, x):
            state = rnn_step(v, *(made or (w(v), u(v))), bias)(state, x)
            return state, state

        _, ys = lax.scan(step, jnp.zeros((len(h), size)), jnp.moveaxis(h, 1, 0))
        return jnp.moveaxis(ys, 0, 1)

    return apply, tokens, size


@part(LAYERS, "RNN, unrolled")
def unrolled_rnn(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w, u, bias, start = b.matrix(channels, size), b.matrix(size, size), b.alone(size), b.alone(size)
    if tokens < 2:
        return None

    def apply(v, h):
        state = jnp.broadcast_to(v[start], (len(h), size)) + h.sum((1, 2))[:, None]
        step = rnn_step(v, w(v), u(v), bias)
        for n in range(min(tokens, 3)):
            state = step(state, h[:, n])
        return state[:, None]

    return apply, 1, size


@part(LAYERS, "GRU")
def gru(b: Builder, tokens: int, channels: int) -> Layer:
    size = b.size()
    w, u = b.matrix(channels, 3 * size), b.matrix(size, 3 * size)

    def apply(v, h):
        kernel, recurrent = w(v), u(v)

        def step(state, x):
            reset, update, new = jnp.split(x @ kernel, 3, -1)
            by_reset, by_update, by_new = jnp.split(state @ recurrent, 3, -1)
            update = jax.nn.sigmoid(update + by_update)
            candidate = jnp.tanh(new + jax.nn.sigmoid(reset + by_reset) * by_new)
            state = update * state + (1 - update) * candidate
            return state, state

        _, ys = lax.scan(step, jnp.zeros((len(h), size)), jnp.moveaxis(h, 1, 0))
        return jnp.moveaxis(ys, 0, 1)

    return apply, tokens, size


@part(LAYERS, "layers scanned")
def scanned(b: Builder, tokens: int, channels: int) -> Layer:
    count = b.random.choice([2, 3])
    w, bias = b.kernel((count, channels, channels), "bio"), b.alone(count, channels)
    remat = jax.checkpoint if b.chance(0.3) else lambda step: step

    def apply(v, h):
        step = remat(lambda h, layer: (h + jnp.tanh(h @ layer[0] + layer[1]), None))
        return lax.scan(step, h, (w(v), v[bias]))[0]

    return apply, tokens, channels


@part(LAYERS, "layers in a fori_loop")
def looped(b: Builder, tokens: int, channels: int) -> Layer:
    count = b.random.choice([2, 3])
    w = b.kernel((count, channels, channels), "bio")

    def apply(v, h):
        kernel = w(v)
        return lax.fori_loop(0, count, lambda i, h: jnp.tanh(h @ kernel[i]), h)

    return apply, tokens, channels


@part(LAYERS, "layers unrolled")
def unrolled(b: Builder, tokens: int, channels: int) -> Layer:
    count, last = b.random.choice([2, 3]), b.chance(0.5)
    shape, roles = ((channels, channels, count), "iob") if last else ((count, channels, channels), "bio")
    w = b.kernel(shape, roles)

    def apply(v, h):
        kernel = w(v)
        for n in range(count):
            h = jnp.tanh(h @ (kernel[..., n] if last else kernel[n]))
        return h

    return apply, tokens, channels


# What is no weight.


@part(LAYERS, "tied embeddings")
def tied_embeddings(b: Builder, tokens: int, channels: int) -> Layer:
    """The table is a lookup and the weight of the outputs: it is left alone."""
    if b.table is None:
        return None
    table, size = b.table
    w = b.matrix(channels, size)
    return lambda v, h: (h @ w(v)) @ v[table].T, tokens, 11


@part(LAYERS, "bias of relative positions")
def relative_positions(b: Builder, tokens: int, channels: int) -> Layer:
    """A table that constant indices look up, and attention scores that it is added to."""
    query, table = b.matrix(channels, channels), b.alone(2 * tokens - 1)
    index = np.arange(tokens)[:, None] - np.arange(tokens) + tokens - 1

    def apply(v, h):
        scores = jnp.einsum("bqc,bkc->bqk", h @ query(v), h) + v[table][index]
        return jax.nn.softmax(scores) @ h

    return apply, tokens, channels


@part(LAYERS, "LayerNorm")
def layer_norm(b: Builder, tokens: int, channels: int) -> Layer:
    scale, bias = b.alone(channels), b.alone(channels)

    def apply(v, h):
        h = (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-6)
        return h * v[scale] + v[bias]

    return apply, tokens, channels


@part(LAYERS, "RMSNorm")
def rms_norm(b: Builder, tokens: int, channels: int) -> Layer:
    scale, first = b.alone(channels), b.chance(0.3)

    def apply(v, h):
        inverse = lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        return h * (inverse * v[scale]) if first else h * inverse * (1 + v[scale])

    return apply, tokens, channels


@part(LAYERS, "learned positions")
def positions(b: Builder, tokens: int, channels: int) -> Layer:
    table, more = b.alone(tokens + 2, channels), b.chance(0.5)
    if more:
        return lambda v, h: h + v[table][:tokens], tokens, channels
    return lambda v, h: h + v[table][jnp.arange(tokens)], tokens, channels


@part(LAYERS, "class token")
def class_token(b: Builder, tokens: int, channels: int) -> Layer:
    token = b.alone(1, channels)

    def apply(v, h):
        return jnp.concatenate([jnp.broadcast_to(v[token], (len(h), 1, channels)), h], 1)

    return apply, tokens + 1, channels


@part(LAYERS, "mask token")
def mask_token(b: Builder, tokens: int, channels: int) -> Layer:
    token = b.alone(channels)
    return lambda v, h: jnp.where(h[..., :1] > 0, h, v[token]), tokens, channels


@part(LAYERS, "gate")
def gate(b: Builder, tokens: int, channels: int) -> Layer:
    weight = b.alone(channels)
    return lambda v, h: jax.nn.sigmoid(v[weight]) * h, tokens, channels


@part(LAYERS, "dropout")
def dropout(b: Builder, tokens: int, channels: int) -> Layer:
    key = b.key()
    return lambda v, h: h * jax.random.bernoulli(v[key], 0.9, h.shape), tokens, channels


@part(LAYERS, "mean over the tokens")
def mean_over_tokens(b: Builder, tokens: int, channels: int) -> Layer:
    return lambda v, h: h.mean(1, keepdims=True), 1, channels
