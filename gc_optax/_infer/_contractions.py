"""Rules of products that sum over dimensions: where a weight meets the data.

In `x @ w` the data say which dimensions of `w` are contracted. In `x @ (a @ b)` there are no data in the
inner product: what it means for `a` and `b` depends on what is done with the result.
"""

import math
from collections.abc import Iterable
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

UNKNOWN_PRODUCT = "a product of parameters with data on neither side"


class Side(NamedTuple):
    """One side of a `dot_general`: its shape, and for each of its dimensions what becomes of it."""

    shape: Shape
    contracted: tuple[int, ...]  # what is summed over, in the order of the other side
    places: dict[int, int]  # where in the result the other dimensions are, those of the batch first

    @property
    def size(self) -> int:
        """How many entries it has for each that is contracted."""
        return math.prod(self.shape[dim] for dim in self.places)

    def picks(self, origin: Origin) -> bool:
        """Whether it is one-hot along what is contracted."""
        summed = [dim for dim in self.contracted if self.shape[dim] > 1]
        return bool(summed) and origin.hot.issuperset(summed)

    def own_labels(self, use: Use, other: "Side") -> Labels:
        """What a use of the product says of the dimensions that only this side has."""
        own = set(self.places.values()) - set(other.places.values())
        return NONE.union(*(use.labels(place) for place in own if use.dims))

    def handed(self, use: Use, contracted: Labels) -> Use:
        """The use of this side that a use of the product is: of `a` in `a @ b`, if `a @ b` is a kernel."""
        dims: list[Dim] = [(Piece(size, contracted),) for size in self.shape]
        for dim, place in self.places.items():
            dims[dim] = use.dims[place] if use.dims else (Piece(self.shape[dim]),)
        return use._replace(dims=tuple(dims))


def _sides(eqn: Any) -> tuple[Side, Side]:
    sides, used = [], len(eqn.params["dimension_numbers"][1][0])
    for var, summed, batch in zip(eqn.invars, *eqn.params["dimension_numbers"], strict=True):
        free = [dim for dim in range(len(shape_of(var))) if dim not in {*summed, *batch}]
        places = {dim: n for n, dim in enumerate(batch)} | {dim: used + n for n, dim in enumerate(free)}
        sides.append(Side(shape_of(var), tuple(summed), places))
        used += len(free)
    return sides[0], sides[1]


