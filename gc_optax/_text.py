"""How a path, a leaf, a tree is told to a person, and where a warning points."""

import inspect
from typing import Any, NamedTuple

from jax import tree_util as jtu

from ._axes import Path, describe_leaf, is_absent, is_array_like, shortened

# The step into a box that holds one array, an NNX variable or a `Partitioned` array of Linen: no name.
BOX: Path = (jtu.GetAttrKey("value"),)

_MOST_CHILDREN = 8


class Wording(NamedTuple):
    """How a message speaks of the transformation that needs axes."""

    call: str  # what a user writes, around what it is called with
    statistic: str  # what it takes of a weight vector
    without_axes: str  # what it does to a vector in which there are no weight vectors
    exact: str = "gc_optax.infer_axes(loss, params, batch)"  # what reads the axes off the model


CENTRALIZING = Wording("centralize({})", "mean", "nothing is centralized")


# Whose functions may stand between a user's line and ours: `jax.jit`, `nnx.Optimizer`, the `init` of a chain.
_LIBRARIES = ("gc_optax", "optax", "jax", "flax", "contextlib", "equinox", "keras")


def place(path: Path | str, leaf: Any) -> str:
    """Which leaf an error message is about: "['Dense_0']['kernel'], shape (3, 4)"."""
    return f"{at(path)}, shape {leaf.shape}" if is_array_like(leaf) else at(path)


def at(path: Path | str) -> str:
    """A path as one types it in Python: "['Dense_0']['kernel']". Of a very long one, both ends."""
    return shortened((path if isinstance(path, str) else jtu.keystr(path)) or "the root")


def path_text(path: Path) -> str:
    """A path as a table shows it: "block_0/attention/kernel"."""
    inside = [key for key in path if (key,) != BOX]
    shown = jtu.keystr(tuple(inside), simple=True, separator="/") or "(root)"
    # A name may hold what a terminal obeys, such as the escape code for red.
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown)


def describe(node: Any) -> str:
    """A leaf or a tree in words: "an array of dtype float32 and shape (4,)", "a dict with ['a'], ['b']".

    It stays short, whatever it is given: of many children the first few are named.
    """
    if is_absent(node) or jtu.all_leaves([node]):
        return describe_leaf(node)
    children, _ = children_of(node)
    named = [at(key) for key, _ in children[:_MOST_CHILDREN]]
    more = len(children) - len(named)
    inside = shortened(", ".join(named)) or "nothing"
    return f"a {type_name(node)} with {inside}" + (f" and {more} more" if more else "")


def type_name(thing: Any) -> str:
    """The name of a type as a user reads it, in bounded length."""
    return shortened(type(thing).__name__, 80)


def joined_lines(lines: list[str], most: int = 20) -> str:
    """The lines of a warning, one below the other; of very many, the first and how many follow."""
    more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(lines[:most] + more)


def children_of(node: Any) -> tuple[list[tuple[Path, Any]], jtu.PyTreeDef]:
    """The children of a node, each with the step that leads to it, and the structure that they stand in."""
    return jtu.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)


def stacklevel_of_the_user() -> int:
    """The `stacklevel` at which a warning points at the user's line: `optimizer.init(params)`, for example.

    Every frame between that line and the caller of this function is in one of `_LIBRARIES`.
    """
    level, frame = 0, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level
