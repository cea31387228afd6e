"""Subtracting a mean: the only arithmetic there is."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnames="axes", inline=True)
def subtract_mean(gradient: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    r"""Subtracts from every weight vector of a gradient its mean over the vector's inputs.

    With \(n\) the number of inputs and \(e = \mathbf 1 / \sqrt n\), every weight vector \(g\) of the
    gradient becomes

    $$
    g - \frac 1 n \sum_{i=1}^{n} g_i \mathbf 1 = (I - e e^\top) g
    $$

    which is the projection onto the vectors whose entries sum to zero. A reduction keeps weight
    vectors apart, so a NaN or an infinity stays in its own.

    Args:
        gradient: an array of any shape and of a real or complex floating-point dtype.
        axes: the fan-in axes, not negative.

    Returns:
        An array of the same shape and dtype.

    References:
        Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
        ECCV 2020, https://arxiv.org/abs/2004.01461, equations 1 and 3.
    """
    wide = gradient.astype(_accumulator(gradient.dtype))
    mean = lax.platform_dependent(
        wide, cpu=functools.partial(_mean_on_cpu, axes=axes), default=functools.partial(_mean, axes=axes)
    )
    # Below float32 the difference is rounded once, here, and neither the sum nor the mean is.
    difference: jax.Array = (wide - mean).astype(gradient.dtype)
    return difference


def _mean(wide: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    # Left to itself, XLA computes sum and difference in one piece where it has such a piece: on GPU (Triton, as
    # if for a softmax) where the inputs are the last axes. It ends in a centralized copy of the gradient, written
    # and read again. Kept apart, the difference fuses into the optimizer, which reads the gradient anyway.
    mean: jax.Array = lax.optimization_barrier(jnp.mean(wide, axes, keepdims=True))  # type: ignore[no-untyped-call]
    return mean


def _mean_on_cpu(wide: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    blocks = _blocks(wide.shape, axes)
    if blocks:
        # Threads take blocks. Of a sum in one level they take columns, and jump from row to row. A product with
        # ones is as fast as this, but adds one after the other: its error is up to a hundred times as large.
        partial = _apart(jnp.sum(wide.reshape(blocks), 2))
        total = jnp.sum(partial.reshape(blocks[0], -1, math.prod(wide.shape[axes[-1] + 1 :])), 1)
    else:
        total = jnp.sum(wide, axes)
    kept = [1 if axis in axes else size for axis, size in enumerate(wide.shape)]
    return _apart((total / math.prod(wide.shape[axis] for axis in axes)).reshape(kept))


def _apart(array: jax.Array) -> jax.Array:
    # On CPU it is YNNPACK that takes sum and difference in one piece, where there are some thousands of means;
    # and XLA drops barriers before it fuses. A rounding to more bits than there are changes no number and
    # becomes no instruction, but YNNPACK has no such operation. It has no complex numbers either.
    if jnp.iscomplexobj(array):
        return array
    return lax.reduce_precision(array, exponent_bits=11, mantissa_bits=53)


def _blocks(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """The shape (batch, blocks, rows, columns) of a large gradient whose rows are summed block by block.

    `None` where that does not help: a small gradient is in the cache, and inputs that are the last axes are
    one contiguous row. And where it cannot be: inputs that are not next to each other, or without divisors.
    """
    inputs = math.prod(shape[axis] for axis in axes)
    outputs = math.prod(shape[axes[-1] + 1 :])
    adjacent = axes == tuple(range(axes[0], axes[-1] + 1))
    # With more devices than one the gradient may be sharded, and a reshape would gather it.
    if math.prod(shape) < 2**22 or outputs == 1 or not adjacent or jax.device_count() > 1:
        return None
    # Short rows are laid side by side, as they are in memory.
    beside = _largest_divisor(inputs, 2048 // outputs)
    rows = _largest_divisor(inputs // beside, 256)
    if rows < 64:
        return None  # the sums of the blocks would be too many
    return math.prod(shape[: axes[0]]), inputs // (beside * rows), rows, beside * outputs


def _largest_divisor(number: int, limit: int) -> int:
    return next((divisor for divisor in range(limit, 1, -1) if number % divisor == 0), 1)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


@functools.partial(jax.jit, static_argnames="axes")
def removed_share(gradient: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    r"""The share of the squared norm of a gradient that `subtract_mean` takes away.

    With \(\bar g\) the mean of the weight vector \(g\) and \(n\) the number of its inputs, this is
    \(\sum n \lvert \bar g \rvert^2 / \sum \lVert g \rVert^2\), both sums over all weight vectors.

    Args:
        gradient: an array of any shape and of a real or complex floating-point dtype.
        axes: the fan-in axes, not negative.

    Returns:
        A float32 scalar in [0, 1], 0 for a gradient that is zero.
    """
    wide = gradient.astype(_accumulator(gradient.dtype))
    largest = jnp.max(jnp.abs(wide))
    # Squares of very large and of very small entries are out of range: the largest becomes 1.
    scaled = wide / jnp.where(largest == 0, 1, largest)
    vectors = jnp.mean(scaled, axes, keepdims=True)
    inputs = scaled.size // vectors.size
    share = inputs * jnp.sum(jnp.abs(vectors) ** 2) / jnp.maximum(jnp.sum(jnp.abs(scaled) ** 2), 1)
    return jnp.minimum(share, 1).astype(jnp.float32)


@jax.jit
def norm(gradient: jax.Array) -> jax.Array:
    """The Euclidean norm of an array of any size of entries, a real scalar in at least float32."""
    wide = gradient.astype(_accumulator(gradient.dtype))
    largest = jnp.max(jnp.abs(wide), initial=0)
    scaled = wide / jnp.where(largest == 0, 1, largest)
    return largest * jnp.sqrt(jnp.sum(jnp.abs(scaled) ** 2))
