"""How an array is used later: what the pass backwards knows of it.

A `Use` has labels for each dimension. For `w` in `x @ w` they are `in` and `out`. What was done to `w` before
is undone on the labels: for `v` in `x @ v.T` they are `out` and `in`.

A dimension may come from several, so it is a row of pieces, the slowest first, as a reshape has them: in
`einsum("bi,hid->bhd", x, w.reshape(2, 4, 3))` the first dimension of `w`, of shape (8, 3), has the pieces
(2, `out`) and (4, `in`). Only a part of it is contracted with the data.
"""

import collections
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .._axes import Role
from ._origins import Sources
from ._program import Shape

Labels = frozenset[str]
NONE: Labels = frozenset()
IN, OUT, BATCH, PICK, PART, REDUCED, SUM, TOTAL, LOSS = (
    frozenset({name}) for name in ("in", "out", "batch", "pick", "part", "reduced", "sum", "total", "loss")
)


class Piece(NamedTuple):
    """A piece of a dimension: how many entries it has, and what they are used for."""

    size: int
    labels: Labels = NONE
    # What put it in a row with others, as the `stack` in `x @ jnp.stack([w[0], w[1]])`, and how long that row
    # is: only all of them together are what the labels speak of. 0 if nothing did.
    row: Hashable = 0


Dim = tuple[Piece, ...]
Window = tuple[tuple[int, int, int], ...]  # dimension, start and stop of what a slice keeps


