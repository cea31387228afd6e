"""A tree of axes as a file: JSON with one line for each parameter, which a person can read and edit."""

import json
import os
import pathlib
import uuid
from typing import Any

import jax
from jax import tree_util as jtu

from ._axes import (
    Axes,
    PyTree,
    WeightAxes,
    describe_leaf,
    is_absent,
    is_array_like,
    left_alone,
    read_from,
    shortened,
)
from ._resolve import in_range, match, settle
from ._text import at, joined_lines, place

_FORMAT, _VERSION = "gc_optax axes", 1
# What the line of a parameter holds, and of which type.
_FIELDS = {"path": str, "shape": list, "fan_in": list, "fan_out": list, "op": str, "role": str, "why": str}
_MOST_LINES = 10


def save_axes(file: str | os.PathLike[str], axes: Axes, params: PyTree) -> None:
    """Writes the axes of every parameter to a JSON file, for `load_axes` and for people.

    A run on a pod need not trace the model again, and a reviewer sees in a diff where something else will be
    centralized than before. Each array of `params` has a line with its path (as `jax.tree_util.keystr` prints
    it, without the boxes of Flax), its shape and its `WeightAxes`. A leaf that is no array, a function in an
    Equinox module for example, has no line.

    The file is there as a whole or not at all: until it is complete, an older one stays in its place.

    Args:
        file: where to write it. The folder must exist.
        axes: as for `centralize`, what `infer_axes` returns for example. `None` stands for `out_last`, with
            the warning that `centralize` gives.
        params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: as the `init` of `centralize`; and if two parameters have paths that print alike.
        TypeError: as the `init` of `centralize`.
        OSError: if the file cannot be written.

    Examples:
        >>> import pathlib
        >>> import tempfile
        >>> import gc_optax
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros((4,))}
        >>> axes = gc_optax.infer_axes(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, 3)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "axes.json")
        ...     gc_optax.save_axes(file, axes, params)
        ...     gc_optax.load_axes(file, params) == axes
        True

    References:
        RFC 8259, The JavaScript Object Notation (JSON) Data Interchange Format,
        https://www.rfc-editor.org/rfc/rfc8259
    """
    settled = settle(params, axes, None)
    lines = [
        json.dumps(_record(path, leaf, weight))
        for (path, leaf), weight in zip(_places(params), settled, strict=True)
        if is_array_like(leaf)
    ]
    header = json.dumps({"format": _FORMAT, "version": _VERSION}).removesuffix("}")
    text = f'{header}, "parameters": [\n' + ",\n".join(lines) + "\n]}\n"
    target = pathlib.Path(file)
    # On a pod many processes may write the same file.
    temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(text.encode())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load_axes(file: str | os.PathLike[str], params: PyTree) -> PyTree:
    """The axes that `save_axes` wrote, as a tree for `params`.

    The file must fit: a line for each array of `params`, with the same path and shape, and no other line. The
    order of the lines does not matter, nor does what kind of nodes the paths lead through, lists or tuples. A
    `fan_in` that was edited by hand counts, also with negative axes.

    Args:
        file: what `save_axes` wrote.
        params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`s.

    Returns:
        A tree with the structure of `params` and a `WeightAxes` at each leaf, equal to those that were saved.
        As what `infer_axes` returns, it is refused for a stack of such models.

    Raises:
        ValueError: if the file does not fit `params`, was written in another version of the format, or is
            none of `save_axes`, because it was cut off for example. The message names the file and the
            parameters.
        OSError: if the file cannot be read, a `FileNotFoundError` if there is none.

    Examples:
        >>> import pathlib
        >>> import tempfile
        >>> import gc_optax
        >>> import jax
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "axes.json")
        ...     gc_optax.save_axes(file, gc_optax.out_first, params)
        ...     axes = gc_optax.load_axes(file, params)
        >>> axes["kernel"].fan_in, axes["kernel"].why
        ((1,), 'out_first: every axis but the first')
        >>> optimizer_state = gc_optax.centralize(axes).init(params)

    References:
        RFC 8259, The JavaScript Object Notation (JSON) Data Interchange Format,
        https://www.rfc-editor.org/rfc/rfc8259
    """
    name = shortened(os.fspath(file))
    records = _records(_parsed(pathlib.Path(file).read_bytes(), name), name)
    places = _places(params)
    found, problems = _read(records, {path: leaf for path, leaf in places if is_array_like(leaf)})
    if problems:
        raise ValueError(f"{name} does not fit the parameters:\n{problems}")
    return jax.tree.unflatten(
        jax.tree.structure(params),
        [
            found[path] if is_array_like(leaf) else left_alone("no array")
            for path, leaf in places
            if not is_absent(leaf)
        ],
    )


