"""Subtracting a mean: the only arithmetic there is."""

import functools

import jax
import jax.numpy as jnp


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
    # Below float32 the difference is rounded once, here, and neither the sum nor the mean is.
    return (wide - jnp.mean(wide, axes, keepdims=True)).astype(gradient.dtype)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
