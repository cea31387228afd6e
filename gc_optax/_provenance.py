"""Which parameter axes the dimensions of an intermediate value come from.

A value that is computed from parameters alone may be a parameter transposed, reshaped, cut, scaled or
added to another. A `View` follows one parameter through all that, dimension by dimension, until the
value meets the data; `uses_in_contraction` then says over which axes of the parameter it does.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Self

Shape = tuple[int, ...]
Axes = frozenset[int]

# The leaves of what is no parameter: a kernel that two parameters multiplied make a correction to, and an
# array of constants that a parameter is spread over.
FROZEN = -1
CONSTANT = -2


class Piece(NamedTuple):
    """A part of one parameter axis, in one dimension of a value.

    An axis of size 6 that was reshaped to (2, 3) is two pieces. Where it is not known which entries of
    a dimension belong to which axis, as after a reshape that cuts across axes, the size is 0.
    """

    axis: int
    size: int


Pieces = tuple[Piece, ...]


class Link(NamedTuple):
    """One side of a product of two parameters.

    Args:
        product: which product.
        side: 0 or 1.
        axes: the axes that are summed over with the other side's.
        low_rank: whether fewer entries are summed over than either side has left: the product is then a
            correction of low rank to a kernel of its shape, if there is one.
    """

    product: int
    side: int
    axes: Axes
    low_rank: bool


class Loop(NamedTuple):
    """The pieces that a loop goes through index by index, outside of what its body sees."""

    loop: int
    pieces: Pieces


@dataclasses.dataclass(frozen=True)
class View:
    """One parameter, as it appears in a value.

    Args:
        leaf: which parameter.
        dims: for each dimension of the value, the pieces in it, from major to minor.
        sliced: axes of which the value holds a part.
        summed: axes that were reduced over: the value is a statistic of the parameter.
        is_multiplied: whether it was multiplied by a matrix of constants.
        pending: the axes that were contracted with the constants.
        loops: pieces that the loops around the value go through.
        link: the product with another parameter in which this one took part.
        is_tangled: whether it cannot be followed any more: it took part in a product that went through a
            function that is not linear or through another product, or in an operation that is not known.
        is_added: whether it is added to an argument of its shape, a kernel or an input.
        lookup: the primitive by which the data picked the entries that are in the value, if it did.
    """

    leaf: int
    dims: tuple[Pieces, ...]
    sliced: Axes = frozenset()
    summed: Axes = frozenset()
    is_multiplied: bool = False
    pending: Axes = frozenset()
    loops: tuple[Loop, ...] = ()
    link: Link | None = None
    is_tangled: bool = False
    is_added: bool = False
    lookup: str = ""

    @classmethod
    def whole(cls, leaf: int, shape: Shape) -> Self:
        """The parameter itself."""
        return cls(leaf, tuple((Piece(axis, size),) for axis, size in enumerate(shape)))

    @property
    def placed(self) -> Axes:
        """The axes that are in some dimension."""
        return axes_of(self.dims)

    @property
    def is_product(self) -> bool:
        """Whether it was multiplied with another parameter."""
        return self.is_tangled or self.link is not None

    def owned(self, shape: Shape) -> frozenset[int]:
        """The dimensions along which this parameter makes the value vary."""
        return frozenset(dim for dim, pieces in enumerate(self.dims) if pieces and shape[dim] > 1)

    def rearranged(self, sources: Sequence[int | None]) -> Self:
        """With each new dimension taken from an old one, or from none."""
        return self.with_dims(() if dim is None else self.dims[dim] for dim in sources)

    def reshaped(self, old: Shape, new: Shape) -> Self:
        """With pieces split and joined as a reshape in row-major order does."""
        dims: list[Pieces] = [()] * len(new)
        for old_dims, new_dims in reshape_groups(old, new):
            if len(old_dims) == len(new_dims) == 1:
                dims[new_dims[0]] = self.dims[old_dims[0]]
                continue
            pieces = [piece for dim in old_dims for piece in self.dims[dim] or (Piece(-1, old[dim]),)]
            sizes = [new[dim] for dim in new_dims]
            for dim, refilled in zip(new_dims, _refill(pieces, sizes), strict=True):
                dims[dim] = refilled
        return self.with_dims(dims)

    def resized(self, old: Shape, new: Shape) -> Self:
        """With the same axes in dimensions of other sizes: the share of one device, say."""
        return self.with_dims(
            pieces if before == after else _of_size(pieces, after)
            for pieces, before, after in zip(self.dims, old, new, strict=True)
        )

    def cut(self, old: Shape, new: Shape) -> Self:
        """With a part of each dimension whose size is another now."""
        changed = [pieces for pieces, a, b in zip(self.dims, old, new, strict=True) if a != b]
        return dataclasses.replace(self.resized(old, new), sliced=self.sliced | axes_of(changed))

    def diluted(self, old: Shape, new: Shape) -> Self:
        """With something else in dimensions whose size is another now, in front, behind or between."""
        return self.with_dims(
            pieces if before == after else _blended(pieces)
            for pieces, before, after in zip(self.dims, old, new, strict=True)
        )

    def reduced(self, over: Collection[int]) -> Self:
        """Without the dimensions `over`, which were summed, or reduced in another way."""
        gone = axes_of(self.dims[dim] for dim in over)
        kept = [pieces for dim, pieces in enumerate(self.dims) if dim not in over]
        return dataclasses.replace(self.with_dims(kept), summed=self.summed | gone)

    def opaque(self, shape: Shape) -> Self:
        """With every axis somewhere in every dimension: nothing is known of an operation."""
        everywhere = tuple(Piece(axis, 0) for axis in sorted(self.placed))
        return self.with_dims(everywhere if size > 1 else () for size in shape)

    def in_loop(self, loop: int) -> Self:
        """What the body of a loop over the first dimension sees."""
        first, *rest = self.dims
        return dataclasses.replace(self.with_dims(rest), loops=(*self.loops, Loop(loop, first)))

    def stacked(self, loop: int) -> Self:
        """What the loop stacks up from the values of its body."""
        first = [piece for over in self.loops if over.loop == loop for piece in over.pieces]
        stacked = self.with_dims((tuple(first), *self.dims))
        return dataclasses.replace(stacked, loops=tuple(over for over in self.loops if over.loop != loop))

    def after_loop(self, loop: int) -> Self:
        """What a loop leaves behind in a value that it carries along."""
        last = axes_of(over.pieces for over in self.loops if over.loop == loop)
        loops = tuple(over for over in self.loops if over.loop != loop)
        return dataclasses.replace(self, loops=loops, sliced=self.sliced | last)

    def linked(self, product: int, side: int, contracted: Collection[int], *, low_rank: bool) -> Self:
        """Multiplied with another parameter over the dimensions `contracted`, which are still there."""
        if self.is_product:
            return self.tangled()
        axes = axes_of(self.dims[dim] for dim in contracted)
        return dataclasses.replace(self, link=Link(product, side, axes, low_rank))

    def tangled(self) -> Self:
        """After an operation through which it cannot be followed."""
        return dataclasses.replace(self, link=None, is_tangled=True)

    def added(self) -> Self:
        """Added to an argument of its shape."""
        return self if self.is_product else dataclasses.replace(self, is_added=True)

    def picked_by(self, op: str, is_own: Sequence[bool]) -> Self:
        """Some of its entries, which the data picks; not all dimensions of the value are its own."""
        dims = (pieces if own else () for pieces, own in zip(self.dims, is_own, strict=True))
        return dataclasses.replace(self.with_dims(dims), lookup=op)

    def times_constant(
        self, contracted: Collection[int], sources: Sequence[int | None], shape: Shape
    ) -> Self:
        """Multiplied with a constant matrix over the dimensions `contracted`, and then rearranged."""
        gone = axes_of(self.dims[dim] for dim in contracted)
        mixed = tuple(Piece(axis, 0) for axis in sorted(gone))
        product = self.with_dims(
            self.dims[dim] if dim is not None else mixed if size > 1 else ()
            for dim, size in zip(sources, shape, strict=True)
        )
        return dataclasses.replace(product, is_multiplied=True, pending=self.pending | gone)

    def without_groups(self, dim: int, groups: int) -> Self:
        """Without the axes that count the groups of a convolution, which are in front in `dim`.

        That is how `vmap` over kernels makes one convolution of many.
        """
        pieces = self.dims[dim]
        while len(pieces) > 1 and pieces[0].size and groups % pieces[0].size == 0:
            groups //= pieces[0].size
            pieces = pieces[1:]
        return self.with_dims(pieces if d == dim else old for d, old in enumerate(self.dims))

    def with_dims(self, dims: Iterable[Pieces]) -> Self:
        """With other pieces in its dimensions."""
        return dataclasses.replace(self, dims=tuple(dims))


@dataclasses.dataclass(frozen=True)
class Use:
    """What one operation says about one parameter.

    Args:
        leaf: which parameter.
        how: `"weight"` where data is contracted with it; `"no weight"` where it is certain that it is
            none; `"unclear"` where neither can be said.
        op: the primitive.
        why: for a reader.
        fan_in: the axes that are contracted with the data; for a use that is unclear, the axes that may be.
        fan_out: the axes that are not, and that are no batch axes.
        weak: whether the use gives way to one as a weight.
    """

    leaf: int
    how: Literal["weight", "no weight", "unclear"]
    op: str
    why: str
    fan_in: Axes = frozenset()
    fan_out: Axes = frozenset()
    weak: bool = False


def uses_in_contraction(
    views: Iterable[View], op: str, *, contracted: Collection[int], batch: Collection[int] = ()
) -> Iterator[Use]:
    """What it says that data is contracted with a value over some of its dimensions.

    Args:
        views: the parameters in the value.
        op: the primitive.
        contracted: the dimensions of the value that are summed over together with the data's.
        batch: the dimensions that run along with one of the data's.
    """
    views = most_complete(views)
    entrances = _entrances(views, contracted)
    free = {
        view: {dim for dim in _occupied(view) if dim not in contracted and dim not in batch} for view in views
    }
    for view in views:
        if view.leaf < 0:
            continue
        others = {dim for other in views if other.leaf != view.leaf for dim in free[other]}
        if view.is_product or view.summed or others <= free[view]:
            yield _use(view, op, entrances.get(view), contracted, batch)
        elif not free[view] or not entrances[view]:
            yield Use(view.leaf, "no weight", op, f"{op}: a bias or a scale of another array")
        else:
            why = f"{op}: spread over an array with more axes, as a scale of it or as a weight"
            yield Use(view.leaf, "unclear", op, why)


def most_complete(views: Iterable[View]) -> list[View]:
    """Leaves out what a value holds of a parameter besides the parameter: its norm in a weight norm."""
    of_leaf: dict[int, list[View]] = {}
    for view in views:
        of_leaf.setdefault(view.leaf, []).append(view)
    return [
        view for same in of_leaf.values() for view in same if not any(_covers(other, view) for other in same)
    ]


def _covers(view: View, other: View) -> bool:
    if view == other or len(view.dims) != len(other.dims):
        return False
    if not all(axes_of([a]) >= axes_of([b]) for a, b in zip(view.dims, other.dims, strict=True)):
        return False
    return view.placed > other.placed or (other.is_tangled and not view.is_tangled)


def listed(axes: Collection[int]) -> str:
    """Axes as a reader says them: "axis 0", "axes 0, 1"."""
    return ("axis " if len(axes) == 1 else "axes ") + ", ".join(map(str, sorted(axes)))


def axes_of(dims: Iterable[Pieces]) -> Axes:
    """The parameter axes with a piece in one of these dimensions."""
    return frozenset(piece.axis for pieces in dims for piece in pieces)


def reshape_groups(old: Shape, new: Shape) -> Iterator[tuple[range, range]]:
    """The smallest runs of old and of new dimensions that hold the same entries."""
    if 0 in old:
        yield range(len(old)), range(len(new))
        return
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (left := math.prod(old[start_i:i])) != (right := math.prod(new[start_j:j])):
            i, j = (i + 1, j) if left < right else (i, j + 1)
        yield range(start_i, i), range(start_j, j)


def _refill(pieces: list[Piece], sizes: list[int]) -> list[Pieces]:
    """Lays pieces end to end into dimensions of other sizes; an axis of -1 is no parameter's."""
    left = [piece for piece in pieces if piece.size != 1]
    filled: list[Pieces] = []
    for size in sizes:
        dim: list[Piece] = []
        while size > 1 and left and left[0].size:
            axis, length = left.pop(0)
            if length % size == 0:
                dim.append(Piece(axis, size))
                size, rest = 1, length // size
                left[:0] = [Piece(axis, rest)] if rest > 1 else []
            elif size % length == 0:
                dim.append(Piece(axis, length))
                size //= length
            else:
                break
        if size > 1:
            return [_blended(pieces) if size > 1 else () for size in sizes]
        filled.append(tuple(piece for piece in dim if piece.axis >= 0))
    return [_blended(pieces) if size > 1 else () for size in sizes] if left else filled


