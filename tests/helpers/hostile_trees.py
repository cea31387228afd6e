"""Cases for `test_hostile_trees.py`: a tree, axes and a mask that a user may give, and a call.

The tree, the axes and the mask are drawn together, leaf by leaf, so that a case knows what must come out of
it: a fan-in for each leaf, or an error that names one of some places.
"""

import collections
import dataclasses
from typing import Any

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax import tree_util as jtu

import gc_optax
from gc_optax import WeightAxes

# Few shapes, so that few programs are compiled. Those with a fan-in of 1 or 0 are among them.
SHAPES = [(), (3,), (3, 2), (2, 3), (1, 4), (2, 0), (2, 3, 2), (1, 1, 3, 2)]
FEW_SHAPES = [(), (3,), (3, 2), (1, 4), (2, 0), (2, 3, 2)]
FLOATS = [jnp.bfloat16, jnp.float16, jnp.complex64]
# float6 is left out: XLA has no code for it on CPU.
SMALL_FLOATS = [
    *(jnp.float4_e2m1fn, jnp.float8_e3m4, jnp.float8_e4m3, jnp.float8_e4m3b11fnuz, jnp.float8_e4m3fn),
    *(jnp.float8_e4m3fnuz, jnp.float8_e5m2, jnp.float8_e5m2fnuz, jnp.float8_e8m0fnu),
]
NO_FLOATS = [
    *(jnp.int4, jnp.uint4, jnp.int2, jnp.uint2, jnp.int8, jnp.uint8, jnp.int16, jnp.int32, jnp.uint32),
    jnp.bool_,
]
NUMPY_DTYPES = [
    *(np.float16, np.float32, np.float64, np.complex64, np.complex128, np.int64, np.bool_),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, jax.dtypes.float0),
]
# NumPy has them, JAX does not.
UNKNOWN_FLOATS = [np.longdouble, np.clongdouble, ">f4", ">c8"]
UNKNOWN = ["U3", "S2", object, "M8[s]", "V8", [("x", "f4")], ">i4", np.dtypes.StringDType()]

# What `out_last` says of a kernel depends on the last part of its path that has a word in it. The words
# here are unknown to it, but for the last few: what has one of them is left alone.
NAMES = [
    *("kernel", "w", "weight", "Dense_0", "layer", "", " ", "\n", "\x1b[31mred", "\t\r\x00"),
    *("[0]", "[bold]", "['a']", "a/k", "a.k", "/", ".", "..", "//x", "{0..3}", "{}", "%s", "\\", "'", '"'),
    *("ключ", "重み", "é", "\u202e", "\ud800", "🦙", "0", "01", "٣", "9" * 30, "x" * 5000, "7" * 5000),
    *("n\n" * 2500, "(root)", "the root", "params"),
]
NAMED_AS_NO_WEIGHT = ["bias", "LayerNorm/scale", "cls_token", "a/b", "a.bias", "my_codebook"]
NO_WEIGHT = ["bias", "scale", "cls_token", "b", "my_codebook"]


class Pair(collections.namedtuple("Pair", "kernel second")):
    """A named tuple, a node to JAX."""


class LongPair(collections.namedtuple("Pair", "first second")):
    """A node whose type has a very long name."""


LongPair.__name__ = "Pair" * 1000


@jtu.register_dataclass
@dataclasses.dataclass
class Registered:
    kernel: Any
    other: Any
    static: Any = dataclasses.field(default=1, metadata={"static": True})


@jtu.register_pytree_node_class
class NoKeys:
    """A node that says nothing of its keys, and what it holds beside its leaves has no hash."""

    def __init__(self, *children, static=()):
        self.children, self.static = children, static

    def tree_flatten(self):
        return self.children, list(self.static)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, static=static)


@jtu.register_pytree_with_keys_class
class OddKeys:
    """A node whose keys are of types that JAX does not have."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def tree_flatten_with_keys(self):
        return ((3.5, self.first), (("a", None), self.second)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@flax.struct.dataclass
class Struct:
    kernel: Any
    label: str = flax.struct.field(pytree_node=False, default="static")


class Module(eqx.Module):
    weight: Any
    inner: Any
    name: str = eqx.field(static=True, default="static")


class CallableModule(Module):
    def __call__(self, x):
        return self.weight @ x


class Foreign:
    """An array of another library: it has a shape and a dtype, and neither may be JAX's."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype


LongNamed = type("Long" * 2000, (Foreign,), {})


class Unprintable:
    def __repr__(self):
        raise RuntimeError("this cannot be printed")

    def __array__(self, *args, **kwargs):
        raise RuntimeError("this is no array")


class Chatty:
    def __repr__(self):
        return "chatty " * 100_000


class TheirsError(Exception):
    """An error of the user's own function."""


OTHER_LEAVES = [
    *(1, 0, True, 2.5, 1j, 10**5000, float("nan"), "", "text", "y" * 5000, b"bytes", np.float32, dict, len),
    *(jax.nn.relu, gc_optax.out_last, {1, 2}, range(3), Ellipsis, Unprintable(), Chatty(), Unprintable),
    *(np.float32(1), np.int64(2), np.bool_(True), np.str_("s"), slice(1), np.dtype("f4"), WeightAxes),
    *(
        LongNamed(None, None),
        Foreign((3, 2), object()),
        Foreign(None, None),
        jnp.float32,
        lambda params: params,
    ),
]


def pick(rng, options):
    return options[rng.integers(len(options))]


def chance(rng, share):
    return rng.random() < share


# Leaves


def numbers(rng, shape, dtype):
    """An array of NumPy with numbers that every dtype with a sign can hold."""
    drawn = np.clip(rng.normal(size=(2, *shape)), -2, 2)
    dtype = np.dtype(dtype)
    if dtype == jax.dtypes.float0:
        return np.zeros(shape, dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating) or dtype.kind == "c":
        return (drawn[0] + 1j * drawn[1]).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating) or dtype.kind == "f":
        return np.asarray(np.abs(drawn[0]) + 1 if "e8m0" in dtype.name else drawn[0]).astype(dtype)
    return np.asarray(drawn[0] > 0).astype(dtype)


def leaf(rng, x64):
    """A leaf of any kind: mostly an array of floats."""
    kind = rng.random()
    shape = pick(rng, SHAPES)
    if kind < 0.4:
        return jnp.asarray(numbers(rng, shape, jnp.float32))
    shape = pick(rng, FEW_SHAPES)
    if kind < 0.6:
        floats = [jnp.float64, jnp.complex128] if x64 else FLOATS
        return jnp.asarray(numbers(rng, shape, pick(rng, floats)))
    if kind < 0.66:
        return jnp.asarray(numbers(rng, pick(rng, [(3, 2), (2, 0)]), pick(rng, SMALL_FLOATS)))
    if kind < 0.73:
        return jnp.asarray(numbers(rng, shape, pick(rng, NO_FLOATS)))
    if kind < 0.82:
        return numbers(rng, shape, pick(rng, NUMPY_DTYPES))
    if kind < 0.83:
        return numbers(rng, pick(rng, [(), (3,), (3, 2)]), pick(rng, UNKNOWN_FLOATS))
    if kind < 0.85:
        return np.zeros(shape, pick(rng, UNKNOWN))
    if kind < 0.86:
        float32 = np.dtype("f4")
        stands_for = [jax.ShapeDtypeStruct((3, 2), float32), jax.core.ShapedArray((3, 2), float32)]
        stands_for += [Foreign([3, 2], float32), Foreign((3, 2), "float32"), LongNamed((3, 2), float32)]
        stands_for += [np.ma.masked_array(numbers(rng, (3, 2), float32), mask=[[True, False]] * 3)]
        return pick(rng, stands_for)
    if kind < 0.88:
        return jax.random.wrap_key_data(jnp.zeros((*shape, 2), jnp.uint32))
    if kind < 0.93:
        return pick(rng, [None, optax.MaskedNode()])
    return pick(rng, OTHER_LEAVES)


# Trees


def keys(rng, count):
    """Keys of a dict, which JAX must be able to sort."""
    kind = rng.random()
    if kind < 0.15:
        return [pick(rng, [0, 1, 7, -3, True, 2.5, 10**20, np.int64(5)]) for _ in range(count)]
    if kind < 0.25:
        return [(pick(rng, NAMES), int(rng.integers(3))) for _ in range(count)]
    if kind < 0.35:
        return [pick(rng, NAMED_AS_NO_WEIGHT) for _ in range(count)]
    return [pick(rng, NAMES) for _ in range(count)]