def _places(params: PyTree) -> list[tuple[str, Any]]:
    """The leaves with their paths as text, in the order of `settle`; absent ones are among them."""
    # Matched with itself, a tree has the paths that error messages name, without the steps into boxes.
    places = [(jtu.keystr(path), leaf) for path, leaf, _ in match("params", params, params, prefix=False)]
    seen = set()
    for path, leaf in places:
        if is_array_like(leaf) and path in seen:
            raise ValueError(
                f"two parameters have the path {at(path)}, so a file cannot tell them apart: keys of their "
                "nodes print alike"
            )
        seen.add(path)
    return places


def _record(path: str, leaf: Any, axes: WeightAxes) -> dict[str, Any]:
    """The line of a parameter. JSON knows the ints of Python, and not those of NumPy."""
    return {
        "path": path,
        "shape": list(map(int, leaf.shape)),
        "fan_in": list(map(int, axes.fan_in)),
        "fan_out": list(map(int, axes.fan_out)),
        "op": axes.op,
        "role": axes.role,
        "why": axes.why,
    }


def _parsed(content: bytes, name: str) -> Any:
    """What the file `name` says, if it is JSON."""
    try:
        return json.loads(content, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} is not the JSON that gc_optax.save_axes writes, or is not all of it: {error}"
        ) from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object of JSON. Python would take the last of two that have the same name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"a field is repeated among {shortened(', '.join(name for name, _ in pairs))}")
    return fields


def _records(document: Any, name: str) -> list[Any]:
    """The lines of the parameters, which follow the header."""
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"{name} was not written by gc_optax.save_axes: it has no format {_FORMAT!r}")
    if describe_leaf(document.get("version")) != str(_VERSION):  # to Python, `true` and 1.0 are 1
        raise ValueError(
            f"{name} has version {describe_leaf(document.get('version'))} of the format, and this gc_optax "
            f"reads version {_VERSION}. Write the file again with gc_optax.save_axes"
        )
    records = document.get("parameters")
    if not isinstance(records, list) or len(document) > 3:
        raise ValueError(f"{name} must hold a format, a version and a list of parameters, and nothing else")
    return records


def _read(records: list[Any], arrays: dict[str, Any]) -> tuple[dict[str, WeightAxes], str]:
    """The axes of each parameter by its path, and lines that say where the file and the arrays do not fit."""
    found: dict[str, WeightAxes] = {}
    wrong, missing = [], dict(arrays)
    for number, record in enumerate(records, 1):
        try:
            path = _path_of(record, number)
            leaf = missing.pop(path, None)
            if leaf is None:
                what = "it is in the file twice" if path in arrays else "the parameters have no such array"
                raise ValueError(f"{at(path)}: {what}")
            found[path] = _axes_of(record, place(path, leaf), leaf)
        except ValueError as error:
            wrong.append(f"  {error}")
    not_there = [f"  {place(path, leaf)}: it is not in the file" for path, leaf in missing.items()]
    return found, "\n".join(joined_lines(lines, _MOST_LINES) for lines in (wrong, not_there) if lines)


def _path_of(record: Any, number: int) -> str:
    """The path of a parameter, from its line."""
    path = record.get("path") if isinstance(record, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"parameter {number} of the file has no path: {describe_leaf(record)}")
    return path


def _axes_of(record: dict[str, Any], where: str, leaf: Any) -> WeightAxes:
    """The axes that a line says, or an error where they are none of `leaf`."""
    if record.keys() != _FIELDS.keys():
        raise ValueError(
            f"{where}: its fields in the file are {shortened(', '.join(record))}; "
            f"they must be {', '.join(_FIELDS)}"
        )
    for field, kind in _FIELDS.items():
        value = record[field]
        # To Python, `true` is an int too.
        if type(value) is not kind or (kind is list and any(type(axis) is not int for axis in value)):
            words = "text" if kind is str else "a list of ints"
            raise ValueError(f"{where}: {field} must be {words}, got {describe_leaf(value)}")
    if record["shape"] != list(leaf.shape):
        raise ValueError(f"{where}: its shape in the file is {describe_leaf(record['shape'])}")
    fan_in, fan_out = tuple(record["fan_in"]), tuple(record["fan_out"])
    try:
        axes = WeightAxes(fan_in, fan_out, record["op"], record["why"], record["role"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return read_from(leaf, in_range(axes, leaf, where))
