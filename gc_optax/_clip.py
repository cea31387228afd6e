"""Adaptive gradient clipping in optax's protocol."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._arithmetic import clip_norms
from ._axes import Axes, Path, PyTree, WeightAxes, is_absent, is_array_like, is_float_array, is_inexact
from ._mesh import PartitionSpecs, check, settle_shards
from ._resolve import Settler, match
from ._text import Wording, at, describe, place

_CLIPPING = Wording("adaptive_grad_clip(clipping, {})", "norm", "it is clipped as one")


def adaptive_grad_clip(
    clipping: jax.typing.ArrayLike,
    axes: Axes = None,
    *,
    eps: jax.typing.ArrayLike = 1e-3,
    partition_specs: PartitionSpecs = None,
) -> optax.GradientTransformation:
    r"""Clips the gradient of every weight vector to a part of the norm of its weights.

    For a weight vector \(w\) with the gradient \(g = \nabla_w L\), the clipping \(\lambda\) and

    $$
    m = \lambda \max(\lVert w \rVert, \epsilon), \qquad
    g \leftarrow
    \begin{cases}
    g & \text{if } \lVert g \rVert < m \\
    g \, m \, / \max(\lVert g \rVert, 10^{-6}) & \text{otherwise}
    \end{cases}
    $$

    Both norms go over the vector's inputs. Every index along another axis has a weight vector of its own, so
    a large gradient in one layer of a stack, or in one expert, scales no other one. A leaf without weight
    vectors is one vector, all of it: a bias, a scale, a lookup table, a kernel whose fan-in is 1, what `axes`
    leaves alone. Where its axes have a `fan_out`, though, only these are one vector, as in a stack of kernels
    whose fan-in is 1. A stack of biases, of shape (layers, features), has none, and is one vector as a whole;
    `WeightAxes(fan_in=(), fan_out=(1,))` in its place keeps its layers apart.

    `optax.adaptive_grad_clip` reads the axes off the rank. Where it reads them right, as on `Dense` and
    `Conv` of Flax that are not stacked, the results are the same to the last bit in float32 and float64.
    Below float32, norms and products are in float32 here, and the product is rounded once: in float16, the
    squares of optax are out of range from 256 on.

    Integer, bool, `float0` and empty leaves, `None` and `optax.MaskedNode` pass through as they are. What is
    not finite stays in its own vector. The transformation has no state. Under `jit`, sharded gradients give
    what unsharded ones give; inside `shard_map` they do with `partition_specs`. Without them the norm there
    is that of the shard, and a warning names the gradients that may be a part of a larger one.

    Compiled together with an optimizer, it reads each gradient and each parameter once more than the
    optimizer does. No clipped copy is written, but for half precision on CPU.

    Args:
        clipping: the largest ratio of the norm of a gradient to that of its weights, a scalar. Brock et al.
            take 0.01 for large batches, and more for smaller ones. It may be traced, as in
            `optax.inject_hyperparams(adaptive_grad_clip, static_args="axes")(clipping=schedule, axes=axes)`.
        axes: which axes are the inputs of a weight vector, as for `centralize`, with the same default and the
            same warning. A mask is to be put around: Brock et al. do not clip the last layer, which is
            `optax.masked(adaptive_grad_clip(0.01, axes), jax.tree.map(lambda a: a.role != "output", axes))`
            with axes that have roles.
        eps: the least norm that weights count with, a scalar, so that weights that are zero can move.
        partition_specs: how the gradients and the parameters are split inside `jax.shard_map`, as for
            `centralize`. The sums of squares then go across the mesh axes that split the vectors, in one
            all-reduce. A bias may be a shard too.

    Returns:
        An `optax.GradientTransformation`. Its `init` returns `optax.EmptyState()`, and checks `axes` and
        `partition_specs` as that of `centralize` does. Its `update` needs `params`, and keeps shapes and
        dtypes (but that JAX takes NumPy's float64 as float32, unless `jax_enable_x64` is set).

    Raises:
        ValueError: if `clipping` or `eps` is negative or NaN; from `init` and `update`, as `centralize`; from
            `update`, if `params` is missing, or does not have an array of floats of the same shape for each
            gradient that is clipped. The message names the parameter.
        TypeError: if `clipping` or `eps` is no scalar; from `init` and `update`, as `centralize`.

    Examples:
        The first weight vector is 5 long and its gradient 10, which is clipped to 2.5; the second one is 2
        long and its gradient 1, which is no more than half of that:

        >>> import gc_optax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]])}
        >>> optimizer = optax.chain(gc_optax.adaptive_grad_clip(0.5), optax.sgd(1.0))
        >>> state = optimizer.init(params)
        >>> gradients = {"kernel": jnp.array([[6.0, 0.0], [8.0, 1.0]])}
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> print(updates["kernel"])
        [[-1.5 -0. ]
         [-2.  -1. ]]

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021,
        https://arxiv.org/abs/2102.06171
    """
    _require_not_negative("clipping", clipping)
    _require_not_negative("eps", eps)
    # A tree of our own: what a user writes into a dict later must not reach `init` alone, or some steps.
    axes = jax.tree.map(lambda leaf: leaf, axes)

    def init(params: optax.Params) -> optax.OptState:
        check(params, axes, None, partition_specs, _CLIPPING)
        return optax.EmptyState()

    settle_axes = Settler(axes, None)

    def settle_vectors(updates: PyTree) -> list[WeightAxes]:
        return list(map(_as_vectors, jax.tree.leaves(updates, is_leaf=is_absent), settle_axes(updates)))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                "adaptive_grad_clip needs the parameters beside their gradients: "
                "optimizer.update(gradients, state, params)"
            )
        settled = settle_shards(updates, partition_specs, settle_vectors, _CLIPPING)
        matched = match("params", params, updates, prefix=False, whose="the updates")
        clipped = [
            clip_norms(leaf, _weights(path, leaf, given), clipping, eps, vector, mesh_axes)
            if _has_entries(path, leaf)
            else leaf
            for (path, leaf, given), (vector, mesh_axes) in zip(matched, settled, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates, is_leaf=is_absent), clipped), state

    return optax.GradientTransformation(init, update)


def _require_not_negative(name: str, given: Any) -> None:
    """Raises an error where an argument is known and no number from 0 on."""
    is_real = isinstance(given, int | float) or (
        is_array_like(given) and jnp.issubdtype(given.dtype, jnp.number) and not jnp.iscomplexobj(given)
    )
    if not is_real or np.shape(given) != ():
        raise TypeError(f"{name} must be a number, got {describe(given)}")
    if not isinstance(given, jax.core.Tracer) and not float(given) >= 0:
        raise ValueError(f"{name} must be at least 0, got {float(given)}")


def _as_vectors(leaf: Any, weight: WeightAxes) -> WeightAxes:
    """The axes of one leaf of the updates, where it has no weight vectors those of a single one."""
    if weight.fan_in or not is_inexact(leaf) or 0 in leaf.shape:
        return weight
    # Where it has a fan-in of 1, these axes have one entry each, and make no difference.
    return WeightAxes(fan_in=weight.fan_out or tuple(range(len(leaf.shape))))


def _has_entries(path: Path, leaf: Any) -> bool:
    """Whether there is something to clip. To `jit` a number of Python is an array, so it must be one here."""
    if isinstance(leaf, float | complex) and not is_array_like(leaf):  # NumPy's are both
        raise TypeError(f"the gradient of {at(path)} must be an array, got {describe(leaf)}")
    return is_float_array(leaf) and leaf.size > 0


def _weights(path: Path, gradient: jax.Array, given: Any) -> jax.Array:
    """What the parameters have in the place of a gradient, or an error where that does not fit it."""
    if not (is_float_array(given) or isinstance(given, float)) or np.shape(given) != gradient.shape:
        raise ValueError(
            f"params must have an array of floats of the same shape as the gradient of "
            f"{place(path, gradient)}, got {describe(given)}"
        )
    return jnp.asarray(given)