class Use(NamedTuple):
    """One way in which an array is used."""

    # "kernel", contracted with data; "other", certainly no kernel; "term", scales data, and such products are
    # added up; "statistic", only a scale of it is used; "output", returned or an activation; "unclear".
    # And "followed", beside "output": data that meet a weight later.
    how: str
    # For a reader, after the primitive that says so: "add: a bias, a scale or a gate".
    why: str = ""
    # The pieces of each dimension; or nothing, where they do not matter.
    dims: tuple[Dim, ...] = ()
    # The labels of dimensions along which it is repeated, as a scale of what varies there.
    spread: Labels = NONE
    # The rows (see `Piece`) that it is one piece of, and has no dimension of, and their labels: for `w[0]` in
    # `x @ jnp.stack([w[0], w[1]])` the stack, and `in`. What is in a row stays in it, in a piece or here,
    # until all of the row is found together (`put_together`) or another takes its place (`alone`).
    hidden: frozenset[tuple[Hashable, Labels]] = frozenset()
    # The part of the array that is used so, if it is only a part.
    window: Window = ()
    # What it is added to: a kernel ("sure"), what may be an activation ("maybe"), or nothing.
    base: str = ""
    # Whether only a scale of a whole kernel is computed so, as a spectral norm is: other uses count more.
    weak: bool = False
    # Where in the model the data meet it, for a kernel or a term: before other weights, behind, or between.
    # And "lookup", for what is certainly no kernel, but a table.
    role: Role = ""

    @property
    def changes_data(self) -> bool:
        """Whether the data have met a weight or a table when they come out; what cannot be read may be one.

        A term by itself, `x * scale` in `x * scale + bias`, is none. All of them together may be.
        """
        return self.how in ("kernel", "unclear") or self.role == "lookup"

    @property
    def op(self) -> str:
        """The primitive that says how it is used."""
        return self.why.partition(":")[0]

    def labels(self, dim: int) -> Labels:
        """The labels of all pieces of a dimension."""
        return NONE.union(*(piece.labels for piece in self.dims[dim]))

    @property
    def has_dims(self) -> bool:
        """Whether its dimensions matter. Those of a kernel do, also if it is a number and has none."""
        return bool(self.dims) or self.how in ("kernel", "term")

    @property
    def fan_in(self) -> tuple[int, ...]:
        """The dimensions that are contracted with the data, as a whole or in part."""
        return tuple(dim for dim in range(len(self.dims)) if self.labels(dim) >= IN)

    @property
    def is_scale(self) -> bool:
        """Whether it scales a kernel that has more dimensions than it, and can be no kernel itself."""
        has_outputs = any(self.labels(dim) >= OUT for dim in range(len(self.dims)))
        return (self.spread >= OUT and not has_outputs) or (self.spread >= IN and not self.fan_in)

    @property
    def doubt(self) -> str:
        """Why the use of a kernel says nothing with certainty, or nothing."""
        labels = [self.labels(dim) for dim in range(len(self.dims))]
        if reduced := [dim for dim, of_one in enumerate(labels) if of_one >= REDUCED]:
            return f"{listed(reduced)} reduced before it meets the data"
        if mixed := [dim for dim, of_one in enumerate(labels) if of_one > IN]:
            return f"only a part of {listed(mixed)} is contracted with the data"
        if self.base == "maybe":
            return "an argument of its shape is added to it: it may be a kernel or an input"
        is_matrix = self.spread >= OUT and self.fan_in and not self.is_scale
        return "spread over an array with more axes, as a scale of it or as a weight" if is_matrix else ""

    def relabeled(self, new: Callable[[int, Labels], Labels]) -> "Use":
        """With labels that depend on the dimension and on those of before."""
        dims = enumerate(self.dims)
        return self._replace(
            dims=tuple(tuple(p._replace(labels=new(d, p.labels)) for p in dim) for d, dim in dims)
        )

    def moved_back(self, sources: Sources, old: Shape) -> "Use":
        """The use of an array, from the use of its entries at other places, maybe of fewer."""
        if not self.has_dims:
            return self
        dims: list[Dim] = [(Piece(size),) for size in old]
        for pieces, source in zip(self.dims, sources, strict=True):
            for dim in source:
                dims[dim] = pieces
        gone = (
            piece for pieces, source in zip(self.dims, sources, strict=True) if not source for piece in pieces
        )
        return self._without(gone)._replace(dims=tuple(dims)).resized(old)

    def reshaped_back(self, order: Sequence[int], old: Shape) -> "Use":
        """The use of an array whose dimensions are read in some order and cut anew."""
        if not self.has_dims:
            return self
        row = list(itertools.chain.from_iterable(self.dims))
        dims = dict(zip(order, cut_anew(row, [old[dim] for dim in order]), strict=True))
        return self._without(row)._replace(dims=tuple(dims[dim] for dim in range(len(old))))

    def _without(self, gone: Iterable[Piece]) -> "Use":
        """Remembers of which rows the pieces were that it has no dimension for any more."""
        hidden = {
            (piece.row, piece.labels) for piece in gone if piece.size == 1 and piece.row and piece.labels
        }
        return self._replace(hidden=self.hidden | hidden)

    def resized(self, shape: Shape, row: Hashable = None) -> "Use":
        """The use of an array of another extent; what differs becomes a piece of a row, if one is given."""
        if not self.dims:
            return self
        return self._replace(dims=tuple(_resized(*dim, row) for dim in zip(self.dims, shape, strict=True)))

    def cut_back(self, cut: Sequence[int], old: Shape, label: Labels = BATCH) -> "Use":
        """The use of an array, from the use of a part of it along some dimensions, unknown which."""
        if not self.dims:
            return self
        whole, is_piece = self.resized(old), any(labels >= IN for _, labels in self.hidden)
        summed = {dim for dim in cut if is_piece or whole.labels(dim) >= IN}
        return whole.relabeled(
            lambda dim, labels: (
                labels | IN | PART if dim in summed else labels or label if dim in cut else labels
            )
        )

    def alone(self) -> "Use":
        """Without the rows that it is a piece of, since it takes turns with others there."""
        dims = tuple(tuple(piece._replace(row=0) for piece in pieces) for pieces in self.dims)
        return self._replace(dims=dims, hidden=frozenset((0, labels) for _, labels in self.hidden))


Uses = frozenset[Use]
NO_USES: Uses = frozenset()
OUTPUT, FOLLOWED = Use("output"), Use("followed")