def _of_size(pieces: Pieces, size: int) -> Pieces:
    return (Piece(pieces[0].axis, size),) if len(pieces) == 1 and pieces[0].size else _blended(pieces)


def _blended(pieces: Iterable[Piece]) -> Pieces:
    return tuple(Piece(axis, 0) for axis in sorted({piece.axis for piece in pieces}) if axis >= 0)


def _occupied(view: View) -> set[int]:
    return {dim for dim, pieces in enumerate(view.dims) if pieces}


def _use(
    view: View, op: str, entrance: Axes | None, contracted: Collection[int], batch: Collection[int]
) -> Use:
    def unclear(why: str) -> Use:
        return Use(view.leaf, "unclear", op, why)

    rest = axes_of(pieces for dim, pieces in enumerate(view.dims) if dim not in contracted)
    outer = axes_of(
        pieces for dim, pieces in enumerate(view.dims) if dim not in contracted and dim not in batch
    )
    looped = axes_of(over.pieces for over in view.loops)
    if view.is_tangled:
        return unclear(f"{op}: what became of it before it meets the data cannot be told")
    if entrance is None:
        return unclear("a product of parameters: which of them meets the data first cannot be told")
    if not entrance:
        why = f"{op}: none of its axes is summed over"
        return Use(view.leaf, "no weight", op, why, weak=bool(view.summed or view.link))
    if view.is_added:
        return unclear(f"{op}: added to an argument of its shape, which may be a kernel or an input")
    if view.lookup and not (outer or view.link):
        return Use(view.leaf, "no weight", op, f"{view.lookup}: a lookup table")
    if split := entrance & (rest | looped):
        return unclear(f"{op}: the data meets only a part of {listed(split)}, the rest is used otherwise")
    if part := entrance & view.sliced:
        return unclear(f"{op}: the data meets only a part of {listed(part)}")
    if view.summed:
        return unclear(f"{op}: {listed(view.summed)} reduced before the data meets {listed(entrance)}")
    if not view.pending <= entrance:
        return unclear(
            f"{op}: constants are contracted with {listed(view.pending)}, the data with {listed(entrance)}: "
            "which are the inputs cannot be told"
        )
    passed_on = view.link.axes if view.link else frozenset[int]()
    return Use(
        view.leaf, "weight", op, f"{op} over {listed(entrance)}", entrance, (outer | passed_on) - entrance
    )


