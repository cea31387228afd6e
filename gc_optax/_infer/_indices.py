"""Indices that are known when a program is read: `w[np.array([1, 0, 2])]`, `w[2 - jnp.arange(3)]`.

An array of whole numbers that the function closes over or counts up is computed along with the origins, so that a
lookup by it can be told from a lookup by the data.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._program import shape_of

Values = Sequence[Any]
MOST_ENTRIES = 2**20

# What is computed with indices on the way to a lookup: the equation, the values of its arguments -> the result.
KNOWN: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda eqn, values: np.add(*values),
    "sub": lambda eqn, values: np.subtract(*values),
    "mul": lambda eqn, values: np.multiply(*values),
    "max": lambda eqn, values: np.maximum(*values),
    "min": lambda eqn, values: np.minimum(*values),
    "lt": lambda eqn, values: np.less(*values),
    "select_n": lambda eqn, values: np.where(values[0] == 0, values[1], values[2]),
    "clamp": lambda eqn, values: np.clip(values[1], values[0], values[2]),
    "convert_element_type": lambda eqn, values: values[0],
    "concatenate": lambda eqn, values: np.concatenate(values, eqn.params["dimension"]),
    "reshape": lambda eqn, values: np.reshape(values[0], shape_of(eqn.outvars[0])),
    "squeeze": lambda eqn, values: np.reshape(values[0], shape_of(eqn.outvars[0])),
    "broadcast_in_dim": lambda eqn, values: _broadcast(eqn, values[0]),
    "iota": lambda eqn, values: _counted(eqn.params["dimension"], shape_of(eqn.outvars[0])),
}


def folded(eqn: Any, values: Values) -> Any:
    """The result of an equation, if its arguments are known, and so few that it is cheap; otherwise `None`."""
    name = eqn.primitive.name
    is_view = name in ("broadcast_in_dim", "iota")
    if name not in KNOWN or any(value is None for value in values):
        return None
    if not is_view and math.prod(shape_of(eqn.outvars[0])) > MOST_ENTRIES:
        return None
    if eqn.outvars[0].aval.dtype.kind not in "iub" or (name == "select_n" and len(values) != 3):
        return None
    return KNOWN[name](eqn, values)


def is_distinct(value: Any, dim: int) -> bool:
    """Whether an array of indices counts up, or down, or anyhow, along a dimension and is constant along others."""
    if value is None or not value.ndim:
        return False
    line = value[tuple(slice(None) if d == dim else slice(0, 1) for d in range(value.ndim))]
    is_constant = all(value.strides[d] == 0 or size == 1 for d, size in enumerate(value.shape) if d != dim)
    return is_constant and len(np.unique(line)) == line.size


def _counted(dim: int, shape: tuple[int, ...]) -> Any:
    line = np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return np.broadcast_to(line, shape)


def _broadcast(eqn: Any, value: Any) -> Any:
    shape = shape_of(eqn.outvars[0])
    at = dict(zip(eqn.params["broadcast_dimensions"], np.shape(value), strict=True))
    return np.broadcast_to(np.reshape(value, [at.get(dim, 1) for dim in range(len(shape))]), shape)
