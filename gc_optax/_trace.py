"""The exact axes: which axes of each parameter the data is contracted with, read off the computation.

`infer_axes` traces a function to a jaxpr and goes through it once, equation by equation, with an
abstract value for each array: `Known` for constants, `Weight` for what is computed from parameters
alone, `Data` for everything else. Where a `Weight` meets `Data`, the equation's primitive says what the
parameter is used for.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util as jtu
from jax.extend import core as jex

from ._axes import PyTree, WeightAxes, applicable, is_array_like, left_alone, place, stacklevel_of_the_user
from ._provenance import FROZEN, Shape, Use, View, most_complete, uses_in_contraction
from ._values import (
    Data,
    Known,
    Value,
    Weight,
    after_loop,
    broadcast,
    changed,
    cut,
    fewer_views,
    is_constant,
    is_constant_or_weight,
    is_key,
    join,
    kernels_in,
    owned_by,
    rearranged,
    reshaped,
    resized,
    stacked,
    variation,
    views_in,
    with_views_changed,
)


def infer_axes(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    r"""The fan-in of every parameter, read off what a model computes.

    In \(y = \sum_i x_i w_{io}\) the axis \(i\) of \(w\), which is summed over together with an axis of
    the data, is the fan-in. `fn` is traced on shapes alone, and every parameter is followed through the
    computation, whatever is done to it on the way (casts, transposes, reshapes, slices, masks,
    normalization, the loops over a stack of layers), to the operation in which it meets the data:

    - `dot_general`, `conv_general_dilated` and `ragged_dot_general` sum over its fan-in;
    - a lookup by indices that depend on the data, or a product with a one-hot array, makes it a table;
    - an operation entry by entry makes it a bias, a scale or a gate.

    Only the first is centralized. A parameter with several uses has the fan-in that all of them say;
    where they differ (embeddings that are tied to the output layer) it is left alone. It is left alone,
    with a warning, where the computation cannot be read with certainty. The `why` of each `WeightAxes`
    says which it was.

    Only what the gradient goes through counts as a use. What depends on random keys alone counts as
    constant, arrays that `fn` closes over count as data. If `fn` differentiates the model itself (a
    gradient penalty, an inner loop), give the forward pass of the model instead of the loss: the
    backward pass contracts each weight over its fan-out.

    Args:
        fn: any function of the parameters, a loss or a forward pass. What it returns does not matter.
        params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`s. Other leaves (the
            functions in an Equinox module) are passed to `fn` as they are.
        *args: further arguments of `fn`: trees of arrays and of `jax.ShapeDtypeStruct`s, which are
            traced, and of anything else, which is passed as it is.
        **kwargs: the same, by name.

    Returns:
        A tree with the structure of `params` and a `WeightAxes` at each leaf.

    Raises:
        TypeError: if `fn` is not callable; and whatever `fn` raises when it is traced.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gc_optax import infer_axes
        >>> def model(params, x):  # two experts, and a head in PyTorch's layout
        ...     h = jnp.einsum("ebi,eio->ebo", x, params["experts"]) + params["bias"]
        ...     return h @ params["head"].T
        >>> shapes = {"experts": (2, 8, 16), "bias": (16,), "head": (4, 16)}
        >>> params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        >>> axes = infer_axes(model, params, jnp.ones((2, 3, 8)))
        >>> axes["experts"].fan_in, axes["experts"].fan_out  # axis 0 is neither: a batch axis
        ((1,), (2,))
        >>> axes["head"].fan_in
        (1,)
        >>> axes["bias"].fan_in, axes["bias"].why
        ((), 'add: a bias, a scale or a gate')

    References:
        The primitives are those of https://docs.jax.dev/en/latest/jax.lax.html
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of the parameters, got {fn!r}")
    places, structure = jtu.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in places]
    others, others_structure = jax.tree.flatten((args, kwargs))
    given = leaves + others

    def of_arrays(arrays: list[Any]) -> list[Any]:
        rest = iter(arrays)
        filled = [next(rest) if _is_traced(leaf) else leaf for leaf in given]
        fn_args, fn_kwargs = jax.tree.unflatten(others_structure, filled[len(leaves) :])
        outputs = fn(jax.tree.unflatten(structure, filled[: len(leaves)]), *fn_args, **fn_kwargs)
        return [output for output in jax.tree.leaves(outputs) if is_array_like(output)]

    closed = jax.make_jaxpr(of_arrays)([leaf for leaf in given if _is_traced(leaf)])
    numbers = [number for number, leaf in enumerate(given) if _is_traced(leaf)]
    values = [
        Weight.of(number, var.aval.shape) if number < len(leaves) else Data.given(var.aval)
        for number, var in zip(numbers, closed.jaxpr.invars, strict=True)
    ]
    reader = _Reader()
    reader.end(reader.read_jaxpr(closed, values))
    axes = [_verdict(leaf, number, reader) for number, leaf in enumerate(leaves)]
    _warn_of_unclear_uses(places, axes, {use.leaf for use in reader.uses if use.how == "unclear"})
    return jax.tree.unflatten(structure, axes)


def _is_traced(leaf: Any) -> bool:
    # A number of NumPy may be what a Python number is: a rate, a count, a flag.
    return is_array_like(leaf) and not isinstance(leaf, np.generic)


# Reading the jaxpr.

# What a loop carries settles within a few rounds, or, where it is reshaped again and again, never.
_MOST_ROUNDS = 16


class _Reader:
    """Goes through a jaxpr equation by equation, and notes how each parameter is used.

    Attributes:
        uses: what was noted so far.
        without_gradient: the parameters that are used where no gradient comes back.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.without_gradient: set[int] = set()
        self._gradient_comes_back = True
        # In the body of a function with a derivative of its own, nothing says where gradients go.
        self._has_own_derivative = False

    def note(self, uses: Iterable[Use]) -> None:
        """Notes what the equation at hand says about parameters."""
        for use in uses:
            if self._gradient_comes_back:
                self.uses.append(use)
            else:
                self.without_gradient.add(use.leaf)

    def end(self, outputs: Iterable[Value]) -> None:
        """Notes what is returned without having met the data."""
        returned = most_complete(frozenset[View]().union(*map(kernels_in, outputs)))
        self.note(
            _unclear_product(view, "the output") for view in returned if view.is_product and view.placed
        )

    def read_jaxpr(
        self, jaxpr: Any, values: Sequence[Value], is_output_live: Sequence[bool] | None = None
    ) -> list[Value]:
        """The outputs of a jaxpr, open or closed.

        Args:
            jaxpr: the jaxpr.
            values: its inputs.
            is_output_live: for each output, whether a gradient comes back to it.
        """
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if is_output_live is None or self._has_own_derivative:
            is_output_live = [True] * len(jaxpr.outvars)
        env: dict[Any, Value] = {var: Data.given(var.aval, constant=True) for var in jaxpr.constvars}
        env.update(zip(jaxpr.invars, values, strict=True))

        def value_of(atom: Any) -> Value:
            return env[atom] if _is_var(atom) else Data.given(atom.aval, constant=True)

        outer = self._gradient_comes_back
        for eqn, live in zip(jaxpr.eqns, self._live_outputs(jaxpr, is_output_live), strict=True):
            self._gradient_comes_back = outer and any(live)
            outputs = self._read_equation(eqn, [value_of(atom) for atom in eqn.invars], live)
            env.update(zip(eqn.outvars, outputs, strict=True))
        self._gradient_comes_back = outer
        return [value_of(atom) for atom in jaxpr.outvars]

    def _live_outputs(self, jaxpr: Any, is_output_live: Sequence[bool]) -> list[list[bool]]:
        """For each equation and each of its outputs, whether a gradient comes back to it."""
        outputs = zip(jaxpr.outvars, is_output_live, strict=True)
        live = {var for var, is_live in outputs if is_live and _is_var(var)}
        flags = []
        for eqn in reversed(jaxpr.eqns):
            flags.append([var in live and self._is_differentiable(var.aval) for var in eqn.outvars])
            if any(flags[-1]) and not self._stops_gradient(eqn):
                live.update(filter(_is_var, eqn.invars))
        return flags[::-1]

    def _is_differentiable(self, aval: Any) -> bool:
        return self._has_own_derivative or jnp.issubdtype(_dtype(aval), jnp.inexact)

    def _stops_gradient(self, eqn: Any) -> bool:
        return eqn.primitive.name == "stop_gradient" and not self._has_own_derivative

    def _read_equation(self, eqn: Any, values: list[Value], live: list[bool]) -> list[Value]:
        name = eqn.primitive.name
        if name in _RULES:
            outputs = [_RULES[name](self, eqn, values)]
        elif name in _CONTROL_FLOW:
            outputs = _CONTROL_FLOW[name](self, eqn, values, live)
        elif name == "split":
            outputs = [cut(values[0], _shape(eqn.invars[0]), _shape(var)) for var in eqn.outvars]
        elif name == "unstack":
            outputs = _unstack(eqn, values)
        elif name in _EACH_BY_ITSELF and len(values) == len(eqn.outvars):
            outputs = values
        elif self._stops_gradient(eqn):
            outputs = [self._as_constant(values[0])]
        elif body := _body_with_the_same_arguments(eqn):
            outputs = self._read_body(eqn, body, values, live)
        else:
            outputs = self.read_unknown(eqn, values)
        return [self._settled(value, var) for value, var in zip(outputs, eqn.outvars, strict=True)]

    def _settled(self, value: Value, var: Any) -> Value:
        if is_key(_dtype(var.aval)):
            return Known()
        # A mask that a threshold on the weights makes is a constant as far as the gradient can tell.
        return (
            fewer_views(value, _shape(var)) if self._is_differentiable(var.aval) else self._as_constant(value)
        )

    def _as_constant(self, value: Value) -> Value:
        self.without_gradient.update(view.leaf for view in views_in([value]))
        return Known() if isinstance(value, Weight) else value

    def _read_body(self, eqn: Any, body: Any, values: list[Value], live: list[bool]) -> list[Value]:
        """The outputs of an equation that does what the jaxpr does that it holds."""
        outer = self._has_own_derivative
        self._has_own_derivative |= eqn.primitive.name.startswith("custom_")
        inside = getattr(body, "jaxpr", body)
        # Inside shard_map an array has the shape of one device's share.
        outputs = self.read_jaxpr(body, _all_resized(values, eqn.invars, inside.invars), live)
        self._has_own_derivative = outer
        return _all_resized(outputs, inside.outvars, eqn.outvars)

    def read_unknown(self, eqn: Any, values: list[Value]) -> list[Value]:
        """The outputs of an equation of which nothing is known but which values go into it."""
        shapes = [_shape(var) for var in eqn.outvars]
        views = most_complete(frozenset[View]().union(*map(kernels_in, values)))
        if not any(isinstance(value, Data) and not kernels_in(value) for value in values):
            opaque = [frozenset(view.opaque(shape).tangled() for view in views) for shape in shapes]
            return [_made_of(seen, values, shape) for seen, shape in zip(opaque, shapes, strict=True)]
        name = eqn.primitive.name
        why = f"{name}: an operation on it together with the data that infer_axes cannot read"
        self.note(Use(view.leaf, "unclear", name, why) for view in views)
        return [_product_of_data(values, shape) for shape in shapes]

    # Loops and branches. Each has an order of arguments of its own.

    def read_scan(self, eqn: Any, values: list[Value], live: list[bool]) -> list[Value]:
        """Goes through the first dimension of some arguments: their leading axis is a batch axis."""
        fixed, carried = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
        loop = id(eqn)
        each = [
            changed(value, [(dim,) for dim in range(1, len(_shape(var)))], lambda view: view.in_loop(loop))
            for value, var in zip(values[carried:], eqn.invars[carried:], strict=True)
        ]
        carry, rest = self._read_loop(
            eqn, eqn.params["jaxpr"], values[:fixed], values[fixed:carried], each, live
        )
        return [after_loop(value, loop) for value in carry] + [
            stacked(value, _shape(var), loop)
            for value, var in zip(rest, eqn.outvars[len(carry) :], strict=True)
        ]

    def read_while(self, eqn: Any, values: list[Value], live: list[bool]) -> list[Value]:
        """The condition is a bool, through which no gradient goes: only the body is read."""
        first = eqn.params["cond_nconsts"]
        carried = first + eqn.params["body_nconsts"]
        body = eqn.params["body_jaxpr"]
        return self._read_loop(eqn, body, values[first:carried], values[carried:], [], live)[0]

    def _read_loop(
        self,
        eqn: Any,
        body: Any,
        fixed: list[Value],
        carry: list[Value],
        each: list[Value],
        live: list[bool],
    ) -> tuple[list[Value], list[Value]]:
        """Reads a body again until what it carries along is the same before and after.

        Returns:
            What it carries, and what comes out besides.
        """
        # What reaches a carried value in one round reaches all of them in the next.
        is_output_live = [any(live)] * len(carry) + live[len(carry) :]
        for _ in range(_MOST_ROUNDS):
            noted, without_gradient = len(self.uses), self.without_gradient.copy()
            outputs = self.read_jaxpr(body, [*fixed, *carry, *each], is_output_live)
            joined = list(map(join, carry, outputs))
            if joined == carry:
                self._note_mixed_with_data(outputs, joined)
                return carry, outputs[len(carry) :]
            del self.uses[noted:]
            self.without_gradient = without_gradient
            self._note_mixed_with_data(carry, joined)
            carry = joined
        why = "a loop reshapes it from round to round"
        self.note(Use(view.leaf, "unclear", eqn.primitive.name, why) for view in views_in([*carry, *outputs]))
        data: list[Value] = [Data.of(_shape(var)) for var in body.jaxpr.outvars]
        return data[: len(carry)], data[len(carry) :]

    def read_cond(self, eqn: Any, values: list[Value], live: list[bool]) -> list[Value]:
        """Every branch is read; the first argument says which of them is taken."""
        branches = [self.read_jaxpr(branch, values[1:], live) for branch in eqn.params["branches"]]
        joined = [functools.reduce(join, outputs) for outputs in zip(*branches, strict=True)]
        for outputs in branches:
            self._note_mixed_with_data(outputs, joined)
        return joined

    def _note_mixed_with_data(self, values: Sequence[Value], joined: Sequence[Value]) -> None:
        """Notes the parameters that become data: the state that a loop begins with, say."""
        why = "it takes the place of the data: a starting value, say"
        for value, after in zip(values, joined, strict=False):
            self.note(_as_no_weight(kernels_in(value) - kernels_in(after), "a loop or a branch", why))


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def _dtype(aval: Any) -> Any:
    return getattr(aval, "dtype", jnp.dtype(bool))


def _shape(atom: Any) -> Shape:
    return tuple(getattr(atom.aval, "shape", ()))


def _body_with_the_same_arguments(eqn: Any) -> Any:
    """The jaxpr that an equation holds, if it holds one that its arguments and results fit.

    Any primitive may hold one: jit, remat, custom_jvp_call, custom_vjp_call, shard_map, and those to come.
    """
    held = [value for value in eqn.params.values() if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)]
    if len(held) != 1:
        return None
    body = getattr(held[0], "jaxpr", held[0])
    inside, outside = body.invars + body.outvars, eqn.invars + eqn.outvars
    fits = len(body.invars) == len(eqn.invars) and len(inside) == len(outside)
    ranks = [(len(_shape(a)), len(_shape(b))) for a, b in zip(inside, outside, strict=False)]
    return held[0] if fits and all(a == b for a, b in ranks) else None


def _all_resized(values: Sequence[Value], before: Sequence[Any], after: Sequence[Any]) -> list[Value]:
    return [
        resized(value, _shape(old), _shape(new))
        for value, old, new in zip(values, before, after, strict=True)
    ]


# One function for each kind of primitive with one output: what it says about parameters, and what comes out.


def _entry_by_entry(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    name, shape = eqn.primitive.name, _shape(eqn.outvars[0])
    values = [broadcast(value, _shape(var), shape) for value, var in zip(values, eqn.invars, strict=True)]
    sizes = [math.prod(_shape(var)) for var in eqn.invars]
    views = frozenset[View]().union(*map(kernels_in, values))
    if not views:
        if all(isinstance(value, Known) for value in values):
            return _constant_entry_by_entry(name, values, sizes)
        return _data_entry_by_entry(name, values, sizes, shape)
    values = _without_masks(name, values, owned_by(views, shape), shape)
    if name not in _LINEAR:
        views = frozenset(view.tangled() for view in views)
    elif name in ("add", "sub") and _is_frozen_kernel_among(values, sizes):
        views = _with_frozen_kernel(views, shape)
    data = [value for value in values if isinstance(value, Data)]
    if not data:
        return Weight(views)
    owned = owned_by(views, shape)
    constant = all(map(is_constant, data))
    why = f"{name}: a bias, a scale or a gate"
    plain = [value for value in data if not kernels_in(value)]
    varies = frozenset[int]().union(*(variation(value, shape) for value in plain))
    is_modulated = bool(owned - varies) and (not varies or _scales(name, values))
    if not (is_modulated or not plain or _is_mask_or_kernel(name, plain, varies, owned)):
        reader.note(_as_no_weight(views, name, why))
        return Data.of(shape, constant=constant)
    # It may be a kernel still: the data that scales it along some of its axes may be contracted over the
    # others, and an argument of its shape may be a mask of it, or the frozen kernel that it is added to.
    reader.note(_as_no_weight(views_in(values), name, why, weak=True))
    if plain and name in ("add", "sub"):
        views = _with_frozen_kernel(views, shape)
    carrying = frozenset[int]().union(*(value.varies for value in data if kernels_in(value)))
    return Data(carrying | (varies if is_modulated else varies - owned), constant=constant, carried=views)


def _constant_entry_by_entry(name: str, values: list[Value], sizes: list[int]) -> Known:
    known = [value for value in values if isinstance(value, Known)]
    arrays = [value for value, size in zip(known, sizes, strict=True) if size > 1]
    if name == "eq" and len(known) == 2:
        counted = {value.counts for value in known if value.counts is not None}
        return Known(one_hot=frozenset(counted) if len(counted) == 2 else frozenset())
    if name in ("add", "sub", *_UNCHANGED) and len(arrays) == 1:
        return arrays[0]
    return Known()


def _data_entry_by_entry(name: str, values: list[Value], sizes: list[int], shape: Shape) -> Data:
    data = [value for value in values if isinstance(value, Data)]
    one_hot = (dim for dim in range(len(shape)) if _is_one_hot(name, values, sizes, shape, dim))
    if len(data) == 1 and data[0].carried and name in _LINEAR:
        return dataclasses.replace(data[0], one_hot=frozenset(), raw=False)
    return Data(
        varies=frozenset[int]().union(*(variation(value, shape) for value in data)),
        one_hot=frozenset(one_hot),
        raw=name in _UNCHANGED and data[0].raw,
        constant=all(map(is_constant, values)),
    )


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
        return isinstance(value, Data) and value.raw and value.constant and variation(value, shape) <= owned

    if name not in ("mul", "select_n") or len(owned) < 2:
        return values
    return [Known() if is_mask(value) else value for value in values]


def _is_frozen_kernel_among(values: list[Value], sizes: list[int]) -> bool:
    return any(
        isinstance(value, Known) and value.counts is None and size > 1
        for value, size in zip(values, sizes, strict=True)
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


def _as_no_weight(views: Iterable[View], op: str, why: str, *, weak: bool = False) -> Iterator[Use]:
    for view in most_complete(views):
        if view.leaf == FROZEN:
            continue
        if not view.placed or view.summed:
            yield Use(view.leaf, "no weight", op, f"{op}: only a statistic of it meets the data", weak=True)
        elif view.is_product and not weak:
            yield _unclear_product(view, op)
        else:
            why = f"{view.lookup}: a lookup table" if view.lookup else why
            yield Use(view.leaf, "no weight", op, why, weak=weak)


def _unclear_product(view: View, op: str) -> Use:
    return Use(view.leaf, "unclear", op, f"{op}: a product of parameters with data on neither side")


def _transpose(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    return rearranged(values[0], eqn.params["permutation"])


def _reshape(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    value, old = values[0], _shape(eqn.invars[0])
    if eqn.params["dimensions"] is not None:
        value = rearranged(value, eqn.params["dimensions"])
        old = tuple(old[dim] for dim in eqn.params["dimensions"])
    return reshaped(value, old, _shape(eqn.outvars[0]))


def _squeeze(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    kept = [dim for dim in range(len(_shape(eqn.invars[0]))) if dim not in eqn.params["dimensions"]]
    return rearranged(values[0], kept)


def _broadcast_in_dim(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    old, new = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    sources: list[int | None] = [None] * len(new)
    for dim, target in enumerate(eqn.params["broadcast_dimensions"]):
        sources[target] = dim if old[dim] == new[target] else None
    return rearranged(values[0], sources)


def _iota(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    return Known(counts=eqn.params["dimension"])


def _slice(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    return cut(values[0], _shape(eqn.invars[0]), _shape(eqn.outvars[0]))


def _unstack(eqn: Any, values: list[Value]) -> list[Value]:
    old, axis = _shape(eqn.invars[0]), eqn.params["axis"]
    kept = [dim for dim in range(len(old)) if dim != axis]
    part = cut(values[0], old, tuple(1 if dim == axis else size for dim, size in enumerate(old)))
    return [rearranged(part, kept) for _ in eqn.outvars]


def _pad(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    if not (kernels_in(values[0]) and is_constant(values[1])):
        return _joined_with_data(reader, eqn, values)
    old, new = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    is_cropped = any(low < 0 or high < 0 for low, high, _ in eqn.params["padding_config"])
    return with_views_changed(values[0], lambda view: (view.cut if is_cropped else view.diluted)(old, new))


def _concatenate(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    new = _shape(eqn.outvars[0])
    shapes = map(_shape, eqn.invars)
    return _side_by_side(reader, eqn, values, [_diluting(shape, new) for shape in shapes])


def _stack(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    axis, rank = eqn.params["axis"], len(_shape(eqn.outvars[0]))
    sources = [None if dim == axis else dim - (dim > axis) for dim in range(rank)]
    return _side_by_side(reader, eqn, values, [lambda view: view.rearranged(sources)] * len(values))


def _side_by_side(
    reader: _Reader, eqn: Any, values: list[Value], changes: Sequence[Callable[[View], View]]
) -> Value:
    if any(isinstance(value, Data) and not kernels_in(value) for value in values):
        return _joined_with_data(reader, eqn, values)
    views = frozenset(
        change(view) for value, change in zip(values, changes, strict=True) for view in kernels_in(value)
    )
    return _made_of(views, values, _shape(eqn.outvars[0]))


def _diluting(old: Shape, new: Shape) -> Callable[[View], View]:
    return lambda view: view.diluted(old, new)


def _made_of(views: frozenset[View], values: list[Value], shape: Shape) -> Value:
    """A value that is a kernel made of some parameters, and of nothing else but constants."""
    if any(isinstance(value, Data) for value in values):
        return Data.of(shape, constant=all(map(is_constant_or_weight, values)), carried=views)
    return Weight(views) if views else Known()


def _joined_with_data(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    """Parameters in a row with the data: a class token, say."""
    name = eqn.primitive.name
    views = frozenset[View]().union(*map(kernels_in, values))
    reader.note(_as_no_weight(views, name, f"{name}: an input, in a row with the data"))
    return _product_of_data(values, _shape(eqn.outvars[0]))


def _reduce(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    value, old, over = values[0], _shape(eqn.invars[0]), eqn.params["axes"]
    kept = [dim for dim in range(len(old)) if dim not in over]
    if isinstance(value, Known):
        return Known()
    if isinstance(value, Data):
        value = dataclasses.replace(value, one_hot=frozenset(), raw=False)
        owned = owned_by(kernels_in(value), old).intersection(over)
        if eqn.primitive.name == "reduce_sum" and owned and owned <= value.varies:
            # A product entry by entry and a sum: a contraction, spelled out.
            reader.note(uses_in_contraction(kernels_in(value), "reduce_sum", contracted=over))
            value = dataclasses.replace(value, varies=variation(value, old), carried=frozenset())
    return changed(value, [(dim,) for dim in kept], lambda view: view.reduced(over))


def _gather(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    old, new = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
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
    return _looked_up(reader, eqn, values, gathered, sources, is_whole)


def _dynamic_slice(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    old, new = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    is_whole = [before == after for before, after in zip(old, new, strict=True)]
    return _looked_up(reader, eqn, values, lambda view: view.cut(old, new), range(len(new)), is_whole)


def _looked_up(
    reader: _Reader,
    eqn: Any,
    values: list[Value],
    change: Callable[[View], View],
    sources: Sequence[int | None],
    is_whole: Sequence[bool],
) -> Value:
    """Some entries of the first value, at indices that are the others.

    Args:
        reader: notes what that says.
        eqn: the equation.
        values: its arguments.
        change: the operation for a parameter's view.
        sources: for each new dimension, the one that it was.
        is_whole: for each new dimension, whether it is all of the one that it was.
    """
    operand, *indices = values
    shape = _shape(eqn.outvars[0])
    views = frozenset(map(change, kernels_in(operand)))
    if all(isinstance(index, Known) for index in indices):
        return _made_of(views, [operand], shape)
    # What the data picks may be a vector, of an embedding, or a matrix, of an expert.
    name = eqn.primitive.name
    matrices = [view for view in (v.picked_by(name, is_whole) for v in views) if len(view.owned(shape)) > 1]
    why = f"{name}: a lookup table"
    reader.note(_as_no_weight(kernels_in(operand), name, why, weak=bool(matrices)))
    result = _product_of_data(values, shape, matrices)
    one_hot = () if isinstance(operand, Weight) else operand.one_hot
    hot = [dim for dim, source in enumerate(sources) if source in one_hot]
    return dataclasses.replace(result, one_hot=frozenset(hot)) if isinstance(result, Data) else result


def _scatter(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    operand, indices, updates = values
    return _written_into(reader, eqn, operand, updates, [indices])


def _dynamic_update_slice(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    operand, updates, *indices = values
    return _written_into(reader, eqn, operand, updates, indices)


def _written_into(
    reader: _Reader, eqn: Any, operand: Value, updates: Value, indices: Sequence[Value]
) -> Value:
    values = [operand, updates]
    if not all(isinstance(index, Known) for index in indices) or any(
        isinstance(value, Data) and not kernels_in(value) for value in values
    ):
        return _joined_with_data(reader, eqn, [*values, *indices])
    shape = _shape(eqn.outvars[0])
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


def _dot_general(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    contracted, batch = eqn.params["dimension_numbers"]
    a, b = map(_Operand, values, map(_shape, eqn.invars), contracted, batch)
    sources_a = [*a.batch, *a.free, *[None] * len(b.free)]
    sources_b = [*b.batch, *[None] * len(a.free), *b.free]
    if isinstance(a.value, Weight) and isinstance(b.value, Weight):
        views = [
            view.linked(id(eqn), number, side.contracted, low_rank=_is_of_low_rank(a, b)).rearranged(sources)
            for number, (side, sources) in enumerate(((a, sources_a), (b, sources_b)))
            for view in side.kernels
        ]
        return Weight(frozenset(views))
    shape = _shape(eqn.outvars[0])
    pending: list[View] = []
    for side, other, sources in ((a, b, sources_a), (b, a, sources_b)):
        _note_contraction(reader, eqn, side, other)
        if is_constant(other.value):
            kernels = kernels_in(side.value)
            pending += (view.times_constant(side.contracted, sources, shape) for view in kernels)
    result = _product_of_data(values, shape, pending)
    if not contracted[0] and isinstance(result, Data):
        return dataclasses.replace(
            result, one_hot=_one_hot_in_product(a, sources_a) | _one_hot_in_product(b, sources_b)
        )
    return result


def _is_of_low_rank(a: _Operand, b: _Operand) -> bool:
    rank, *left = (
        math.prod(side.shape[dim] for dim in dims)
        for side, dims in ((a, a.contracted), (a, a.free), (b, b.free))
    )
    return rank < min(left)


def _one_hot_in_product(side: _Operand, sources: Sequence[int | None]) -> frozenset[int]:
    one_hot = side.value.one_hot if isinstance(side.value, Data) else frozenset[int]()
    return frozenset(dim for dim, source in enumerate(sources) if source in one_hot)


def _ragged_dot_general(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batch = numbers.dot_dimension_numbers
    groups = [(), numbers.rhs_group_dimensions]
    batch = [[*dims, *more] for dims, more in zip(batch, groups, strict=True)]
    a, b = map(_Operand, values[:2], map(_shape, eqn.invars[:2]), contracted, batch)
    if isinstance(a.value, Weight):
        reader.note(_unclear_product(view, eqn.primitive.name) for view in views_in(values))
    else:
        _note_contraction(reader, eqn, b, a)
    return _product_of_data(values, _shape(eqn.outvars[0]))


def _conv_general_dilated(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    name = eqn.primitive.name
    out, *contracted = eqn.params["dimension_numbers"].rhs_spec
    image, kernel = values
    if isinstance(image, Weight) and isinstance(kernel, Weight):
        reader.note(_unclear_product(view, name) for view in views_in(values))
    elif isinstance(image, Weight):
        why = f"{name}: an input, it is what is convolved"
        reader.note(_as_no_weight(image.views, name, why))
    groups = eqn.params["feature_group_count"]
    if not isinstance(image, Weight) or isinstance(kernel, Data):
        kernels = with_views_changed(kernel, lambda view: view.without_groups(out, groups))
        own = _Operand(kernels, _shape(eqn.invars[1]), contracted, ())
        _note_contraction(reader, eqn, own, _Operand(image, _shape(eqn.invars[0]), (), ()))
    return _product_of_data(values, _shape(eqn.outvars[0]))


def _note_contraction(reader: _Reader, eqn: Any, side: _Operand, other: _Operand) -> None:
    """Notes what the parameters on one side of a product are there, given what is on the other."""
    name = eqn.primitive.name
    others = {view.leaf for view in other.kernels}
    if isinstance(side.value, Data) and (isinstance(other.value, Weight) or _share(side.kernels, others)):
        why = f"{name}: an input, multiplied with a parameter"
        reader.note(_as_no_weight(kernels_in(side.value), name, why))
        return
    both_constant = isinstance(side.value, Data) and side.value.constant and is_constant(other.value)
    kernels = kernels_in(side.value) if both_constant else side.kernels
    pairs = list(zip(side.contracted, other.contracted, strict=False))
    one_hot = other.value.one_hot if isinstance(other.value, Data) else frozenset[int]()
    picked = [own for own, dim in pairs if dim in one_hot]
    summed = [dim for dim in side.contracted if dim not in picked]
    if picked and not any(side.shape[dim] > 1 for dim in summed):
        reader.note(_as_no_weight(kernels, name, f"{name} with a one-hot array: a lookup table"))
    else:
        batch = [*side.batch, *picked]
        reader.note(uses_in_contraction(kernels, name, contracted=summed, batch=batch))


def _share(views: Iterable[View], leaves: set[int]) -> bool:
    return any(view.leaf in leaves for view in views)


def _product_of_data(values: list[Value], shape: Shape, carried: Iterable[View] = ()) -> Value:
    if all(isinstance(value, Known) for value in values):
        return Known()
    constant = all(map(is_constant_or_weight, values))
    return Data.of(shape, constant=constant, carried=carried)


def _resize(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    """Communication inside shard_map after which a dimension is longer or shorter."""
    old, new = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if len(old) == len(new):
        return resized(values[0], old, new)
    return reader.read_unknown(eqn, values)[0]


def _tile(reader: _Reader, eqn: Any, values: list[Value]) -> Value:
    old, new = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return changed(values[0], [(dim,) for dim in range(len(new))], lambda view: view.diluted(old, new))


# Operations entry by entry.
_UNCHANGED = ("convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint")
# What multiplies entries by something: a kernel stays a kernel, and a one-hot array has its one entry.
_SCALING = ("mul", "div", "neg", "select_n", *_UNCHANGED)
_LINEAR = ("add", "add_any", "sub", *_SCALING)

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

_RULES: dict[str, Callable[[_Reader, Any, list[Value]], Value]] = {
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

_CONTROL_FLOW: dict[str, Callable[[_Reader, Any, list[Value], list[bool]], list[Value]]] = {
    "cond": _Reader.read_cond,
    "scan": _Reader.read_scan,
    "while": _Reader.read_while,
}


# From the uses of a parameter to its axes.


def _verdict(leaf: Any, number: int, reader: _Reader) -> WeightAxes:
    if not is_array_like(leaf):
        return left_alone("no array")
    uses = [use for use in reader.uses if use.leaf == number]
    return applicable(_agreed(uses, number in reader.without_gradient), leaf)


def _agreed(uses: list[Use], is_used_without_gradient: bool) -> WeightAxes:
    """What all uses of a parameter say."""
    unclear = [use for use in uses if use.how == "unclear"]
    weights = [use for use in uses if use.how == "weight"]
    others = [use for use in uses if use.how == "no weight" and not (weights and use.weak)]
    if unclear:
        return left_alone(unclear[0].why, unclear[0].op)
    if not uses:
        why = "no gradient comes back to it" if is_used_without_gradient else "it never meets the data"
        return left_alone(why)
    if not weights:
        telling = [use for use in others if not use.weak] or others
        return left_alone(telling[0].why, telling[0].op)
    if others or len({use.fan_in for use in weights}) > 1:
        ways = dict.fromkeys(use.why for use in [*weights, *others])
        return left_alone("used in more than one way: " + "; ".join(ways))
    fan_out = frozenset.intersection(*(use.fan_out for use in weights))
    first = weights[0]
    return WeightAxes(tuple(sorted(first.fan_in)), tuple(sorted(fan_out)), first.op, first.why)


def _warn_of_unclear_uses(places: list[tuple[Any, Any]], axes: list[WeightAxes], unclear: set[int]) -> None:
    lines = [
        f"  {place(path, leaf)}: {axes[number].why}"
        for number, (path, leaf) in enumerate(places)
        if number in unclear
    ]
    if lines:
        warnings.warn(
            "infer_axes leaves these parameters alone, because it cannot read with certainty what the "
            "computation does with them:\n" + "\n".join(lines) + "\n"
            "To centralize one of them, replace its leaf in the tree by axes of your own.",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )
