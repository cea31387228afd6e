"""The conventions: axes from names and shapes, and how sure that is."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
from jax import tree_util as jtu

from ._axes import (
    Axes,
    AxesTree,
    Path,
    PyTree,
    Role,
    WeightAxes,
    is_function,
    is_inexact,
    left_alone,
    read_from,
)
from ._text import BOX, at, describe

_DOT = "dot_general"
_CONV = "conv_general_dilated"


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

    From rank 3 on, "every axis but the last" is a guess: (12, 64, 8, 8) may be twelve attention layers, and
    (5, 16, 32) a convolution of width 5 or five dense layers. These are settled:

    - attention layers of rank 3 whose `query`, `key`, `value` and `out` fit together, and depthwise and
      transposed convolutions whose names tell their layout;
    - a convolution whose name counts its dimensions, `conv2d` of Keras or `conv2_d` of Haiku, where the rank
      is two more (of `conv1d`, where it has more than 32 inputs);
    - a kernel of rank 4 with a square window whose module's name has the word "conv", or over an image of up
      to 4 channels where the path says "patch", "stem" or "embed";
    - a window of 1 x 1, in which nothing can be taken for a stack.

    Where the path speaks of a stack ("scan", "ensemble", "experts"), or the name of a transposed convolution
    of unknown layout, nothing of rank 3 and more is.

    Given explicitly, as in `centralize(out_last)`, the convention is silent. As the default it warns
    of each kernel that it cannot settle: see `centralize`.

    Args:
        params: the parameters, a tree of arrays of any shape and dtype, or of
            `jax.ShapeDtypeStruct`s. Nothing but shapes, dtypes and the path of each leaf is read.

    Returns:
        A tree with the structure of `params` and a `WeightAxes` at each leaf.

    Examples:
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
    return jax.tree.unflatten(structure, [reading.axes for reading in read_out_last(places)])


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

    Examples:
        >>> import jax.numpy as jnp
        >>> from gc_optax import out_first
        >>> out_first([jnp.ones((10, 64)), jnp.ones((16, 3, 5, 5))])[1].fan_in
        (1, 2, 3)

    References:
        The authors' code, https://github.com/Yonghongwei/Gradient-Centralization
    """
    return jtu.tree_map_with_path(lambda path, leaf: _read(_out_first_kernel, path, leaf).axes, params)


