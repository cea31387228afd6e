"""Rules of what moves entries, sums over dimensions, and puts arrays in a row or into one another."""

import math
from collections.abc import Iterable
from typing import Any

from ._origins import Made, Origin, Sources, big, join_all
from ._program import Shape, shape_of
from ._rules import Step, absorbed, backwards, forwards, moves, unclear
from ._uses import IN, NONE, OUT, REDUCED, SUM, TOTAL, Piece, Use, Uses, cut_anew, labeled

IN_A_ROW = "an input, in a row with the data"


@moves("transpose")
def _transposed(eqn: Any, old: Shape, new: Shape) -> Sources:
    return [[dim] for dim in eqn.params["permutation"]]


@moves("rev")
def _reversed(eqn: Any, old: Shape, new: Shape) -> Sources:
    return [[dim] for dim in range(len(old))]


def _broadcast(eqn: Any, old: Shape, new: Shape) -> Sources:
    at = {target: dim for dim, target in enumerate(eqn.params["broadcast_dimensions"])}
    return [[at[dim]] if dim in at and old[at[dim]] == size else [] for dim, size in enumerate(new)]


def _squeezed(eqn: Any, old: Shape, new: Shape) -> Sources:
    return [[dim] for dim in range(len(old)) if dim not in eqn.params["dimensions"]]


moves("broadcast_in_dim")(_broadcast)
moves("squeeze")(_squeezed)


def _reshape_order(eqn: Any, old: Shape) -> list[int]:
    return list(eqn.params["dimensions"] or range(len(old)))


