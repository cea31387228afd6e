"""Which mesh axes split a parameter, where a program is written for one shard of it.

Under `jit` an array is whole, however it is sharded, and XLA takes its mean across the shards. Inside
`jax.shard_map` an array is one shard, and of what, only the user's `PartitionSpec`s say.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax import tree_util as jtu
from jax.sharding import PartitionSpec

from ._axes import NOTHING_LEFT, Axes, Mask, Nodes, Path, PyTree, WeightAxes, is_absent, is_array_like
from ._resolve import match, require_arrays, resolve, settle
from ._text import Wording, describe, joined_lines, place, stacklevel_of_the_user

PartitionSpecs: TypeAlias = "PartitionSpec | tuple[PartitionSpecs, ...] | Nodes | Callable[[PyTree], PyTree]"

# For the leading dimensions of an array, the mesh axes that split each. Further dimensions are not split.
Split = tuple[tuple[str, ...], ...]


def check(params: PyTree, axes: Axes, mask: Mask, partition_specs: PartitionSpecs, wording: Wording) -> None:
    """Raises an error where `axes`, `mask` or `partition_specs` do not fit; warns where axes are a guess.

    optax.tree_map_params calls `init` with a placeholder that has no leaves: there is nothing to check.
    """
    if jax.tree.leaves(params):
        splits = _settle_splits(params, partition_specs)
        settle(_whole(params, splits), axes, mask, wording=wording)


def settle_shards(
    updates: PyTree,
    partition_specs: PartitionSpecs,
    settle_whole: Callable[[PyTree], list[WeightAxes]],
    wording: Wording,
) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """For each leaf of `updates` the fan-in axes, and the axes of a mesh that split these.

    Axes are about whole parameters, so `settle_whole` gets the shapes that the leaves have outside of
    `shard_map`. Without `partition_specs`, a warning names what may be a shard.
    """
    if partition_specs is not None:
        _require_shard_map()
    splits = _settle_splits(updates, partition_specs)
    settled = settle_whole(_whole(updates, splits))
    require_arrays(updates, settled)
    if partition_specs is None:
        _warn_of_shards(updates, settled, wording)
    pairs = zip(settled, splits, strict=True)
    return [(weight.fan_in, _mesh_axes(split, weight.fan_in)) for weight, split in pairs]


def _settle_splits(params: PyTree, partition_specs: PartitionSpecs) -> list[Split]:
    """How each leaf of `params` is split, in the order of `jax.tree.leaves(params, is_leaf=is_absent)`.

    Outside of `shard_map`, where `init` usually gets the whole parameters, there is no mesh that the names
    in the specs could be checked against.
    """
    if partition_specs is None:
        return [()] * len(jax.tree.leaves(params, is_leaf=is_absent))
    specs = match("partition_specs", resolve(partition_specs, params), params, prefix=True)
    return [() if is_absent(leaf) else _split(path, leaf, spec) for path, leaf, spec in specs]


def _require_shard_map() -> None:
    """Raises an error outside of `shard_map`, where an array is no shard of anything."""
    if not _manual_axes():
        raise ValueError(
            "partition_specs are for gradients inside jax.shard_map, each of them a shard, and here no mesh "
            "axis is manual. Under jit a sharded gradient is whole: leave them out"
        )


def _warn_of_shards(updates: PyTree, settled: list[WeightAxes], wording: Wording) -> None:
    """Warns inside `shard_map` of gradients that may be shards, where nobody said how they are split.

    JAX knows along which mesh axes an array varies, unless `shard_map` has `check_vma=False`: then any may.
    """
    manual = [name for name in _manual_axes() if lax.axis_size(name) > 1]
    if not manual:
        return
    is_checked = bool(_varying(lax.axis_index(manual[0])))
    places, _ = jtu.tree_flatten_with_path(updates, is_leaf=is_absent)
    # Of a weight vector with many inputs a shard may have a single one, and would be left alone.
    lines = [
        f"  {place(path, leaf)}: may be split by {', '.join(varying)}"
        for (path, leaf), axes in zip(places, settled, strict=True)
        if (axes.fan_in or NOTHING_LEFT in axes.why)
        and (varying := [name for name in manual if not is_checked or name in _varying(leaf)])
    ]
    if lines:
        warnings.warn(
            "inside jax.shard_map and jax.pmap gc_optax sees one shard of each gradient, and takes the "
            f"{wording.statistic} of the shard. These may be parts of a larger one:\n{joined_lines(lines)}\n"
            f"Say how they are split, with {wording.call.format('axes, partition_specs=...')}, or that each "
            "is whole, as it is after a pmean, with "
            f"{wording.call.format('axes, partition_specs=jax.sharding.PartitionSpec()')}.",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )


def _whole(params: PyTree, splits: list[Split]) -> PyTree:
    """`params` with the shapes that they have outside of `shard_map`.

    Axes and masks are about those shapes: a shard may have one input of a weight vector that has many. A leaf
    that is split becomes an array of zeros, so that a mask may ask `isinstance(leaf, jax.Array)`. Nothing is
    computed from the zeros, so under `jit` JAX drops them before XLA sees the program; without `jit` they are
    made, and take memory until the axes are settled.
    """
    if not (any(splits) and _manual_axes()):
        return params
    leaves, structure = jax.tree.flatten(params, is_leaf=is_absent)
    pairs = zip(leaves, splits, strict=True)
    return jax.tree.unflatten(
        structure,
        [jnp.zeros(_whole_shape(leaf, split), leaf.dtype) if any(split) else leaf for leaf, split in pairs],
    )


def _mesh_axes(split: Split, axes: tuple[int, ...]) -> tuple[str, ...]:
    """The mesh axes that split the given axes of an array."""
    return tuple(name for axis, names in enumerate(split) if axis in axes for name in names)


def _manual_axes() -> tuple[str, ...]:
    """The mesh axes that the `shard_map` around this splits arrays by; outside of one there are none."""
    axes: tuple[str, ...] = jax.sharding.get_abstract_mesh().manual_axes
    return axes


def _varying(array: Any) -> frozenset[str]:
    """The mesh axes along which JAX knows an array to vary; none where `shard_map` has `check_vma=False`."""
    aval: Any = jax.typeof(array)
    # Later versions of JAX have it as a part of `mat`.
    varying: frozenset[str] = aval.vma if hasattr(aval, "vma") else aval.mat.varying
    return varying


def _whole_shape(shard: jax.Array, split: Split) -> tuple[int, ...]:
    """The shape of the array that `shard` is a part of."""
    numbers = [math.prod(map(lax.axis_size, names)) for names in split]
    return tuple(size * number for size, number in itertools.zip_longest(shard.shape, numbers, fillvalue=1))


def _split(path: Path, leaf: Any, spec: Any) -> Split:
    """How one leaf is split, or an error where the spec does not fit it."""
    where = f"partition_specs for {place(path, leaf)}"
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{where} must be a PartitionSpec, got {describe(spec)}")
    rank = len(leaf.shape) if is_array_like(leaf) else 0
    if len(spec) > rank:
        raise ValueError(f"{where}: {spec} has {len(spec)} entries for {rank} axes")
    # A spec that says `reduced` refuses to be iterated; older versions of JAX have no `partitions`.
    entries = getattr(spec, "partitions", spec)
    if PartitionSpec.UNCONSTRAINED in entries:
        raise ValueError(f"{where}: {spec} does not say how the array is split")
    split = tuple(map(_names, entries))
    _check_names([name for names in split for name in names], f"{where}: {spec}")
    return split


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec: `P(None, "x", ("y", "z"))` has none, one and two."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _check_names(names: list[str], where: str) -> None:
    """Raises an error where a mesh axis is named twice, or is not one of those that are manual here."""
    manual = _manual_axes()
    for name in names:
        if manual and name not in manual:
            raise ValueError(f"{where} names the mesh axis {name!r}; manual here are {', '.join(manual)}")
        if names.count(name) > 1:
            raise ValueError(f"{where} names the mesh axis {name!r} more than once")
