"""Gradient centralization for JAX, as an optax transformation."""

from importlib.metadata import version as _version

from . import optimizers as optimizers
from ._axes import WeightAxes as WeightAxes
from ._centralize import centralize as centralize
from ._centralize import centralize_gradients as centralize_gradients
from ._centralize import centralized as centralized
from ._conventions import conv_only as conv_only
from ._conventions import out_first as out_first
from ._conventions import out_last as out_last
from ._infer import infer_axes as infer_axes
from ._report import removed_fraction as removed_fraction
from ._report import summarize as summarize

__version__ = _version("gc_optax")
