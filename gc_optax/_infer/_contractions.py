"""Rules of products that sum over dimensions: where a weight meets the data.

In `x @ w` the data say which dimensions of `w` are contracted. In `x @ (a @ b)` there are no data in the inner
product: what it means for `a` and `b` depends on what is done with the result.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ._origins import Made, Origin, computed, either
from ._program import Shape, shape_of
from ._rules import Step, backwards, forwards
from ._uses import (
    BATCH,
    IN,
    NO_USES,
    NONE,
    OUT,
    OUTPUT,
    PICK,
    REDUCED,
    Dim,
    Labels,
    Piece,
    Use,
    Uses,
    labeled,
)
from ._verdict import doubt

UNKNOWN_PRODUCT = "a product of parameters with data on neither side"


class Side(NamedTuple):
    """One side of `dot_general`: the equation, and which of its arguments it is."""

    eqn: Any
    number: int

    @property
    def shape(self) -> Shape:
        return shape_of(self.eqn.invars[self.number])

    @property
    def contracted(self) -> Sequence[int]:
        """The dimensions that are summed over, in the order of those of the other side."""
        numbers: Sequence[int] = self.eqn.params["dimension_numbers"][0][self.number]
        return numbers

    @property
    def batch(self) -> Sequence[int]:
        """The dimensions that go side by side with those of the other side."""
        numbers: Sequence[int] = self.eqn.params["dimension_numbers"][1][self.number]
        return numbers

    @property
    def free(self) -> list[int]:
        """The dimensions that only this side has."""
        return [dim for dim in range(len(self.shape)) if dim not in {*self.contracted, *self.batch}]

    @property
    def places(self) -> dict[int, int]:
        """Where in the result each dimension is: those of the batch come first, then the free ones."""
        first = len(self.batch) + (len(Side(self.eqn, 0).free) if self.number else 0)
        return {dim: n for n, dim in enumerate(self.batch)} | {
            dim: first + n for n, dim in enumerate(self.free)
        }

    def picks(self, origin: Origin) -> bool:
        """Whether it is one-hot along what is contracted."""
        summed = [dim for dim in self.contracted if self.shape[dim] > 1]
        return bool(summed) and origin.hot.issuperset(summed)

    def own_labels(self, use: Use) -> Labels:
        """What a use of the product says of the dimensions that only this side has."""
        return NONE.union(*(use.labels(self.places[dim]) for dim in self.free if use.dims))

    def handed(self, use: Use, contracted: Labels) -> Use:
        """The use of this side that a use of the product is: `a` in `a @ b`, if `a @ b` is a kernel."""
        dims: list[Dim] = [(Piece(size, contracted),) for size in self.shape]
        for dim, target in self.places.items():
            dims[dim] = use.dims[target] if use.dims else (Piece(self.shape[dim]),)
        return use._replace(dims=tuple(dims))


@forwards("dot_general")
def _dot_general(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    a, b = Side(eqn, 0), Side(eqn, 1)
    places = [(o, dim, to) for o, side in zip(ins, (a, b), strict=True) for dim, to in side.places.items()]
    varies = frozenset(to for origin, dim, to in places if dim in origin.varies)
    result = _product(eqn, ins, var)._replace(varies=varies)
    for side, mine, other, its in ((a, ins[0], b, ins[1]), (b, ins[1], a, ins[0])):
        if mine.has_params and its.made >= Made.CLOSED and other.picks(its):
            return result._replace(made=either(ins) if len(side.free) > 1 else Made.DATA, mixed=0)
    hot = frozenset(to for origin, dim, to in places if dim in origin.hot and not a.contracted)
    return result._replace(hot=hot)


@forwards("conv_general_dilated", "ragged_dot_general")
def _product(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    whole, kernels = computed(ins, var), [origin for origin in ins if origin.has_params]
    if whole.made == Made.PARAMS or not kernels:
        return whole._replace(made=Made.DATA if whole.made == Made.RAW else whole.made)
    is_image = eqn.primitive.name != "dot_general" and (ins[1].has_params or ins[0].is_either)
    # `h @ h.T` with `h = x + positions` is an attention; a kernel is not multiplied with itself.
    is_with_itself = ins[0].source == ins[1].source != 0 and ins[0].mixed == 2
    is_data = is_image or is_with_itself or any(origin.is_data for origin in ins)
    mixed = 2 if any(origin.is_array for origin in ins) else 1
    return whole._replace(made=Made.DATA if is_data else either(ins), mixed=max(mixed, whole.mixed))


@backwards("dot_general")
def _dot_general_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    return [{_of_side(step, use, number) for use in uses[0]} for number in (0, 1)]


def _of_side(step: Step, use: Use, number: int) -> Use:
    """How one side of a product is used, if the product is used so."""
    side, other = Side(step.eqn, number), Side(step.eqn, 1 - number)
    mine, its, op = step.ins[number], step.ins[1 - number], step.name
    if not mine.has_params:
        return OUTPUT
    reading = _as_kernel(op, side, other, its)
    if its.is_data or (its.is_array and use.how == "output"):
        is_expert = other.picks(its) and use.how == "kernel" and step.outs[0].is_either
        return side.handed(use, PICK) if is_expert else reading
    if use.how == "statistic" or (use.how == "kernel" and use.spread & (IN | OUT) and not use.fan_in):
        return Use("statistic")
    if not its.has_params and use.how in ("kernel", "unclear"):
        return _beside_constants(step, use, side, other, its, reading)
    if use.how == "other" and not its.has_params and mine.is_either:
        return use
    if use.how != "kernel" and (mine.is_either or its.is_either):
        # In `(x + positions) @ (w @ rotation)`, with a rotation that is closed over, the second may be the kernel.
        is_activation = mine.is_either and not (mine.made == Made.EITHER_CLOSED and its.made == Made.EITHER)
        return OUTPUT if is_activation else reading
    if not its.has_params and use.how == "output":
        return reading._replace(weak=True)  # `jnp.ones((3, 4)) @ w`, returned as it is
    if not its.has_params:
        why = f"{op}: only constants are contracted with it before it meets the data"
        return reading._replace(how="unclear", why=why)
    rank = _entries(side, side.contracted)
    is_thin = rank < min(_entries(side, side.free), _entries(other, other.free))
    if use.how == "kernel" and use.base and is_thin and not (mine.mixed or its.mixed):
        return side.handed(use, other.own_labels(use))._replace(base="")  # `w + a @ b`
    chained = side.handed(use, other.own_labels(use))
    if use.how == "kernel" and its.mixed and chained.fan_in == reading.fan_in and not doubt(chained):
        return chained  # the second `w` in `x @ (w @ w @ w)`
    dims = chained.relabeled(lambda dim, labels: labels & IN).dims
    return Use("unclear", f"{op}: {UNKNOWN_PRODUCT}", dims)


def _beside_constants(step: Step, use: Use, side: Side, other: Side, its: Origin, reading: Use) -> Use:
    """The use of a side of a product with constants, of which something is made that is a kernel.

    In `(ones((3, 4)) @ w) @ x.T` the ones may be the inputs of `w`, in `x @ (w @ rotation)` the outputs are
    rotated. Where both readings give the same fan-in, it is clear.
    """
    if use.how == "unclear":
        return use._replace(dims=())
    handed = side.handed(use, other.own_labels(use) - BATCH or REDUCED)
    if reading.how == "kernel" and handed.fan_in == reading.fan_in and not doubt(handed):
        return handed
    why = f"{step.name}: constants are contracted with it, and which are the inputs cannot be told"
    return Use("unclear", why, reading.dims if its.made == Made.FROZEN else ())


def _as_kernel(op: str, side: Side, other: Side, its: Origin) -> Use:
    """The use of a side of a product whose other side is data."""
    if other.picks(its):
        return Use("other", f"{op}: a lookup table, by a one-hot array")
    labels = [OUT if dim in side.free else BATCH for dim in range(len(side.shape))]
    for dim, across in zip(side.contracted, other.contracted, strict=True):
        labels[dim] = PICK if across in its.hot else IN
    return Use("kernel", op, labeled(side.shape, labels))


def _entries(side: Side, dims: Iterable[int]) -> int:
    return math.prod(side.shape[dim] for dim in dims)


@backwards("conv_general_dilated")
def _convolved_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    out, *contracted = step.eqn.params["dimension_numbers"].rhs_spec
    shape = shape_of(step.eqn.invars[1])
    groups = step.eqn.params["feature_group_count"] * step.eqn.params["batch_group_count"]
    dims = list(labeled(shape, (IN if dim in contracted else OUT for dim in range(len(shape)))))
    if groups < shape[out]:
        dims[out] = (Piece(groups, BATCH), Piece(shape[out] // groups, OUT))
    return _image_and_kernel(step, uses[0], tuple(dims))


@backwards("ragged_dot_general")
def _ragged_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    numbers = step.eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    groups = (*batch, *numbers.rhs_group_dimensions)
    shape = shape_of(step.eqn.invars[1])
    labels = (IN if d in contracted else BATCH if d in groups else OUT for d in range(len(shape)))
    return _image_and_kernel(step, uses[0], labeled(shape, labels))


def _image_and_kernel(step: Step, uses: Uses, dims: tuple[Dim, ...]) -> list[Iterable[Use]]:
    """The uses of both sides of a product whose second side is the kernel, if any is."""
    image, kernel, op = step.ins[0], step.ins[1], step.name
    of_image, of_kernel = OUTPUT, Use("kernel", op, dims)
    if image.made < Made.CLOSED:
        why = UNKNOWN_PRODUCT if image.made == Made.PARAMS else "only constants are contracted with it"
        of_kernel = of_kernel._replace(how="unclear", why=f"{op}: {why}")
    if image.made == Made.PARAMS:
        is_image = not kernel.has_params and all(use.how in ("output", "other") for use in uses)
        why = "an input, it is what is convolved" if is_image else "what became of it cannot be read"
        of_image = Use("other" if is_image else "unclear", f"{op}: {why}")
    return [{of_image}, {of_kernel}, *[NO_USES] * (len(step.ins) - 2)]
