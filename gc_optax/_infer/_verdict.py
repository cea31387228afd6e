"""From the uses of a parameter to its axes, or to a warning."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from .._axes import WeightAxes, applicable, left_alone
from .._text import place, stacklevel_of_the_user
from ._uses import IN, OUT, REDUCED, Use, Uses


def doubt(use: Use) -> str:
    """Why the use of a kernel says nothing with certainty, or nothing."""
    labels = [use.labels(dim) for dim in range(len(use.dims))]
    if reduced := [dim for dim, of_one in enumerate(labels) if of_one >= REDUCED]:
        return f"{_listed(reduced)} reduced before it meets the data"
    if mixed := [dim for dim, of_one in enumerate(labels) if of_one > IN]:
        return f"only a part of {_listed(mixed)} is contracted with the data"
    if use.base == "maybe":
        return "an argument of its shape is added to it: it may be a kernel or an input"
    if use.spread & (IN | OUT) and use.fan_in and not use.is_scale:
        return "spread over an array with more axes, as a scale of it or as a weight"
    return ""


def _judged(use: Use) -> Use:
    """The use of a parameter, with what its labels say."""
    if use.how == "term":
        return use._replace(how="other")
    if use.how != "kernel":
        return use
    if why := doubt(use):
        return use._replace(how="unclear", why=f"{use.op}: {why}", dims=())
    if use.is_scale or not use.fan_in:
        why = "a bias or a scale of another array" if use.is_scale else "none of its axes is summed over"
        return use._replace(how="other", why=f"{use.op}: {why}")
    return use


def verdict(uses: Uses | None, leaf: Any) -> tuple[WeightAxes, bool]:
    """What all uses of a parameter say, and whether they are clear."""
    if uses is None:
        return left_alone("no array"), True
    judged = sorted(map(_judged, uses), key=lambda use: use.why)
    if any(use.how in ("kernel", "unclear") and not use.weak for use in judged):
        judged = [use for use in judged if not use.weak]
    axes, is_clear = _agreed(judged, len(leaf.shape))
    return applicable(axes, leaf), is_clear


def _agreed(judged: list[Use], rank: int) -> tuple[WeightAxes, bool]:
    kernels = [use for use in judged if use.how == "kernel"]
    # In the first step of a recurrence `w` meets a state of zeros, which tells nothing. The later steps say how
    # `w` is used, and their answer stands.
    known = {use.fan_in for use in kernels}
    unclear = [use for use in judged if use.how == "unclear" and use.fan_in not in known]
    others = [use for use in judged if use.how == "other"]
    statistics = [use for use in judged if use.how == "statistic" and use.why]
    if kernels:
        unclear += [use for use in others if use.op == "a loop or a branch"]
    elif not others:
        others = statistics
    if unclear:
        return left_alone(unclear[0].why, unclear[0].op), False
    if not judged:
        return left_alone("no gradient comes back to it"), True
    if not kernels:
        why = "it never meets the data, or only a statistic of it does"
        return left_alone(others[0].why, others[0].op) if others else left_alone(why), True
    ways = dict.fromkeys(f"{use.op} over {_listed(use.fan_in)}" for use in kernels)
    if others or len(known) > 1:
        return left_alone(
            "used in more than one way: " + "; ".join([*ways, *dict.fromkeys(u.why for u in others)])
        ), True
    fan_out = [dim for dim in range(rank) if all(use.labels(dim) >= OUT for use in kernels)]
    return WeightAxes(kernels[0].fan_in, tuple(fan_out), kernels[0].op, next(iter(ways))), True


def _listed(axes: Sequence[int]) -> str:
    return ("axis " if len(axes) == 1 else "axes ") + ", ".join(map(str, axes))


def warn_of_unclear_uses(
    places: Iterable[tuple[Any, Any]], verdicts: Iterable[tuple[WeightAxes, bool]]
) -> None:
    """Warns, once for all of them, of the parameters whose uses are not clear."""
    lines = [
        f"  {place(path, leaf)}: {axes.why}"
        for (path, leaf), (axes, is_clear) in zip(places, verdicts, strict=True)
        if not is_clear
    ]
    if lines:
        warnings.warn(
            "infer_axes leaves these parameters alone, because it cannot read with certainty what the "
            "computation does with them:\n" + "\n".join(lines) + "\n"
            "To centralize one of them, replace its leaf in the tree by axes of your own, or, if it is "
            "multiplied by an array that the function closes over, pass the array as an argument.",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )
