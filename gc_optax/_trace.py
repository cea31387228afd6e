"""The exact axes: which axes of each parameter the data is contracted with, read off the computation.

`infer_axes` traces a function to a jaxpr and goes through it once, equation by equation, with an
abstract value for each array: `Known` for constants, `Weight` for what is computed from parameters
alone, `Data` for everything else. Where a `Weight` meets `Data`, the equation's primitive says what the
parameter is used for.
"""

import collections
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util as jtu
from jax.extend import core as jex

from ._axes import PyTree, WeightAxes, applicable, is_array_like, left_alone
from ._primitives import MAKING_ARRAYS, deferred_in, no_weight, results, shape_of, unclear_product
from ._provenance import Shape, Use, View, most_complete
from ._text import place, stacklevel_of_the_user
from ._values import (
    Data,
    Known,
    Value,
    Weight,
    after_loop,
    changed,
    is_key,
    join,
    kernels_in,
    resized,
    simplified,
    stacked,
    variation,
)


def infer_axes(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    r"""The fan-in of every parameter, read off what a model computes.

    In \(y = \sum_i x_i w_{io}\) the axis \(i\) of \(w\), which is summed over together with an axis of
    the data, is the fan-in. `fn` is traced on shapes alone, and every parameter is followed through the
    computation, whatever is done to it on the way (casts, transposes, reshapes, slices, masks,
    normalization, the loops over a stack of layers), to the operation in which it meets the data:

    - `dot_general`, `conv_general_dilated` and `ragged_dot_general` sum over its fan-in;
    - a lookup by indices that depend on the data, or a product with a one-hot array, makes it a table,
      unless what is picked is a matrix that is contracted next, that of an expert;
    - an operation entry by entry makes it a bias, a scale or a gate.

    Only the first is centralized. A parameter with several uses has the fan-in that all of them say;
    where they differ (embeddings that are tied to the output layer) it is left alone. It is left alone,
    with a warning, where the computation cannot be read with certainty. The `why` of each `WeightAxes`
    says which it was.

    Only what the gradient goes through counts as a use. Arrays that `fn` closes over count as data, and
    where there are none at all, so do the arrays that it makes itself. A weight that is contracted with
    data twice in a row, as in \(x^\top W y\), counts by the first contraction. If `fn` differentiates the
    model itself (a gradient penalty, an inner loop), give the forward pass of the model instead of the
    loss: the backward pass contracts each weight over its fan-out.

    Args:
        fn: any function of the parameters, a loss or a forward pass, which returns any tree with arrays.
        params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`s. Other leaves (the
            functions in an Equinox module) are passed to `fn` as they are.
        *args: further arguments of `fn`: trees of arrays and of `jax.ShapeDtypeStruct`s, which are
            traced, and of anything else, which is passed as it is.
        **kwargs: the same, by name.

    Returns:
        A tree with the structure of `params` and a `WeightAxes` at each leaf.

    Raises:
        TypeError: if `fn` is not callable or returns no array; and whatever `fn` raises when it is traced.

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
        arrays = [output for output in jax.tree.leaves(outputs) if is_array_like(output)]
        if not arrays:
            raise TypeError(
                f"fn has to return what depends on the parameters, an array; it returned {outputs!r}"
            )
        return arrays

    closed = jax.make_jaxpr(of_arrays)([leaf for leaf in given if _is_traced(leaf)])
    numbers = [number for number, leaf in enumerate(given) if _is_traced(leaf)]
    values = [
        Weight.of(number, var.aval.shape) if number < len(leaves) else Data.given(var.aval)
        for number, var in zip(numbers, closed.jaxpr.invars, strict=True)
    ]
    has_data = any(isinstance(value, Data) for value in values) or _closes_over_arrays(closed)
    reader = _Reader(is_without_data=not has_data)
    reader.end(reader.read_jaxpr(closed, values))
    verdicts = _verdicts(leaves, reader)
    _warn_of_unclear_uses(places, verdicts)
    return jax.tree.unflatten(structure, [axes for axes, _ in verdicts])


def _is_traced(leaf: Any) -> bool:
    # A number of NumPy may be what a Python number is: a rate, a count, a flag.
    return is_array_like(leaf) and not isinstance(leaf, np.generic)


# Reading the jaxpr.

# What a loop carries settles within a few rounds, or, where it is reshaped again and again, never.
_MOST_ROUNDS = 16


class _Reader:
    """Goes through a jaxpr equation by equation, and notes how each parameter is used.

    Args:
        is_without_data: whether there are no arrays but those that the computation makes itself: a batch of
            ones then takes the place of the data.

    Attributes:
        uses: what was noted so far.
        without_gradient: the parameters that are used where no gradient comes back.
    """

    def __init__(self, *, is_without_data: bool) -> None:
        self._is_without_data = is_without_data
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

    def end(self, outputs: Sequence[Value]) -> None:
        """Notes what is returned without having met the data."""
        for output in outputs:
            returned = most_complete(kernels_in(output))
            self.note(unclear_product(v, "the output") for v in returned if v.is_product and v.placed)
            self.note(deferred_in(output))

    def read_jaxpr(
        self, jaxpr: Any, values: Sequence[Value], is_output_live: Sequence[bool] | None = None
    ) -> list[Value]:
        """The outputs of a jaxpr, open or closed.

        Args:
            jaxpr: the jaxpr.
            values: its inputs.
            is_output_live: for each output, whether a gradient comes back to it.
        """
        jaxpr = _opened(jaxpr)
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
        if name in _CONTROL_FLOW:
            outputs = _CONTROL_FLOW[name](self, eqn, values, live)
        elif self._stops_gradient(eqn):
            outputs = [self._as_constant(values[0], shape_of(eqn.outvars[0]), is_frozen=True)]
        elif bodies := _bodies_with_the_same_arguments(eqn):
            read = [self._read_body(eqn, body, values, live) for body in bodies]
            outputs = [functools.reduce(join, each) for each in zip(*read, strict=True)]
        else:
            outputs = results(self.note, eqn, values)
        return [self._settled(value, var, name) for value, var in zip(outputs, eqn.outvars, strict=True)]

    def _settled(self, value: Value, var: Any, name: str) -> Value:
        if is_key(_dtype(var.aval)):
            return Known()
        if self._is_without_data and isinstance(value, Known) and name in MAKING_ARRAYS and _rank(var):
            return Data.given(var.aval, constant=True)
        # A mask that a threshold on the weights makes is a constant as far as the gradient can tell.
        if not self._is_differentiable(var.aval):
            return self._as_constant(value, shape_of(var))
        return simplified(value, shape_of(var))

    def _as_constant(self, value: Value, shape: Shape, *, is_frozen: bool = False) -> Value:
        self.without_gradient.update(view.leaf for view in kernels_in(value))
        if isinstance(value, Data):
            varies = variation(value, shape)
            return dataclasses.replace(value, varies=varies, carried=frozenset(), deferred=frozenset())
        return Known(is_frozen=is_frozen) if isinstance(value, Weight) else value

    def _read_body(self, eqn: Any, body: Any, values: list[Value], live: list[bool]) -> list[Value]:
        """The outputs of an equation that does what the jaxpr does that it holds."""
        outer = self._has_own_derivative
        self._has_own_derivative |= eqn.primitive.name.startswith("custom_")
        inside = _opened(body)
        # Inside shard_map an array has the shape of one device's share.
        outputs = self.read_jaxpr(body, _all_resized(values, eqn.invars, inside.invars), live)
        self._has_own_derivative = outer
        return _all_resized(outputs, inside.outvars, eqn.outvars)

    # Loops and branches. Each has an order of arguments of its own.

    def read_scan(self, eqn: Any, values: list[Value], live: list[bool]) -> list[Value]:
        """Goes through the first dimension of some arguments: their leading axis is a batch axis."""
        body = eqn.params["jaxpr"]
        inside = _opened(body)
        # What a round sees of an argument tells what kind it is; the names of the parameters that say so
        # differ between versions of JAX.
        looped = sum(_rank(a) > _rank(b) for a, b in zip(eqn.invars, inside.invars, strict=True))
        carried = sum(_rank(a) == _rank(b) for a, b in zip(eqn.outvars, inside.outvars, strict=True))
        fixed = len(values) - looped - carried
        each = [
            changed(value, [(dim,) for dim in range(1, _rank(var))], lambda view: view.in_loop(id(eqn)))
            for value, var in zip(values[fixed + carried :], eqn.invars[fixed + carried :], strict=True)
        ]
        carry, rest = self._read_loop(eqn, body, values[:fixed], values[fixed : fixed + carried], each, live)
        return [after_loop(value, id(eqn)) for value in carry] + [
            stacked(value, shape_of(var), id(eqn))
            for value, var in zip(rest, eqn.outvars[carried:], strict=True)
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
        carried = frozenset[View]().union(*map(kernels_in, [*carry, *outputs]))
        self.note(Use(view.leaf, "unclear", eqn.primitive.name, why) for view in carried)
        data: list[Value] = [Data.of(shape_of(var)) for var in _opened(body).outvars]
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
            self.note(no_weight(kernels_in(value) - kernels_in(after), "a loop or a branch", why))


def _opened(jaxpr: Any) -> Any:
    """A jaxpr without the constants that a closed one has beside it."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _rank(atom: Any) -> int:
    return len(shape_of(atom))


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def _dtype(aval: Any) -> Any:
    return getattr(aval, "dtype", jnp.dtype(bool))


def _closes_over_arrays(jaxpr: Any) -> bool:
    opened = _opened(jaxpr)
    atoms = [atom for eqn in opened.eqns for atom in eqn.invars if not _is_var(atom)]
    arrays = (atom for atom in [*opened.constvars, *atoms] if _rank(atom) and not is_key(_dtype(atom.aval)))
    return any(arrays) or any(_closes_over_arrays(held) for eqn in opened.eqns for held in _held(eqn))


def _held(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds."""
    return [
        value
        for given in eqn.params.values()
        for value in (given if isinstance(given, tuple | list) else [given])
        if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)
    ]


def _bodies_with_the_same_arguments(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds, if its arguments and results fit all of them.

    Any primitive may hold one: jit, remat, custom_jvp_call, custom_vjp_call, shard_map, and those to come.
    """
    held = _held(eqn)
    return held if all(_fits(eqn, _opened(jaxpr)) for jaxpr in held) else []


def _fits(eqn: Any, jaxpr: Any) -> bool:
    if len(jaxpr.invars) != len(eqn.invars) or len(jaxpr.outvars) != len(eqn.outvars):
        return False
    pairs = zip(jaxpr.invars + jaxpr.outvars, eqn.invars + eqn.outvars, strict=True)
    return all(_rank(inside) == _rank(outside) for inside, outside in pairs)


def _all_resized(values: Sequence[Value], before: Sequence[Any], after: Sequence[Any]) -> list[Value]:
    return [
        resized(value, shape_of(old), shape_of(new))
        for value, old, new in zip(values, before, after, strict=True)
    ]


_CONTROL_FLOW: dict[str, Callable[[_Reader, Any, list[Value], list[bool]], list[Value]]] = {
    "cond": _Reader.read_cond,
    "scan": _Reader.read_scan,
    "while": _Reader.read_while,
}


# From the uses of a parameter to its axes.


def _verdicts(leaves: list[Any], reader: _Reader) -> list[tuple[WeightAxes, bool]]:
    """The axes of each parameter, and whether its uses are clear."""
    uses = collections.defaultdict(list)
    for use in reader.uses:
        uses[use.leaf].append(use)
    verdicts = []
    for number, leaf in enumerate(leaves):
        axes, is_clear = _agreed(uses[number], number in reader.without_gradient)
        axes = applicable(axes, leaf) if _is_traced(leaf) else left_alone("no array")
        verdicts.append((axes, is_clear))
    return verdicts


def _agreed(uses: list[Use], is_used_without_gradient: bool) -> tuple[WeightAxes, bool]:
    """What all uses of a parameter say, and whether they are clear."""
    weights = [use for use in uses if use.how == "weight"]
    others = [use for use in uses if use.how == "no weight" and not (weights and use.weak)]
    # What may be a use like the others is one: the first step of a recurrence, from a state of zeros.
    known = {use.fan_in for use in weights}
    unclear = [use for use in uses if use.how == "unclear" and use.fan_in not in known]
    if unclear:
        return left_alone(unclear[0].why, unclear[0].op), False
    if not uses:
        why = "it never meets the data, or only a statistic of it does"
        return left_alone("no gradient comes back to it" if is_used_without_gradient else why), True
    if not weights:
        telling = [use for use in others if not use.weak] or others
        return left_alone(telling[0].why, telling[0].op), True
    if others or len(known) > 1:
        ways = dict.fromkeys(use.why for use in [*weights, *others])
        return left_alone("used in more than one way: " + "; ".join(ways)), True
    fan_out = frozenset.intersection(*(use.fan_out for use in weights))
    first = weights[0]
    return WeightAxes(tuple(sorted(first.fan_in)), tuple(sorted(fan_out)), first.op, first.why), True


def _warn_of_unclear_uses(places: list[tuple[Any, Any]], verdicts: list[tuple[WeightAxes, bool]]) -> None:
    lines = [
        f"  {place(path, leaf)}: {axes.why}"
        for (path, leaf), (axes, is_clear) in zip(places, verdicts, strict=True)
        if not is_clear
    ]
    if lines:
        warnings.warn(
            "infer_axes leaves these parameters alone, because it cannot read with certainty what the "
            "computation does with them:\n" + "\n".join(lines) + "\n"
            "To centralize one of them, replace its leaf in the tree by axes of your own, or, if it is "
            "multiplied by an array that the function closes over, pass the array as an argument.",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )
