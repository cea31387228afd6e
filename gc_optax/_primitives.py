"""What each primitive says about the parameters that go into it, and what is known of what comes out.

One function for each kind of primitive. It gets the equation and what is known of its arguments, and
notes how parameters are used. A primitive that is not among them says nothing with certainty.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ._provenance import CONSTANT, FROZEN, Shape, Use, View, most_complete, uses_in_contraction
from ._values import (
    Data,
    Known,
    Value,
    Weight,
    broadcast,
    changed,
    cut,
    is_constant,
    is_constant_or_weight,
    kernels_in,
    owned_by,
    pending_in,
    rearranged,
    reshaped,
    resized,
    variation,
    views_in,
    with_views_changed,
)

Note = Callable[[Iterable[Use]], None]


def results(note: Note, eqn: Any, values: list[Value]) -> list[Value]:
    """What is known of the results of an equation.

    Args:
        note: takes what the equation says about parameters.
        eqn: an equation of a jaxpr.
        values: what is known of its arguments.
    """
    outputs = _read(note, eqn, values)
    deferred = {use for value in values for use in deferred_in(value)}
    if deferred and not any(deferred_in(output) for output in outputs):
        note(_no_longer_deferred(deferred, eqn, values))
    return outputs


def _read(note: Note, eqn: Any, values: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in _RULES:
        return [_RULES[name](note, eqn, values)]
    if name == "split":
        return [cut(values[0], shape_of(eqn.invars[0]), shape_of(var)) for var in eqn.outvars]
    if name == "unstack":
        return _unstack(eqn, values)
    if name in _EACH_BY_ITSELF and len(values) == len(eqn.outvars):
        return values
    return _unknown(note, eqn, values)


def deferred_in(value: Value) -> frozenset[Use]:
    """What there is to say of a value as soon as it is certain that the constants in it are the inputs."""
    return value.deferred if isinstance(value, Data) else frozenset()


def _no_longer_deferred(deferred: Iterable[Use], eqn: Any, values: list[Value]) -> Iterator[Use]:
    name = eqn.primitive.name
    meets_data = any(isinstance(value, Data) and not value.constant for value in values)
    if not meets_data or math.prod(shape_of(eqn.outvars[0])) == 1:
        yield from deferred
    elif name not in _CONTRACTIONS:
        why = f"{name}: only constants are contracted with it before it meets the data"
        for use in deferred:
            yield dataclasses.replace(use, how="unclear", why=why)


def shape_of(atom: Any) -> Shape:
    """The shape of a variable or a literal; `()` where it is no array."""
    return tuple(getattr(atom.aval, "shape", ()))


def no_weight(views: Iterable[View], op: str, why: str, *, weak: bool = False) -> Iterator[Use]:
    """What it says that parameters are used in another way than as weights."""
    for view in most_complete(views):
        if view.leaf < 0:
            continue
        if not view.placed or view.summed:
            yield Use(view.leaf, "no weight", op, f"{op}: only a statistic of it meets the data", weak=True)
        elif view.is_product and not weak:
            yield unclear_product(view, op)
        else:
            reason = f"{view.lookup}: a lookup table" if view.lookup else why
            yield Use(view.leaf, "no weight", op, reason, weak=weak)


def unclear_product(view: View, op: str) -> Use:
    """What there is to say of a product of parameters in which no data is contracted."""
    return Use(view.leaf, "unclear", op, f"{op}: a product of parameters with data on neither side")


def _kernels_among(values: Iterable[Value]) -> frozenset[View]:
    return frozenset(view for value in values for view in kernels_in(value))


def _unknown(note: Note, eqn: Any, values: list[Value]) -> list[Value]:
    """Nothing is known of the operation but which values go into it."""
    shapes = [shape_of(var) for var in eqn.outvars]
    views = most_complete(_kernels_among(values))
    if not any(isinstance(value, Data) and not kernels_in(value) for value in values):
        opaque = [frozenset(view.opaque(shape).tangled() for view in views) for shape in shapes]
        return [_made_of(seen, values, shape) for seen, shape in zip(opaque, shapes, strict=True)]
    name = eqn.primitive.name
    why = f"{name}: an operation on it together with the data that infer_axes cannot read"
    note(Use(view.leaf, "unclear", name, why) for view in views)
    return [_product_of_data(values, shape) for shape in shapes]


def _entry_by_entry(note: Note, eqn: Any, values: list[Value]) -> Value:
    name, shape = eqn.primitive.name, shape_of(eqn.outvars[0])
    values = [broadcast(value, shape_of(var), shape) for value, var in zip(values, eqn.invars, strict=True)]
    shapes = [shape_of(var) for var in eqn.invars]
    sizes = [math.prod(own) for own in shapes]
    if _kernels_among(values):
        return _kernels_entry_by_entry(note, name, values, shapes, shape)
    if all(isinstance(value, Known) for value in values):
        return _constant_entry_by_entry(name, values, sizes)
    return _data_entry_by_entry(name, values, sizes, shape)


def _kernels_entry_by_entry(
    note: Note, name: str, values: list[Value], shapes: list[Shape], shape: Shape
) -> Value:
    views = _kernels_among(values)
    owned = owned_by(views, shape)
    values = _without_masks(name, values, owned, shape)
    is_sum = name in ("add", "sub")
    if name not in _LINEAR:
        views = frozenset(view.tangled() if view.is_product else view for view in views)
    elif is_sum and _is_frozen_kernel_among(values, shapes, shape):
        views = _with_frozen_kernel(views, shape)
    elif not is_sum and _is_spread_over_constants(values, shapes, owned):
        views |= {View.whole(CONSTANT, shape)}
    data = [value for value in values if isinstance(value, Data)]
    if not data:
        return Weight(views)

    # It may be a kernel still: data that scales it along some of its axes may be contracted over the others,
    # and an argument of its shape may be a mask of it, or the frozen kernel that it is added to.
    others = [value for value in data if not kernels_in(value)]
    varies = frozenset[int]().union(*(variation(value, shape) for value in others))
    is_scaled = bool(owned - varies) and (not varies or _scales(name, values))
    is_kernel = is_scaled or not others or _is_mask_or_kernel(name, others, varies, owned)
    constant = all(map(is_constant, data))
    why = f"{name}: a bias, a scale or a gate"
    note(no_weight(views_in(values) if is_kernel else views, name, why, weak=is_kernel))
    if not is_kernel:
        # A parameter of the same extent may be another term of a kernel; a bias is added to an activation.
        is_of_same_extent = owned == {dim for dim, size in enumerate(shape) if size > 1}
        keeps = is_of_same_extent and name in _KEEPING_KERNELS
        return _still_constant(Data.of(shape, constant=constant), values, keeps_pending=keeps)
    if others and not is_scaled and is_sum:
        views = frozenset(view.added() for view in _with_frozen_kernel(views, shape))
    scaling = frozenset[int]().union(*(value.varies for value in data if kernels_in(value)))
    return Data(scaling | (varies if is_scaled else varies - owned), constant=constant, carried=views)


def _still_constant(result: Data, values: Iterable[Value], *, keeps_pending: bool) -> Data:
    """With what was said of products of parameters with constants, as long as nothing else is in it."""
    if not result.constant:
        return result
    deferred = frozenset[Use]().union(*map(deferred_in, values))
    pending = frozenset[View]().union(*map(pending_in, values)) if keeps_pending else frozenset[View]()
    return dataclasses.replace(result, carried=result.carried | pending, deferred=deferred)


def _constant_entry_by_entry(name: str, values: list[Value], sizes: list[int]) -> Known:
    known = [value for value in values if isinstance(value, Known)]
    arrays = [value for value, size in zip(known, sizes, strict=True) if size > 1]
    if name == "eq" and len(known) == 2:
        counted = {value.counts for value in known if value.counts is not None}
        return Known(one_hot=frozenset(counted) if len(counted) == 2 else frozenset())
    if name in ("add", "sub", *_UNCHANGED) and len(arrays) == 1:
        return arrays[0]
    return Known(is_frozen=len(arrays) == 1 and arrays[0].is_frozen and name in _SCALING)


def _data_entry_by_entry(name: str, values: list[Value], sizes: list[int], shape: Shape) -> Data:
    data = [value for value in values if isinstance(value, Data)]
    one_hot = (dim for dim in range(len(shape)) if _is_one_hot(name, values, sizes, shape, dim))
    result = Data(
        varies=frozenset[int]().union(*(variation(value, shape) for value in data)),
        one_hot=frozenset(one_hot),
        raw=all(value.raw for value in data),
        constant=all(map(is_constant, values)),
    )
    return _still_constant(result, values, keeps_pending=name in _KEEPING_KERNELS)


def _is_one_hot(name: str, values: list[Value], sizes: list[int], shape: Shape, dim: int) -> bool:
    def is_constant_along(value: Value, size: int) -> bool:
        return size == 1 or (isinstance(value, Data) and dim not in variation(value, shape))

    if name == "eq":
        return any(
            isinstance(value, Known) and value.counts == dim and is_constant_along(other, size)
            for value, other, size in zip(values, values[::-1], sizes[::-1], strict=True)
        )
    hot = [isinstance(value, Data) and dim in value.one_hot for value in values]
    others = zip(values, sizes, hot, strict=True)
    return (
        name in _SCALING
        and any(hot)
        and all(is_hot or is_constant_along(value, size) for value, size, is_hot in others)
    )


def _without_masks(name: str, values: list[Value], owned: frozenset[int], shape: Shape) -> list[Value]:
    """With arrays that the function closes over, and that run along a kernel, for what they are: masks."""

    def is_mask(value: Value) -> bool:
        return isinstance(value, Data) and value.raw and value.constant and variation(value, shape) == owned

    if name not in ("mul", "select_n") or len(owned) < 2:
        return values
    return [Known() if is_mask(value) else value for value in values]


def _is_frozen_kernel_among(values: list[Value], shapes: list[Shape], shape: Shape) -> bool:
    return any(
        isinstance(value, Known) and value.is_frozen and own == shape
        for value, own in zip(values, shapes, strict=True)
    )


def _is_spread_over_constants(values: list[Value], shapes: list[Shape], owned: frozenset[int]) -> bool:
    """Whether constants make a matrix of a vector of parameters, a diagonal one say."""
    return any(
        isinstance(value, Known) and not {dim for dim, size in enumerate(own) if size > 1} <= owned
        for value, own in zip(values, shapes, strict=True)
    )


def _is_mask_or_kernel(name: str, data: list[Data], varies: frozenset[int], owned: frozenset[int]) -> bool:
    is_raw = all(value.raw for value in data) and len(owned) > 1
    return is_raw and name in _LINEAR and (varies == owned or (name == "mul" and varies <= owned))


def _scales(name: str, values: list[Value]) -> bool:
    if name == "div":
        return bool(kernels_in(values[0]))
    if name == "select_n":
        return not any(isinstance(case, Data) and not kernels_in(case) for case in values[1:])
    return name == "mul"


def _with_frozen_kernel(views: frozenset[View], shape: Shape) -> frozenset[View]:
    """With a kernel that is no parameter, where there is a product of parameters to correct it."""
    return views | {View.whole(FROZEN, shape)} if any(view.link for view in views) else views


def _transpose(note: Note, eqn: Any, values: list[Value]) -> Value:
    return rearranged(values[0], eqn.params["permutation"])


def _reshape(note: Note, eqn: Any, values: list[Value]) -> Value:
    value, old = values[0], shape_of(eqn.invars[0])
    if eqn.params["dimensions"] is not None:
        value = rearranged(value, eqn.params["dimensions"])
        old = tuple(old[dim] for dim in eqn.params["dimensions"])
    return reshaped(value, old, shape_of(eqn.outvars[0]))


def _squeeze(note: Note, eqn: Any, values: list[Value]) -> Value:
    kept = [dim for dim in range(len(shape_of(eqn.invars[0]))) if dim not in eqn.params["dimensions"]]
    return rearranged(values[0], kept)


def _broadcast_in_dim(note: Note, eqn: Any, values: list[Value]) -> Value:
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    sources: list[int | None] = [None] * len(new)
    for dim, target in enumerate(eqn.params["broadcast_dimensions"]):
        sources[target] = dim if old[dim] == new[target] else None
    return rearranged(values[0], sources)


def _iota(note: Note, eqn: Any, values: list[Value]) -> Value:
    return Known(counts=eqn.params["dimension"])


def _slice(note: Note, eqn: Any, values: list[Value]) -> Value:
    return cut(values[0], shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]))


def _unstack(eqn: Any, values: list[Value]) -> list[Value]:
    old, axis = shape_of(eqn.invars[0]), eqn.params["axis"]
    kept = [dim for dim in range(len(old)) if dim != axis]
    part = cut(values[0], old, tuple(1 if dim == axis else size for dim, size in enumerate(old)))
    return [rearranged(part, kept) for _ in eqn.outvars]


def _pad(note: Note, eqn: Any, values: list[Value]) -> Value:
    if not (kernels_in(values[0]) and is_constant(values[1])):
        return _joined_with_data(note, eqn, values)
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    is_cropped = any(low < 0 or high < 0 for low, high, _ in eqn.params["padding_config"])
    return with_views_changed(values[0], lambda view: (view.cut if is_cropped else view.diluted)(old, new))


def _concatenate(note: Note, eqn: Any, values: list[Value]) -> Value:
    new = shape_of(eqn.outvars[0])
    shapes = map(shape_of, eqn.invars)
    return _side_by_side(note, eqn, values, [_diluting(shape, new) for shape in shapes])


def _stack(note: Note, eqn: Any, values: list[Value]) -> Value:
    axis, rank = eqn.params["axis"], len(shape_of(eqn.outvars[0]))
    sources = [None if dim == axis else dim - (dim > axis) for dim in range(rank)]
    return _side_by_side(note, eqn, values, [lambda view: view.rearranged(sources)] * len(values))


def _side_by_side(
    note: Note, eqn: Any, values: list[Value], changes: Sequence[Callable[[View], View]]
) -> Value:
    if any(isinstance(value, Data) and not kernels_in(value) for value in values):
        return _joined_with_data(note, eqn, values)
    views = frozenset(
        change(view) for value, change in zip(values, changes, strict=True) for view in kernels_in(value)
    )
    return _made_of(views, values, shape_of(eqn.outvars[0]))


def _diluting(old: Shape, new: Shape) -> Callable[[View], View]:
    return lambda view: view.diluted(old, new)


def _made_of(views: frozenset[View], values: list[Value], shape: Shape) -> Value:
    """A value that is a kernel made of some parameters, and of nothing else but constants."""
    if any(isinstance(value, Data) for value in values):
        return Data.of(shape, constant=all(map(is_constant_or_weight, values)), carried=views)
    return Weight(views) if views else Known()


def _joined_with_data(note: Note, eqn: Any, values: list[Value]) -> Value:
    """Parameters in a row with the data: a class token, say."""
    name = eqn.primitive.name
    views = _kernels_among(values)
    note(no_weight(views, name, f"{name}: an input, in a row with the data"))
    return _product_of_data(values, shape_of(eqn.outvars[0]))


def _reduce(note: Note, eqn: Any, values: list[Value]) -> Value:
    value, old, over = values[0], shape_of(eqn.invars[0]), eqn.params["axes"]
    kept = [dim for dim in range(len(old)) if dim not in over]
    if isinstance(value, Known):
        return Known()
    if isinstance(value, Data):
        value = dataclasses.replace(value, one_hot=frozenset(), raw=False)
        owned = owned_by(kernels_in(value), old).intersection(over)
        if eqn.primitive.name == "reduce_sum" and owned and owned <= value.varies:
            # A product entry by entry and a sum: a contraction, spelled out.
            note(uses_in_contraction(kernels_in(value), "reduce_sum", contracted=over))
            value = dataclasses.replace(value, varies=variation(value, old), carried=frozenset())
    return changed(value, [(dim,) for dim in kept], lambda view: view.reduced(over))


def _gather(note: Note, eqn: Any, values: list[Value]) -> Value:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    sources: list[int | None] = [None] * len(new)
    pointed = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = (dim for dim in range(len(old)) if dim not in pointed)
    for target, dim in zip(numbers.offset_dims, kept, strict=True):
        sources[target] = dim

    def gathered(view: View) -> View:
        # The dimensions of the indices run along those of the operand that they point into.
        along = view.rearranged([*pointed]).opaque(new).dims
        own = view.cut(old, tuple(sizes)).rearranged(sources)
        dims = zip(own.dims, along, sources, strict=True)
        return own.with_dims(other if source is None else pieces for pieces, other, source in dims)

    is_whole = [source is not None and old[source] == sizes[source] for source in sources]
    return _looked_up(note, eqn, values, gathered, sources, is_whole)


def _dynamic_slice(note: Note, eqn: Any, values: list[Value]) -> Value:
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    is_whole = [before == after for before, after in zip(old, new, strict=True)]
    return _looked_up(note, eqn, values, lambda view: view.cut(old, new), range(len(new)), is_whole)


def _looked_up(
    note: Note,
    eqn: Any,
    values: list[Value],
    change: Callable[[View], View],
    sources: Sequence[int | None],
    is_whole: Sequence[bool],
) -> Value:
    """Some entries of the first value, at indices that are the others.

    Args:
        note: takes what that says.
        eqn: the equation.
        values: its arguments.
        change: the operation for a parameter's view.
        sources: for each new dimension, the one that it was.
        is_whole: for each new dimension, whether it is all of the one that it was.
    """
    operand, *indices = values
    shape = shape_of(eqn.outvars[0])
    views = frozenset(map(change, kernels_in(operand)))
    if all(isinstance(index, Known) for index in indices):
        return _made_of(views, [operand], shape)
    # What the data picks may be a vector, of an embedding, or a matrix, of an expert.
    name = eqn.primitive.name
    matrices = [view for view in (v.picked_by(name, is_whole) for v in views) if len(view.owned(shape)) > 1]
    why = f"{name}: a lookup table"
    note(no_weight(kernels_in(operand), name, why, weak=bool(matrices)))
    result = _product_of_data(values, shape, matrices)
    one_hot = () if isinstance(operand, Weight) else operand.one_hot
    hot = [dim for dim, source in enumerate(sources) if source in one_hot]
    return dataclasses.replace(result, one_hot=frozenset(hot)) if isinstance(result, Data) else result


def _scatter(note: Note, eqn: Any, values: list[Value]) -> Value:
    operand, indices, updates = values
    return _written_into(note, eqn, operand, updates, [indices])


def _dynamic_update_slice(note: Note, eqn: Any, values: list[Value]) -> Value:
    operand, updates, *indices = values
    return _written_into(note, eqn, operand, updates, indices)


def _written_into(note: Note, eqn: Any, operand: Value, updates: Value, indices: Sequence[Value]) -> Value:
    values = [operand, updates]
    if not all(isinstance(index, Known) for index in indices) or any(
        isinstance(value, Data) and not kernels_in(value) for value in values
    ):
        return _joined_with_data(note, eqn, [*values, *indices])
    shape = shape_of(eqn.outvars[0])
    written = frozenset(view.opaque(shape) for view in kernels_in(updates))
    return _made_of(kernels_in(operand) | written, values, shape)


@dataclasses.dataclass(frozen=True)
class _Operand:
    """One side of a product."""

    value: Value
    shape: Shape
    contracted: Sequence[int]
    batch: Sequence[int]

    @property
    def free(self) -> list[int]:
        return [dim for dim in range(len(self.shape)) if dim not in {*self.contracted, *self.batch}]

    @property
    def kernels(self) -> frozenset[View]:
        """The parameters that this side is a kernel made of, or may be, products with constants included."""
        return self.value.carried if isinstance(self.value, Data) else views_in([self.value])


def _dot_general(note: Note, eqn: Any, values: list[Value]) -> Value:
    contracted, batch = eqn.params["dimension_numbers"]
    a, b = map(_Operand, values, map(shape_of, eqn.invars), contracted, batch)
    sources_a = [*a.batch, *a.free, *[None] * len(b.free)]
    sources_b = [*b.batch, *[None] * len(a.free), *b.free]
    shape = shape_of(eqn.outvars[0])
    if _may_be_kernel(a) and _may_be_kernel(b):
        views = [
            view.linked(id(eqn), number, side.contracted, low_rank=_is_of_low_rank(a, b)).rearranged(sources)
            for number, (side, sources) in enumerate(((a, sources_a), (b, sources_b)))
            for view in kernels_in(side.value)
        ]
        return _made_of(frozenset(views), values, shape)
    pending: list[View] = []
    deferred: list[Use] = []
    for side, other, sources in ((a, b, sources_a), (b, a, sources_b)):
        uses = list(_contraction(eqn, side, other))
        is_deferred = isinstance(other.value, Known) and all(use.how == "weight" for use in uses)
        (deferred.extend if is_deferred else note)(uses)
        if is_constant(other.value):
            kernels = side.kernels if isinstance(other.value, Known) else kernels_in(side.value)
            pending += (view.times_constant(side.contracted, sources, shape) for view in kernels)
        if isinstance(other.value, Known):
            deferred += deferred_in(side.value)
    result = _product_of_data(values, shape, pending)
    if isinstance(result, Data):
        hot = _one_hot_in_product(a, sources_a) | _one_hot_in_product(b, sources_b)
        one_hot = hot if not contracted[0] else frozenset[int]()
        return dataclasses.replace(result, one_hot=one_hot, deferred=frozenset(deferred))
    return result


def _may_be_kernel(side: _Operand) -> bool:
    """Whether a side of a product may be a kernel itself, so that it does not say what the other is.

    An argument with a parameter added, and whatever has a dimension of the data's own, is an activation.
    """
    if isinstance(side.value, Data):
        kernels = kernels_in(side.value)
        own = variation(side.value, side.shape) - owned_by(kernels, side.shape)
        return bool(kernels) and not own and not any(view.is_added for view in kernels)
    return isinstance(side.value, Weight)


def _is_of_low_rank(a: _Operand, b: _Operand) -> bool:
    rank, *left = (
        math.prod(side.shape[dim] for dim in dims)
        for side, dims in ((a, a.contracted), (a, a.free), (b, b.free))
    )
    return rank < min(left)


def _one_hot_in_product(side: _Operand, sources: Sequence[int | None]) -> frozenset[int]:
    one_hot = side.value.one_hot if isinstance(side.value, Data) else frozenset[int]()
    return frozenset(dim for dim, source in enumerate(sources) if source in one_hot)


def _ragged_dot_general(note: Note, eqn: Any, values: list[Value]) -> Value:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    groups = [(), numbers.rhs_group_dimensions]
    batch = [[*dims, *more] for dims, more in zip(batch, groups, strict=True)]
    a, b = map(_Operand, values[:2], map(shape_of, eqn.invars[:2]), contracted, batch)
    if isinstance(a.value, Weight):
        note(unclear_product(view, eqn.primitive.name) for view in views_in(values))
    else:
        note(_contraction(eqn, b, a))
    return _product_of_data(values, shape_of(eqn.outvars[0]))


def _conv_general_dilated(note: Note, eqn: Any, values: list[Value]) -> Value:
    name = eqn.primitive.name
    out, *contracted = eqn.params["dimension_numbers"].rhs_spec
    image, kernel = values
    shape = shape_of(eqn.outvars[0])
    if isinstance(image, Weight) and kernels_in(kernel):
        note(unclear_product(view, name) for view in _kernels_among(values))
        return _product_of_data(values, shape)
    if isinstance(image, Weight) and is_constant(kernel):
        # A kernel that is blurred, or an image.
        return _made_of(frozenset(view.opaque(shape).tangled() for view in image.views), [image], shape)
    note(no_weight(kernels_in(image), name, f"{name}: an input, it is what is convolved"))
    groups = eqn.params["feature_group_count"]
    kernels = with_views_changed(kernel, lambda view: view.without_groups(out, groups))
    side = _Operand(kernels, shape_of(eqn.invars[1]), contracted, ())
    note(_contraction(eqn, side, _Operand(image, shape_of(eqn.invars[0]), (), ())))
    return _product_of_data(values, shape)


def _contraction(eqn: Any, side: _Operand, other: _Operand) -> Iterator[Use]:
    """What the parameters on one side of a product are there, given what is on the other."""
    name = eqn.primitive.name
    others = {view.leaf for view in other.kernels if view.leaf >= 0}
    if isinstance(side.value, Data) and (isinstance(other.value, Weight) or _share(side.kernels, others)):
        yield from no_weight(kernels_in(side.value), name, f"{name}: an input, multiplied with a parameter")
        return
    both_constant = isinstance(side.value, Data) and side.value.constant and is_constant(other.value)
    kernels = kernels_in(side.value) if both_constant else side.kernels
    pairs = list(zip(side.contracted, other.contracted, strict=False))
    one_hot = other.value.one_hot if isinstance(other.value, Data) else frozenset[int]()
    picked = [own for own, dim in pairs if dim in one_hot]
    summed = [dim for dim in side.contracted if dim not in picked]
    if picked and not any(side.shape[dim] > 1 for dim in summed):
        yield from no_weight(kernels, name, f"{name} with a one-hot array: a lookup table")
    else:
        batch = [*side.batch, *picked]
        yield from uses_in_contraction(kernels, name, contracted=summed, batch=batch)


def _share(views: Iterable[View], leaves: set[int]) -> bool:
    return any(view.leaf in leaves for view in views)


def _product_of_data(values: list[Value], shape: Shape, carried: Iterable[View] = ()) -> Value:
    if all(isinstance(value, Known) for value in values):
        return Known()
    constant = all(map(is_constant_or_weight, values))
    return Data.of(shape, constant=constant, carried=carried)


def _resize(note: Note, eqn: Any, values: list[Value]) -> Value:
    """Communication inside shard_map after which a dimension is longer or shorter."""
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if len(old) == len(new):
        return resized(values[0], old, new)
    return _unknown(note, eqn, values)[0]


def _tile(note: Note, eqn: Any, values: list[Value]) -> Value:
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return _made_of(frozenset(view.diluted(old, new) for view in kernels_in(values[0])), values, new)


# Operations entry by entry.
_UNCHANGED = ("convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint")
# What multiplies entries by something: a kernel stays a kernel, and a one-hot array has its one entry.
_SCALING = ("mul", "div", "neg", "select_n", *_UNCHANGED)
_LINEAR = ("add", "add_any", "sub", *_SCALING)
# What is done to kernels on their way to the data; other functions are those of activations.
_KEEPING_KERNELS = (*_LINEAR, "clamp", "max", "min", "round")

_ENTRY_BY_ENTRY = (
    *_LINEAR,
    *("abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh"),
    *("bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex"),
    *("conj", "cos", "cosh", "digamma", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1"),
    *("floor", "ge", "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to"),
    *("lgamma", "log", "log1p", "logistic", "lt", "lt_to", "max", "min", "ne", "nextafter", "not", "or"),
    *("polygamma", "population_count", "pow", "real", "regularized_incomplete_beta", "rem", "round"),
    *("rsqrt", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh"),
    *("sqrt", "square", "tan", "tanh", "xor", "zeta"),
)

# What makes an array of nothing, or of a number.
MAKING_ARRAYS = ("broadcast_in_dim", "random_bits", "rng_bit_generator", "threefry2x32")

_CONTRACTIONS = ("conv_general_dilated", "dot_general", "ragged_dot_general")

# Whatever goes in comes out in the same place: communication inside shard_map, barriers, placement.
_EACH_BY_ITSELF = (
    *("device_put", "mesh_cast", "optimization_barrier", "pcast", "pmax", "pmin", "ppermute", "psum"),
    *("psum_invariant", "pvary", "reshard", "rev"),
)

_REDUCTIONS = (
    *("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"),
    *("reduce_sum", "reduce_xor"),
)

_SCATTERS = ("scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub")

_RULES: dict[str, Callable[[Note, Any, list[Value]], Value]] = {
    **dict.fromkeys(_ENTRY_BY_ENTRY, _entry_by_entry),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_SCATTERS, _scatter),
    **dict.fromkeys(("all_gather", "all_gather_invariant", "all_gather_reduced", "reduce_scatter"), _resize),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "ragged_dot_general": _ragged_dot_general,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