def tree(rng, x64, depth=3):
    if depth == 0 or chance(rng, 0.15):
        return leaf(rng, x64)
    count = int(rng.integers(0, 4))
    kind = rng.integers(16)

    def child():
        return tree(rng, x64, depth - 1)

    if kind < 5:
        return {key: child() for key in keys(rng, count)}
    if kind == 5:
        return [child() for _ in range(count)]
    if kind == 6:
        return tuple(child() for _ in range(count))
    if kind == 7:
        return Pair(child(), child())
    if kind == 8:
        return Registered(child(), child(), static=pick(rng, [1, True, "text", (1, 2), None]))
    if kind == 9:
        return flax.core.FrozenDict({key: child() for key in keys(rng, count) if isinstance(key, str)})
    if kind == 10:
        return nnx.State(
            {f"layer_{n}": pick(rng, [nnx.Param, nnx.BatchStat])(leaf(rng, x64)) for n in range(2)}
        )
    if kind == 11:
        return pick(rng, [Module, CallableModule])(child(), child())
    if kind == 12:
        names = ("in", None)
        return pick(rng, [nn.Partitioned, nn.LogicallyPartitioned])(leaf(rng, x64), names=names)
    if kind == 13:
        return NoKeys(child(), child(), static=pick(rng, [(), [1], "ab"]))
    if kind == 14:
        return pick(
            rng, [OddKeys(child(), child()), Struct(child()), nnx.Param(leaf(rng, x64)), Careless(child())]
        )
    ordered = collections.OrderedDict((key, child()) for key in keys(rng, count))
    return pick(rng, [ordered, collections.defaultdict(list, {"a": child()})])


@jtu.register_pytree_with_keys_class
class Careless:
    """A node that keeps an array beside its leaves: nobody can say whether two of them are alike."""

    def __init__(self, kernel, static=None):
        self.kernel, self.static = kernel, np.arange(3) if static is None else static

    def tree_flatten_with_keys(self):
        return ((jtu.GetAttrKey("kernel"), self.kernel),), self.static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, static)


def is_absent(node):
    return node is None or isinstance(node, optax.MaskedNode)


def places(params):
    """The leaves with their paths, those that are absent too."""
    return jtu.tree_flatten_with_path(params, is_leaf=is_absent)[0]


def like(params, entries):
    """`entries` in the structure of `params`."""
    return jtu.tree_unflatten(jtu.tree_structure(params, is_leaf=is_absent), entries)


# What is true of a leaf, without a line of gc_optax


def is_array_like(value):
    return isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype")


def is_float(value):
    if not is_array_like(value):
        return False
    try:
        dtype = value.dtype
        return bool(jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.complexfloating))
    except TypeError:
        return False


def has_unknown_dtype(value):
    return isinstance(value, np.ndarray | np.generic) and value.dtype in list(map(np.dtype, UNKNOWN_FLOATS))


