"""Which parameters weight decay is for: the same axes, as a mask of optax."""

import functools
from collections.abc import Callable
from typing import Any, overload

import jax
import optax
from jax import tree_util as jtu

from ._axes import (
    Axes,
    AxesTree,
    Path,
    PyTree,
    WeightAxes,
    is_absent,
    is_array_like,
    is_axis,
    is_function,
    is_inexact,
)
from ._resolve import as_weight_axes, settle, unboxed
from ._text import at, describe


@overload
def decay_mask(
    axes: Callable[[PyTree], PyTree] | None, *, lookups: bool = ...
) -> Callable[[PyTree], PyTree]: ...
@overload
def decay_mask(axes: AxesTree, *, lookups: bool = ...) -> PyTree: ...
def decay_mask(axes: Axes, *, lookups: bool = False) -> PyTree:
    r"""The mask of weight decay: true for weights, false for biases, scales and all else.

    Decoupled weight decay (AdamW) takes from the parameter \(w\), besides the step of Adam,

    $$
    w \leftarrow w - \eta \lambda m w
    $$

    where \(\eta\) is the learning rate, \(\lambda\) the weight decay, and the mask \(m\) 1 or 0. Here it is 1
    where \(w\) is contracted with data (`WeightAxes.is_weight`), whatever the rank of the array that holds
    it. The usual mask, `leaf.ndim > 1`, decays the biases of an attention layer, of shape (heads, head_dim),
    and in a stack of layers every bias and every scale.

    The mask is for `mask` of `optax.adamw`, `optax.add_decayed_weights` and `optax.masked`, and for
    `weight_decay_mask` of `optax.contrib.muon` (whose `adam_weight_decay` takes no mask: it decays all that
    is left to Adam).

    A kernel with a fan-in of one is a weight too: `centralize` leaves it alone, and weight decay does not.
    What `infer_axes` could not read is not decayed, and `infer_axes` has warned of it; nor is what is a bias
    or a scale besides. `conv_only` leaves dense kernels alone, but weights they stay: they are decayed.

    Args:
        axes: what `centralize` takes: a tree of axes, a function from the parameters to such a tree, a
            convention, or `None` for the convention `out_last`. There is no warning of the kernels that
            `out_last` can only guess at: they are weights in every reading. In a tree of axes, `None`, `()`
            and a `WeightAxes` without fan-in and role are "no weight".
        lookups: whether tables that data index into, as embeddings are, are decayed too.

    Returns:
        The same kind of thing: a tree of bools for a tree, a function from the parameters to such a tree for
        a function and for `None`. Boxes are left out of a tree (a bool stands in place of the NNX variable or
        the `Partitioned` array), and optax takes that for boxed and for bare parameters: `nnx.Optimizer` has
        both. Without the parameters a tuple of ints may be the axes of one parameter or a tuple of
        parameters with one axis each. It gives one bool, which to optax is for all that is in its place.

    Raises:
        TypeError: if a leaf of `axes` is not one that `centralize` takes. The message names the place. For a
            function, it comes from the mask, which refuses a number too: `optax.inject_hyperparams` takes a
            function for a schedule, unless it is told `static_args="mask"`, and calls it with the step.
        ValueError: from the mask that is made of a function, as from `centralize`.

    Examples:
        The bias of an attention layer has two axes, and the scales of a stack of layers have:

        >>> import gc_optax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> def loss(params, tokens):
        ...     h = params["embed"][tokens] * params["scale"][0]
        ...     return jnp.sum(jnp.einsum("te,ehd->thd", h, params["query"]) + params["bias"])
        >>> params = {
        ...     "embed": jnp.ones((7, 4)),
        ...     "scale": jnp.ones((1, 4)),
        ...     "query": jnp.ones((4, 2, 3)),
        ...     "bias": jnp.zeros((2, 3)),
        ... }
        >>> axes = gc_optax.infer_axes(loss, params, jnp.arange(5))
        >>> mask = gc_optax.decay_mask(axes)
        >>> mask
        {'bias': False, 'embed': False, 'query': True, 'scale': False}
        >>> optimizer = optax.chain(gc_optax.centralize(axes), optax.adamw(1e-3, mask=mask))
        >>> state = optimizer.init(params)

        With a convention the mask is made of the parameters that optax has:

        >>> by_name = optax.adamw(1e-3, mask=gc_optax.decay_mask(gc_optax.out_last))
        >>> state = by_name.init(params)

        With `nnx.Optimizer`, the axes of `gc_optax.nnx.infer_axes` are given as they are:
        `optax.adamw(1e-3, mask=gc_optax.decay_mask(axes))`.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019,
        https://arxiv.org/abs/1711.05101
    """
    if axes is None or is_function(axes):
        return functools.partial(_mask_of_params, axes, lookups)
    is_decayed = functools.partial(_is_decayed_at, lookups)
    return jtu.tree_map_with_path(is_decayed, axes, is_leaf=_is_leaf_of_axes)


def _mask_of_params(axes: Axes, lookups: bool, params: PyTree) -> PyTree:
    """The mask in the structure of `params`, which the errors of `settle` name the leaves of."""
    if is_array_like(params) and params.shape == () and not is_inexact(params):
        raise TypeError(
            f"the mask of decay_mask needs the parameters, got {describe(params)}. optax.inject_hyperparams "
            'takes a function for a schedule, and calls it with the step: tell it static_args="mask"'
        )
    settled = settle(params, axes, None, silent=True)
    leaves, structure = jax.tree.flatten(params, is_leaf=is_absent)
    pairs = zip(leaves, settled, strict=True)
    mask = [leaf if is_absent(leaf) else _is_decayed(weight, lookups) for leaf, weight in pairs]
    return jax.tree.unflatten(structure, mask)


def _is_decayed_at(lookups: bool, path: Path, given: Any) -> bool:
    return _is_decayed(as_weight_axes(unboxed(given), at(path)), lookups)


def _is_decayed(axes: WeightAxes, lookups: bool) -> bool:
    return axes.is_weight or (lookups and axes.role == "lookup")


def _is_leaf_of_axes(node: Any) -> bool:
    """Whether a node of a tree of axes is what one parameter has, as it is or in a box."""
    held = unboxed(node)
    if held is None or isinstance(held, optax.contrib.MuonDimensionNumbers) or jtu.all_leaves([held]):
        return True
    return type(held) is tuple and all(map(is_axis, held))
