"""Gradient centralization for JAX, as an optax transformation."""

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
    from ._infer import infer_axes
else:  # where a type checker sees it, it takes every name for one of ours

    def __getattr__(name: str) -> Any:
        # A program that has its axes need not load what reads programs.
        if name == "infer_axes":
            from ._infer import infer_axes

            return infer_axes
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
    return [*__all__, "__version__"]
