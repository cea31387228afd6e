"""What each axis of a parameter means: fan-in, fan-out or batch.

A user may say it in many ways: a convention, a tree of axes, a function of the parameters, and a mask
on top. `settle` turns whatever was given into one `WeightAxes` for each leaf, or raises an error that
names the leaf.
"""

import dataclasses
import functools
import inspect
import math
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import tree_util as jtu

PyTree = Any
Axes = PyTree | Callable[[PyTree], PyTree] | None
Mask = PyTree | Callable[[PyTree], PyTree] | None
Path = tuple[Any, ...]

_DOT = "dot_general"
_CONV = "conv_general_dilated"

# What stands between a user's code and our `init`: a chain, an optimizer, a trace.
_LIBRARIES = ("gc_optax", "optax", "jax", "flax", "contextlib", "equinox")

# The way into a box that holds one array, an NNX variable or a `Partitioned` array of Linen: no name.
_BOX: Path = (jtu.GetAttrKey("value"),)


@dataclasses.dataclass(frozen=True)
class WeightAxes:
    """Which axes of one parameter are the inputs of its weight vectors, and how that is known.

    Gradient centralization averages over `fan_in`. Axes in neither `fan_in` nor `fan_out` are batch
    axes: a stack of layers, of experts, of groups. For the average a batch axis is like a fan-out
    axis: every index along it has weight vectors of its own.

    An empty `fan_in` means "leave this parameter alone". JAX treats a `WeightAxes` as one leaf of a
    tree, so a tree of them has the structure of the parameters.

    Args:
        fan_in: the axes that are averaged over. Negative axes count from the end.
        fan_out: the axes that tell one weight vector from another.
        op: the JAX primitive in which the weight meets the data (`"dot_general"`,
            `"conv_general_dilated"`), as far as it is known.
        why: for a reader, where the axes come from or why the parameter is left alone.

    Raises:
        TypeError: if `fan_in` or `fan_out` is not a tuple of ints.

    Example:
        A stack of 12 dense layers of shape (64, 32), kept in one array:

        >>> from gc_optax import WeightAxes
        >>> axes = WeightAxes(fan_in=(1,), fan_out=(2,), why="12 stacked Dense layers")
        >>> axes.fan_in
        (1,)
    """

    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...] = ()
    op: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        for field, axes in (("fan_in", self.fan_in), ("fan_out", self.fan_out)):
            if not (isinstance(axes, tuple) and all(map(_is_axis, axes))):
                raise TypeError(f"WeightAxes.{field} must be a tuple of ints, got {axes!r}")

    def to_muon(self) -> optax.contrib.MuonDimensionNumbers | None:
        """The same axes for `optax.contrib.muon`, which orthogonalizes the matrix that they make.

        The axes in neither `fan_in` nor `fan_out` are batch axes there too: each layer of a stack is a
        matrix of its own.

        Returns:
            `MuonDimensionNumbers(fan_in, fan_out)`, or `None`, which leaves the parameter to Adam, where
            there is no matrix: where `fan_in` or `fan_out` is empty.

        Example:
            One tree of axes for both:

            >>> import gc_optax
            >>> import jax
            >>> import jax.numpy as jnp
            >>> import optax
            >>> def loss(params, x):
            ...     return jnp.sum(jnp.einsum("eti,eio->eto", x, params["experts"]) + params["bias"])
            >>> params = {"experts": jnp.ones((2, 4, 8)), "bias": jnp.zeros((8,))}
            >>> axes = gc_optax.infer_axes(loss, params, jnp.ones((2, 3, 4)))
            >>> matrices = jax.tree.map(gc_optax.WeightAxes.to_muon, axes)
            >>> matrices
            {'bias': None, 'experts': MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))}
            >>> muon = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=matrices)
            >>> optimizer = optax.chain(gc_optax.centralize(axes), muon)
            >>> state = optimizer.init(params)

        References:
            Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
            https://kellerjordan.github.io/posts/muon/
        """
        if not (self.fan_in and self.fan_out):
            return None
        return optax.contrib.MuonDimensionNumbers(self.fan_in, self.fan_out)


def out_last(params: PyTree) -> PyTree:
    """The convention of Flax, Haiku and Keras: every axis but the last is fan-in.

    A convention sees names and shapes, not the model. These are left alone, each with the reason in
    `why`: leaves of rank below 2; leaves whose name says that they are no weight matrix (a bias, a
    scale, an embedding table and what else the frameworks call such things); leaves with a fan-in
    below 2, which the projection would zero. Some names say more than the rank does: the `query`,
    `key` and `value` kernels of an attention layer, of shape (embed, heads, head_dim), have their
    fan-in in axis 0; a depthwise kernel as Keras stores it, (*window, channels, multiplier), has it
    in its window; a transposed convolution as Haiku and Keras store it, (*window, out, in), has it in
    its window and its last axis. A name it does not know, of rank 2 or more, is a weight.

    Given explicitly, as in `centralize(out_last)`, the convention is silent. As the default it warns
    of each kernel that it cannot settle: see `centralize`.

    Args:
        params: the parameters, a tree of arrays of any shape and dtype, or of
            `jax.ShapeDtypeStruct`s. Nothing but shapes, dtypes and the path of each leaf is read.

    Returns:
        A tree with the structure of `params` and a `WeightAxes` at each leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from gc_optax import out_last
        >>> axes = out_last({"Dense_0": {"kernel": jnp.ones((64, 10)), "bias": jnp.ones((10,))}})
        >>> axes["Dense_0"]["kernel"].fan_in
        (0,)
        >>> axes["Dense_0"]["bias"].fan_in, axes["Dense_0"]["bias"].why
        ((), 'rank 1: no weight matrix')

    References:
        The kernel layouts documented for `flax.linen.Dense` and `flax.linen.Conv`, and for the layers
        of those names in Haiku and Keras.
    """
    places, structure = jtu.tree_flatten_with_path(params)
    return jax.tree.unflatten(structure, [reading.axes for reading in _read_out_last(places)])


def out_first(params: PyTree) -> PyTree:
    """The convention of PyTorch and Equinox: every axis but the first is fan-in.

    This is the rule of the authors' code and of `optax.centralize`. On a tree of float32 or float64
    arrays without names (a list, say) it equals `optax.centralize`, except that a fan-in below 2 is
    left alone here and zeroed there. Where there are names, they are heeded as by `out_last`: a bias,
    a scale or an embedding table is left alone, and so is the `weight` of a module whose own name
    says that it is a normalization or an embedding.

    Args:
        params: the parameters, as for `out_last`.

    Returns:
        A tree with the structure of `params` and a `WeightAxes` at each leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from gc_optax import out_first
        >>> out_first([jnp.ones((10, 64)), jnp.ones((16, 3, 5, 5))])[1].fan_in
        (1, 2, 3)

    References:
        The authors' code, https://github.com/Yonghongwei/Gradient-Centralization
    """
    return jtu.tree_map_with_path(lambda path, leaf: _read(_out_first_kernel, path, leaf).axes, params)


def conv_only(axes: Axes) -> Axes:
    """Keeps the convolutions of a tree or of a convention, and leaves everything else alone.

    This is `gc_conv_only` in the authors' code, and what the `GCC` variants of their optimizers do.

    A leaf is a convolution where its `op` is `"conv_general_dilated"`. The conventions take a kernel
    of rank 4 or more for one (the authors' rule), unless it is known to belong to a stack of attention
    layers, and one of lower rank where its module's name has the word "conv".

    Args:
        axes: a tree of `WeightAxes`, or a function from parameters to such a tree, `out_last` for
            example.

    Returns:
        The same kind of thing: a tree for a tree, a function for a function.

    Raises:
        TypeError: if a leaf is not a `WeightAxes`: bare axes do not say what the weight is used for.

    Example:
        >>> import jax.numpy as jnp
        >>> from gc_optax import conv_only, out_last
        >>> params = {"conv": jnp.ones((3, 3, 16, 32)), "head": jnp.ones((32, 10))}
        >>> axes = conv_only(out_last)(params)
        >>> axes["conv"].fan_in, axes["head"].fan_in
        ((0, 1, 2), ())

    References:
        `gc_conv_only` in the authors' code, https://github.com/Yonghongwei/Gradient-Centralization
    """
    if axes is None:
        raise TypeError("conv_only needs a tree of WeightAxes or a convention such as out_last, got None")
    if _is_function(axes):
        return lambda params: conv_only(axes(params))
    return jtu.tree_map_with_path(_keep_convolution, axes)


def is_absent(node: Any) -> bool:
    """Whether `node` stands where a parameter was taken out: `None`, or optax's `MaskedNode`."""
    return node is None or isinstance(node, optax.MaskedNode)


def settle(params: PyTree, axes: Axes, mask: Mask) -> list[WeightAxes]:
    """One `WeightAxes` for each leaf of `params`, with axes that are in range and not negative.

    The leaves come in the order of `jax.tree.leaves(params, is_leaf=is_absent)`: where a parameter is
    absent there is an entry too, whatever `axes` and `mask` have in its place.
    """
    axes_tree = out_last(params) if axes is None else resolve(axes, params)
    given = match("axes", axes_tree, params, prefix=False)
    if mask is None:
        return [_settle_leaf(*leaf, keep=True) for leaf in given]
    kept = match("mask", resolve(mask, params), params, prefix=True)
    return [_settle_leaf(*leaf, keep) for leaf, (_, _, keep) in zip(given, kept, strict=True)]


_OUTSIDE_OF_FLATTEN = (
    "If optax.flatten made one vector of all parameters, put the centralization around it: "
    "optax.chain(gc_optax.centralize(...), optax.flatten(optimizer))"
)


def warn_of_unsettled_kernels(params: PyTree, settled: list[WeightAxes]) -> None:
    """Warns, once for all of them, of the centralized kernels that `out_last` can only guess at.

    Also of a lone vector, which is what `optax.flatten` shows of the parameters that it is given.
    """
    places, _ = jtu.tree_flatten_with_path(params)
    if [(path, np.ndim(leaf)) for path, leaf in places] == [((), 1)]:
        warnings.warn(
            "the parameters are a single vector without a name, in which gc_optax finds no weight vectors: "
            f"nothing is centralized. {_OUTSIDE_OF_FLATTEN}. If there is nothing to centralize, "
            "centralize(gc_optax.out_last) says nothing.",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )
    absent = map(is_absent, jax.tree.leaves(params, is_leaf=is_absent))
    present = [axes for axes, left_out in zip(settled, absent, strict=True) if not left_out]
    doubtful = [
        f"  {place(path, leaf)}: mean over axes {axes.fan_in}"
        for (path, leaf), axes, reading in zip(places, present, _read_out_last(places), strict=True)
        if axes.fan_in and not reading.settled
    ]
    if doubtful:
        warnings.warn(
            "by default gc_optax reads the axes off names and shapes (out_last: every axis but the last "
            "is fan-in). These kernels have more than one reading: a convolution, a fused projection, a "
            "stack of layers. The reading taken is\n" + "\n".join(doubtful) + "\n"
            "Settle it exactly with centralize(gc_optax.infer_axes(loss, params, batch)), which reads the "
            "axes off the model, or with a tree of axes of your own; or accept this reading silently with "
            "centralize(gc_optax.out_last).",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )


def stacklevel_of_the_user() -> int:
    """How far up the stack the code is that called into a library with our transformation in it."""
    level, frame = 0, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level


# From a leaf's name and shape to its axes.


class _Name(NamedTuple):
    """The words of a leaf's own name and of the module that it is the weight of, and what that is in."""

    leaf: list[str]
    module: list[str]
    parent: tuple[str, ...]


