"""The exact axes, read off what a model computes."""

from . import _contractions as _contractions
from . import _entrywise as _entrywise
from . import _lookups as _lookups
from . import _moves as _moves
from ._infer_axes import infer_axes as infer_axes
