"""Subtracting means and scaling by norms: the only arithmetic there is."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.jit, static_argnames=("axes", "mesh_axes"))
def subtract_mean(gradient: jax.Array, axes: tuple[int, ...], mesh_axes: tuple[str, ...] = ()) -> jax.Array:
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
        mesh_axes: the axes of a mesh that split the fan-in axes, inside `shard_map`. All shards have the
            same size, so the mean is the mean of their means.

    Returns:
        An array of the same shape and dtype.

    References:
        Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
        ECCV 2020, https://arxiv.org/abs/2004.01461, equations 1 and 3.
    """
    wide = gradient.astype(_accumulator(gradient.dtype))
    mean = jnp.mean(wide, axes, keepdims=True)
    if mesh_axes:
        mean = lax.pmean(mean, mesh_axes)  # type: ignore[no-untyped-call]
    if gradient.dtype.itemsize < 4:
        # XLA divides by multiplying with a rounded 1 / n, and may do that and the difference in one
        # instruction: of ones over three inputs -3e-8 would be left. The mean of equal numbers in half
        # precision needs few bits: rounded to one bit less than float32 has, it is that number.
        mean = lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=22)
    mean = _apart(mean)
    # Below float32 the sum and the difference are in float32, and the result is rounded to its dtype here.
    return (wide - mean).astype(gradient.dtype)


def _apart(mean: jax.Array) -> jax.Array:
    # XLA likes to compute sum and difference in one piece: on CPU (YNNPACK) where there are thousands of
    # means, on GPU (Triton, as if for a softmax) where the inputs are the last axes. On CPU that piece writes
    # a centralized copy of the gradient, on GPU it breaks the optimizer's one loop into several. Kept apart
    # from the sum, the difference fuses into the optimizer, which reads the gradient anyway. (Below float32,
    # XLA copies on CPU all the same.)
    apart: jax.Array = lax.platform_dependent(mean, cpu=_apart_on_cpu, default=lax.optimization_barrier)
    return apart


def _apart_on_cpu(mean: jax.Array) -> jax.Array:
    # Here XLA drops barriers before it fuses. A rounding to more bits than there are changes no number and
    # becomes no instruction, but YNNPACK has no such operation. It has no complex numbers either.
    if jnp.iscomplexobj(mean):
        return mean
    return lax.reduce_precision(mean, exponent_bits=11, mantissa_bits=53)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def clip_norms(
    gradient: jax.Array,
    weights: jax.Array,
    clipping: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    axes: tuple[int, ...],
    mesh_axes: tuple[str, ...] = (),
) -> jax.Array:
    r"""Scales every vector of a gradient down to a part of the norm of its weights, where it is longer.

    With \(w\) the weights of a vector, \(g\) their gradient, and
    \(m = \lambda \max(\lVert w \rVert, \epsilon)\), \(g\) becomes

    $$
    g \min\left(1, \frac m {\lVert g \rVert}\right)
    $$

    Outside of `jit` this runs op by op, as `optax.adaptive_grad_clip` does: compiled in one piece, a sum of
    squares may be rounded otherwise.

    Args:
        gradient: an array of any shape and of a real or complex floating-point dtype.
        weights: an array of the same shape and of any such dtype.
        clipping: the scalar \(\lambda\).
        eps: the scalar \(\epsilon\).
        axes: the axes over which the norms go, not negative.
        mesh_axes: the axes of a mesh that split these axes, inside `shard_map`: the norms go across shards.

    Returns:
        An array of the shape and dtype of `gradient`.

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021,
        https://arxiv.org/abs/2102.06171, equation 3.
    """
    gradient = jnp.asarray(gradient)
    wide = gradient.astype(_accumulator(gradient.dtype))
    squares = _sum_of_squares(wide, axes), _sum_of_squares(weights.astype(_accumulator(weights.dtype)), axes)
    if mesh_axes:
        squares = lax.psum(squares, mesh_axes)  # type: ignore[no-untyped-call]
    # XLA divides by a norm that is broadcast by multiplying with its inverse, and else it does not. For the
    # bits of optax they are broadcast first, as there. The compiled program holds none of these arrays.
    norm, norm_of_weights, _ = jnp.broadcast_arrays(*map(jnp.sqrt, squares), wide)
    most = clipping * jnp.maximum(norm_of_weights, eps)
    # Nothing has to be kept apart: the product fuses into the optimizer.
    clipped = wide * (most / jnp.maximum(norm, 1e-6))
    return jnp.where(norm < most, wide, clipped).astype(gradient.dtype)


def _sum_of_squares(wide: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(jnp.real(wide * jnp.conj(wide)), axes, keepdims=True)


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
    scaled, _ = _scaled(wide)
    vectors = jnp.mean(scaled, axes, keepdims=True)
    inputs = scaled.size // vectors.size
    share = inputs * jnp.sum(jnp.abs(vectors) ** 2) / jnp.maximum(jnp.sum(jnp.abs(scaled) ** 2), 1)
    return jnp.minimum(share, 1).astype(jnp.float32)


@jax.jit
def norm(gradient: jax.Array) -> jax.Array:
    """The Euclidean norm of an array of any size of entries, a real scalar in at least float32."""
    wide = gradient.astype(_accumulator(gradient.dtype))
    scaled, largest = _scaled(wide)
    return largest * jnp.sqrt(jnp.sum(jnp.abs(scaled) ** 2))


def _scaled(wide: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An array over the largest of its absolute values, and that value.

    Squares of very large and of very small entries are out of range: here the largest becomes 1.
    """
    largest = jnp.max(jnp.abs(wide), initial=0)
    # XLA may multiply by the inverse, which from 8.5e37 on is below what float32 holds with all its bits.
    shrink = jnp.where(largest > 1, 0.125, 1).astype(largest.dtype)
    return (wide * shrink) / jnp.where(largest == 0, 1, largest * shrink), largest
