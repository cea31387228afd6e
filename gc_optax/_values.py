"""What is known of an array without computing it.

Each array of a computation is constant (`Known`), depends on the data (`Data`), or is computed from
parameters alone (`Weight`). `Data` too may be a kernel, that the data has modulated or masked.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._provenance import Shape, Use, View, most_complete, reshape_groups

# How many views of its parameters a value may hold.
_FEW_VIEWS = 32
_MOST_VIEWS_EACH = 8


@dataclasses.dataclass(frozen=True)
class Known:
    """Computed from constants and random keys alone.

    Args:
        counts: the one dimension along which it varies, if its entries there are all different.
        one_hot: the dimensions along which it has a single entry that is not zero.
        is_frozen: whether it is a parameter through which no gradient goes.
    """

    counts: int | None = None
    one_hot: frozenset[int] = frozenset()
    is_frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Data:
    """What depends on the data, an activation for example.

    Args:
        varies: the dimensions along which it is not constant, apart from those of what it carries.
        one_hot: the dimensions along which it has a single entry that is not zero.
        raw: whether it is made of arguments alone, entry by entry: it may be a mask, or a frozen kernel.
        constant: whether it depends on nothing but parameters and arrays that are constants: the
            batch, where the function closes over it, but perhaps a fixed transform of a kernel.
        carried: the parameters that it is a version of, should it turn out to be a kernel itself:
            modulated or masked by the data, picked by it, or multiplied by a constant.
        deferred: what there is to say of products of parameters with computed constants, as soon as
            it is certain that the constants are the inputs: a batch of ones, but not the weights of an
            interpolation between learned positions.
    """

    varies: frozenset[int]
    one_hot: frozenset[int] = frozenset()
    raw: bool = False
    constant: bool = False
    carried: frozenset[View] = frozenset()
    deferred: frozenset[Use] = frozenset()

    @classmethod
    def of(cls, shape: Shape, *, constant: bool = False, carried: Iterable[View] = ()) -> "Data":
        """Data of which nothing else is known."""
        carried = frozenset(carried)
        varies = frozenset(dim for dim, size in enumerate(shape) if size > 1) - owned_by(carried, shape)
        return cls(varies, constant=constant, carried=carried)

    @classmethod
    def given(cls, aval: Any, *, constant: bool = False) -> "Data | Known":
        """An argument, or an array that the function closes over."""
        if is_key(aval.dtype) or (constant and not aval.shape):
            return Known()
        return dataclasses.replace(cls.of(aval.shape, constant=constant), raw=True)


@dataclasses.dataclass(frozen=True)
class Weight:
    """What is computed from parameters alone, with constants: a kernel on its way to the data."""

    views: frozenset[View]

    @classmethod
    def of(cls, leaf: int, shape: Shape) -> "Weight":
        """A parameter."""
        return cls(frozenset({View.whole(leaf, shape)}))


Value = Known | Data | Weight


def is_key(dtype: Any) -> bool:
    """Whether arrays of this dtype hold random keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def is_constant(value: Value) -> bool:
    """Whether nothing but constants and parameters are in it."""
    return isinstance(value, Known) or (isinstance(value, Data) and value.constant)


def is_constant_or_weight(value: Value) -> bool:
    """Whether nothing but constants and parameters are in it, in a kernel too."""
    return isinstance(value, Weight) or is_constant(value)


def views_in(values: Iterable[Value]) -> frozenset[View]:
    """The parameters in those of the values that are computed from parameters alone."""
    return frozenset(view for value in values if isinstance(value, Weight) for view in value.views)


def owned_by(views: Iterable[View], shape: Shape) -> frozenset[int]:
    """The dimensions along which parameters make a value vary."""
    return frozenset(dim for view in views for dim in view.owned(shape))


def changed(value: Value, sources: Sequence[Sequence[int]], change: Callable[[View], View]) -> Value:
    """A value after an operation that moves entries and does not mix them.

    Args:
        value: what it was.
        sources: for each new dimension, the old ones that its index depends on.
        change: the same operation for a parameter's view.
    """

    def moved(dims: frozenset[int]) -> frozenset[int]:
        return frozenset(new for new, old in enumerate(sources) if not dims.isdisjoint(old))

    def moved_whole(dims: frozenset[int]) -> frozenset[int]:
        uses = list(itertools.chain.from_iterable(sources))
        kept = {dim for dim in dims if uses.count(dim) == 1}
        return frozenset(new for new, old in enumerate(sources) if len(old) == 1 and old[0] in kept)

    match value:
        case Known():
            counts = () if value.counts is None else moved_whole(frozenset({value.counts}))
            return Known(next(iter(counts), None), moved_whole(value.one_hot), value.is_frozen)
        case Data():
            return dataclasses.replace(
                value,
                varies=moved(value.varies),
                one_hot=moved_whole(value.one_hot),
                carried=frozenset(map(change, value.carried)),
            )
        case Weight():
            return Weight(frozenset(map(change, value.views)))


