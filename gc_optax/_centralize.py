"""Gradient centralization in optax's protocol."""

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, get_args

import jax
import optax

from ._arithmetic import subtract_mean
from ._axes import Axes, Mask, PyTree, WeightAxes, is_absent
from ._mesh import PartitionSpecs, check, settle_shards
from ._resolve import Settler, settle
from ._text import CENTRALIZING, describe

Where = Literal["gradients", "updates"]


class Transformation(Protocol):
    """What an `optax.GradientTransformation` is, for type checkers that do not read optax."""

    @property
    def init(self) -> Callable[[Any], Any]: ...
    @property
    def update(self) -> Callable[..., Any]: ...
    def __len__(self) -> int: ...  # it is a pair, which `optax.MultiSteps` is not


def centralize(
    axes: Axes = None, *, mask: Mask = None, partition_specs: PartitionSpecs = None
) -> optax.GradientTransformation:
    r"""Subtracts from the gradient of every weight vector its mean over the vector's inputs.

    For a weight vector \(w\) with \(n\) inputs and the gradient \(g = \nabla_w L\),

    $$
    g \leftarrow g - \frac 1 n \sum_{i=1}^{n} g_i \mathbf 1
    $$

    This is a projection: what is left of \(g\) sums to zero, so that a step of plain SGD keeps the
    sum of every weight vector where it is. The transformation is linear and has no state.

    Integer, bool, `float0` and empty leaves, leaves with a fan-in below 2, `None` and
    `optax.MaskedNode` pass through as they are. Below float32, the mean is taken and subtracted in
    float32 (of the mean, 22 bits count) and the difference rounded once. Under `jit`, sharded gradients
    give what unsharded ones give; inside `shard_map` they do with `partition_specs`. Without them the mean
    there is that of the shard, and a warning names the gradients that may be a part of a larger one.

    Compiled together with an optimizer, it reads each gradient once more than the optimizer does. The
    subtraction becomes a part of the optimizer's own loops: no centralized copy is written, but for
    half precision on CPU.

    Args:
        axes: which axes are the inputs of a weight vector. A tree with the structure of the
            parameters, of which a copy is kept, or a function from the parameters to such a tree. A leaf
            is a `WeightAxes`, an int, a tuple of ints, an `optax.contrib.MuonDimensionNumbers` (whose
            `reduction_axis` counts), or `None` for "leave this one alone"; negative axes count from the
            end. By default the convention `out_last`, with one warning from `init` that names the kernels
            that it cannot settle: those of rank 3 and more, but for attention layers whose kernels
            fit together, and for what is certain to be a convolution. `out_last` has the rule, and
            `axes=out_last` takes the convention silently.
        mask: optax's mask: a tree of bools with the structure of the parameters or of a prefix of
            it, or a function from the parameters to such a tree. A leaf is centralized where it is
            true. By default it is true everywhere.
        partition_specs: for gradients inside `jax.shard_map`, where each is one shard: how they are
            split. A tree of `jax.sharding.PartitionSpec` with the structure of the parameters or of a
            prefix of it, as in the `in_specs` of `shard_map`, or a function from the parameters to such a
            tree. The mean of a weight vector is then taken across the mesh axes that split its inputs, in
            one all-reduce of the means. `axes` and `mask` are about the whole parameters, but a function
            for `partition_specs` gets the shards: it may go by names or by boxes, as
            `nn.get_partition_spec` of Flax does, and what goes by size must be called outside. Under
            `jit` there is nothing to say, and `update` does not take it.

    Returns:
        An `optax.GradientTransformation`. Its `init` returns `optax.EmptyState()`, and checks `axes`,
        `mask` and `partition_specs` against the parameters, but for the names of mesh axes, which are known
        inside `shard_map` only. Its `update` works with and without `params`, and keeps shapes and dtypes
        (but that JAX takes NumPy's float64 as float32, unless `jax_enable_x64` is set).

    Raises:
        ValueError: from `init` and `update`, if `axes` or `mask` does not have the structure of the
            parameters, if an axis is repeated or out of range, or if axes that were read from a parameter of
            one rank are given for one of another. The message names the parameter.
            Likewise, if a spec of `partition_specs` has more entries than the parameter has axes, leaves
            one unconstrained, names a mesh axis twice, or names one that is not manual there. From
            `update`, if `partition_specs` is given and no mesh axis is manual.
        TypeError: likewise, if a leaf of `axes`, `mask` or `partition_specs` is of none of the types above.

    Examples:
        >>> import gc_optax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones((2,))}
        >>> optimizer = optax.chain(gc_optax.centralize(), optax.sgd(0.1))
        >>> state = optimizer.init(params)
        >>> gradients = {"kernel": jnp.array([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]), "bias": jnp.ones((2,))}
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> print(updates["kernel"])
        [[ 0.2  0.1]
         [ 0.1  0.1]
         [-0.3 -0.2]]
        >>> print(updates["bias"])
        [-0.1 -0.1]

    References:
        Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
        ECCV 2020, https://arxiv.org/abs/2004.01461
    """
    # Trees of our own: what a user writes into a dict later must not reach `init` alone, or some steps.
    axes, mask = jax.tree.map(lambda leaf: leaf, (axes, mask))

    def init(params: optax.Params) -> optax.OptState:
        check(params, axes, mask, partition_specs, CENTRALIZING)
        return optax.EmptyState()

    settle_updates = Settler(axes, mask)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        return _project(updates, partition_specs, settle_updates), state

    return optax.GradientTransformation(init, update)


