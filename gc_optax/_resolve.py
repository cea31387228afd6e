"""Whatever a user gave -> one `WeightAxes` a leaf, or an error that names the leaf.

A user may say it in many ways: a convention, a tree of axes, a function of the parameters, and a mask on
top. `settle` is the only way from there to axes, and the only place that warns of what it had to guess.
"""

import dataclasses
import operator
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import tree_util as jtu

from ._axes import (
    Axes,
    Mask,
    Path,
    PyTree,
    WeightAxes,
    applicable,
    describe_leaf,
    is_absent,
    is_array_like,
    is_axis,
    is_float_array,
    is_function,
    is_inexact,
    is_known_to_jax,
    left_alone,
    shortened,
)
from ._conventions import is_convention, out_last, read_out_last
from ._text import (
    BOX,
    CENTRALIZING,
    Wording,
    at,
    children_of,
    describe,
    joined_lines,
    place,
    stacklevel_of_the_user,
    type_name,
)

_OUTSIDE_OF_FLATTEN = (
    "If optax.flatten made one vector of all parameters, put what needs axes around it: "
    "optax.chain(gc_optax.centralize(...), optax.flatten(optimizer))"
)


_MOST_KEPT = 8


def settle(
    params: PyTree,
    axes: Axes,
    mask: Mask,
    *,
    silent: bool = False,
    wording: Wording = CENTRALIZING,
    of_keras: bool = False,
) -> list[WeightAxes]:
    """One `WeightAxes` for each leaf of `params`, with axes that are in range and not negative.

    The leaves come in the order of `jax.tree.leaves(params, is_leaf=is_absent)`: where a parameter is
    absent there is an entry too, whatever `axes` and `mask` have in its place.

    Where `axes` is None, `out_last` stands in for it, with a warning of the kernels that it can only guess
    at. `of_keras` is for names that are those of Keras's layers. The `update` of an optimizer is `silent`:
    its `init` has warned.
    """
    axes_tree = out_last(params) if axes is None else resolve(axes, params)
    given = match("axes", axes_tree, params, prefix=False)
    kept = match("mask", True if mask is None else resolve(mask, params), params, prefix=True)
    settled = [_settle_leaf(*leaf, keep) for leaf, (_, _, keep) in zip(given, kept, strict=True)]
    if axes is None and not silent:
        _warn_of_unsettled_kernels(params, settled, wording, of_keras)
    return settled


