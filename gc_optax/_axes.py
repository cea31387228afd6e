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
            input, or because several products with data sum over different axes. `infer_axes` has the
            definition.

    Raises:
        TypeError: if `fan_in` or `fan_out` is not a tuple of ints.
        ValueError: if `role` is none of these.

    Examples:
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

    def with_batch_axes(self, *axes: int) -> "WeightAxes":
        """The same axes, but with the given ones as batch axes: "this axis counts matrices".

        An axis that a weight shares with its data and with its output is a batch axis, and an axis that it
        shares with its output alone is fan-out. So for experts it depends on the product: in
        `btef,efd->bted` the axis e is a batch axis, and in `btd,edf->btef`, where every expert sees the same
        data, it is fan-out. `centralize` does the same with both. `to_muon` does not: there the first are
        e matrices (f, d), and the second are one matrix (d, e * f). `with_batch_axes(0)` makes them e
        matrices (d, f). Likewise for query, key and value in one array of shape (embed, 3, heads, head_dim):
        one matrix (embed, 3 * heads * head_dim), and with `with_batch_axes(1)` three.

        Without an axis of `fan_in`, `centralize` averages over the inputs that are left, so that each index
        along the axis has a mean of its own; without any, it leaves the parameter alone. Without an axis of
        `fan_out` it does what it did.

        Args:
            *axes: the axes. What is a batch axis already stays one, and a parameter that has neither fan-in
                nor fan-out stays as it is. Negative axes count from the end; where the rank is not known,
                count as `fan_in` and `fan_out` do.

        Returns:
            The axes, with `op`, `why`, `role` and `rank` as they are. Where no fan-in is left, a weight
            without a role gets the role `"weight"`.

        Raises:
            TypeError: if an axis is not an int.
            ValueError: if an axis is repeated, or is not one of the parameter's as far as it is known.

        Examples:
            >>> from gc_optax import WeightAxes
            >>> experts = WeightAxes(fan_in=(1,), fan_out=(0, 2))
            >>> experts.to_muon()
            MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0, 2))
            >>> experts.with_batch_axes(0).to_muon()
            MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
        """
        if not all(map(is_axis, axes)):
            raise TypeError(f"with_batch_axes takes ints, got {describe_leaf(axes)}")
        if not (self.fan_in or self.fan_out):
            return self
        batch = [self._counted(axis) for axis in axes]
        if len(set(batch)) < len(batch):
            raise ValueError(f"with_batch_axes: an axis is repeated in {describe_leaf(axes)}; name it once")
        fan_in, fan_out = (
            tuple(axis for axis in group if self._counted(axis) not in batch)
            for group in (self.fan_in, self.fan_out)
        )
        # Without fan-in, nothing but the role says that this is a weight.
        role = self.role or "weight" if self.fan_in and not fan_in else self.role
        return of_rank(dataclasses.replace(self, fan_in=fan_in, fan_out=fan_out, role=role), self.rank)

    def to_muon(self) -> optax.contrib.MuonDimensionNumbers | None:
        """The same axes for `optax.contrib.muon`, which orthogonalizes the matrix that they make.

        All axes of `fan_in` together are the rows of the matrix, and all of `fan_out` its columns. The axes
        in neither are batch axes there too: each layer of a stack is a matrix of its own. Experts that all
        see the same data (`btd,edf->btef`), and query, key and value in one array, are one wide matrix;
        `with_batch_axes` makes them one each, and has the rule.

        Returns:
            `MuonDimensionNumbers(fan_in, fan_out)`, or `None`, which leaves the parameter to Adam, where
            there is no matrix: where `fan_in` or `fan_out` is empty.

        Examples:
            Muon is for the weights between the first and the last. The others have a role that says so:

            >>> import jax
            >>> import jax.numpy as jnp
            >>> import optax
            >>> from gc_optax import WeightAxes
            >>> axes = {
            ...     "embed": WeightAxes((), role="lookup"),
            ...     "experts": WeightAxes((1,), (2,), role="hidden"),
            ...     "bias": WeightAxes(()),
            ...     "head": WeightAxes((0,), (1,), role="output"),
            ... }
            >>> matrices = jax.tree.map(lambda a: a.to_muon() if a.role == "hidden" else None, axes)
            >>> matrices["experts"]
            MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
            >>> optimizer = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=matrices)
            >>> shapes = {"embed": (9, 4), "experts": (2, 4, 4), "bias": (4,), "head": (4, 9)}
            >>> state = optimizer.init({name: jnp.ones(shape) for name, shape in shapes.items()})

            `infer_axes` reads such a tree off the model, the roles included. A convention knows no roles but
            `"weight"` and `"lookup"`; `jax.tree.map(WeightAxes.to_muon, axes)` takes all matrices. A tree
            that is an Equinox module goes into a function, `lambda params: matrices`: optax calls what is
            callable, and a module is.

        References:
            Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
            https://kellerjordan.github.io/posts/muon/
        """
        if not (self.fan_in and self.fan_out):
            return None
        return optax.contrib.MuonDimensionNumbers(self.fan_in, self.fan_out)

    def to_galore(self) -> "optax.contrib.GaLoreDimensionNumbers | None":
        """The same axes for `optax.contrib.galore`, which projects the gradient of the matrix that they make.

        GaLore of optax takes a parameter for a single matrix, and refuses one that is a stack of them. So a
        parameter with batch axes is left to Adam in full rank, which takes its full memory: in a model with
        scanned layers that is all of the layers. The example has what to do instead. Batch axes are found
        where the rank is known, as in what `infer_axes` returns, and where the axes show them: axis 0 of
        `WeightAxes((1,), (2,))`. Where there is neither, as in `WeightAxes((0,), (1,))` for a parameter with
        a third axis, `galore` raises a `ValueError`. It takes no `None` among the parameters, as a filtered
        module of Equinox has: give it their leaves, `jax.tree.leaves(params)`, as a list.

        Returns:
            `GaLoreDimensionNumbers(fan_in, fan_out)`, or `None`, which leaves the parameter to Adam, where
            there is no single matrix: where `fan_in` or `fan_out` is empty, or there are batch axes.

        Raises:
            ImportError: if optax is older than 0.2.7, which was the first to have `GaLoreDimensionNumbers`.

        Examples:
            An attention kernel of shape (embed, heads, head_dim) is a matrix (embed, heads * head_dim):

            >>> import jax
            >>> import jax.numpy as jnp
            >>> import optax
            >>> from gc_optax import WeightAxes
            >>> query = WeightAxes((0,), (1, 2))
            >>> query.to_galore()
            GaLoreDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
            >>> optimizer = optax.contrib.galore(1e-2, rank=2, weight_dimension_numbers=query.to_galore())
            >>> state = optimizer.init(jnp.ones((8, 2, 4)))

            For a stack of three of them, map the optimizer of one over the stack. What it counts, the steps,
            has no axis to map over, and must not get one: the singular value decomposition would be computed
            at every step, not at one in 200.

            >>> print(WeightAxes((1,), (2, 3)).to_galore())
            None
            >>> stack = jnp.ones((3, 8, 2, 4))
            >>> one = jax.eval_shape(optimizer.init, stack[0])
            >>> mapped = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, one)
            >>> state = jax.vmap(optimizer.init, out_axes=mapped)(stack)
            >>> update = jax.vmap(optimizer.update, in_axes=(0, mapped, 0), out_axes=(0, mapped))
            >>> gradients = jnp.arange(192.0).reshape(stack.shape)
            >>> updates, state = update(gradients, state, stack)

        References:
            Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024,
            https://arxiv.org/abs/2403.03507
        """
        if not (self.fan_in and self.fan_out):
            return None
        if self._least_rank() > len(self.fan_in + self.fan_out):
            return None
        if not hasattr(optax.contrib, "GaLoreDimensionNumbers"):
            raise ImportError(
                f"WeightAxes.to_galore needs optax.contrib.GaLoreDimensionNumbers, which optax has since "
                f"0.2.7; optax {optax.__version__} is installed: pip install --upgrade optax"
            )
        return optax.contrib.GaLoreDimensionNumbers(self.fan_in, self.fan_out)

    def _least_rank(self) -> int:
        """How many axes the parameter has, or where that is not known, has at least: 3 for `(1,), (-3,)`."""
        if self.rank is not None:
            return self.rank
        return max(-axis if axis < 0 else axis + 1 for axis in self.fan_in + self.fan_out)

    def _counted(self, axis: int) -> int:
        """An axis as `fan_in` and `fan_out` count theirs, or an error where it is not known to be there.

        The rank of `WeightAxes((1,), (2,))` is not known: axis 0 is there, but of 3 and -4 nobody knows, and
        not which axis -1 is.
        """
        rank, named = self._least_rank(), self.fan_in + self.fan_out
        is_there = -rank <= axis < rank
        if self.rank is not None:
            if not is_there:
                raise ValueError(
                    f"with_batch_axes: axis {describe_leaf(axis)} is out of range for rank {rank}: "
                    f"name one of 0 to {rank - 1}"
                )
            return axis % rank
        if axis in named or (is_there and all((axis < 0) == (other < 0) for other in named)):
            return axis
        raise ValueError(
            f"with_batch_axes: which axis {describe_leaf(axis)} is cannot be told from "
            f"{shortened(f'fan_in {self.fan_in}, fan_out {self.fan_out}')}: count it from the same end as "
            "they do, and leave it out where it is in neither, for then it is a batch axis already"
        )


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
        why = f"fan-in {fan_in}: {NOTHING_LEFT}"
        return dataclasses.replace(axes, fan_in=(), why=why, role=axes.role or "weight")
    return axes


def read_from(leaf: Any, axes: WeightAxes) -> WeightAxes:
    """`axes` that were read from `leaf`, where they are applicable: they know its rank."""
    known = applicable(axes, leaf)
    return of_rank(known, len(leaf.shape)) if known.fan_in else known


def of_rank(axes: WeightAxes, rank: int | None) -> WeightAxes:
    """A copy of `axes` that knows the rank of the parameter."""
    known = dataclasses.replace(axes)
    object.__setattr__(known, "rank", rank)
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
