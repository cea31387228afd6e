"""Views of parameters against arrays that hold the indices of their own entries."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gc_optax._provenance import Piece, View, reshape_groups
from gc_optax._values import Known, Weight, simplified

sizes = st.sampled_from([1, 1, 2, 3, 4, 6])


@st.composite
def shapes_of(draw, size):
    """Any shape with so many entries."""
    shape = []
    while size > 1:
        shape.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= shape[-1]
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


def axes_that_vary(indices, dim):
    """The parameter axes whose index is not the same all along a dimension of a value."""
    return {axis for axis, index in enumerate(indices) if (index != index.take([0], dim)).any()}


def check(view, indices):
    """Each dimension has a piece of just the axes that vary along it, where nothing is blended."""
    shape = indices[0].shape
    for dim, pieces in enumerate(view.dims):
        owners = {piece.axis for piece in pieces}
        assert axes_that_vary(indices, dim) <= owners
        if all(piece.size for piece in pieces):
            assert math.prod(piece.size for piece in pieces) == shape[dim]
            assert owners <= axes_that_vary(indices, dim) | {p.axis for p in pieces if p.size == 1}


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.lists(sizes, min_size=1, max_size=4).map(tuple), st.data())
def test_reshapes_and_transposes(shape, data):
    view, indices = View.whole(0, shape), np.indices(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        old = indices[0].shape
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(old))))
            view = view.rearranged(order)
            indices = indices.transpose(0, *(dim + 1 for dim in order))
        else:
            new = data.draw(shapes_of(math.prod(old)))
            view = view.reshaped(old, new)
            indices = indices.reshape(len(shape), *new)
        check(view, indices)


@hypothesis.given(st.lists(sizes, max_size=5).map(tuple), st.data())
def test_reshape_groups_hold_the_same_entries(old, data):
    new = data.draw(shapes_of(math.prod(old)))
    groups = list(reshape_groups(old, new))
    assert [dim for group, _ in groups for dim in group] == list(range(len(old)))
    assert [dim for _, group in groups for dim in group] == list(range(len(new)))
    for left, right in groups:
        assert math.prod(old[dim] for dim in left) == math.prod(new[dim] for dim in right)


def test_empty_arrays_are_one_group():
    assert list(reshape_groups((2, 0), (0, 3, 5))) == [(range(2), range(3))]


@pytest.mark.parametrize(
    ("shape", "new", "dims"),
    [
        ((4, 6), (4, 2, 3), (((0, 4),), ((1, 2),), ((1, 3),))),
        ((4, 2, 3), (4, 6), (((0, 4),), ((1, 2), (2, 3)))),
        ((4, 6), (24,), (((0, 4), (1, 6)),)),
        ((4, 6), (2, 12), (((0, 2),), ((0, 2), (1, 6)))),
        ((4, 6), (8, 3), (((0, 4), (1, 2)), ((1, 3),))),
        ((4, 6), (3, 8), (((0, 0), (1, 0)), ((0, 0), (1, 0)))),
    ],
)
def test_pieces_of_axes(shape, new, dims):
    view = View.whole(0, shape).reshaped(shape, new)
    assert view.dims == tuple(tuple(Piece(*piece) for piece in pieces) for pieces in dims)


def test_too_many_views_become_one_for_each_parameter():
    shape = (4, 4)
    views = {
        dataclasses.replace(View.whole(leaf, shape), sliced=frozenset({number}))
        for leaf in range(2)
        for number in range(20)
    }
    kept = simplified(Weight(frozenset(views)), shape)
    assert {view.leaf for view in kept.views} == {0, 1}
    assert all(view.is_tangled for view in kept.views)
    few = Weight(frozenset(list(views)[:30]))
    assert simplified(few, shape) == few


def test_what_was_reduced_to_a_number_is_no_kernel():
    assert simplified(Weight(frozenset({View.whole(0, (4, 4)).reduced([0, 1])})), ()) == Known()