class Settler:
    """`settle` for the updates of an optimizer, which have the same shapes at every step.

    Trees and conventions say the same of the same shapes, so what they say is kept. A function of a user may
    look at the numbers too: it is called at every step, and asked no further where it says the same again.
    """

    def __init__(self, axes: Axes, mask: Mask) -> None:
        self._axes, self._mask = axes, mask
        self._kept: dict[Any, tuple[list[WeightAxes], list[Any]]] = {}

    def __call__(self, params: PyTree) -> list[WeightAxes]:
        """One `WeightAxes` for each leaf, as from `settle`, without its warnings."""
        is_ours = is_function(self._axes) and is_convention(self._axes)
        axes = self._axes if is_ours else resolve(self._axes, params)
        mask = resolve(self._mask, params)
        leaves, structure = jax.tree.flatten(params)
        given, structure_of_given = jax.tree.flatten((axes, mask))
        if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
            return settle(params, axes, mask, silent=True)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (structure, structure_of_given, shapes, tuple(map(id, given)))
        try:
            kept = self._kept.get(key)
        except (TypeError, ValueError):  # a node keeps a list or an array in a static field
            return settle(params, axes, mask, silent=True)
        if kept is None:
            if len(self._kept) == _MOST_KEPT:
                self._kept.clear()
            # What was given is kept too: as long as it is there, nothing else has its `id`.
            kept = self._kept[key] = settle(params, axes, mask, silent=True), given
        return kept[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return Settler, (self._axes, self._mask)


def resolve(given: Any, params: PyTree) -> PyTree:
    """A tree: the one that the user gave, or what the user's function makes of the parameters."""
    return given(params) if is_function(given) else given


def match(
    role: str, tree: PyTree, params: PyTree, *, prefix: bool, whose: str = "the parameters"
) -> list[tuple[Path, Any, Any]]:
    """Each leaf of `params` with its path and what `tree` has in the same place.

    A message calls the two trees `role` and `whose`.

    `jax.tree.map` does this too, but it cannot say where two trees differ, it does not match a full
    tree with parameters of which a part is masked out, and it minds boxes: `nnx.Optimizer` hands boxed
    parameters to `init` and bare gradients to `update`.
    """
    matched: list[tuple[Path, Any, Any]] = []

    def walk(path: Path, node: Any, entry: Any) -> None:
        node, entry = unboxed(node), unboxed(entry)
        if is_absent(node) or jtu.all_leaves([node]):
            matched.append((path, node, entry))
            return
        children, structure = children_of(node)
        if prefix and jtu.all_leaves([entry]):
            entries = [entry] * len(children)
        else:
            with_keys, entry_structure = children_of(entry)
            if not _are_equal(entry_structure, structure):
                raise ValueError(
                    f"{role} does not have the structure of {whose}: at {at(path)} {whose} "
                    f"have {describe(node)}, {role} has {describe(entry)}{_mend(role, node, entry, whose)}"
                )
            entries = [child for _, child in with_keys]
        for (key, child), child_entry in zip(children, entries, strict=True):
            walk((*path, *key), child, child_entry)

    walk((), params, tree)
    return matched


def _are_equal(one: jtu.PyTreeDef, other: jtu.PyTreeDef) -> bool:
    """Whether two structures are the same. An array that a node keeps in a static field has no answer."""
    try:
        return bool(one == other)
    except ValueError:
        return False


def _mend(role: str, node: Any, entry: Any, whose: str) -> str:
    """What to write where a user's tree differs from the parameters (`node`) in a way that is often met."""
    if isinstance(entry, str):
        return _mend_of_a_name(entry)
    bases = [f"{base.__module__}.{base.__name__}" for base in type(entry).__mro__]
    if role == "axes" and "flax.nnx.module.Module" in bases:
        return ". For a model of Flax NNX, gc_optax.nnx.infer_axes gives them as nnx.Optimizer needs them"
    keys, entry_keys = ([key for key, _ in children_of(each)[0]] for each in (node, entry))
    if type(entry) is type(node) and keys == entry_keys:
        return ". They are not equal in what they keep beside that, static fields for example"
    for owner, outer, inner in ((whose, node, entry), (f"the {role}", entry, node)):
        # One of the two is {"params": {"Dense_0": ...}}, and the other {"Dense_0": ...}.
        children, structure = children_of(outer)[0], children_of(inner)[1]
        if len(children) == 1 and not jtu.all_leaves([inner]):
            [(key, child)] = children
            if _are_equal(children_of(child)[1], structure):
                return f". Below {at(key)} of {owner} the two fit: give both with it, or both without"
    return ""


def _mend_of_a_name(given: str) -> str:
    """What to write for "out_last"."""
    is_ours = given in ("out_last", "out_first")
    return f". A convention is a function: gc_optax.{given}" if is_ours else ""


def unboxed(node: Any) -> Any:
    """What a box (an NNX variable, a `Partitioned` array) holds in its attribute `value`."""
    while not jtu.all_leaves([node]):
        children, _ = children_of(node)
        if [key for key, _ in children] != [BOX]:
            break
        node = children[0][1]
    return node


def _settle_leaf(path: Path, leaf: Any, given: Any, keep: Any) -> WeightAxes:
    """The axes of one leaf, from what the axes (`given`) and the mask (`keep`) have in its place."""
    if is_absent(leaf):
        return left_alone("absent")
    where = place(path, leaf)
    axes = as_weight_axes(given, where)
    if not _as_bool(keep, where):
        return left_alone("masked out", axes.op, axes.role)
    axes = applicable(in_range(axes, leaf, where), leaf)
    if axes.fan_in and not is_known_to_jax(leaf.dtype):
        raise TypeError(f"{where}, is of dtype {leaf.dtype}, which JAX does not have")
    return axes


def require_arrays(gradients: PyTree, settled: list[WeightAxes]) -> None:
    """Raises an error where a leaf that is to be changed only stands for an array."""
    leaves = jax.tree.leaves(gradients, is_leaf=is_absent)
    for number, (leaf, axes) in enumerate(zip(leaves, settled, strict=True)):
        if axes.fan_in and not is_float_array(leaf):
            places, _ = jtu.tree_flatten_with_path(gradients, is_leaf=is_absent)
            path, _ = places[number]
            raise TypeError(f"the gradient of {at(path)} must be an array, got a {type_name(leaf)}")


def as_weight_axes(given: Any, where: str) -> WeightAxes:
    """A leaf of the user's axes as a `WeightAxes`: 0 is `WeightAxes(fan_in=(0,))`."""
    if isinstance(given, WeightAxes):
        return given
    if given is None:
        return left_alone("left alone by axes")
    if isinstance(given, optax.contrib.MuonDimensionNumbers):
        fan_in = _axis_tuple(given.reduction_axis, where)
        return WeightAxes(fan_in, _axis_tuple(given.output_axis, where), why="MuonDimensionNumbers")
    if is_axis(given) or type(given) is tuple:  # a NamedTuple is something else
        return WeightAxes(_axis_tuple(given, where), why="given by axes")
    hint = "; a tree of bools is a mask" if isinstance(given, bool) else ""
    if isinstance(given, str):
        hint = _mend_of_a_name(given)
    if where.startswith(at(())) and not jtu.all_leaves([given]):
        hint = f". {_OUTSIDE_OF_FLATTEN}"
    raise TypeError(
        f"axes for {where} must be a WeightAxes, an int, a tuple of ints, a MuonDimensionNumbers or None, "
        f"got {describe(given)}{hint}"
    )


def _axis_tuple(given: Any, where: str) -> tuple[int, ...]:
    """An axis or several as ints of Python: 0 is (0,)."""
    axes = (given,) if is_axis(given) else given
    if not (isinstance(axes, tuple | list) and all(map(is_axis, axes))):
        raise TypeError(f"axes for {where} must be ints, got {describe_leaf(given)}")
    return tuple(map(operator.index, axes))


def in_range(axes: WeightAxes, leaf: Any, where: str) -> WeightAxes:
    """The same axes counted from the front, or an error where `leaf` does not have them."""
    rank = len(leaf.shape) if is_array_like(leaf) else 0
    if axes.rank not in (None, rank):
        raise ValueError(
            f"axes for {where}: they were read from a parameter of rank {axes.rank}. For a stack of models "
            "or of layers, read them from the stacked one, update each member by itself, inside "
            "jax.vmap, or say them yourself: WeightAxes(fan_in=...)"
        )
    for axis in axes.fan_in + axes.fan_out:
        if not -rank <= axis < rank:
            shown = describe_leaf(axis)
            raise ValueError(f"axes for {where}: axis {shown} is out of range for rank {rank}")
    fan_in = tuple(axis % rank for axis in axes.fan_in)
    fan_out = tuple(axis % rank for axis in axes.fan_out)
    if len(set(fan_in + fan_out)) < len(fan_in + fan_out):
        named = f"fan_in {axes.fan_in}" + (f", fan_out {axes.fan_out}" if axes.fan_out else "")
        raise ValueError(f"axes for {where}: an axis is repeated in {shortened(named)}")
    return dataclasses.replace(axes, fan_in=fan_in, fan_out=fan_out)


def _as_bool(keep: Any, where: str) -> bool:
    """A leaf of the user's mask, of Python, NumPy or JAX."""
    is_array = isinstance(keep, jax.Array | np.ndarray) and not isinstance(keep, jax.core.Tracer)
    is_bool = isinstance(keep, bool | np.bool_) or (is_array and keep.dtype == jnp.bool_ and keep.shape == ())
    if is_bool:
        return bool(keep)
    raise TypeError(
        f"mask for {where} must be a bool that is known when the update is traced, got {describe(keep)}"
    )


def _warn_of_unsettled_kernels(
    params: PyTree, settled: list[WeightAxes], wording: Wording, of_keras: bool
) -> None:
    """Warns, once for all of them, of the kernels that `out_last` can only guess at.

    Also of a lone vector, which is what `optax.flatten` shows of the parameters that it is given.
    """
    places, _ = jtu.tree_flatten_with_path(params)
    if [path for path, _ in places] == [()] and is_inexact(places[0][1]) and len(places[0][1].shape) == 1:
        warnings.warn(
            "the parameters are a single vector without a name, in which gc_optax finds no weight vectors: "
            f"{wording.without_axes}. {_OUTSIDE_OF_FLATTEN}. If you do have a single "
            f"vector, {wording.call.format('gc_optax.out_last')} says nothing.",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )
    absent = map(is_absent, jax.tree.leaves(params, is_leaf=is_absent))
    present = [axes for axes, left_out in zip(settled, absent, strict=True) if not left_out]
    doubtful = [
        f"  {place(path, leaf)}: {wording.statistic} over axes {axes.fan_in}"
        for (path, leaf), axes, reading in zip(
            places, present, read_out_last(places, of_keras=of_keras), strict=True
        )
        if axes.fan_in and not reading.settled
    ]
    if doubtful:
        warnings.warn(
            "by default gc_optax reads the axes off names and shapes (out_last: every axis but the last "
            "is fan-in). These kernels have more than one reading: a convolution, a fused projection, a "
            "stack of layers. The reading taken is\n" + joined_lines(doubtful) + "\n"
            f"Settle it exactly with {wording.call.format(wording.exact)}, "
            "which reads the axes off the model, or with a tree of axes of your own; or accept this reading "
            f"silently with {wording.call.format('gc_optax.out_last')}.",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )
