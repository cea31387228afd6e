"""The program that JAX traces: all that depends on how JAX writes a jaxpr down, and on its version."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


def shape_of(atom: Any) -> Shape:
    """The shape of a variable or a literal; `()` where it is no array, but a token, say."""
    return tuple(getattr(atom.aval, "shape", ()))


def is_kind(atom: Any, kind: Any) -> bool:
    """Whether its numbers are of a kind: random keys, or `jnp.inexact`, which gradients come back to."""
    return bool(jnp.issubdtype(getattr(atom.aval, "dtype", jnp.dtype(bool)), kind))


def is_literal(atom: Any) -> bool:
    """Whether it is a number that stands in the equation itself: `add a 1.0`."""
    return hasattr(atom, "val")


def opened(jaxpr: Any) -> Any:
    """A jaxpr without the arrays of the function's surroundings, which a closed one has beside it."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def closed_over(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """The variables that stand for arrays of the function's surroundings, and those arrays, if known."""
    variables = opened(jaxpr).constvars
    return zip(variables, getattr(jaxpr, "consts", [None] * len(variables)), strict=True)


def bodies_of(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds, if its arguments and results fit all of them.

    Any primitive may hold one: `jit`, `checkpoint`, `custom_vjp_call`, `shard_map`, and those to come. The
    first argument of `cond` chooses among its branches.
    """
    if eqn.primitive.name == "cond":
        return list(eqn.params["branches"])
    given = (value if isinstance(value, tuple | list) else [value] for value in eqn.params.values())
    held = [v for values in given for v in values if hasattr(v, "eqns")]
    return held if all(_ranks(opened(jaxpr)) == _ranks(eqn) for jaxpr in held) else []


def loop_of(eqn: Any) -> tuple[Any, int, int, int]:
    """The body of a loop, and how many arguments are not for it, are the same in each round, are carried.

    The condition of `while` is a bool, through which no gradient goes: only its body counts. Versions of JAX
    name the parameters of `scan` differently; ranks tell the same: what it goes through has one more outside.
    """
    if eqn.primitive.name == "while":
        first, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        return eqn.params["body_jaxpr"], first, fixed, len(eqn.outvars)
    both = zip(_ranks(eqn), _ranks(opened(eqn.params["jaxpr"])), strict=True)
    looped, stacked = (sum(map(operator.gt, outer, inner)) for outer, inner in both)
    carried = len(eqn.outvars) - stacked
    return eqn.params["jaxpr"], 0, len(eqn.invars) - looped - carried, carried


def _ranks(holder: Any) -> list[list[int]]:
    return [[len(shape_of(atom)) for atom in atoms] for atoms in (holder.invars, holder.outvars)]


# Indices that are known: `w[np.array([1, 0, 2])]`, `w[2 - jnp.arange(3)]`.

KNOWN: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "lt": np.less,
    "select_n": lambda which, *cases: np.choose(which, cases),
    "clamp": lambda low, value, high: np.clip(value, low, high),
    "convert_element_type": lambda value: value,
}


def indices(value: Any) -> np.ndarray[Any, Any] | None:
    """An array of the surroundings, or a literal, if it can be an index: known whole numbers."""
    dtype = getattr(value, "dtype", np.dtype(int) if isinstance(value, int) else np.dtype(float))
    is_whole = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
    return np.asarray(value) if is_whole and not isinstance(value, jax.core.Tracer) else None


def folded(eqn: Any, values: Sequence[Any]) -> Any:
    """The indices that an equation computes, if those that go in are known, and few; otherwise `None`."""
    name, params, shape = eqn.primitive.name, eqn.params, shape_of(eqn.outvars[0])
    if any(value is None for value in values):
        return None
    if name == "iota" and is_kind(eqn.outvars[0], jnp.integer):
        return np.broadcast_to(np.indices(shape, sparse=True)[params["dimension"]], shape)
    if name == "broadcast_in_dim":
        gone = [dim for dim in range(len(shape)) if dim not in params["broadcast_dimensions"]]
        return np.broadcast_to(np.expand_dims(values[0], gone), shape)
    if name in ("reshape", "squeeze"):
        return np.reshape(values[0], shape)
    return KNOWN[name](*values) if name in KNOWN and math.prod(shape) <= 2**20 else None