class _Reading(NamedTuple):
    """What a convention makes of a kernel; `settled` where the kernel has no other usual reading."""

    axes: WeightAxes
    settled: bool


# The last word of a leaf's name that one of these knows decides: "kernel_scale" is a scale, and
# "embed_kernel" is a kernel. Frameworks glue words together ("posemb"), so some match an ending.
_WEIGHT = re.compile(r"kernels?|weights?|w")
_NO_WEIGHT_MATRIX = {
    re.compile(r".*bias(es)?|offset|shift|beta"): "named as a bias",
    re.compile(r".*scales?|gamma|alpha|slope|gain"): "named as a scale",
    re.compile(r".*emb(ed(ding)?)?s?|codebooks?"): "named as an embedding, a lookup table",
    re.compile(r"tokens?"): "named as a token, a learned input",
    re.compile(r"mean|var(iance)?|std(dev)?"): "named as a statistic",
}
# The names of modules that call their array "weight", their words joined by underscores.
_NORMALIZATION_MODULE = re.compile(r".*norm(alization)?|(.*_)?[bgl]n(_f)?")
_EMBEDDING_MODULE = re.compile(r".*emb(ed(ding)?)?s?(_tokens|_positions)?|wte|wpe")
_ATTENTION_MODULES = {"query", "key", "value", "out", "attention_output"}


def _words(name: str) -> list[str]:
    words: list[str] = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    # "b" is a bias, "B" the second matrix of a LoRA pair: a single letter keeps its case.
    return [word if len(word) == 1 else word.lower() for word in words]


def _name(path: Path) -> _Name:
    keys = list(path)
    while keys and (keys[-1],) == _BOX:
        keys.pop()
    parts = [part for key in keys for part in _parts(key)]
    # An index says which of several arrays of one name it is.
    while parts and not _words(parts[-1]):
        parts.pop()
    leaf = _words(parts[-1]) if parts else []
    if leaf and _WEIGHT.fullmatch(leaf[-1]) and len(parts) > 1:
        return _Name(leaf, _words(parts[-2]), tuple(parts[:-2]))
    return _Name(leaf, leaf, tuple(parts[:-1]))


def _parts(key: Any) -> list[str]:
    """The names in one step of a path; an index is a name without words."""
    step = getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))
    # Flattened trees of Flax have tuples for keys. Haiku's modules and flattened trees of other kinds join
    # names with a slash, PyTorch's with a dot.
    names = step if isinstance(step, tuple) else (step,)
    return [part for name in names for part in re.split(r"[/.]", str(name))]


def _no_weight_matrix(name: _Name, rank: int) -> str:
    """Why the name says that the leaf is no weight matrix; empty where it does not."""
    if name.leaf == ["b"]:
        return "named as a bias"
    for word in reversed(name.leaf):
        if _WEIGHT.fullmatch(word):
            break
        for pattern, why in _NO_WEIGHT_MATRIX.items():
            if pattern.fullmatch(word):
                return why
    # PyTorch and Equinox call the array of any module "weight", so the module's name must tell.
    if name.leaf == ["weight"]:
        module = "_".join(name.module)
        if _NORMALIZATION_MODULE.fullmatch(module):
            return "named as the weight of a normalization"
        # At a higher rank it is a patch embedding, which is a convolution.
        if rank == 2 and _EMBEDDING_MODULE.fullmatch(module):
            return "named as an embedding, a lookup table"
    return ""


def _read(rule: Callable[[_Name, tuple[int, ...]], _Reading], path: Path, leaf: Any) -> _Reading:
    """What a convention, by its `rule` for kernels, makes of any leaf."""
    if not is_inexact(leaf):
        return _Reading(left_alone(f"no array of floats: {describe(leaf)}"), settled=True)
    if len(leaf.shape) < 2:
        return _Reading(left_alone(f"rank {len(leaf.shape)}: no weight matrix"), settled=True)
    name = _name(path)
    why_not = _no_weight_matrix(name, len(leaf.shape))
    if why_not:
        return _Reading(left_alone(why_not), settled=True)
    reading = rule(name, leaf.shape)
    return reading._replace(axes=_without_trivial_fan_in(reading.axes, leaf.shape))


