"""The program that JAX traces: all that depends on how JAX writes a jaxpr down, and on its version.

A jaxpr is a list of equations, `c = mul a b`, each with a primitive (`mul`), variables, and parameters, some
of which hold jaxprs of their own (the body of a loop). The other rooms see no more of it than this one shows.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

Shape = tuple[int, ...]


def shape_of(atom: Any) -> Shape:
    """The shape of a variable or a literal; `()` where it is no array, but a token, say."""
    return tuple(getattr(atom.aval, "shape", ()))


def is_key(atom: Any) -> bool:
    """Whether it holds random keys: no numbers that anything could be computed from."""
    return bool(jnp.issubdtype(_dtype(atom), jax.dtypes.prng_key))


def carries_gradient(atom: Any) -> bool:
    """Whether a gradient can come back to it: whether its numbers are real or complex."""
    return bool(jnp.issubdtype(_dtype(atom), jnp.inexact))


def is_literal(atom: Any) -> bool:
    """Whether it is a number that is written into the equation itself: `add a 1.0`."""
    return isinstance(atom, jex.Literal)


def opened(jaxpr: Any) -> Any:
    """A jaxpr without the constants that a closed one has beside it."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def closed_over(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """The variables of a jaxpr that stand for arrays of the function's surroundings, and those arrays."""
    variables = opened(jaxpr).constvars
    return zip(variables, getattr(jaxpr, "consts", [None] * len(variables)), strict=True)


def held_in(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds."""
    given = (value if isinstance(value, tuple | list) else [value] for value in eqn.params.values())
    return [v for values in given for v in values if isinstance(v, jex.Jaxpr | jex.ClosedJaxpr)]


def bodies_of(eqn: Any) -> list[Any]:
    """The jaxprs that an equation holds, if its arguments and results fit all of them.

    Any primitive may hold one: `jit`, `checkpoint`, `custom_vjp_call`, `shard_map`, and those to come. The
    first argument of `cond` only chooses among its branches.
    """
    if eqn.primitive.name == "cond":
        return list(eqn.params["branches"])

    def ranks(holder: Any) -> list[int]:
        return [len(shape_of(atom)) for atom in (*holder.invars, *holder.outvars)]

    held = held_in(eqn)
    return held if all(ranks(opened(jaxpr)) == ranks(eqn) for jaxpr in held) else []


def loop_of(eqn: Any) -> tuple[Any, int, int, int]:
    """The body of a loop, and how many arguments are not for it, are the same in each round, are carried.

    The condition of `while` is a bool, through which no gradient goes, so only its body counts. The names of
    the parameters of `scan` differ between versions of JAX; ranks tell the same: what it goes through has one
    dimension more outside than inside.
    """
    if eqn.primitive.name == "while":
        first, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        return eqn.params["body_jaxpr"], first, fixed, len(eqn.outvars)
    body = eqn.params["jaxpr"]
    inside = opened(body)
    looped = sum(_rank(a) > _rank(b) for a, b in zip(eqn.invars, inside.invars, strict=True))
    carried = sum(_rank(a) == _rank(b) for a, b in zip(eqn.outvars, inside.outvars, strict=True))
    return body, 0, len(eqn.invars) - looped - carried, carried


def closes_over_arrays(jaxpr: Any) -> bool:
    """Whether the function uses arrays that are neither its arguments nor made by it."""
    inside = opened(jaxpr)
    literals = (atom for eqn in inside.eqns for atom in eqn.invars if is_literal(atom))
    if any(_rank(atom) and not is_key(atom) for atom in (*inside.constvars, *literals)):
        return True
    return any(map(closes_over_arrays, itertools.chain.from_iterable(map(held_in, inside.eqns))))


def indices(value: Any) -> np.ndarray[Any, Any] | None:
    """A closed-over array or a literal, if it can be an index: if its numbers are known and whole."""
    is_array = isinstance(value, int | np.integer | np.bool_ | np.ndarray | jax.Array)
    if not is_array or isinstance(value, jax.core.Tracer) or jnp.result_type(value).kind not in "iub":
        return None
    return np.asarray(value)


def _dtype(atom: Any) -> Any:
    return getattr(atom.aval, "dtype", jnp.dtype(bool))


def _rank(atom: Any) -> int:
    return len(shape_of(atom))
