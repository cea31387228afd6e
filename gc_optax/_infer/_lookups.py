"""Rules of what picks entries by indices: a lookup table, an expert, a layer, or all entries in another order."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ._origins import NO_DIMS, Made, Origin, Sources, big, either, join_all
from ._program import Shape, shape_of
from ._rules import Step, absorbed, backwards, forwards
from ._uses import BATCH, NO_USES, NONE, PICK, Piece, Use, Uses


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
    """Whether the indices are known, and every entry along the one dimension that they point into is picked."""
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
    moved = operand.moved(sources)
    result = moved._replace(varies=big(new), along=NO_DIMS, source=0)
    if _leaves_nothing_out(eqn, ins):
        return moved._replace(varies=big(new))
    if not operand.has_params:
        return result._replace(made=max(operand.made, index.made), source=operand.source)
    if index.made <= Made.PARAMS:
        return result
    # What the data picks may be a vector, of an embedding, or a matrix, of an expert.
    whole = [size == extent for size, extent in zip(sizes, old, strict=True)]
    is_matrix = sum(whole) > 1 and all(w or size == 1 for w, size in zip(whole, sizes, strict=True))
    is_vector = (index.is_data or index.has_params) and not is_matrix
    return result._replace(
        made=Made.DATA if is_vector else either(ins), mixed=operand.mixed if is_matrix else 2
    )


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
        before = absorbed(use, table, step.outs[0], f"{step.name}: a lookup table")
        before = _before_lookup(step, before, sources, pointed)
        found.add(before.cut_back(partly, step.old, PICK if by_data else BATCH))
    return [found, *[NO_USES] * (len(step.ins) - 1)]


def _before_lookup(step: Step, use: Use, sources: Sources, pointed: list[int]) -> Use:
    """The use of all entries, with the labels of the indices' dimensions for those that they point into."""
    along = [
        piece for pieces, source in zip(use.dims, sources, strict=False) if not source for piece in pieces
    ]
    row = along[0].row if len({piece.row for piece in along}) == 1 else 0
    labels, before = NONE.union(*(piece.labels for piece in along)), use.moved_back(sources, step.old)
    dims = (
        (Piece(step.old[dim], labels, row),) if dim in pointed else pieces
        for dim, pieces in enumerate(before.dims)
    )
    return before._replace(dims=tuple(dims), hidden=use.hidden)