def _read_out_last(places: list[tuple[Path, Any]]) -> list[_Reading]:
    attention = _attention_layers(places)
    rule = functools.partial(_out_last_kernel, attention)
    return [_read(rule, path, leaf) for path, leaf in places]


def _attention_layers(places: list[tuple[Path, Any]]) -> set[tuple[str, ...]]:
    """The parents whose modules query, key, value and out fit together as the parts of one attention.

    The names alone do not tell: a critic's head is called "value" too, and in a stack of layers of
    shape (layers, in, out) "query" may be a plain dense layer.
    """
    parts: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
    for path, leaf in places:
        name = _name(path)
        if "_".join(name.module) in _ATTENTION_MODULES and is_inexact(leaf) and len(leaf.shape) >= 3:
            parts.setdefault(name.parent, {})[name.module[-1].replace("output", "out")] = leaf.shape
    return {parent for parent, shapes in parts.items() if _fit_together(shapes)}


def _fit_together(shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether `out` undoes what `query`, `key` and `value` do: (embed, heads, dim), (heads, dim, embed)."""
    if shapes.keys() != {"query", "key", "value", "out"} or len({*map(len, shapes.values())}) > 1:
        return False
    return shapes["out"][-3:-1] == (shapes["query"][-2], shapes["value"][-1])


def _out_last_kernel(attention: set[tuple[str, ...]], name: _Name, shape: tuple[int, ...]) -> _Reading:
    rank = len(shape)
    every = tuple(range(rank))
    words = {*name.leaf, *name.module}
    in_attention = name.parent in attention
    is_named_for_attention = "_".join(name.module) in _ATTENTION_MODULES
    if is_named_for_attention and (rank == 3 or in_attention):
        # What is in front of the last three axes is a stack of attention layers.
        fan_in = every[-3:-1] if name.module[-1] in ("out", "output") else every[-3:-2]
        fan_out = tuple(axis for axis in every[-3:] if axis not in fan_in)
        axes = WeightAxes(fan_in, fan_out, _DOT, "out_last: named as a projection of an attention layer")
        return _Reading(axes, settled=rank == 3 and in_attention)
    if rank >= 3 and words & {"depthwise", "dw", "dwconv"} and shape[-2] > 1:
        # Flax and Haiku keep depthwise kernels as (*window, 1, channels): this can only be Keras.
        axes = WeightAxes(every[:-2], every[-1:], _CONV, "out_last: named as a depthwise kernel, the window")
        return _Reading(axes, settled=True)
    if rank >= 3 and words & {"transpose", "transposed"} and (name.leaf == ["w"] or words & {"d", "D"}):
        # Haiku's conv2_d_transpose and Keras's conv2d_transpose. Flax has no "2d", nor one layout.
        fan_in = (*every[:-2], rank - 1)
        axes = WeightAxes(fan_in, every[-2:-1], _CONV, "out_last: named as a transposed convolution")
        return _Reading(axes, settled=name.leaf == ["w"])
    axes = WeightAxes(every[:-1], every[-1:], _op(name, rank), "out_last: every axis but the last")
    # Flax keeps transposed convolutions as (*window, in, out) or as (*window, out, in), unshared ones
    # with a weight of their own at each position, and scanned attention may have lost its siblings.
    has_doubtful_name = bool(words & {"transpose", "transposed", "local", "query", "key", "value"})
    return _Reading(axes, settled=rank == 2 or (rank == 4 and not has_doubtful_name))


def _out_first_kernel(name: _Name, shape: tuple[int, ...]) -> _Reading:
    rank = len(shape)
    every = tuple(range(rank))
    axes = WeightAxes(every[1:], every[:1], _op(name, rank), "out_first: every axis but the first")
    return _Reading(axes, settled=True)  # nobody gets it who did not ask for it


def _op(name: _Name, rank: int) -> str:
    return _CONV if rank >= 4 or not {"conv", "convolution"}.isdisjoint(name.module) else _DOT


def _keep_convolution(path: Path, axes: Any) -> WeightAxes:
    if not isinstance(axes, WeightAxes):
        raise TypeError(
            f"conv_only needs a WeightAxes at every leaf, to know which are convolutions; "
            f"at {_at(path)} there is {axes!r}"
        )
    return axes if axes.op == _CONV or not axes.fan_in else left_alone("no convolution", op=axes.op)


# From what the user gave to one WeightAxes a leaf.


def _is_function(given: Any) -> bool:
    # A module of Equinox or NNX is callable too, but it is a tree: it has leaves of its own.
    return callable(given) and jtu.all_leaves([given])


def resolve(given: Any, params: PyTree) -> PyTree:
    """The tree that a user gave, or that the function of the parameters makes which was given."""
    return given(params) if _is_function(given) else given


def match(role: str, tree: PyTree, params: PyTree, *, prefix: bool) -> list[tuple[Path, Any, Any]]:
    """Each leaf of `params` with its path and what `tree` has in the same place.

    `jax.tree.map` does this too, but it cannot say where two trees differ, it does not match a full
    tree with parameters of which a part is masked out, and it minds boxes: `nnx.Optimizer` hands boxed
    parameters to `init` and bare gradients to `update`.
    """
    matched: list[tuple[Path, Any, Any]] = []

    def walk(path: Path, node: Any, entry: Any) -> None:
        node, entry = _unboxed(node), _unboxed(entry)
        if is_absent(node) or jtu.all_leaves([node]):
            matched.append((path, node, entry))
            return
        children, structure = _one_level(node)
        if prefix and jtu.all_leaves([entry]):
            entries = [entry] * len(children)
        else:
            with_keys, entry_structure = _one_level(entry)
            if entry_structure != structure:
                raise ValueError(
                    f"{role} does not have the structure of the parameters: at {_at(path)} the parameters "
                    f"have {describe(node)}, {role} has {describe(entry)}"
                )
            entries = [child for _, child in with_keys]
        for (key, child), child_entry in zip(children, entries, strict=True):
            walk((*path, *key), child, child_entry)

    walk((), params, tree)
    return matched


def _unboxed(node: Any) -> Any:
    """What a box (an NNX variable, a `Partitioned` array) holds in its attribute `value`."""
    while not jtu.all_leaves([node]):
        children, _ = _one_level(node)
        if [key for key, _ in children] != [_BOX]:
            break
        node = children[0][1]
    return node


def _one_level(node: Any) -> tuple[list[tuple[Path, Any]], jtu.PyTreeDef]:
    return jtu.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)


def _settle_leaf(path: Path, leaf: Any, given: Any, keep: Any) -> WeightAxes:
    if is_absent(leaf):
        return left_alone("absent")
    where = place(path, leaf)
    axes = _in_range(_as_weight_axes(given, where), leaf, where)
    if not _as_bool(keep, where):
        return left_alone("masked out", op=axes.op)
    return applicable(axes, leaf)


def _as_weight_axes(given: Any, where: str) -> WeightAxes:
    if isinstance(given, WeightAxes):
        return given
    if given is None:
        return left_alone("left alone by axes")
    if isinstance(given, optax.contrib.MuonDimensionNumbers):
        fan_in = _axis_tuple(given.reduction_axis, where)
        return WeightAxes(fan_in, _axis_tuple(given.output_axis, where), why="MuonDimensionNumbers")
    if _is_axis(given) or type(given) is tuple:  # a NamedTuple is something else
        return WeightAxes(_axis_tuple(given, where), why="given by axes")
    hint = "; a tree of bools is a mask" if isinstance(given, bool) else ""
    if where.startswith(_at(())) and not jtu.all_leaves([given]):
        hint = f". {_OUTSIDE_OF_FLATTEN}"
    raise TypeError(
        f"axes for {where} must be a WeightAxes, an int, a tuple of ints, a MuonDimensionNumbers or None, "
        f"got {describe(given)}{hint}"
    )


def _axis_tuple(given: Any, where: str) -> tuple[int, ...]:
    axes = (given,) if _is_axis(given) else given
    if not (isinstance(axes, tuple | list) and all(map(_is_axis, axes))):
        raise TypeError(f"axes for {where} must be ints, got {given!r}")
    return tuple(map(operator.index, axes))


def _is_axis(given: Any) -> bool:
    return isinstance(given, int | np.integer) and not isinstance(given, bool)


def _in_range(axes: WeightAxes, leaf: Any, where: str) -> WeightAxes:
    rank = len(leaf.shape) if is_array_like(leaf) else 0
    for axis in axes.fan_in + axes.fan_out:
        if not -rank <= axis < rank:
            raise ValueError(f"axes for {where}: axis {axis} is out of range for rank {rank}")
    fan_in = tuple(axis % rank for axis in axes.fan_in)
    fan_out = tuple(axis % rank for axis in axes.fan_out)
    if len(set(fan_in + fan_out)) < len(fan_in + fan_out):
        named = f"fan_in {axes.fan_in}" + (f", fan_out {axes.fan_out}" if axes.fan_out else "")
        raise ValueError(f"axes for {where}: an axis is repeated in {named}")
    return dataclasses.replace(axes, fan_in=fan_in, fan_out=fan_out)


def _as_bool(keep: Any, where: str) -> bool:
    is_bool = isinstance(keep, bool) or (is_array_like(keep) and keep.dtype == jnp.bool_ and keep.shape == ())
    if is_bool and not isinstance(keep, jax.core.Tracer):
        return bool(keep)
    raise TypeError(f"mask for {where} must be a bool that is known when the update is traced, got {keep!r}")


def applicable(axes: WeightAxes, leaf: Any) -> WeightAxes:
    """`axes` where there is something to average over; otherwise `leaf` is left alone."""
    if not is_inexact(leaf):
        return left_alone(f"no array of floats: {describe(leaf)}", op=axes.op)
    return _without_trivial_fan_in(axes, leaf.shape)


def _without_trivial_fan_in(axes: WeightAxes, shape: tuple[int, ...]) -> WeightAxes:
    if 0 in shape:
        return left_alone("empty", op=axes.op)
    fan_in = math.prod(shape[axis] for axis in axes.fan_in)
    if axes.fan_in and fan_in < 2:
        return left_alone(f"fan-in {fan_in}: nothing would be left of the gradient", op=axes.op)
    return axes


def left_alone(why: str, op: str = "") -> WeightAxes:
    """The axes of a parameter that is not centralized."""
    return WeightAxes((), (), op, why)


def is_array_like(leaf: Any) -> bool:
    """Whether a leaf is an array, or what stands for one: it has a shape and a dtype."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is an array of real or complex floating-point numbers."""
    return is_array_like(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


# For the reader of an error message.


def _at(path: Path) -> str:
    return jtu.keystr(path) or "the root"


def path_text(path: Path) -> str:
    """A path for the eye: "block_0/attention/kernel"."""
    inside = [key for key in path if (key,) != _BOX]
    return jtu.keystr(tuple(inside), simple=True, separator="/") or "(root)"


def place(path: Path, leaf: Any) -> str:
    """A leaf for the reader of an error message."""
    return f"{_at(path)}, shape {leaf.shape}" if is_array_like(leaf) else _at(path)


def describe(node: Any) -> str:
    """A node of a tree for the reader of an error message."""
    if is_array_like(node):
        return f"an array of dtype {node.dtype} and shape {node.shape}"
    if is_absent(node) or jtu.all_leaves([node]):
        return repr(node)
    children, _ = _one_level(node)
    return f"a {type(node).__name__} with {', '.join(_at(key) for key, _ in children) or 'nothing'}"
