"""For people: what is centralized, over what and why, and how much of the gradient that removes."""

import dataclasses
import io
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util as jtu

from ._arithmetic import norm, removed_share
from ._axes import Axes, Mask, Path, PyTree, WeightAxes, is_absent, is_array_like, is_float_array, is_inexact
from ._resolve import match, require_arrays, settle
from ._text import describe, path_text, place

# Wide enough for the reasons, narrow enough for a page.
_WIDTH = 140


def removed_fraction(gradients: PyTree, axes: Axes = None, *, mask: Mask = None) -> PyTree:
    r"""How much of the gradient of each parameter centralization removes.

    With \(\bar g\) the mean part of a gradient \(g\), in which every weight vector is replaced by its
    mean over its inputs,

    $$
    \frac{\lVert \bar g \rVert^2}{\lVert g \rVert^2}
    = 1 - \frac{\lVert g - \bar g \rVert^2}{\lVert g \rVert^2}
    $$

    A gradient of independent entries has the fraction \(1 / n\) in expectation, \(n\) being the
    fan-in. Near 0, centralization does nothing; near 1, it removes the direction in which the
    parameter wants to go. Inside `jax.shard_map` it is the fraction of the shard.

    Args:
        gradients: a tree of arrays.
        axes: as for `centralize`, with the same warning by default.
        mask: as for `centralize`.

    Returns:
        A tree with the structure of `gradients` and a float32 scalar in [0, 1] at each leaf: 0 for what is
        left alone and for a gradient that is zero, NaN where there is a NaN or an infinity. `None` and
        `optax.MaskedNode` stay as they are.

    Raises:
        ValueError: as the `init` of `centralize`.
        TypeError: as the `init` of `centralize`.

    Examples:
        As a metric of a training loop, measured before the gradient is centralized:

        >>> import functools
        >>> import gc_optax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> axes = {"kernel": 0}
        >>> removed = functools.partial(gc_optax.removed_fraction, axes=axes)
        >>> optimizer = optax.chain(
        ...     optax.monitor({"removed": removed}), gc_optax.centralize(axes), optax.adam(1e-2)
        ... )
        >>> params = {"kernel": jnp.zeros((2, 2))}
        >>> state = optimizer.init(params)
        >>> gradients = {"kernel": jnp.array([[1.0, 2.0], [1.0, 0.0]])}
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> print(optax.tree.get(state, "removed"))
        {'kernel': Array(0.6666667, dtype=float32)}

    References:
        Yong et al., ECCV 2020, https://arxiv.org/abs/2004.01461
    """
    settled = settle(gradients, axes, mask)
    require_arrays(gradients, settled)
    leaves, structure = jax.tree.flatten(gradients, is_leaf=is_absent)
    return jax.tree.unflatten(structure, list(map(_fraction, leaves, settled)))


