"""Labels that are moved back through reshapes, transposes and slices, against the indices of all entries."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gc_optax._infer._uses import BATCH, IN, NONE, OUT, PART, Piece, Use, cut_anew, labeled, put_together

SIZES = st.sampled_from([1, 2, 3, 4, 5, 6])
SHAPES = st.lists(SIZES, min_size=1, max_size=4).map(tuple)


def unique_labels(shape):
    """A label of its own for each dimension."""
    return [frozenset({f"dim {dim}"}) for dim in range(len(shape))]


def labels_of(use):
    return [use.labels(dim) for dim in range(len(use.dims))]


def positions_in(shape):
    """The index of each entry of an array."""
    return np.stack(np.indices(shape), -1)


def varying(positions, dim):
    """The dimensions of another array along which one moves by going along one of this array.

    Args:
        positions: the index in the other array of each entry of this one, along the last one; -1 where an
            entry is not in the other array.
        dim: the dimension to go along.
    """
    last = positions.max(dim)
    first = np.where(positions < 0, np.iinfo(int).max, positions).min(dim)
    return {other for other in range(positions.shape[-1]) if (last > first)[..., other].any()}


@st.composite
def factorizations(draw, size):
    """Shapes of as many entries."""
    shape = []
    while size > 1:
        divisors = [n for n in range(2, size + 1) if size % n == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape) or (1,)


@st.composite
def reshapes(draw):
    old = draw(SHAPES)
    return old, draw(factorizations(math.prod(old)))


@st.composite
def programs(draw, names=("transpose", "reshape", "add", "drop")):
    """A shape, and steps from an array of that shape to others: the name, how, the shape before and after."""
    old = shape = draw(SHAPES)
    steps = []
    for name in draw(st.lists(st.sampled_from(names), max_size=5)):
        if name == "transpose":
            how = tuple(draw(st.permutations(range(len(shape)))))
            after = tuple(shape[dim] for dim in how)
        elif name == "reshape":
            how = after = draw(factorizations(math.prod(shape)))
        elif name == "slice":
            dim = draw(st.integers(0, len(shape) - 1))
            start = draw(st.integers(0, shape[dim] - 1))
            how = (dim, start, draw(st.integers(start + 1, shape[dim])))
            after = (*shape[:dim], how[2] - start, *shape[dim + 1 :])
        elif name == "add":
            how = draw(st.integers(0, len(shape)))
            after = (*shape[:how], 1, *shape[how:])
        elif 1 in shape and len(shape) > 1:
            how = shape.index(1)
            after = (*shape[:how], *shape[how + 1 :])
        else:
            continue
        steps.append((name, how, shape, after))
        shape = after
    return old, steps, shape


def positions_after(old, steps, new):
    """Where the entries of an array are after the steps; -1 for those that a slice left out."""
    numbers = np.arange(math.prod(old)).reshape(old)
    for name, how, _, after in steps:
        if name == "transpose":
            numbers = numbers.transpose(how)
        elif name == "slice":
            numbers = numbers.take(range(*how[1:]), axis=how[0])
        else:
            numbers = numbers.reshape(after)
    positions = np.full((math.prod(old), len(new)), -1)
    positions[numbers.ravel()] = positions_in(new).reshape(-1, len(new))
    return positions.reshape(*old, len(new))


def moved_back(use, steps):
    for name, how, before, after in reversed(steps):
        if name == "transpose":
            use = use.moved_back([[dim] for dim in how], before)
        elif name == "reshape":
            use = use.reshaped_back(range(len(before)), before)
        elif name == "slice":
            (use,) = put_together({use._replace(window=(how,))}, before) if before != after else (use,)
        elif name == "add":
            sources = [[dim - (dim > how)] for dim in range(len(after))]
            sources[how] = []
            use = use.moved_back(sources, before)
        else:
            use = use.moved_back([[dim] for dim in range(len(before)) if dim != how], before)
    return use


# Pieces that are cut anew.


@hypothesis.given(reshapes())
def test_dimensions_that_are_cut_anew_have_their_sizes(shapes):
    old, new = shapes
    row = [piece for (piece,) in labeled(old, unique_labels(old))]
    dims = cut_anew(row, new)
    assert tuple(math.prod(piece.size for piece in pieces) for pieces in dims) == new


@hypothesis.given(reshapes())
def test_dimensions_that_are_cut_anew_have_the_labels_of_what_varies_along_them(shapes):
    old, new = shapes
    use = Use("kernel", dims=labeled(new, unique_labels(new))).reshaped_back(range(len(old)), old)
    positions = positions_in(new).reshape(*old, len(new))
    for dim, size in enumerate(old):
        truth = {f"dim {other}" for other in varying(positions, dim)}
        assert size == 1 or use.labels(dim) >= truth


@hypothesis.given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4))
def test_splitting_dimensions_and_joining_them_again_changes_nothing(pairs):
    joined, split = tuple(a * b for a, b in pairs), tuple(size for pair in pairs for size in pair)
    use = Use("kernel", dims=labeled(joined, unique_labels(joined)))
    back = use.reshaped_back(range(len(split)), split)
    assert [back.labels(dim) for dim, size in enumerate(split) if size > 1] == [
        frozenset({f"dim {dim // 2}"}) for dim, size in enumerate(split) if size > 1
    ]
    again = back.reshaped_back(range(len(joined)), joined)
    assert all(
        size == 1 or of_one == before
        for size, of_one, before in zip(joined, labels_of(again), labels_of(use), strict=True)
    )


def test_pieces_keep_their_order():
    (pieces,) = cut_anew([Piece(2, OUT), Piece(4, IN)], [8])
    assert pieces == (Piece(2, OUT), Piece(4, IN))
    assert cut_anew(pieces, [2, 4]) == [(Piece(2, OUT),), (Piece(4, IN),)]
    assert cut_anew(pieces, [4, 2]) == [(Piece(2, OUT), Piece(2, IN)), (Piece(2, IN),)]


def test_labels_that_cannot_be_told_apart_are_all_given():
    first, second = cut_anew([Piece(4, OUT), Piece(6, IN)], [3, 8])
    assert first[0].labels == second[0].labels == IN | OUT


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_row_without_pieces_may_be_cut(size):
    shape = (1, 1) if size == 1 else (size,)
    dims = cut_anew([Piece(size, IN)], shape)
    assert [math.prod(piece.size for piece in pieces) for pieces in dims] == list(shape)


# Whole programs.


@hypothesis.settings(max_examples=300)
@hypothesis.given(programs())
def test_labels_come_back_to_the_dimensions_that_their_entries_came_from(program):
    old, steps, new = program
    use = moved_back(Use("kernel", dims=labeled(new, unique_labels(new))), steps)
    positions = positions_after(old, steps, new)
    assert tuple(math.prod(piece.size for piece in pieces) for pieces in use.dims) == old
    for dim, size in enumerate(old):
        truth = {f"dim {other}" for other in varying(positions, dim)}
        assert size == 1 or use.labels(dim) >= truth


@hypothesis.settings(max_examples=300)
@hypothesis.given(programs(), st.randoms(use_true_random=False))
def test_labels_are_mixed_only_where_they_cannot_be_told_apart(program, random):
    old, steps, new = program
    labels = [random.choice([IN, OUT]) for _ in new]
    use = moved_back(Use("kernel", dims=labeled(new, labels)), steps)
    positions = positions_after(old, steps, new)
    for dim, size in enumerate(old):
        truth = NONE.union(*(labels[other] for other in varying(positions, dim)))
        assert size == 1 or use.labels(dim) in (truth, IN | OUT)


@hypothesis.settings(max_examples=500)
@hypothesis.given(programs(("transpose", "reshape", "slice", "slice")), st.randoms(use_true_random=False))
def test_a_fan_in_without_a_doubt_is_right_whatever_is_cut_off(program, random):
    old, steps, new = program
    labels = [random.choice([IN, OUT, BATCH]) for _ in new]
    use = moved_back(Use("kernel", "dot_general", labeled(new, labels)), steps)
    positions = positions_after(old, steps, new)
    if not any(use.labels(dim) > IN for dim in range(len(old))):
        for dim in use.fan_in:
            assert old[dim] == 1 or {labels[other] for other in varying(positions, dim)} == {IN}
        for other, label in enumerate(labels):
            moved = {dim for dim in range(len(old)) if other in varying(positions, dim)}
            assert label != IN or moved <= set(use.fan_in)


@hypothesis.given(SHAPES, st.data())
def test_a_transpose_moves_the_labels(shape, data):
    order = data.draw(st.permutations(range(len(shape))))
    new = tuple(shape[dim] for dim in order)
    use = Use("kernel", dims=labeled(new, unique_labels(new)))
    back = use.moved_back([[dim] for dim in order], shape)
    assert labels_of(back) == [frozenset({f"dim {order.index(dim)}"}) for dim in range(len(shape))]


@hypothesis.given(SHAPES)
def test_a_reshape_that_reads_dimensions_in_an_order_is_a_transpose_and_a_reshape(shape):
    order = [*range(1, len(shape)), 0]
    moved = tuple(shape[dim] for dim in order)
    use = Use("kernel", dims=labeled(moved, unique_labels(moved)))
    back = use.reshaped_back(order, shape)
    other = use.moved_back([[dim] for dim in order], shape)
    assert all(
        size == 1 or a == b for size, a, b in zip(shape, labels_of(back), labels_of(other), strict=True)
    )


@hypothesis.given(SHAPES, st.data())
def test_a_use_of_another_extent_keeps_its_labels(shape, data):
    bigger = tuple(size * data.draw(SIZES) for size in shape)
    use = Use("kernel", dims=labeled(shape, unique_labels(shape)))
    assert labels_of(use.resized(bigger)) == labels_of(use) == labels_of(use.resized(bigger).resized(shape))
    assert tuple(math.prod(piece.size for piece in pieces) for pieces in use.resized(bigger).dims) == bigger


def test_uses_without_dimensions_stay_as_they_are():
    use = Use("other", "add: a bias")
    assert (
        use == use.resized((2, 3)) == use.moved_back([[1], [0]], (2, 3)) == use.reshaped_back([0, 1], (2, 3))
    )


# Parts that are put together.


def of_part(window, shape, row="row"):
    """The use of a part of a kernel, all of whose parts stand in one row."""
    cut = {dim: stop - start for dim, start, stop in window}
    dims = tuple((Piece(cut.get(dim, size), IN, row if dim in cut else 0),) for dim, size in enumerate(shape))
    return Use("kernel", "dot_general", dims, window=window)


@st.composite
def windows(draw):
    """A length and parts of it, of one size."""
    size = draw(st.integers(2, 8))
    width = draw(st.integers(1, size - 1))
    starts = draw(st.lists(st.integers(0, size - width), min_size=1, max_size=8))
    return size, [(start, start + width) for start in starts]


@hypothesis.given(windows(), st.booleans())
def test_parts_are_the_whole_if_and_only_if_they_cover_it(parts, last):
    size, spans = parts
    shape, dim = ((3, size), 1) if last else ((size, 3), 0)
    uses = {of_part(((dim, *span),), shape) for span in spans}
    covered = np.zeros(size, bool)
    for start, stop in spans:
        covered[start:stop] = True
    (whole,) = put_together(uses, shape)
    assert whole.window == ()
    assert (whole.labels(dim) == IN) == covered.all()
    assert (whole.labels(dim) >= PART) == (not covered.all())
    assert whole.labels(1 - dim) == IN
    assert whole.fan_in == (0, 1)


@hypothesis.given(st.integers(2, 4), st.integers(2, 4), st.data())
def test_parts_along_two_dimensions_have_to_cover_both(rows, columns, data):
    everything = [(row, column) for row in range(rows) for column in range(columns)]
    kept = data.draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    uses = {of_part(((0, r, r + 1), (1, c, c + 1)), (rows, columns)) for r, c in kept}
    (whole,) = put_together(uses, (rows, columns))
    is_part = any(whole.labels(dim) >= PART for dim in (0, 1))
    is_whole = whole.labels(0) == whole.labels(1) == IN
    assert is_whole == (len(kept) == len(everything))
    # All of one row is a kernel too: that of this row.
    assert is_part or is_whole or len({r for r, _ in kept}) == 1 or len({c for _, c in kept}) == 1


@hypothesis.given(windows())
def test_parts_of_different_rows_are_not_put_together(parts):
    size, spans = parts
    uses = {of_part(((0, *span),), (size, 3), row=number) for number, span in enumerate(spans)}
    assert all(whole.labels(0) >= PART for whole in put_together(uses, (size, 3)))


def test_a_part_of_the_outputs_says_nothing_of_the_others():
    dims = labeled((4, 3), [IN, OUT])
    (whole,) = put_together({Use("kernel", "dot_general", dims, window=((1, 0, 3),))}, (4, 6))
    assert labels_of(whole) == [IN, OUT]


def test_one_layer_of_several_is_a_kernel_of_all():
    use = Use("kernel", "dot_general", ((Piece(1),), *labeled((4, 6), [IN, OUT])), window=((0, 1, 2),))
    (whole,) = put_together({use}, (3, 4, 6))
    assert labels_of(whole) == [BATCH, IN, OUT]


def test_uses_of_the_whole_stay_as_they_are():
    use = Use("kernel", "dot_general", labeled((4, 6), [IN, OUT]))
    assert put_together({use, Use("output")}, (4, 6)) == {use, Use("output")}