def centralize_gradients(
    gradients: PyTree, axes: Axes = None, *, mask: Mask = None, partition_specs: PartitionSpecs = None
) -> PyTree:
    """`centralize` as a pure function of the gradients, for a training loop without optax.

    Args:
        gradients: a tree of arrays.
        axes: as for `centralize`; the tree of axes has the structure of `gradients`.
        mask: as for `centralize`.
        partition_specs: as for `centralize`.

    Returns:
        The centralized gradients, with the same structure, shapes and dtypes.

    Raises:
        ValueError: as `centralize`.
        TypeError: as `centralize`.

    Examples:
        >>> import gc_optax
        >>> import jax.numpy as jnp
        >>> print(gc_optax.centralize_gradients(jnp.array([[1.0, 0.0], [3.0, 4.0]]), axes=0))
        [[-1. -2.]
         [ 1.  2.]]

    References:
        Yong et al., ECCV 2020, https://arxiv.org/abs/2004.01461
    """
    return _project(gradients, partition_specs, functools.partial(settle, axes=axes, mask=mask))


def centralized(
    optimizer: Transformation,
    centralization: Transformation | None = None,
    *,
    where: Where = "gradients",
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with gradient centralization built in, and with the state it has without.

    `optax.chain(centralize(), optimizer)` adds a slot to the optimizer's state. Here the state is
    that of `optimizer`, so a checkpoint written without centralization loads with it, and back.

    Args:
        optimizer: any optax optimizer. Extra arguments of `update` are passed on to it.
        centralization: what centralizes, `centralize()` by default. It must be without state, as
            `centralize(...)` with any axes and mask is.
        where: `"gradients"` centralizes what goes into the optimizer (`gc_loc=True` in the authors'
            code): its moments then see centralized gradients. `"updates"` centralizes what comes out
            of it (`gc_loc=False`, which the authors advise for adaptive methods): the sum of every
            weight vector then stays where it is, whatever the optimizer does, its weight decay
            included.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ValueError: if `where` is neither of the two; from `init`, if `centralization` has a state.
        TypeError: if `optimizer` or `centralization` is no `optax.GradientTransformation`.

    Examples:
        >>> import gc_optax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones((2,))}
        >>> optimizer = gc_optax.centralized(optax.adamw(1e-3), where="updates")
        >>> state = optimizer.init(params)
        >>> gradients = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones((2,))}
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> print(jnp.allclose(updates["kernel"].sum(axis=0), 0.0, atol=1e-8))
        True

    References:
        Yong et al., ECCV 2020, https://arxiv.org/abs/2004.01461; `gc_loc` in the authors' code,
        https://github.com/Yonghongwei/Gradient-Centralization
    """
    if not isinstance(where, str) or where not in get_args(Where):
        raise ValueError(f'where must be "gradients" or "updates", got {describe(where)}')
    if centralization is None:
        centralization = centralize()
    inner = _with_extra_args("optimizer", optimizer)
    projection = _with_extra_args("centralization", centralization)

    def init(params: optax.Params) -> optax.OptState:
        state = projection.init(params)
        if not isinstance(state, optax.EmptyState):
            raise ValueError(
                "centralization must be without state, so that the state of the optimizer stays as it is; "
                f"its init gave {describe(state)}. To mask, use centralize(mask=...); and the optimizer "
                "comes first: centralized(optimizer, centralize(...))"
            )
        return inner.init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        if where == "gradients":
            updates, _ = projection.update(updates, optax.EmptyState(), params, **extra_args)
            return inner.update(updates, state, params, **extra_args)
        updates, state = inner.update(updates, state, params, **extra_args)
        updates, _ = projection.update(updates, optax.EmptyState(), params, **extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def _project(
    updates: PyTree, partition_specs: PartitionSpecs, settle_whole: Callable[[PyTree], list[WeightAxes]]
) -> PyTree:
    """`updates` with the mean of every weight vector subtracted."""
    settled = settle_shards(updates, partition_specs, settle_whole, CENTRALIZING)
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_absent)
    projected = [
        subtract_mean(leaf, fan_in, mesh_axes) if fan_in else leaf
        for leaf, (fan_in, mesh_axes) in zip(leaves, settled, strict=True)
    ]
    return jax.tree.unflatten(structure, projected)


def _with_extra_args(role: str, given: Any) -> optax.GradientTransformationExtraArgs:
    """`given` as a transformation whose `update` takes extra arguments; `role` is its name in an error."""
    if not isinstance(given, optax.GradientTransformation):
        raise TypeError(
            f"{role} must be an optax.GradientTransformation, got {describe(given)}. "
            "Axes go into one: centralization=gc_optax.centralize(axes)"
        )
    return optax.with_extra_args_support(given)
