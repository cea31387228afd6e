"""Rules of what moves entries, takes or picks parts, sums over dimensions, and puts arrays in a row."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ._origins import NO_DIMS, Made, Origin, Sources, big, either, join_all
from ._program import Shape, shape_of
from ._rules import Step, absorbed, backwards, forwards, moves, unclear
from ._uses import (
    BATCH,
    IN,
    NO_USES,
    NONE,
    OUT,
    PICK,
    REDUCED,
    SUM,
    TOTAL,
    Piece,
    Use,
    Uses,
    cut_anew,
    labeled,
)


@moves("transpose")
def _transposed(eqn: Any, old: Shape, new: Shape) -> Sources:
    return [[dim] for dim in eqn.params["permutation"]]


@moves("squeeze")
def _squeezed(eqn: Any, old: Shape, new: Shape) -> Sources:
    return [[dim] for dim in range(len(old)) if dim not in eqn.params["dimensions"]]


@moves("broadcast_in_dim")
def _broadcast(eqn: Any, old: Shape, new: Shape) -> Sources:
    at = {target: dim for dim, target in enumerate(eqn.params["broadcast_dimensions"])}
    return [[at[dim]] if dim in at and old[at[dim]] == size else [] for dim, size in enumerate(new)]


# Some of them change the size of a dimension, inside `shard_map` say, or give a new one to what was gathered.
@moves("rev", "tile", "all_gather", "all_gather_invariant", "all_gather_reduced", "reduce_scatter")
def _in_place(eqn: Any, old: Shape, new: Shape) -> Sources:
    added = [eqn.params["all_gather_dimension"]] if len(new) > len(old) else []
    kept = iter(range(len(old)))
    return [[] if dim in added else [next(kept)] for dim in range(len(new))]


@forwards("reshape")
def _reshaped(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    old = shape_of(eqn.invars[0])
    row = [Piece(old[dim], frozenset({str(dim)})) for dim in eqn.params["dimensions"] or range(len(old))]
    sources = [[int(dim) for p in pieces for dim in p.labels] for pieces in cut_anew(row, shape_of(var))]
    # Two dimensions in one are one-hot only if both are.
    hot = frozenset(new for new, source in enumerate(sources) if source and ins[0].hot.issuperset(source))
    return ins[0].moved(sources)._replace(hot=hot)


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
    params, cut = step.eqn.params, [dim for dim, size in enumerate(step.new) if size != step.old[dim]]
    if any(params["strides"][dim] > 1 for dim in cut if params["strides"]):
        return [{use.cut_back(cut, step.old) for use in uses[0]}]
    window = tuple((dim, params["start_indices"][dim], params["limit_indices"][dim]) for dim in cut)
    return [{_windowed(step, use, window) for use in uses[0]}]


@backwards("split", "unstack")
def _split_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    axis = step.eqn.params["axis"]
    part = tuple(1 if dim == axis else size for dim, size in enumerate(step.old))
    if step.name == "unstack":
        uses = [frozenset(use.reshaped_back(range(len(part)), part) for use in of_one) for of_one in uses]
    stops = list(itertools.accumulate(step.eqn.params.get("sizes", [1] * len(uses))))
    windows = [((axis, start, stop),) for start, stop in zip([0, *stops], stops, strict=False)]
    pairs = zip(uses, windows, strict=True)
    return [{_windowed(step, use, window) for of_one, window in pairs for use in of_one}]


def _windowed(step: Step, use: Use, window: tuple[tuple[int, int, int], ...]) -> Use:
    """The use of an array of which only a part is used so; it does not matter which part of data it is."""
    return use.resized(step.old) if step.ins[0].made == Made.DATA else use._replace(window=window)


# Sums over dimensions.

REDUCTIONS = (
    *("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"),
    *("reduce_sum", "reduce_xor", "psum", "pmax", "pmin"),  # the last three of what `vmap` gave a dimension
)


def _kept(eqn: Any) -> Sources:
    return [[dim] for dim in range(len(shape_of(eqn.invars[0]))) if dim not in eqn.params["axes"]]


@forwards(*REDUCTIONS)
def _reduced(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    operand, summed = ins[0], ins[0].varies.intersection(eqn.params["axes"])
    # In `(x[:, :, None] * w).sum(1)` a product entry by entry and a sum make a contraction.
    is_product = operand.is_either and eqn.primitive.name == "reduce_sum"
    is_contraction = is_product and summed and summed <= operand.along
    moved = operand.moved(_kept(eqn))._replace(hot=NO_DIMS, source=0)
    return moved._replace(made=Made.DATA, met=True) if is_contraction else moved


@backwards(*REDUCTIONS)
def _reduced_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    gone = {dim for dim in step.eqn.params["axes"] if step.old[dim] > 1}
    return [{_before_reduction(step, use, gone) for use in uses[0]}]


def _before_reduction(step: Step, use: Use, gone: set[int]) -> Use:
    is_scale = use.how == "kernel" and (use.spread & (IN | OUT) or not use.dims)
    if is_scale or use.how in ("other", "term"):
        return Use("statistic", f"{use.op}: only a statistic of it meets the data")
    back = use.moved_back(_kept(step.eqn), step.old)
    if use.how != "output":
        return back.relabeled(lambda dim, labels: labels | REDUCED if dim in gone else labels)
    # Only the first sum after a product makes a contraction of it.
    label = (SUM if step.name == "reduce_sum" else NONE) | (TOTAL if math.prod(step.new) == 1 else NONE)
    kept = [back.labels(dim) & TOTAL if back.dims else NONE for dim in range(len(step.old))]
    return Use(
        "output", dims=labeled(step.old, (label if d in gone else of_one for d, of_one in enumerate(kept)))
    )


# In a row, and one in the other.

IN_A_ROW = "an input, in a row with the data"
WRITES = (
    *("dynamic_update_slice", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul"),
    "scatter-sub",
)


@forwards("concatenate", "stack", "pad", *WRITES)
def _beside(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    # What is written into parameters beforehand, `w.at[0].set(0.0)`, makes no data of them.
    is_written = (
        eqn.primitive.name in WRITES and ins[0].has_params and all(o.made <= Made.CLOSED for o in ins[1:])
    )
    whole = join_all(ins[:1] if is_written or eqn.primitive.name == "pad" else ins)
    return whole._replace(varies=big(shape_of(var)), hot=NO_DIMS, along=NO_DIMS, value=None)


@backwards("concatenate", "stack")
def _beside_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    """The uses may be of parts of the row (`Use.window`): then only what is in that part is used so.

    What `stack` puts in a row gets a dimension of one entry for it.
    """
    is_new, shapes = step.name == "stack", [shape_of(var) for var in step.eqn.invars]
    axis = step.eqn.params["axis" if is_new else "dimension"]
    parts = [(*shape[:axis], 1, *shape[axis:]) if is_new else shape for shape in shapes]
    sources = [
        [] if is_new and dim == axis else [dim - (is_new and dim > axis)] for dim in range(len(step.new))
    ]
    stops = list(itertools.accumulate(part[axis] for part in parts))
    found: list[Iterable[Use]] = []
    for origin, shape, part, start, stop in zip(step.ins, shapes, parts, [0, *stops], stops, strict=False):
        mine = (_of_one_in_row(step, use, axis, start, stop, part) for use in uses[0])
        found.append({_in_a_row(step, use.moved_back(sources, shape), origin) for use in mine if use})
    return found


def _in_a_row(step: Step, use: Use, origin: Origin) -> Use:
    """The use of one of several arrays in a row, if the row is used so; some may be data."""
    is_doubtful = origin.is_either and origin.mixed == 2 and step.outs[0].made == Made.DATA
    mine = origin._replace(made=Made.PARAMS) if is_doubtful else origin
    return absorbed(use, mine, step.outs[0], f"{step.name}: {IN_A_ROW}")


def _of_one_in_row(step: Step, use: Use, axis: int, start: int, stop: int, shape: Shape) -> Use | None:
    """The use of what stands from `start` to `stop` in a row, or nothing, if a part without it is used."""
    _, first, last = use.window[0] if use.window else (axis, start, stop)
    low, high = max(start, first), min(stop, last)
    if low >= high:
        return None
    is_alone = bool(use.window) and (low, high) == (first, last)
    part = tuple(high - low if dim == axis else size for dim, size in enumerate(shape))
    row = None if is_alone else (id(step), use.window, last - first if use.window else step.new[axis])
    mine = use._replace(window=()).resized(part, row)
    return (
        mine if (low, high) == (start, stop) else mine._replace(window=((axis, low - start, high - start),))
    )


@backwards("pad", *WRITES)
def _written_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    config = step.eqn.params.get("padding_config", ())
    cropped = [dim for dim, (low, high, _) in enumerate(config) if low < 0 or high < 0]
    back = (u.cut_back(cropped, step.old) if cropped else u.resized(step.old, id(step)) for u in uses[0])
    operand = {absorbed(use, step.ins[0], step.outs[0], f"{step.name}: {IN_A_ROW}") for use in back}
    return [operand, *(unclear(step, uses[0], number) for number in range(1, len(step.ins)))]


# Lookups: of a vector in a table, of an expert, of a layer, or of all entries in another order.


def _picked(eqn: Any, old: Shape, new: Shape) -> tuple[Sources, list[int], Shape]:
    """The source of each new dimension, the old ones that indices point into, and the size of a slice."""
    if eqn.primitive.name == "dynamic_slice":
        return [[dim] for dim in range(len(new))], [], new
    numbers = eqn.params["dimension_numbers"]
    pointed = [*numbers.collapsed_slice_dims, *numbers.operand_batching_dims]
    kept = iter([dim for dim in range(len(old)) if dim not in pointed])
    sources = [[next(kept)] if dim in numbers.offset_dims else [] for dim in range(len(new))]
    return sources, pointed, tuple(eqn.params["slice_sizes"])


def _leaves_nothing_out(eqn: Any, ins: list[Origin]) -> bool:
    """Whether the indices are known, and every entry along the one dimension they point into is picked."""
    if eqn.primitive.name == "dynamic_slice" or ins[1].value is None:
        return False
    old, numbers, sizes = shape_of(eqn.invars[0]), eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    cut = tuple(dim for dim in range(len(old)) if sizes[dim] != old[dim])
    is_along_one = len(cut) == 1 and numbers.start_index_map == numbers.collapsed_slice_dims == cut
    return is_along_one and set(range(old[cut[0]])) == set(np.unique(ins[1].value).tolist())


@forwards("gather", "dynamic_slice")
def _looked_up(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    operand, index, old, new = ins[0], join_all(ins[1:]), shape_of(eqn.invars[0]), shape_of(var)
    sources, _, sizes = _picked(eqn, old, new)
    moved = operand.moved(sources)._replace(varies=big(new))
    if _leaves_nothing_out(eqn, ins):
        return moved
    if not operand.has_params:
        return moved._replace(made=max(operand.made, index.made))
    picked = moved._replace(along=NO_DIMS, source=0)
    if index.made <= Made.PARAMS:
        return picked
    # What the data picks may be a vector, of an embedding, or a matrix, of an expert.
    whole = [size == extent for size, extent in zip(sizes, old, strict=True)]
    is_matrix = sum(whole) > 1 and all(w or size == 1 for w, size in zip(whole, sizes, strict=True))
    is_vector = (index.is_data or index.has_params) and not is_matrix
    made, mixed = Made.DATA if is_vector else either(ins), operand.mixed if is_matrix else 2
    return picked._replace(made=made, mixed=mixed, met=not is_matrix)


@backwards("gather", "dynamic_slice")
def _looked_up_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    operand, is_all = step.ins[0], _leaves_nothing_out(step.eqn, step.ins)
    by_data = any(origin.made > Made.PARAMS for origin in step.ins[1:]) and not is_all
    is_table = by_data and operand.has_params and operand.mixed < 2
    table = operand._replace(made=Made.PARAMS) if is_table else operand
    sources, pointed, sizes = _picked(step.eqn, step.old, step.new)
    partly = [
        dim for dim, size in enumerate(step.old) if not is_all and (dim in pointed or sizes[dim] != size)
    ]
    found = set()
    for use in uses[0]:
        before = absorbed(use, table, step.outs[0], f"{step.name}: a lookup table", "lookup")
        before = _before_lookup(step, before, sources, pointed)
        found.add(before.cut_back(partly, step.old, PICK if by_data else BATCH))
    return [found, *[NO_USES] * (len(step.ins) - 1)]


def _before_lookup(step: Step, use: Use, sources: Sources, pointed: list[int]) -> Use:
    """The use of all entries, with the labels of the indices' dimensions for those that they point into."""
    pairs = zip(use.dims, sources, strict=False)
    along = [piece for pieces, source in pairs if not source for piece in pieces]
    row = along[0].row if len({piece.row for piece in along}) == 1 else 0
    labels, before = NONE.union(*(piece.labels for piece in along)), use.moved_back(sources, step.old)
    dims = enumerate(before.dims)
    new = ((Piece(step.old[dim], labels, row),) if dim in pointed else pieces for dim, pieces in dims)
    return before._replace(dims=tuple(new), hidden=use.hidden)