def is_computable(value):
    """Whether JAX computes with an array of floats."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    return is_array and not isinstance(value, np.ma.MaskedArray) and not has_unknown_dtype(value)


def rank(value):
    return len(value.shape) if is_array_like(value) else 0


def effective(value, fan_in):
    """The axes that are averaged over: none where nothing can be subtracted or nothing would be left."""
    if is_absent(value) or not is_float(value) or 0 in value.shape or "e8m0" in str(value.dtype):
        return ()
    size = int(np.prod([value.shape[axis] for axis in fan_in]))
    return tuple(axis % rank(value) for axis in fan_in) if size >= 2 else ()


def by_convention(path, value, first):
    """What the conventions say of the names above: all axes but one, or nothing."""
    if not is_float(value) or rank(value) < 2 or last_name(path) in NO_WEIGHT:
        return ()
    every = tuple(range(rank(value)))
    return effective(value, every[1:] if first else every[:-1])


def last_name(path):
    """The last part of a path that has a word in it. The step into a box is no name."""
    parts = []
    for key in path:
        names = getattr(key, "name", getattr(key, "key", ""))
        if key != jtu.GetAttrKey("value"):
            for name in names if isinstance(names, tuple) else (names,):
                # To a dict, True is the key 1.
                parts += str(1 if name is True else name).replace("/", ".").split(".")
    worded = [part for part in parts if any("a" <= letter.lower() <= "z" for letter in part)]
    return worded[-1] if worded else ""


# Axes and masks


def written(rng, fan_in, size):
    """The same axes in one of the ways in which a user may write them."""
    fan_in = tuple(axis - size if chance(rng, 0.3) else axis for axis in fan_in)
    options = [fan_in, WeightAxes(fan_in), optax.contrib.MuonDimensionNumbers(fan_in, ())]
    options += [optax.contrib.MuonDimensionNumbers(list(fan_in), []), tuple(map(np.int64, fan_in))]
    if not fan_in:
        options += [None, WeightAxes((), why="because " * 1000)]
    if len(fan_in) == 1:
        options += [fan_in[0], np.int32(fan_in[0])]
    return pick(rng, options)


def good_axes(rng, values):
    """For each leaf its axes, and what a user may write for them."""
    chosen = []
    for value in values:
        size = 0 if is_absent(value) else rank(value)
        count = int(rng.integers(0, size + 1))
        fan_in = tuple(sorted(int(axis) for axis in rng.permutation(size)[:count]))
        fan_in = fan_in[::-1] if chance(rng, 0.1) else fan_in
        # In the place of what is absent anything may stand.
        entry = pick(rng, [0, "x", None, 2.5]) if is_absent(value) else written(rng, fan_in, size)
        chosen.append((fan_in, entry))
    return chosen


def bad_entry(rng, value):
    """What is no axes of this leaf."""
    size = rank(value)
    wrong = [size, -size - 1, (0, size), 10**5000, (10**5000,), WeightAxes((0, -size if size else 0))]
    wrong += ["0", "out_last", 1.0, True, False, np.bool_(True), [0], (True,), ("0",), (1.5,), {"a": 0}, b"0"]
    wrong += [np.arange(2), jnp.ones(2), jax.ShapeDtypeStruct((), jnp.int32), optax.EmptyState(), "z" * 5000]
    wrong += [optax.MaskedNode(), Pair(0, 1), ((0,),), (None,), Unprintable(), Chatty(), [[]] * 5000]
    wrong += [LongNamed(None, None), LongPair(0, 1), Careless(0)]
    wrong += [WeightAxes((0,), (0,)), WeightAxes((size + 7,)), optax.contrib.MuonDimensionNumbers("0", 1)]
    wrong += [optax.contrib.MuonDimensionNumbers(0, size), optax.sgd(0.1), gc_optax.out_last, len, np.float32]
    wrong += [gc_optax.out_last([jnp.ones((2,) * (size + 2))])[0], {f"{n}": 0 for n in range(10_000)}]
    return pick(rng, wrong)


def wrong_as_a_whole(entry, is_whole):
    """Axes and masks as a whole may be None or a function: there is nothing wrong with them then."""
    return "0" if is_whole and (entry is None or callable(entry)) else entry


def bad_keep(rng):
    """What is no bool."""
    wrong = [0, 1, "True", None, 1.0, np.array([True]), np.int8(1), jnp.ones(3, bool), {"a": True}, [True]]
    wrong += [jax.ShapeDtypeStruct((), jnp.bool_), np.float32, optax.MaskedNode(), Chatty(), jnp.float32(1)]
    wrong += [(True, False), "t" * 5000, Unprintable(), len, jax.random.key(0), WeightAxes((0,)), np.bool_]
    return pick(rng, wrong)


def prefix_mask(rng, node):
    """A mask that has one bool for some subtrees, and the bool of each leaf."""
    children, structure = jtu.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    if is_absent(node) or jtu.all_leaves([node]) or chance(rng, 0.3):
        keep = chance(rng, 0.7)
        given = pick(rng, [keep, keep, np.bool_(keep), np.array(keep), jnp.asarray(keep)])
        return given, [keep] * len(places(node))
    masks = [prefix_mask(rng, child) for _, child in children]
    whole = jtu.tree_unflatten(structure, [mask for mask, _ in masks])
    return whole, [keep for _, kept in masks for keep in kept]


def without_boxes(given):
    """A tree with the contents of boxes in their places, as `nnx.Optimizer` hands gradients on."""

    def is_box(node):
        return isinstance(node, nnx.Variable | nn.Partitioned)

    def content(node):
        return jtu.tree_leaves(node, is_leaf=lambda inner: inner is not node)[0] if is_box(node) else node

    return jtu.tree_map(content, given, is_leaf=is_box)


CALLS = [
    *["init", "update", "update twice", "centralize_gradients", "centralized", "summarize"] * 3,
    *["removed_fraction", "summarize with gradients", "update in jit", "centralize_gradients in jit"],
    *["centralized updates", "convention"],
]


@dataclasses.dataclass
class Case:
    """What is called, and what must come of it.

    The call "convention" is `axes(params)`.

    Args:
        refused: the paths of which an error must name one; none where there must be a result. A path that
            is an argument's name, a string, is that argument as a whole.
        fan_in: for each leaf the axes that are averaged over.
        theirs: whether a function of the user raises.
    """

    call: str
    params: Any
    axes: Any = None
    mask: Any = None
    refused: list[Any] = dataclasses.field(default_factory=list)
    fan_in: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    theirs: bool = False
    x64: bool = False
    fault: str = ""


SGD = optax.sgd(0.1)
# What is wrong whatever the tree is. The names must be in the message.
BAD_ARGUMENTS = {
    "optimizer must": lambda params: gc_optax.centralized(params),
    "centralization must be an": lambda params: gc_optax.centralized(SGD, [params]),
    "centralization must be without state": lambda params: gc_optax.centralized(SGD, SGD).init(params),
    "where must": lambda params: gc_optax.centralized(SGD, where=params),
    "conv_only needs": lambda params: gc_optax.conv_only(None),
    "summarize needs the parameters": lambda params: gc_optax.summarize([WeightAxes(()), params]),
    "gradients does not": lambda params: gc_optax.summarize([params], gradients={"other": params}),
    "partition_specs": lambda params: gc_optax.centralize_gradients(params, partition_specs=params),
}


def draw(seed, number):
    """The case of this number: the same one whenever and wherever it is drawn."""
    rng = np.random.default_rng([seed, number])
    x64 = chance(rng, 0.05)
    with jax.enable_x64(x64):
        return _draw(rng, x64)


def _draw(rng, x64):
    params = tree(rng, x64)
    leaves = places(params)
    values = [value for _, value in leaves]
    kind = rng.random()
    case = Case(pick(rng, CALLS), params, x64=x64)
    if kind < 0.4:  # by convention
        first = chance(rng, 0.4)
        case.fan_in = [by_convention(path, value, first) for path, value in leaves]
        case.axes = gc_optax.out_first if first else pick(rng, [None, None, gc_optax.out_last])
        if case.axes is not None and chance(rng, 0.3):
            case.axes = gc_optax.conv_only(case.axes)
            # No name here is one of a convolution, but this shape is: a window of 1 x 1.
            case.fan_in = [axes if axes == (0, 1, 2) else () for axes in case.fan_in]
    else:
        chosen = good_axes(rng, values)
        case.fan_in = [effective(value, fan_in) for value, (fan_in, _) in zip(values, chosen, strict=True)]
        case.axes = like(params, [entry for _, entry in chosen])
        if chance(rng, 0.2):
            case.axes = without_boxes(case.axes)
        if case.axes is None:  # for a lone array that is the default
            case.axes = WeightAxes(())
    if chance(rng, 0.3):
        case.mask, keeps = prefix_mask(rng, params)
        case.fan_in = [axes if keep else () for axes, keep in zip(case.fan_in, keeps, strict=True)]
    if case.call == "convention":
        if case.mask is None and callable(case.axes) and jtu.all_leaves([case.axes]):
            return case
        case.call = "update"
    if chance(rng, 0.45) and not all(map(is_absent, values)):
        fault = pick(rng, FAULTS)
        case.fault, case.refused = fault.__name__, fault(rng, case, leaves)
    if case.refused:
        case.refused += [path for path, value in leaves if is_float(value) and not is_computable(value)]
    elif not case.theirs:
        case.refused = uncomputable(case, leaves)
        if not callable(case.axes) and case.axes is not None and chance(rng, 0.2):
            given = case.axes
            case.axes = lambda params: given
        if case.mask is not None and chance(rng, 0.2):
            kept = case.mask
            case.mask = lambda params: kept
    return case


def uncomputable(case, leaves):
    """The leaves that are to be centralized, and that JAX cannot compute with."""
    refused = []
    for (path, value), fan_in in zip(leaves, case.fan_in, strict=True):
        is_needed = bool(fan_in) or (case.call == "summarize with gradients" and is_float(value))
        is_read = case.call not in ("init", "summarize") or has_unknown_dtype(value)
        if is_needed and is_read and not is_computable(value):
            refused.append(path)
    return refused


# Faults: each changes a case, and returns the places of which the error must name one


def axes_entry(rng, case, leaves):
    number, is_whole = present_leaf(rng, case, leaves)
    entries = [entry for _, entry in good_axes(rng, [value for _, value in leaves])]
    entries[number] = wrong_as_a_whole(bad_entry(rng, leaves[number][1]), is_whole)
    # The axes of what is masked out are not read.
    case.axes, case.mask = like(case.params, entries), None
    return [leaves[number][0]]


def mask_entry(rng, case, leaves):
    number, is_whole = present_leaf(rng, case, leaves)
    kept = [True] * len(leaves)
    kept[number] = wrong_as_a_whole(bad_keep(rng), is_whole)
    case.mask = like(case.params, kept)
    return [leaves[number][0]]


def present_leaf(rng, case, leaves):
    number = pick(rng, [number for number, (_, value) in enumerate(leaves) if not is_absent(value)])
    return number, case.params is leaves[number][1]


def axes_of_another_structure(rng, case, leaves):
    case.axes = other_structure(rng, like(case.params, [None] * len(leaves)))
    return around(leaves)


def mask_of_another_structure(rng, case, leaves):
    case.mask = other_structure(rng, like(case.params, [True] * len(leaves)))
    return around(leaves)


def other_structure(rng, whole):
    return pick(
        rng, [[whole], {"params": whole}, (whole, whole), {"a": "x", "b": [whole]}, Pair(whole, whole)]
    )


def around(leaves):
    """Every place there is: where two trees differ, any of them may be the one that is named."""
    return [path[:length] for path, _ in leaves for length in range(len(path) + 1)]


def other_static_field(rng, case, leaves):
    case.params = pick(rng, [Registered(case.params, case.params), Careless(case.params)])

    def other(whole):
        if isinstance(case.params, Careless):
            return Careless(whole)
        return Registered(whole, whole, static=pick(rng, [2, "s" * 5000, Unprintable()]))

    if chance(rng, 0.5):
        case.axes = other(like(case.params, [None] * len(places(case.params))))
    else:
        case.axes, case.mask = gc_optax.out_last, other(True)
    return [()]


def junk(rng):
    """What is neither axes nor a mask."""
    some = [3.5, "out_last", object(), b"", jnp.ones(2), np.array("s"), SGD, {}, [], "j" * 5000, [[]]]
    some += [Unprintable(), Chatty(), range(3), {1, 2}, Ellipsis, WeightAxes((99,)), float("nan")]
    return pick(rng, some)


def junk_for_axes(rng, case, leaves):
    case.axes, case.mask = junk(rng), None
    return around(leaves)


def junk_for_a_mask(rng, case, leaves):
    case.mask = junk(rng)
    return around(leaves)


def function_that_returns_junk(rng, case, leaves):
    returned = junk(rng)
    case.axes, case.mask = lambda params: returned, None
    return around(leaves)


def function_that_raises(rng, case, leaves):
    def raising(params):
        raise TheirsError

    case.axes, case.theirs = raising, True
    return []


def conv_only_of_bare_axes(rng, case, leaves):
    case.axes = lambda params: gc_optax.conv_only(like(params, ["junk"] * len(leaves)))
    return [path for path, _ in leaves]


def traced(rng, case, leaves):
    case.call, case.axes, case.mask = pick(rng, ["traced axes", "traced mask"]), None, None
    return [path for path, _ in leaves]


def bad_argument(rng, case, leaves):
    case.call = pick(rng, list(BAD_ARGUMENTS))
    return [case.call]


FAULTS = [
    *[axes_entry, mask_entry, axes_of_another_structure, mask_of_another_structure] * 3,
    *[junk_for_axes, junk_for_a_mask, traced] * 2,
    *(function_that_returns_junk, function_that_raises, other_static_field, conv_only_of_bare_axes),
    bad_argument,
]
