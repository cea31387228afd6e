"""What each axis of a parameter means: fan-in, fan-out or batch, and what that converts to."""

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeGuard, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import tree_util as jtu

PyTree = Any
Path = tuple[Any, ...]
Role = Literal["", "input", "hidden", "output", "weight", "lookup"]


class _IsDataclass(Protocol):
    """A node that is a dataclass, as a module of Equinox is."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class _IsMuonDimensionNumbers(Protocol):
    """What `optax.contrib.MuonDimensionNumbers` is, for type checkers that do not read optax."""

    @property
    def reduction_axis(self) -> Any: ...
    @property
    def output_axis(self) -> Any: ...


# To type checkers a tree is `Any` as soon as a part of it may be. So these name the kinds of nodes that trees
# of axes are made of: a string or a transformation in their place is an error.
Nodes: TypeAlias = "Mapping[Any, Any] | list[Any] | _IsDataclass | None"
AxesTree: TypeAlias = (
    "WeightAxes | int | np.integer[Any] | _IsMuonDimensionNumbers | tuple[AxesTree, ...] | Nodes"
)
MaskTree: TypeAlias = "bool | np.bool_ | jax.Array | tuple[MaskTree, ...] | Nodes"
Axes: TypeAlias = "AxesTree | Callable[[PyTree], PyTree]"
Mask: TypeAlias = "MaskTree | Callable[[PyTree], PyTree]"


@dataclasses.dataclass(frozen=True)
class WeightAxes:
    """Which axes of one parameter are the inputs of its weight vectors, and how that is known.

    Gradient centralization averages over `fan_in`. Axes in neither `fan_in` nor `fan_out` are batch
    axes: a stack of layers, of experts, of groups. For the average a batch axis is like a fan-out
    axis: every index along it has weight vectors of its own.

    An empty `fan_in` means "leave this parameter alone". JAX treats a `WeightAxes` as one leaf of a
    tree, so a tree of them has the structure of the parameters.

    What `infer_axes` or a convention returns knows in its attribute `rank` how many axes the parameter has
    that it was read from, and is refused for another, as in a stack of such models. What you make yourself,
    also by `dataclasses.replace`, has the rank `None` and is for any.

    Args:
        fan_in: the axes that are averaged over. Negative axes count from the end.
        fan_out: the axes that tell one weight vector from another.
        op: the JAX primitive in which the weight meets the data (`"dot_general"`,
            `"conv_general_dilated"`), as far as it is known.
        why: for a reader, where the axes come from or why the parameter is left alone.
        role: where in the model a weight stands, as far as it is known. `"input"`: the data have met no
            other weight before. `"output"`: they meet none afterwards. `"hidden"`: what lies between.
            `"weight"`: it is not known where. `"lookup"`: a table that data index into. Empty for all else,
            a bias for example. A weight has a role even where its `fan_in` is empty because it has a single
            input, or because it is used in ways that differ. `infer_axes` has the definition.

    Raises:
        TypeError: if `fan_in` or `fan_out` is not a tuple of ints.
        ValueError: if `role` is none of these.

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
    role: Role = ""
    rank: int | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for field, axes in (("fan_in", self.fan_in), ("fan_out", self.fan_out)):
            if not (isinstance(axes, tuple) and all(map(is_axis, axes))):
                raise TypeError(f"WeightAxes.{field} must be a tuple of ints, got {describe_leaf(axes)}")
        if self.role not in get_args(Role):
            raise ValueError(
                f"WeightAxes.role must be one of {get_args(Role)}, got {describe_leaf(self.role)}"
            )

    @property
    def is_weight(self) -> bool:
        """Whether it is contracted with data, whatever its fan-in: a table that data index into is none."""
        return bool(self.fan_in) or self.role in ("input", "hidden", "output", "weight")

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


NOTHING_LEFT = "nothing would be left of the gradient"

# Of what is long, a string or what a user's own class prints, the beginning and the end.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def left_alone(why: str, op: str = "", role: Role = "") -> WeightAxes:
    """The axes of a parameter that is not centralized."""
    return WeightAxes((), (), op, why, role)


def applicable(axes: WeightAxes, leaf: Any) -> WeightAxes:
    """`axes` where there is something to average over; otherwise `leaf` is left alone."""
    if not is_inexact(leaf):
        return left_alone(f"no array of floats: {describe_leaf(leaf)}", op=axes.op)
    if leaf.dtype == jnp.float8_e8m0fnu:
        return left_alone("float8_e8m0fnu has no sign, so it holds no difference", axes.op, axes.role)
    if 0 in leaf.shape:
        return left_alone("empty", axes.op, axes.role)
    fan_in = math.prod(leaf.shape[axis] for axis in axes.fan_in)
    if axes.fan_in and fan_in < 2:
        return left_alone(f"fan-in {fan_in}: {NOTHING_LEFT}", axes.op, axes.role or "weight")
    return axes


def read_from(leaf: Any, axes: WeightAxes) -> WeightAxes:
    """`axes` that were read from `leaf`, where they are applicable: they know its rank."""
    known = applicable(axes, leaf)
    if not known.fan_in:
        return known
    known = dataclasses.replace(known)
    object.__setattr__(known, "rank", len(leaf.shape))
    return known


def describe_leaf(leaf: Any) -> str:
    """A leaf in words, for `why` and for error messages: an array has thousands of numbers to print."""
    if is_array_like(leaf):
        return f"an array of dtype {leaf.dtype} and shape {leaf.shape}"
    try:
        text = _SHORT.repr(leaf)
    except Exception:  # what a user's class prints may fail, and an int of thousands of digits does
        text = f"an object of type {type(leaf).__name__}"
    return shortened(text)


def shortened(text: str, most: int = 400) -> str:
    """Of a text that is too long for a message, both ends."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def is_axis(given: Any) -> bool:
    """Whether `given` is an int of Python or NumPy. To Python, `True` is an int too: it belongs to a mask."""
    return isinstance(given, int | np.integer) and not isinstance(given, bool)


def is_function(given: Any) -> TypeGuard[Callable[[PyTree], PyTree]]:
    """Whether axes or a mask are given as a function of the parameters.

    A module of Equinox or NNX is callable too, but it is a tree: it has leaves of its own.
    """
    return callable(given) and jtu.all_leaves([given])


def is_absent(node: Any) -> bool:
    """Whether `node` stands where a parameter was taken out: `None`, or optax's `MaskedNode`."""
    return node is None or isinstance(node, optax.MaskedNode)


def is_array_like(leaf: Any) -> bool:
    """Whether a leaf is an array, or what stands for one: it has a shape and a dtype.

    A class of NumPy, as a module may keep it for its dtype, has attributes of these names as well.
    """
    return isinstance(getattr(leaf, "shape", None), tuple) and hasattr(leaf, "dtype")


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is an array of real or complex floating-point numbers."""
    if not is_array_like(leaf):
        return False
    try:
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    except TypeError:  # the dtypes of other libraries, PyTorch for example, are none to NumPy
        return False


def is_float_array(leaf: Any) -> bool:
    """Whether JAX can compute with a leaf: it holds floats, and does not only stand for an array."""
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic) and not isinstance(
        leaf, np.ma.MaskedArray
    )
    return is_array and is_inexact(leaf) and is_known_to_jax(leaf.dtype)


@functools.cache
def is_known_to_jax(dtype: Any) -> bool:
    """Whether JAX has a dtype. It has no `longdouble`, and none whose bytes are in the other order."""
    try:
        jax.typeof(np.zeros((), dtype))
    except TypeError:
        return False
    return True
