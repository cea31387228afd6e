"""Gradient centralization for JAX, as an optax transformation.

`gc_optax.nnx` is for models of Flax NNX and `gc_optax.keras` for Keras. Each loads when it is first used, and
needs Flax or Keras installed; nothing else here does.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from . import optimizers
from ._axes import WeightAxes
from ._centralize import centralize, centralize_gradients, centralized
from ._clip import adaptive_grad_clip
from ._conventions import conv_only, out_first, out_last
from ._files import load_axes, save_axes
from ._masks import decay_mask
from ._report import removed_fraction, summarize

if TYPE_CHECKING:
    from . import keras as keras
    from . import nnx as nnx
    from ._infer import infer_axes
else:  # where a type checker sees it, it takes every name for one of ours

    def __getattr__(name: str) -> Any:
        # A program that has its axes need not load what reads programs, nor a framework that it does not use.
        if name == "infer_axes":
            from ._infer import infer_axes

            return infer_axes
        if name in ("keras", "nnx"):
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = _version("gc_optax")
__all__ = [
    "WeightAxes",
    "adaptive_grad_clip",
    "centralize",
    "centralize_gradients",
    "centralized",
    "conv_only",
    "decay_mask",
    "infer_axes",
    "load_axes",
    "optimizers",
    "out_first",
    "out_last",
    "removed_fraction",
    "save_axes",
    "summarize",
]


def __dir__() -> list[str]:
    # `help` and completion get every name that is listed here, so a framework is listed once it is loaded.
    return [*__all__, "__version__", *({"keras", "nnx"} & globals().keys())]
