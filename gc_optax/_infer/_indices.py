"""Indices that are known when a program is read: `w[np.array([1, 0, 2])]`, `w[2 - jnp.arange(3)]`.

They tell a lookup that only changes the order of a kernel's entries from a lookup by the data.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._program import shape_of

MOST_ENTRIES = 2**20
KNOWN: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "lt": np.less,
    "select_n": lambda which, *cases: np.choose(which, cases),
    "clamp": lambda low, value, high: np.clip(value, low, high),
    "convert_element_type": lambda value: value,
}


def folded(eqn: Any, values: Sequence[Any]) -> Any:
    """The result of an equation, if its arguments are known, and so few that it is cheap; otherwise `None`."""
    name, params, shape = eqn.primitive.name, eqn.params, shape_of(eqn.outvars[0])
    if any(value is None for value in values):
        return None
    if name == "iota" and eqn.outvars[0].aval.dtype.kind in "iu":
        line = np.arange(shape[params["dimension"]])
        return np.broadcast_to(_spread(line, [params["dimension"]], len(shape)), shape)
    if name == "broadcast_in_dim":
        return np.broadcast_to(_spread(values[0], params["broadcast_dimensions"], len(shape)), shape)
    if math.prod(shape) > MOST_ENTRIES:
        return None
    if name in ("reshape", "squeeze"):
        return np.reshape(values[0], shape)
    return KNOWN[name](*values) if name in KNOWN else None


def is_distinct(value: Any, dim: int) -> bool:
    """Whether indices are all different along a dimension, and constant along the others, as those of `iota`."""
    if value is None or not value.ndim:
        return False
    others = [d for d in range(value.ndim) if d != dim]
    is_constant = all(value.strides[d] == 0 or value.shape[d] == 1 for d in others)
    return is_constant and len(np.unique(np.moveaxis(value, dim, -1)[(0,) * len(others)])) == value.shape[dim]


def _spread(value: Any, dims: Sequence[int], rank: int) -> Any:
    return np.expand_dims(value, [dim for dim in range(rank) if dim not in dims])