def summarize(params: PyTree, axes: Axes = None, *, mask: Mask = None, gradients: PyTree = None) -> str:
    """A table of what is centralized, over which axes and why.

    Each array has a row, those that are left alone too. Parameters that differ only in an index of
    their path (the blocks of a transformer) share one. Where the axes know it, as those of `infer_axes` do, a
    column has the role of each weight: see `WeightAxes`.

    Args:
        params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`s.
        axes: as for `centralize`, what `infer_axes` returns for example. By default it warns as
            `centralize` does.
        mask: as for `centralize`.
        gradients: a tree with the structure and the shapes of `params`. With it the table also has the
            share of the squared norm of the gradient that centralization removes.

    Returns:
        The table as text, 140 columns wide at most, and a last line with totals.

    Raises:
        ValueError: as the `init` of `centralize`; and if `gradients` does not have an array of the same
            shape for each parameter.
        TypeError: as the `init` of `centralize`; and if `params` is a tree of axes.
        ImportError: if `rich` is not installed.

    Examples:
        >>> import gc_optax
        >>> import jax.numpy as jnp
        >>> block = {"kernel": jnp.ones((64, 10)), "bias": jnp.ones((10,))}
        >>> print(gc_optax.summarize({f"block_{number}": block for number in range(3)}))
        parameter            shape     mean over  fan-in  vectors  why
        ────────────────────────────────────────────────────────────────────────────────────────────
        block_{0..2}/bias    (10,)             -       -        -  rank 1: no weight matrix
        block_{0..2}/kernel  (64, 10)          0      64       30  out_last: every axis but the last
        <BLANKLINE>
        3 of 6 parameters are centralized: 1,920 of 1,950 entries, in 30 weight vectors.

    References:
        The table is made by Rich, https://rich.readthedocs.io
    """
    places, _ = jtu.tree_flatten_with_path(params, is_leaf=is_absent)
    if any(isinstance(leaf, WeightAxes) for _, leaf in places):
        raise TypeError("summarize needs the parameters, and then their axes: summarize(params, axes)")
    settled = settle(params, axes, mask)
    # A module may have functions and numbers for leaves too.
    arrays = [
        (path, leaf, weight)
        for (path, leaf), weight in zip(places, settled, strict=True)
        if is_array_like(leaf)
    ]
    if gradients is None:
        rows = [_row(*leaf) for leaf in arrays]
    else:
        matched = match("gradients", gradients, params, prefix=False)
        given = [gradient for _, leaf, gradient in matched if is_array_like(leaf)]
        rows = [_row_with_gradient(*leaf, gradient) for leaf, gradient in zip(arrays, given, strict=True)]
    table = _table(_collapsed(rows), with_gradients=gradients is not None)
    return f"{table}\n\n{_totals(rows, with_gradients=gradients is not None)}"


def _fraction(gradient: Any, axes: WeightAxes) -> Any:
    if is_absent(gradient):
        return gradient
    return removed_share(gradient, axes.fan_in) if axes.fan_in else jnp.float32(0)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One line of the table: a parameter, or several that differ in an index of their path.

    Args:
        path: the path as text, cut before and after each index in it.
        shape: the shape of each of them.
        axes: the axes of each of them.
        count: how many they are.
        squared_norm: of their gradients together.
        removed: how much of that is removed.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: WeightAxes
    count: int = 1
    squared_norm: float = 0.0
    removed: float = 0.0

    @property
    def fan_in(self) -> int:
        """The number of inputs of a weight vector."""
        return math.prod(self.shape[axis] for axis in self.axes.fan_in)

    @property
    def entries(self) -> int:
        """The number of entries of all the parameters."""
        return self.count * math.prod(self.shape)

    @property
    def vectors(self) -> int:
        """The number of weight vectors, where they are centralized."""
        return self.entries // self.fan_in

    def cells(self) -> dict[str, str]:
        """What the table may show, by the heading of the column."""
        numbers = ["-", "-", "-", "-"]
        if self.axes.fan_in:
            axes = ", ".join(map(str, self.axes.fan_in))
            numbers = [axes, f"{self.fan_in:,}", f"{self.vectors:,}", _percent([self])]
        return {
            "parameter": "".join(self.path),
            "shape": str(self.shape),
            **dict(zip(("mean over", "fan-in", "vectors", "removed"), numbers, strict=True)),
            "role": self.axes.role or "-",
            "why": self.axes.why,
        }


def _percent(rows: list[_Row]) -> str:
    """How much of the squared norm of the gradient of some parameters is removed."""
    of_all = sum(row.squared_norm for row in rows)
    return f"{sum(row.removed for row in rows) / of_all:.1%}" if of_all else "0.0%"


def _row(path: Path, leaf: Any, axes: WeightAxes) -> _Row:
    # Longer numbers are names: Python reads no int of thousands of digits.
    parts = re.split(r"(?<!\d)(\d{1,18})(?=/|$)", path_text(path))
    return _Row(tuple(parts), tuple(leaf.shape), axes)


def _row_with_gradient(path: Path, leaf: Any, axes: WeightAxes, gradient: Any) -> _Row:
    row = _row(path, leaf, axes)
    if not is_inexact(leaf):
        return row
    if not is_float_array(gradient) or gradient.shape != row.shape:
        raise ValueError(f"the gradient of {place(path, leaf)}, is {describe(gradient)}")
    # Squares of what float32 holds may be out of its range, but not of Python's.
    squared_norm = float(norm(gradient)) ** 2
    share = float(removed_share(gradient, axes.fan_in)) if axes.fan_in else 0.0
    return dataclasses.replace(row, squared_norm=squared_norm, removed=share * squared_norm)


def _collapsed(rows: list[_Row]) -> list[_Row]:
    """With one row for those that differ in one index only, and so on for the other indices."""
    longest = max((len(row.path) for row in rows), default=0)
    for position in range(1, longest, 2):
        groups: dict[Any, list[_Row]] = {}
        for number, row in enumerate(rows):
            rest = (row.path[:position], row.path[position + 1 :], row.shape, row.axes, row.count)
            groups.setdefault(rest if position < len(row.path) else number, []).append(row)
        rows = [_together(group, position) for group in groups.values()]
    return rows


def _together(rows: list[_Row], position: int) -> _Row:
    if len(rows) == 1:
        return rows[0]
    path = list(rows[0].path)
    path[position] = "{" + ",".join(_ranges([row.path[position] for row in rows])) + "}"
    return dataclasses.replace(
        rows[0],
        path=tuple(path),
        count=sum(row.count for row in rows),
        squared_norm=sum(row.squared_norm for row in rows),
        removed=sum(row.removed for row in rows),
    )


def _ranges(indices: list[str]) -> Iterator[str]:
    """Indices as a reader counts them: "0..11", or "0,2..22" for every other one."""
    rest = sorted(indices, key=int)
    while rest:
        step = int(rest[1]) - int(rest[0]) if len(rest) > 1 else 0
        run = [index for n, index in enumerate(rest) if int(index) == int(rest[0]) + n * step]
        if step == 1 and len(run) > 2:
            yield f"{run[0]}..{run[-1]}"
        elif step > 1 and len(run) > 3:
            yield f"{run[0]},{run[1]}..{run[-1]}"
        else:
            run = rest[:1]
            yield run[0]
        rest = rest[len(run) :]


def _table(rows: list[_Row], *, with_gradients: bool) -> str:
    try:
        from rich import box, console, table, text
    except ImportError as error:
        raise ImportError("summarize needs Rich: pip install rich") from error
    shown = table.Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    # A convention knows what is a weight and what a table, but not where a weight stands.
    with_roles = any(row.axes.role in ("input", "hidden", "output") for row in rows)
    roles, removed = ["role"] if with_roles else [], ["removed"] if with_gradients else []
    headings = ["parameter", "shape", "mean over", "fan-in", "vectors", *roles, "why", *removed]
    for heading in headings:
        is_text = heading in ("parameter", "shape", "role", "why")
        shown.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        cells = row.cells()
        shown.add_row(*(text.Text(cells[heading]) for heading in headings))
    printed = io.StringIO()
    plain = console.Console(
        file=printed, width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False
    )
    plain.print(shown)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().split("\n"))


def _totals(rows: list[_Row], *, with_gradients: bool) -> str:
    centralized = [row for row in rows if row.axes.fan_in]
    entries, of_all = (sum(row.entries for row in some) for some in (centralized, rows))
    text = (
        f"{len(centralized):,} of {len(rows):,} parameters are centralized: {entries:,} of {of_all:,} "
        f"entries, in {sum(row.vectors for row in centralized):,} weight vectors."
    )
    if with_gradients:
        text += f" That removes {_percent(rows)} of the squared norm of the gradient."
    return text