@forwards("reshape")
def _reshaped(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    old, new = shape_of(eqn.invars[0]), shape_of(var)
    row = [Piece(old[dim], frozenset({str(dim)})) for dim in _reshape_order(eqn, old)]
    return ins[0].moved(
        [[int(dim) for piece in pieces for dim in piece.labels] for pieces in cut_anew(row, new)]
    )


@backwards("reshape")
def _reshaped_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    return [{use.reshaped_back(_reshape_order(step.eqn, step.old), step.old) for use in uses[0]}]


# Parts.


@forwards("slice", "split", "unstack")
def _cut(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    gone = [eqn.params["axis"]] if eqn.primitive.name == "unstack" else []
    return ins[0].moved([[dim] for dim in range(len(shape_of(eqn.invars[0]))) if dim not in gone])


@backwards("slice")
def _slice_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    starts, stops = step.eqn.params["start_indices"], step.eqn.params["limit_indices"]
    strides = step.eqn.params["strides"] or [1] * len(starts)
    cut = [dim for dim, size in enumerate(step.new) if size != step.old[dim]]
    if any(strides[dim] > 1 for dim in cut):
        return [{use.cut_back(cut, step.old) for use in uses[0]}]
    return [{_of_part(step, use, [(dim, starts[dim], stops[dim]) for dim in cut]) for use in uses[0]}]


@backwards("split")
def _split_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    axis, start, found = step.eqn.params["axis"], 0, set[Use]()
    for size, of_one in zip(step.eqn.params["sizes"], uses, strict=True):
        found |= {_of_part(step, use, [(axis, start, start + size)]) for use in of_one}
        start += size
    return [found]


@backwards("unstack")
def _unstack_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    axis, found = step.eqn.params["axis"], set[Use]()
    one = tuple(1 if dim == axis else size for dim, size in enumerate(step.old))
    for number, of_one in enumerate(uses):
        back = (use.reshaped_back(range(len(one)), one) for use in of_one)
        found |= {_of_part(step, use, [(axis, number, number + 1)]) for use in back}
    return [found]


def _of_part(step: Step, use: Use, window: Iterable[tuple[int, int, int]]) -> Use:
    """The use of an array of which only a part is used; it does not matter which part of data it is."""
    return use if step.ins[0].made == Made.DATA else use._replace(window=tuple(window))


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


@forwards("concatenate")
def _concatenated(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    whole = join_all(ins)
    return whole._replace(varies=whole.varies | {eqn.params["dimension"]}, hot=frozenset())


@backwards("concatenate")
def _concatenated_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    """The uses may be of parts of the row (`Use.window`): then only what is in that part is used so."""
    axis, start = step.eqn.params["dimension"], 0
    found: list[Iterable[Use]] = []
    for origin, var in zip(step.ins, step.eqn.invars, strict=True):
        shape = shape_of(var)
        stop = start + shape[axis]
        mine = (_of_one_in_row(step, use, axis, start, stop, shape) for use in uses[0])
        found.append({absorbed(use, origin, step.outs[0], f"{step.name}: {IN_A_ROW}") for use in mine if use})
        start = stop
    return found


def _of_one_in_row(step: Step, use: Use, axis: int, start: int, stop: int, shape: Shape) -> Use | None:
    """The use of what stands from `start` to `stop` in a row, or nothing, if a part without it is used."""
    row = id(step)
    if not use.window:
        return use.resized(shape, row)
    ((_, first, last),) = use.window
    low, high = max(start, first), min(stop, last)
    if low >= high:
        return None
    part = tuple(high - low if dim == axis else size for dim, size in enumerate(shape))
    is_whole_part = (low, high) == (first, last)
    mine = use._replace(window=()) if is_whole_part else use._replace(window=()).resized(part, row)
    return (
        mine if (low, high) == (start, stop) else mine._replace(window=((axis, low - start, high - start),))
    )


@forwards("stack")
def _stacked(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    axis = eqn.params["axis"]
    whole = join_all(ins).moved(_without_axis(axis, len(shape_of(var))))
    return whole._replace(varies=whole.varies | {axis})


@backwards("stack")
def _stacked_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    axis = step.eqn.params["axis"]
    one = tuple(1 if dim == axis else size for dim, size in enumerate(step.new))
    sources = _without_axis(axis, len(step.new))
    back = [use.resized(one, id(step)).moved_back(sources, step.old) for use in uses[0]]
    why = f"{step.name}: {IN_A_ROW}"
    return [{absorbed(use, origin, step.outs[0], why) for use in back} for origin in step.ins]


def _without_axis(axis: int, rank: int) -> Sources:
    return [[] if dim == axis else [dim - (dim > axis)] for dim in range(rank)]


@forwards("pad")
def _padded(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    return join_all(ins)._replace(varies=big(shape_of(var)), hot=frozenset(), source=ins[0].source)


@backwards("pad")
def _padded_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    config = enumerate(step.eqn.params["padding_config"])
    cropped = [dim for dim, (low, high, _) in config if low < 0 or high < 0]
    back = (
        use.cut_back(cropped, step.old) if cropped else use.resized(step.old, id(step)) for use in uses[0]
    )
    operand = {absorbed(use, step.ins[0], step.outs[0], f"{step.name}: {IN_A_ROW}") for use in back}
    return [operand, unclear(step, uses[0], 1)]


WRITES = (
    *("dynamic_update_slice", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul"),
    "scatter-sub",
)


@forwards(*WRITES)
def _written(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    return join_all(ins)._replace(varies=big(shape_of(var)), hot=frozenset(), source=0)


@backwards(*WRITES)
def _written_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    operand = {absorbed(use, step.ins[0], step.outs[0], f"{step.name}: {IN_A_ROW}") for use in uses[0]}
    return [operand, *(unclear(step, uses[0], number) for number in range(1, len(step.ins)))]


# Inside `shard_map`: a dimension that is longer or shorter afterwards.

RESIZES = ("all_gather", "all_gather_invariant", "all_gather_reduced", "reduce_scatter", "tile")


@forwards(*RESIZES)
def _resized(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    is_same_rank = len(shape_of(eqn.invars[0])) == len(shape_of(var))
    return ins[0]._replace(value=None) if is_same_rank else join_all(ins)._replace(varies=big(shape_of(var)))


@backwards(*RESIZES)
def _resized_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    if len(step.old) != len(step.new):
        return [unclear(step, uses[0], 0)]
    return [{use.resized(step.old) for use in uses[0]}]