def labeled(shape: Shape, labels: Iterable[Labels]) -> tuple[Dim, ...]:
    """Dimensions of one piece each."""
    return tuple((Piece(size, of_one),) for size, of_one in zip(shape, labels, strict=True))


def listed(axes: Sequence[int]) -> str:
    """Axes for a reader: "axes 0, 1"."""
    return ("axis " if len(axes) == 1 else "axes ") + ", ".join(map(str, axes))


# Pieces.


def cut_anew(row: Iterable[Piece], sizes: Sequence[int]) -> list[Dim]:
    """Cuts a row of pieces into dimensions of other sizes.

    Where the cuts do not fall between pieces or divide them, as from (4, 6) to (3, 8), labels can no longer
    be told apart, and each dimension from there on has those of all.
    """
    runs = itertools.groupby((piece for piece in row if piece.size != 1), lambda piece: piece[1:])
    rest = [Piece(math.prod(piece.size for piece in run), *alike) for alike, run in runs][::-1]
    dims: list[Dim] = []
    for number, size in enumerate(sizes):
        left, taken = size, list[Piece]()
        while left > 1 and rest:
            piece = rest.pop()
            common = math.gcd(left, piece.size)
            if common < left and common < piece.size:
                labels = NONE.union(*(p.labels for p in (*taken, piece, *rest)))
                return dims + [(Piece(size, labels),) for size in sizes[number:]]
            taken.append(piece._replace(size=common))
            left //= common
            if common < piece.size:
                rest.append(piece._replace(size=piece.size // common))
        dims.append(tuple(taken) or (Piece(size),))
    return dims


def _resized(pieces: Dim, size: int, row: Hashable) -> Dim:
    """A dimension of another size. Its slowest piece is what grows or shrinks, where the sizes allow it."""
    inner = math.prod(piece.size for piece in pieces[1:])
    if pieces[0].size * inner == size:
        return pieces
    first = pieces[0] if row is None else pieces[0]._replace(row=row)
    if inner == 0 or size % inner:
        return (first._replace(size=size, labels=NONE.union(*(piece.labels for piece in pieces))),)
    return (first._replace(size=size // inner), *pieces[1:])


# From the uses of the parts of an array to those of the array.


def put_together(uses: Collection[Use], shape: Shape) -> Uses:
    """The uses of an array, from those of its parts.

    In `x @ jnp.stack([w[0], w[1], w[2]])` each `w[k]` is a piece of one row, and together they are all of
    `w`: dimension 0 is contracted. In `x @ w[:4] + z @ w[4:]` only a part of it is, each time.
    """
    if not any(use.window or use.role for use in uses):
        return frozenset(uses)
    parts = collections.defaultdict[tuple[Use, tuple[int, ...]], set[tuple[Window, Role]]](set)
    for use in uses:
        cut, alike = tuple(dim for dim, _, _ in use.window), use._replace(role="")
        parts[_enlarged(alike, shape) if cut else alike, cut].add((use.window, use.role))
    return frozenset(
        _of_parts(use, cut, {window for window, _ in those}, shape)._replace(
            role=common_role(role for _, role in those)
        )
        for (use, cut), those in parts.items()
    )


def common_role(roles: Iterable[Role]) -> Role:
    """The role of a weight with several uses: what lies at the beginning and behind it too is hidden."""
    different = set(roles)
    return different.pop() if len(different) == 1 else "hidden"


def _enlarged(use: Use, shape: Shape) -> Use:
    """The use of a whole array of which every part is used like the one at hand."""
    whole, cut = use._replace(window=()), {dim: stop - start for dim, start, stop in use.window}
    if not use.dims:
        return whole
    if use.hidden and (lost := {dim for dim, size in cut.items() if size == 1 and not use.labels(dim)}):
        # With two rows, and two dimensions, nobody knows which piece was where.
        others = {p.row for pieces in use.dims for p in pieces if p.row and p.labels >= IN}
        row, labels = next(iter(use.hidden)) if len(use.hidden) == 1 and not others else (0, IN | PART)
        dims = ((Piece(1, labels, row),) if dim in lost else pieces for dim, pieces in enumerate(use.dims))
        whole = whole._replace(dims=tuple(dims), hidden=frozenset())
    return whole.resized(shape).relabeled(lambda dim, labels: labels or BATCH if dim in cut else labels)


def _of_parts(use: Use, cut: Sequence[int], windows: set[Window], shape: Shape) -> Use:
    """The use of an array whose parts in some windows are used so, and its other parts are not."""
    if not use.dims or not cut:
        return use
    seen = {dim: {part for window in windows for part in window if part[0] == dim} for dim in cut}
    use = _put_in_row(use, [dim for dim in cut if len(seen[dim]) > 1], cut, windows, shape)
    summed = [dim for dim in cut if use.labels(dim) >= IN]
    moving = [dim for dim in summed if len(seen[dim]) > 1]
    is_row = all(piece.row for dim in summed for piece in use.dims[dim] if piece.labels >= IN)
    if is_row and moving and _cover(windows, moving, shape):
        whole = use.relabeled(lambda dim, labels: BATCH if dim in summed and dim not in moving else labels)
        whole = _without_full_row(whole, moving, windows)
        return whole._replace(how="kernel", why=use.op) if use.how == "term" else whole
    if use.how == "term":
        return use._replace(how="other", dims=())
    return use.relabeled(lambda dim, labels: labels | PART if dim in summed else labels)


def _without_full_row(use: Use, moving: Sequence[int], windows: set[Window]) -> Use:
    """Without a row that has these parts and no others: the array is all of it."""
    parts = (math.prod(stop - start for dim, start, stop in window if dim in moving) for window in windows)
    entries, row = sum(parts), use.dims[moving[0]][0].row
    if not isinstance(row, tuple) or row[-1] != entries:
        return use
    return use._replace(
        dims=tuple(tuple(p._replace(row=0) if p.row == row else p for p in d) for d in use.dims)
    )


def _put_in_row(
    use: Use, moving: Sequence[int], cut: Sequence[int], windows: set[Window], shape: Shape
) -> Use:
    """Parts along some dimensions that stand in a row along another: `x @ jnp.concatenate([w[0], w[1]])`.

    One by one, and all of them, they make the dimension that they were cut from a part of the row.
    """
    others = [piece for dim, pieces in enumerate(use.dims) if dim not in cut for piece in pieces if piece.row]
    rows = {(piece.row, piece.labels) for piece in others} | use.hidden
    parts = [part for window in windows for part in window]
    single = {dim for dim in moving if all(stop - start == 1 for d, start, stop in parts if d == dim)}
    # A dimension that is a row of its parts itself needs no other.
    if any(labels >= IN for _, labels in use.hidden):
        single = set()
    own = {d for d in moving if any(p.row and (p.labels >= IN or d in single) for p in use.dims[d])}
    loose = [dim for dim in moving if dim not in own]
    if not loose or not any(labels >= IN for _, labels in rows):
        return use
    is_free = all(dim in single and use.labels(dim) == BATCH for dim in loose)
    is_whole = is_free and len(rows) == 1 and not use.hidden and _cover(windows, loose, shape)
    label, row, dims = IN if is_whole else IN | PART, next(iter(rows))[0], enumerate(use.dims)
    return use._replace(dims=tuple((Piece(shape[d], label, row),) if d in loose else dim for d, dim in dims))


def _cover(windows: Iterable[Window], dims: Sequence[int], shape: Shape) -> bool:
    """Whether windows leave out nothing along some dimensions."""
    covered = np.zeros([shape[dim] for dim in dims], bool)
    for window in windows:
        covered[tuple(slice(start, stop) for dim, start, stop in window if dim in dims)] = True
    return bool(covered.all())