@forwards("dot_general")
def _dot_general(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    a, b = _sides(eqn)
    places = [(o, dim, to) for o, side in zip(ins, (a, b), strict=True) for dim, to in side.places.items()]
    varies = frozenset(to for origin, dim, to in places if dim in origin.varies)
    result = _product(eqn, ins, var)._replace(varies=varies)
    for side, mine, other, its in ((a, ins[0], b, ins[1]), (b, ins[1], a, ins[0])):
        if mine.has_params and its.made >= Made.FIXED and other.picks(its):
            is_matrix = len(side.places) - len(set(side.places.values()) & set(other.places.values())) > 1
            return result._replace(made=either(ins) if is_matrix else Made.DATA, mixed=0)
    return result._replace(hot=frozenset(to for o, dim, to in places if dim in o.hot and not a.contracted))


@forwards("conv_general_dilated", "ragged_dot_general")
def _product(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    whole = computed(ins, var)
    if whole.made == Made.PARAMS or not any(origin.has_params for origin in ins):
        return whole._replace(made=Made.DATA if whole.made == Made.RAW else whole.made)
    is_image = eqn.primitive.name != "dot_general" and (ins[1].has_params or ins[0].is_either)
    # `h @ h.T` with `h = x + positions` is an attention; a kernel is not multiplied with itself.
    is_with_itself = ins[0].source == ins[1].source != 0 and ins[0].mixed == 2
    is_data = is_image or is_with_itself or any(origin.is_data for origin in ins)
    mixed = 2 if any(origin.is_array for origin in ins) else whole.mixed
    # `x @ (w + argument)` may have met one, `(x + positions) @ closed_over` has not.
    sides = (ins[:2], ins[1::-1])
    met = any(mine.has_params and (mine.mixed < 2 or its.is_data) for mine, its in sides)
    return whole._replace(made=Made.DATA if is_data else either(ins), mixed=mixed, met=met)


@backwards("dot_general")
def _dot_general_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    a, b = _sides(step.eqn)
    mine, its = step.ins
    return [
        {_of_side(step, use, a, mine, b, its) for use in uses[0]},
        {_of_side(step, use, b, its, a, mine) for use in uses[0]},
    ]


def _of_side(step: Step, use: Use, side: Side, mine: Origin, other: Side, its: Origin) -> Use:
    """How one side of a product is used, if the product is used so."""
    op, is_kernel = step.name, use.how == "kernel"
    reading = _beside_data(op, side, other, its)
    if not mine.has_params:
        return OUTPUT
    if its.is_data or (its.is_array and use.how == "output"):
        is_expert = other.picks(its) and is_kernel and step.outs[0].is_either
        return side.handed(use, PICK) if is_expert else reading
    if use.how == "statistic" or (is_kernel and use.spread & (IN | OUT) and not use.fan_in):
        why = f"{op}: a scale is computed of it and of constants, and which are the inputs cannot be told"
        return Use("unclear", why, weak=True) if is_kernel and its.is_array else Use("statistic")
    if not its.has_params:
        return _beside_constants(step, use, side, mine, other, its)
    if not is_kernel and (mine.is_either or its.is_either):
        return _beside_activation(op, mine, its, reading)
    chained = side.handed(use, other.own_labels(use, side))
    is_thin = math.prod(side.shape) < side.size * min(side.size, other.size)
    if is_kernel and use.base and is_thin and not (mine.mixed or its.mixed):
        return chained._replace(base="")  # `w + a @ b`
    if is_kernel and its.mixed and chained.fan_in == reading.fan_in and not chained.doubt:
        return chained  # the second `w` in `x @ (w @ w @ w)`
    dims = chained.relabeled(lambda dim, labels: labels & IN).dims
    return Use("unclear", f"{op}: {UNKNOWN_PRODUCT}", dims)


def _beside_data(op: str, side: Side, other: Side, its: Origin) -> Use:
    """The use of a side of a product whose other side is data."""
    if other.picks(its):
        return Use("other", f"{op}: a lookup table, by a one-hot array", role="lookup")
    labels = [BATCH if place in other.places.values() else OUT for place in side.places.values()]
    of_dims = dict(zip(side.places, labels, strict=True))
    for dim, across in zip(side.contracted, other.contracted, strict=True):
        of_dims[dim] = PICK if across in its.hot else IN
    return Use("kernel", op, labeled(side.shape, (of_dims[dim] for dim in range(len(side.shape)))))


def _beside_activation(op: str, mine: Origin, its: Origin, reading: Use) -> Use:
    """The use of a side of a product, if either side may be an activation, and the product is one."""
    if not its.is_either or (not mine.is_either and (its.mixed == 2 or its.made == Made.EITHER)):
        return OUTPUT if mine.is_either else reading
    # In `(x + positions) @ (w @ rotation)`, the rotation closed over, the second may be the kernel.
    is_one_kind = mine.made == its.made and mine.mixed == its.mixed  # as in an attention
    return OUTPUT if is_one_kind else Use("unclear", f"{op}: which side of it is the kernel cannot be told")


def _beside_constants(step: Step, use: Use, side: Side, mine: Origin, other: Side, its: Origin) -> Use:
    """The use of a side of a product with constants.

    In `(ones((3, 4)) @ w) @ x.T` the ones may be the inputs of `w`, in `x @ (w @ rotation)` the outputs are
    rotated. Where both readings give the same fan-in, it is clear.
    """
    reading = _beside_data(step.name, side, other, its)
    if use.how == "unclear":
        return use._replace(dims=())
    if use.how == "kernel":
        handed = side.handed(use, other.own_labels(use, side) - BATCH or REDUCED)
        if reading.how == "kernel" and handed.fan_in == reading.fan_in and not handed.doubt:
            return handed
        why = f"{step.name}: constants are contracted with it, and which are the inputs cannot be told"
        return Use("unclear", why, reading.dims if its.made == Made.FROZEN else ())
    if mine.is_either:
        return use if use.how == "other" else OUTPUT
    if use.how == "output":
        return reading._replace(weak=True)  # `jnp.ones((3, 4)) @ w`, returned as it is
    why = f"{step.name}: only constants are contracted with it before it meets the data"
    return reading._replace(how="unclear", why=why)


@backwards("conv_general_dilated")
def _convolved_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    out, *contracted = step.eqn.params["dimension_numbers"].rhs_spec
    shape = shape_of(step.eqn.invars[1])
    groups = step.eqn.params["feature_group_count"] * step.eqn.params["batch_group_count"]
    dims = list(labeled(shape, (IN if dim in contracted else OUT for dim in range(len(shape)))))
    if 1 < groups < shape[out]:
        dims[out] = (Piece(groups, BATCH), Piece(shape[out] // groups, OUT))
    return _image_and_kernel(step, uses[0], tuple(dims))


@backwards("ragged_dot_general")
def _ragged_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    numbers = step.eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shape, groups = shape_of(step.eqn.invars[1]), (*batch, *numbers.rhs_group_dimensions)
    labels = (IN if d in contracted else BATCH if d in groups else OUT for d in range(len(shape)))
    return _image_and_kernel(step, uses[0], labeled(shape, labels))


def _image_and_kernel(step: Step, uses: Uses, dims: tuple[Dim, ...]) -> list[Iterable[Use]]:
    """The uses of both sides of a product whose second side is the kernel, if any is."""
    image, kernel, op = step.ins[0], step.ins[1], step.name
    of_image, of_kernel = OUTPUT, Use("kernel", op, dims)
    if image.made < Made.FIXED:
        why = UNKNOWN_PRODUCT if image.made == Made.PARAMS else "only constants are contracted with it"
        of_kernel = of_kernel._replace(how="unclear", why=f"{op}: {why}")
    if image.made == Made.PARAMS:
        is_image = not kernel.has_params and all(use.how in ("output", "other") for use in uses)
        why = "an input, it is what is convolved" if is_image else "what became of it cannot be read"
        of_image = Use("other" if is_image else "unclear", f"{op}: {why}")
    return [{of_image}, {of_kernel}, *[NO_USES] * (len(step.ins) - 2)]
