"""Where an array comes from: what the pass forwards knows of it."""

import enum
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._program import Shape, shape_of

Dims = frozenset[int]
NO_DIMS: Dims = frozenset()
Sources = list[list[int]]  # for each new dimension, the old ones that it comes from


class Made(enum.IntEnum):
    """What an array is made of. What is made of two of them is, as a rule, the later one."""

    CONSTANT = 0  # what the function computes from nothing: `jnp.eye(4)`
    FROZEN = 1  # parameters that no gradient comes back to: `stop_gradient(w)`
    PARAMS = 2  # parameters: `w / norm(w)`
    FIXED = 3  # what a function of arrays closes over besides: a mask or a fixed matrix, maybe a batch
    CLOSED = 4  # what a function of nothing but parameters closes over: a batch, a mask or a fixed matrix
    RAW = 5  # arguments as they are given: a batch, a mask or a frozen kernel
    EITHER_CLOSED = 6  # parameters that these scale, mask or pick, kernels or activations: `w * mask`
    EITHER = 7  # the same with `RAW`: `experts[i]`
    DATA = 8  # what is certain to be data: `tanh(x @ w)`


class Origin(NamedTuple):
    """What is known of an array from what it is computed from."""

    made: Made
    # The dimensions along which it is not constant.
    varies: Dims = NO_DIMS
    # 0 where each entry comes from one entry of each parameter; 1 where it comes from many, as in `a @ b`; 2
    # where it is as likely to be an activation, as `closed_over @ w` and `argument + w` are.
    mixed: int = 0
    # The dimensions along which it is one-hot.
    hot: Dims = NO_DIMS
    # The dimensions along which data scale the parameters in it.
    along: Dims = NO_DIMS
    # Its entries, if they are known whole numbers: `np.array([1, 0, 2])`.
    value: Any = None
    # A number for its entries, wherever they are: `roll(x, 1)` has that of `x`. Arrays with the same one have
    # entries of one array, computed in one way; with another, or with 0, nothing is known.
    source: int = 0
    # Whether the data in it have met a weight or a lookup table.
    met: bool = False

    @property
    def is_either(self) -> bool:
        """Whether it may be a kernel, or an activation."""
        return self.made in (Made.EITHER_CLOSED, Made.EITHER)

    @property
    def has_params(self) -> bool:
        """Whether it may be a kernel."""
        return self.made == Made.PARAMS or self.is_either

    @property
    def is_array(self) -> bool:
        """Whether it is an array that the function was given, as it was given."""
        return self.made in (Made.FIXED, Made.CLOSED, Made.RAW)

    @property
    def is_data(self) -> bool:
        """Whether it is certain to be data, and no constant of the model."""
        return self.made in (Made.RAW, Made.DATA)

    def is_distinct(self, dim: int) -> bool:
        """Whether it counts up along a dimension, or has known indices that are all different."""
        if self.value is None or not self.value.ndim:
            return False
        others = tuple(d for d in range(self.value.ndim) if d != dim)
        is_constant = all(self.value.strides[d] == 0 or self.value.shape[d] == 1 for d in others)
        line = np.moveaxis(self.value, dim, -1)[(0,) * len(others)]
        return is_constant and len(np.unique(line)) == line.size

    def moved(self, sources: Sources) -> "Origin":
        """What is known of it when its entries are moved."""
        varies, hot, along = (
            frozenset(new for new, source in enumerate(sources) if not dims.isdisjoint(source))
            for dims in (self.varies, self.hot, self.along)
        )
        return self._replace(varies=varies, hot=hot, along=along, value=None)


CONSTANT = Origin(Made.CONSTANT)


def big(shape: Shape) -> Dims:
    """The dimensions that have more than one entry."""
    return frozenset(dim for dim, size in enumerate(shape) if size > 1)


def union(dims: Iterable[Dims]) -> Dims:
    """The dimensions that are in any of the sets."""
    return NO_DIMS.union(*dims)


def either(ins: Iterable[Origin]) -> Made:
    """What parameters and arrays are together, if they may be a kernel."""
    is_closed = all(origin.made <= Made.CLOSED or origin.made == Made.EITHER_CLOSED for origin in ins)
    return Made.EITHER_CLOSED if is_closed else Made.EITHER


def join(a: Origin, b: Origin) -> Origin:
    """What is known of an array that is one or the other, or has entries of both."""
    made, mixed = max(a.made, b.made), max(a.mixed, b.mixed)
    if (a.has_params or b.has_params) and (a.is_array or b.is_array):
        made, mixed = Made.DATA if Made.RAW in (a.made, b.made) else max(made, Made.EITHER_CLOSED), 2
    source = a.source if a.source == b.source else 0
    varies, along, met = a.varies | b.varies, a.along | b.along, a.met or b.met
    return Origin(made, varies, mixed, a.hot & b.hot, along, None, source, met)


def join_all(origins: Sequence[Origin]) -> Origin:
    """What is known of an array that is one of several, or has entries of all."""
    return functools.reduce(join, origins) if origins else CONSTANT


def computed(ins: Sequence[Origin], var: Any) -> Origin:
    """What is known of an array that is computed from others, nobody knows how."""
    whole = join_all(ins)
    return Origin(whole.made, big(shape_of(var)), max(whole.mixed, int(whole.has_params)))