def _entrances(views: list[View], contracted: Collection[int]) -> dict[View, Axes]:
    """Through which axes the data comes into each parameter; without an entry where it cannot be told.

    In `x @ (a @ b)` the data comes into `a` from `x` and into `b` from `a`. But with a learned query
    for `b`, `a` may just as well be a projection of it, and `x` the keys. It is the former where the
    product is a correction of low rank to a kernel of its shape, as in LoRA.
    """

    def met(view: View) -> Axes:
        return axes_of(view.dims[dim] for dim in contracted)

    entrances = {view: met(view) for view in views if not view.is_product}
    kernels = [view for view in entrances if not view.summed and view.leaf != CONSTANT]
    linked = [(view, view.link) for view in views if view.link]
    for product in {link.product for _, link in linked}:
        factors = [(view, link) for view, link in linked if link.product == product]
        occupied = {dim for view, _ in factors for dim in _occupied(view)}
        leaves = {view.leaf for view, _ in factors}
        entered = {link.side for view, link in factors if met(view)}
        is_corrected = any(_occupied(kernel) >= occupied and kernel.leaf not in leaves for kernel in kernels)
        if is_corrected and all(link.low_rank for _, link in factors) and len(entered) == 1:
            entrances |= {view: met(view) if link.side in entered else link.axes for view, link in factors}
    return entrances
