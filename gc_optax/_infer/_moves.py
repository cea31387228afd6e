"""Rules of what moves entries, takes parts, sums over dimensions, and puts arrays in a row or into one another."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

from ._origins import Made, Origin, Sources, big, join_all
from ._program import Shape, shape_of
from ._rules import Step, absorbed, backwards, forwards, moves, unclear
from ._uses import IN, NONE, OUT, REDUCED, SUM, TOTAL, Piece, Use, Uses, Window, cut_anew, labeled

IN_A_ROW = "an input, in a row with the data"


@moves("transpose")
def _transposed(eqn: Any, old: Shape, new: Shape) -> Sources:
    return [[dim] for dim in eqn.params["permutation"]]


@moves("rev")
def _reversed(eqn: Any, old: Shape, new: Shape) -> Sources:
    return [[dim] for dim in range(len(old))]


@moves("squeeze")
def _squeezed(eqn: Any, old: Shape, new: Shape) -> Sources:
    return [[dim] for dim in range(len(old)) if dim not in eqn.params["dimensions"]]


@moves("broadcast_in_dim")
def _broadcast(eqn: Any, old: Shape, new: Shape) -> Sources:
    at = {target: dim for dim, target in enumerate(eqn.params["broadcast_dimensions"])}
    return [[at[dim]] if dim in at and old[at[dim]] == size else [] for dim, size in enumerate(new)]


@forwards("reshape")
def _reshaped(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    old = shape_of(eqn.invars[0])
    row = [Piece(old[dim], frozenset({str(dim)})) for dim in eqn.params["dimensions"] or range(len(old))]
    dims = cut_anew(row, shape_of(var))
    return ins[0].moved([[int(dim) for piece in pieces for dim in piece.labels] for pieces in dims])


@backwards("reshape")
def _reshaped_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    order = step.eqn.params["dimensions"] or range(len(step.old))
    return [{use.reshaped_back(order, step.old) for use in uses[0]}]


# Parts.


@forwards("slice", "split", "unstack")
def _cut(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    gone = [eqn.params["axis"]] if eqn.primitive.name == "unstack" else []
    return ins[0].moved([[dim] for dim in range(len(shape_of(eqn.invars[0]))) if dim not in gone])


@backwards("slice")
def _slice_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    starts, stops = step.eqn.params["start_indices"], step.eqn.params["limit_indices"]
    cut = [dim for dim, size in enumerate(step.new) if size != step.old[dim]]
    if any((step.eqn.params["strides"] or step.old)[dim] > 1 for dim in cut if step.eqn.params["strides"]):
        return [{use.cut_back(cut, step.old) for use in uses[0]}]
    return [_of_part(step, uses[0], tuple((dim, starts[dim], stops[dim]) for dim in cut))]


@backwards("split", "unstack")
def _split_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    axis = step.eqn.params["axis"]
    stops = list(itertools.accumulate(step.eqn.params.get("sizes", [1] * len(uses))))
    parts = zip(uses, [0, *stops], stops, strict=False)
    return [itertools.chain(*(_of_part(step, of_one, ((axis, *part),)) for of_one, *part in parts))]


def _of_part(step: Step, uses: Uses, window: Window) -> Iterable[Use]:
    """The uses of an array of which only a part is used so; it does not matter which part of data it is."""
    if len(step.old) > len(step.new):
        one = tuple(1 if dim == window[0][0] else size for dim, size in enumerate(step.old))
        uses = frozenset(use.reshaped_back(range(len(one)), one) for use in uses)
    return uses if step.ins[0].made == Made.DATA else {use._replace(window=window) for use in uses}


# Sums over dimensions.

REDUCTIONS = (
    *("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"),
    *("reduce_sum", "reduce_xor"),
)


def _kept(eqn: Any) -> Sources:
    return [[dim] for dim in range(len(shape_of(eqn.invars[0]))) if dim not in eqn.params["axes"]]


@forwards(*REDUCTIONS)
def _reduced(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    operand, summed = ins[0], ins[0].varies.intersection(eqn.params["axes"])
    # In `(x[:, :, None] * w).sum(1)` a product entry by entry and a sum make a contraction.
    is_product = operand.is_either and eqn.primitive.name == "reduce_sum"
    made = Made.DATA if is_product and summed and summed <= operand.along else operand.made
    return operand.moved(_kept(eqn))._replace(made=made, hot=frozenset(), source=0)


@backwards(*REDUCTIONS)
def _reduced_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    gone = {dim for dim in step.eqn.params["axes"] if step.old[dim] > 1}
    return [{_before_reduction(step, use, gone) for use in uses[0]}]


def _before_reduction(step: Step, use: Use, gone: set[int]) -> Use:
    back = use.moved_back(_kept(step.eqn), step.old)
    if use.how == "output":
        # Only the first sum after a product makes a contraction of it.
        label = (SUM if step.name == "reduce_sum" else NONE) | (TOTAL if math.prod(step.new) == 1 else NONE)
        kept = [back.labels(dim) & TOTAL if back.dims else NONE for dim in range(len(step.old))]
        return Use(
            "output", dims=labeled(step.old, (label if d in gone else kept[d] for d in range(len(kept))))
        )
    if use.how in ("other", "term") or (use.how == "kernel" and use.spread & (IN | OUT)):
        return Use("statistic", f"{use.op}: only a statistic of it meets the data")
    return back.relabeled(lambda dim, labels: labels | REDUCED if dim in gone else labels)


# In a row, and one in the other.

WRITES = (
    *("dynamic_update_slice", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul"),
    "scatter-sub",
)


@forwards("concatenate", "stack", "pad", *WRITES)
def _beside(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    source = ins[0].source if eqn.primitive.name == "pad" else 0
    return join_all(ins)._replace(
        varies=big(shape_of(var)), hot=frozenset(), along=frozenset(), source=source
    )


@backwards("concatenate")
def _concatenated_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    """The uses may be of parts of the row (`Use.window`): then only what is in that part is used so."""
    axis, shapes = step.eqn.params["dimension"], [shape_of(var) for var in step.eqn.invars]
    stops = list(itertools.accumulate(shape[axis] for shape in shapes))
    found: list[Iterable[Use]] = []
    for origin, shape, start, stop in zip(step.ins, shapes, [0, *stops], stops, strict=False):
        mine = (_of_one_in_row(step, use, axis, start, stop, shape) for use in uses[0])
        found.append({absorbed(use, origin, step.outs[0], f"{step.name}: {IN_A_ROW}") for use in mine if use})
    return found


def _of_one_in_row(step: Step, use: Use, axis: int, start: int, stop: int, shape: Shape) -> Use | None:
    """The use of what stands from `start` to `stop` in a row, or nothing, if a part without it is used."""
    _, first, last = use.window[0] if use.window else (axis, start, stop)
    low, high = max(start, first), min(stop, last)
    if low >= high:
        return None
    is_alone = bool(use.window) and (low, high) == (first, last)
    part = tuple(high - low if dim == axis else size for dim, size in enumerate(shape))
    mine = use._replace(window=()).resized(part, None if is_alone else id(step))
    return (
        mine if (low, high) == (start, stop) else mine._replace(window=((axis, low - start, high - start),))
    )


@backwards("stack")
def _stacked_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    axis, rank = step.eqn.params["axis"], len(step.new)
    one = tuple(1 if dim == axis else size for dim, size in enumerate(step.new))
    sources = [[] if dim == axis else [dim - (dim > axis)] for dim in range(rank)]
    back = [use.resized(one, id(step)).moved_back(sources, step.old) for use in uses[0]]
    why = f"{step.name}: {IN_A_ROW}"
    return [{absorbed(use, origin, step.outs[0], why) for use in back} for origin in step.ins]


@backwards("pad", *WRITES)
def _written_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    config = step.eqn.params.get("padding_config", ())
    cropped = [dim for dim, (low, high, _) in enumerate(config) if low < 0 or high < 0]
    back = (u.cut_back(cropped, step.old) if cropped else u.resized(step.old, id(step)) for u in uses[0])
    operand = {absorbed(use, step.ins[0], step.outs[0], f"{step.name}: {IN_A_ROW}") for use in back}
    return [operand, *(unclear(step, uses[0], number) for number in range(1, len(step.ins)))]


# Inside `shard_map`: a dimension that is longer or shorter afterwards.

RESIZES = ("all_gather", "all_gather_invariant", "all_gather_reduced", "reduce_scatter", "tile")


@forwards(*RESIZES)
def _resized(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    is_same_rank = len(shape_of(eqn.invars[0])) == len(shape_of(var))
    return ins[0] if is_same_rank else join_all(ins)._replace(varies=big(shape_of(var)))


@backwards(*RESIZES)
def _resized_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    is_same_rank = len(step.old) == len(step.new)
    return [{use.resized(step.old) for use in uses[0]} if is_same_rank else unclear(step, uses[0], 0)]