@overload
def conv_only(axes: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]: ...
@overload
def conv_only(axes: AxesTree) -> PyTree: ...
def conv_only(axes: Axes) -> PyTree:
    """Keeps the convolutions of a tree or of a convention, and leaves everything else alone.

    This is `gc_conv_only` in the authors' code, and what the `GCC` variants of their optimizers do.

    A leaf is a convolution where its `op` is `"conv_general_dilated"`. To the conventions it is one from
    rank 3 on where its module's name has the word "conv", and where `out_last` settles it as one.
    The authors take every kernel of rank 4 for one: in JAX that may be a stack of attention layers.

    Args:
        axes: a tree of `WeightAxes`, or a function from parameters to such a tree, `out_last` for
            example.

    Returns:
        The same kind of thing: a tree for a tree, a function for a function.

    Raises:
        TypeError: if a leaf is not a `WeightAxes`: bare axes do not say what the weight is used for.

    Examples:
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
    return functools.partial(convolutions_of, axes) if is_function(axes) else _keepconvolutions_of(axes)


def is_convention(function: Any) -> bool:
    """Whether a function of the parameters is one of ours, which read nothing but names and shapes."""
    if isinstance(function, functools.partial):
        return function.func is convolutions_of and is_convention(*function.args)
    return function in (out_last, out_first)


def convolutions_of(convention: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """What `conv_only(convention)` makes of the parameters."""
    return _keepconvolutions_of(convention(params))


def _keepconvolutions_of(axes: PyTree) -> PyTree:
    return jtu.tree_map_with_path(_keep_convolution, axes)


def _keep_convolution(path: Path, axes: Any) -> WeightAxes:
    """The axes of a convolution, and of what is left alone anyway; any other weight is left alone."""
    if not isinstance(axes, WeightAxes):
        raise TypeError(
            f"conv_only needs a WeightAxes at every leaf, to know which are convolutions; "
            f"at {at(path)} there is {describe(axes)}"
        )
    if axes.op == _CONV or not axes.fan_in:
        return axes
    why = "no convolution" if axes.op else "not known to be a convolution"
    return left_alone(why, axes.op, axes.role or "weight")


class _Name(NamedTuple):
    """The name of a leaf, in words.

    In "decoder/conv2_d_transpose/w" the leaf is `["w"]`, its module `["conv", "2d", "transpose"]` and its
    parent `("decoder",)`. A leaf that has a name of its own, "decoder/depthwise_kernel", is its own module.
    """

    leaf: list[str]
    module: list[str]
    parent: tuple[str, ...]
    path: tuple[str, ...]


class _Reading(NamedTuple):
    """What a convention makes of a leaf.

    `settled` is false where another reading is usual too: a kernel of shape (5, 16, 32) is a convolution of
    width 5, or a stack of five dense layers.
    """

    axes: WeightAxes
    settled: bool


# The last word of a leaf's name that one of these knows decides: "kernel_scale" is a scale, and
# "embed_kernel" is a kernel. Frameworks glue words together ("posemb"), so some match an ending.
_WEIGHT = re.compile(r"kernels?|weights?|w")
_A_TABLE = "named as an embedding, a lookup table"
_NO_WEIGHT_MATRIX = {
    re.compile(r".*bias(es)?|offset|shift|beta"): "named as a bias",
    re.compile(r".*scales?|gamma|alpha|slope|gain"): "named as a scale",
    re.compile(r".*emb(ed(ding)?)?s?|codebooks?"): _A_TABLE,
    re.compile(r"tokens?"): "named as a token, a learned input",
    re.compile(r"mean|var(iance)?|std(dev)?"): "named as a statistic",
}
# The names of modules that call their array "weight", their words joined by underscores.
_NORMALIZATION_MODULE = re.compile(r".*norm(alization)?|(.*_)?[bgl]n(_f)?")
_EMBEDDING_MODULE = re.compile(r".*emb(ed(ding)?)?s?(_tokens|_positions)?|wte|wpe")
# "Conv_0", "conv2d" and "dwconv" are convolutions. A graph's and a spectral one are products of matrices.
_CONVOLUTION = re.compile(r".*conv(olution)?")
_OTHER_CONVOLUTION = re.compile(r".*(graph|spectral|fourier).*|gat|gcn|fno")
_PATCHES = re.compile(r"patch|stem|embed")
# In front of a kernel there are layers, experts or members: three of them with a width of 3 have a "window"
# of 3 x 3 too.
_STACK = re.compile(r"scan|stack|ensemble|expert|moe|vmap|remat|lora")
# Flax keeps transposed convolutions as (*window, in, out) or as (*window, out, in), unshared ones
# with a weight of their own at each position, and scanned attention may have lost its siblings.
_DOUBTFUL = re.compile(
    r".*(transp|convt|tconv|deconv|upconv|unpool|upsampl|upscale).*|trans|tr|t|dt|up|local|query|key|value"
    r"|dec|decoder|gen|generator|g"
)
_MOST_CHANNELS = 4  # of an image
_WIDEST_WINDOW = 32
_ATTENTION_MODULES = {"query", "key", "value", "out", "attention_output"}


def read_out_last(places: list[tuple[Path, Any]], *, of_keras: bool = False) -> list[_Reading]:
    """What `out_last` makes of each leaf, and whether that is settled.

    It takes all leaves at once: whether "query" is a projection of an attention layer, its siblings tell.
    `of_keras` says that the names are those of Keras's layers. "conv_1" is then no name that a framework
    gives, and may be what a user calls a transposed or a depthwise convolution.
    """
    attention = _attention_layers(places)
    rule = functools.partial(_out_last_kernel, attention, of_keras)
    return [_read(rule, path, leaf) for path, leaf in places]


def _read(rule: Callable[[_Name, tuple[int, ...]], _Reading], path: Path, leaf: Any) -> _Reading:
    """What a convention makes of one leaf. Its `rule` is for kernels; biases and the like are left alone."""
    if not is_inexact(leaf):
        return _Reading(left_alone(f"no array of floats: {describe(leaf)}"), settled=True)
    if len(leaf.shape) < 2:
        return _Reading(left_alone(f"rank {len(leaf.shape)}: no weight matrix"), settled=True)
    name = _name(path)
    why_not = _no_weight_matrix(name, len(leaf.shape))
    if why_not:
        role: Role = "lookup" if why_not == _A_TABLE else ""
        return _Reading(left_alone(why_not, role=role), settled=True)
    reading = rule(name, leaf.shape)
    axes = dataclasses.replace(reading.axes, role="weight")
    return reading._replace(axes=read_from(leaf, axes))


def _out_last_kernel(
    attention: set[tuple[str, ...]], of_keras: bool, name: _Name, shape: tuple[int, ...]
) -> _Reading:
    """The axes of a kernel of Flax, Haiku or Keras; `attention` has the parents of attention layers."""
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
    if rank >= 3 and words & {"depthwise", "depthwiseconv", "dw", "dwconv", "dwise"} and shape[-2] > 1:
        # Flax and Haiku keep depthwise kernels as (*window, 1, channels): this can only be Keras.
        axes = WeightAxes(every[:-2], every[-1:], _CONV, "out_last: named as a depthwise kernel, the window")
        return _Reading(axes, settled=True)
    if rank >= 3 and words & {"transpose", "transposed"} and (name.leaf == ["w"] or _dimensions(name)):
        # Haiku's conv2_d_transpose and Keras's conv2d_transpose. Flax has no "2d", nor one layout.
        fan_in = (*every[:-2], rank - 1)
        axes = WeightAxes(fan_in, every[-2:-1], _CONV, "out_last: named as a transposed convolution")
        return _Reading(axes, settled=name.leaf == ["w"])
    is_convolution = _is_convolution(name, shape[:-2], shape[-2])
    op = _op(name, rank, is_convolution)
    axes = WeightAxes(every[:-1], every[-1:], op, "out_last: every axis but the last")
    is_doubtful = any(map(_DOUBTFUL.fullmatch, words)) or (of_keras and not _dimensions(name))
    return _Reading(axes, settled=rank == 2 or (is_convolution and not is_doubtful))


def _out_first_kernel(name: _Name, shape: tuple[int, ...]) -> _Reading:
    """The axes of a kernel of PyTorch or Equinox."""
    rank = len(shape)
    every = tuple(range(rank))
    op = _op(name, rank, _is_convolution(name, shape[2:], shape[1]))
    axes = WeightAxes(every[1:], every[:1], op, "out_first: every axis but the first")
    return _Reading(axes, settled=True)  # nobody gets it who did not ask for it


def _op(name: _Name, rank: int, is_convolution: bool) -> str:
    """The primitive that takes a kernel; empty where that is not known."""
    if rank == 2:
        return _DOT
    return _CONV if is_convolution or _is_named_convolution(name) else ""


def _is_convolution(name: _Name, window: tuple[int, ...], inputs: int) -> bool:
    """Whether a kernel is certain to be one convolution, and not a stack of kernels.

    The name has to say that it is one, or that it cuts an image into patches. That is not enough: twelve
    convolutions of width 3 in one array are "Conv_0/kernel" too, of shape (12, 3, 64, 64). "conv2d" counts
    its dimensions; without that, a square window tells, where no name around it speaks of a stack. In a
    window of 1 x 1 there is nothing to tell.
    """
    path = "/".join(name.path).lower()
    if _STACK.search(path.replace("_", "")) or not window or max(window) > _WIDEST_WINDOW:
        return False
    if dimensions := _dimensions(name):
        # Depthwise kernels of shape (width, channels) in a stack have rank 3 too.
        return len(window) == dimensions and (dimensions > 1 or inputs > _WIDEST_WINDOW)
    is_square = len(window) == 2 and window[0] == window[1]
    is_of_patches = bool(_PATCHES.search(path)) and inputs <= _MOST_CHANNELS
    return is_square and (window[0] == 1 or is_of_patches or _is_named_convolution(name))


def _is_named_convolution(name: _Name) -> bool:
    is_other = any(map(_OTHER_CONVOLUTION.fullmatch, name.module))
    return not is_other and any(map(_CONVOLUTION.fullmatch, name.module))


def _dimensions(name: _Name) -> int:
    """How many dimensions the name of a convolution counts: 2 in "conv2d" and "conv2_d", 0 in "Conv_0"."""
    if not _is_named_convolution(name):
        return 0
    for word, following in itertools.pairwise(name.module):
        if _CONVOLUTION.fullmatch(word) and following in ("1d", "2d", "3d"):
            return int(following[0])
    return 0


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
    """Whether these are the kernels of one attention layer.

    `query` has the shape (embed, heads, dim), `value` (embed, heads, dim of a value) and `out` takes the
    heads together again: (heads, dim of a value, embed). All of them may be stacked: (layers, ...).
    """
    if shapes.keys() != {"query", "key", "value", "out"} or len({*map(len, shapes.values())}) > 1:
        return False
    return shapes["out"][-3:-1] == (shapes["query"][-2], shapes["value"][-1])


def _no_weight_matrix(name: _Name, rank: int) -> str:
    """Why the name says that the leaf is no weight matrix; empty where it does not."""
    if name.leaf == ["b"]:
        return "named as a bias"
    for word in reversed(name.leaf):
        if _WEIGHT.fullmatch(word):
            break
        for pattern, why in _NO_WEIGHT_MATRIX.items():
            # Keras calls the projection from a model's width to its vocabulary "reverse_embeddings".
            if pattern.fullmatch(word) and not (why == _A_TABLE and "reverse" in name.leaf):
                return why
    # PyTorch and Equinox call the array of any module "weight", so the module's name must tell.
    if name.leaf == ["weight"]:
        module = "_".join(name.module)
        if _NORMALIZATION_MODULE.fullmatch(module):
            return "named as the weight of a normalization"
        # At a higher rank it is a patch embedding, which is a convolution.
        if rank == 2 and _EMBEDDING_MODULE.fullmatch(module):
            return _A_TABLE
    return ""


def _name(path: Path) -> _Name:
    """The words of a path: what the leaf, its module and the modules around that are called."""
    keys = list(path)
    while keys and (keys[-1],) == BOX:
        keys.pop()
    parts = [part for key in keys for part in _parts(key)]
    # An index says which of several arrays of one name it is.
    while parts and not _words(parts[-1]):
        parts.pop()
    leaf, path = _words(parts[-1]) if parts else [], tuple(parts)
    if leaf and _WEIGHT.fullmatch(leaf[-1]) and len(parts) > 1:
        return _Name(leaf, _words(parts[-2]), path[:-2], path)
    return _Name(leaf, leaf, path[:-1], path)


def _parts(key: Any) -> list[str]:
    """The names in one step of a path; an index is a name without words."""
    step = getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))
    # Flattened trees of Flax have tuples for keys. Haiku's modules and flattened trees of other kinds join
    # names with a slash, PyTorch's with a dot.
    names = step if isinstance(step, tuple) else (step,)
    # To a dict, the keys True and 1 are one.
    texts = [str(int(name) if isinstance(name, bool) else name) for name in names]
    return [part for text in texts for part in re.split(r"[/.]", text)]


def _words(name: str) -> list[str]:
    """The words of a name: `["conv", "2d", "transpose"]` for "Conv2DTranspose" and "conv2_d_transpose"."""
    words: list[str] = re.findall(r"[123]_?[dD](?![a-z])|[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    # "b" is a bias, "B" the second matrix of a LoRA pair: a single letter keeps its case.
    return [word if len(word) == 1 else word.lower().replace("_", "") for word in words]