def rearranged(value: Value, sources: Sequence[int | None]) -> Value:
    """A value with each new dimension taken from an old one, or from none."""
    old = [() if dim is None else (dim,) for dim in sources]
    return changed(value, old, lambda view: view.rearranged(sources))


def reshaped(value: Value, old: Shape, new: Shape) -> Value:
    """A value in another shape, in row-major order."""
    sources: list[Sequence[int]] = [()] * len(new)
    for old_dims, new_dims in reshape_groups(old, new):
        old_dims_in_use = [dim for dim in old_dims if old[dim] != 1] or list(old_dims)
        for dim in new_dims:
            if new[dim] != 1 or len(new_dims) == 1:
                sources[dim] = old_dims_in_use
    return changed(value, sources, lambda view: view.reshaped(old, new))


def broadcast(value: Value, old: Shape, new: Shape) -> Value:
    """As operations entry by entry see it: scalars and dimensions of size 1 fit anything."""
    return rearranged(value, [dim if old and old[dim] == size else None for dim, size in enumerate(new)])


def join(a: Value, b: Value) -> Value:
    """What is known of an array that may be the one or the other."""
    match a, b:
        case Weight(), Weight():
            return Weight(a.views | b.views)
        case Data(), Data():
            return Data(
                a.varies | b.varies,
                a.one_hot & b.one_hot,
                a.raw and b.raw,
                a.constant and b.constant,
                pending_in(a) | pending_in(b) | _if_both(kernels_in(a), kernels_in(b)),
                a.deferred | b.deferred,
            )
        case Data(), Weight():
            carried = pending_in(a) | _if_both(kernels_in(a), b.views)
            return dataclasses.replace(a, one_hot=frozenset(), raw=False, carried=carried)
        case Data(), Known():
            return dataclasses.replace(a, one_hot=frozenset(), raw=False)
        case Known(), Known():
            return a if a == b else Known()
        case Weight(), Known():
            return a
        case _:
            return join(b, a)


def _if_both(a: frozenset[View], b: frozenset[View]) -> frozenset[View]:
    return a | b if a and b else frozenset()


def resized(value: Value, old: Shape, new: Shape) -> Value:
    """A value in which dimensions have another size: the share of one device, say."""
    if old == new:
        return value
    return changed(value, [(dim,) for dim in range(len(new))], lambda view: view.resized(old, new))


def cut(value: Value, old: Shape, new: Shape) -> Value:
    """A part of a value."""
    return changed(value, [(dim,) for dim in range(len(new))], lambda view: view.cut(old, new))


def after_loop(value: Value, loop: int) -> Value:
    """What a loop leaves in a value that it carries along."""
    return with_views_changed(value, lambda view: view.after_loop(loop))


def stacked(value: Value, shape: Shape, loop: int) -> Value:
    """What a loop makes of the values of all its rounds."""
    match value:
        case Weight():
            return Weight(frozenset(view.stacked(loop) for view in value.views))
        case Data():
            carried = [view.stacked(loop) for view in value.carried]
            result = Data.of(shape, constant=value.constant, carried=carried)
            return dataclasses.replace(result, deferred=value.deferred)
        case Known():
            return Known()


def variation(value: Value, shape: Shape) -> frozenset[int]:
    """The dimensions along which data is not constant."""
    return value.varies | owned_by(value.carried, shape) if isinstance(value, Data) else frozenset()


def kernels_in(value: Value) -> frozenset[View]:
    """The parameters that a value is a kernel made of, or may be."""
    match value:
        case Weight():
            return value.views
        case Data():
            return frozenset(view for view in value.carried if not view.is_multiplied)
        case Known():
            return frozenset()


def pending_in(value: Value) -> frozenset[View]:
    """The parameters in a value that were multiplied by constants."""
    return value.carried - kernels_in(value) if isinstance(value, Data) else frozenset()


def simplified(value: Value, shape: Shape) -> Value:
    """A value without what does not matter, and with less where it would be too much.

    A parameter that was reduced to a number does not matter. Too much would be what a network of nothing
    but parameters makes of them.
    """
    match value:
        case Weight():
            views = _relevant(value.views)
            if len(views) > max(_FEW_VIEWS, _MOST_VIEWS_EACH * len({view.leaf for view in views})):
                views = frozenset(view.opaque(shape).tangled() for view in most_complete(views))
            return Weight(views) if views else Known()
        case Data():
            return dataclasses.replace(value, carried=_relevant(value.carried)) if value.carried else value
        case Known():
            return value


def _relevant(views: frozenset[View]) -> frozenset[View]:
    return frozenset(view for view in views if view.placed or view.loops or view.is_product)


def with_views_changed(value: Value, change: Callable[[View], View]) -> Value:
    """A value with the same dimensions, whose parameters are seen in another way."""
    match value:
        case Weight():
            return Weight(frozenset(map(change, value.views)))
        case Data():
            return dataclasses.replace(value, carried=frozenset(map(change, value.carried)))
        case Known():
            return value
