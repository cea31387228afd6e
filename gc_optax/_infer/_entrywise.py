"""Rules of what is computed entry by entry: sums, products, and functions of one entry."""

from collections.abc import Iterable
from typing import Any

from ._origins import Dims, Made, Origin, big, either, union
from ._program import Shape, shape_of
from ._rules import Step, backwards, forwards
from ._uses import BATCH, IN, LOSS, NONE, OUT, REDUCED, SUM, TOTAL, Labels, Use, Uses, labeled

UNCHANGED = ("convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint")
SCALING = ("mul", "div", "neg", "select_n", "and", *UNCHANGED)
SUMS = ("add", "add_any", "sub")
LINEAR = (*SUMS, *SCALING)
OTHERS = """
    abs acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp
    clz complex conj cos cosh digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
    imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min ne nextafter not or
    polygamma population_count pow real regularized_incomplete_beta rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square tan tanh xor zeta
"""
ENTRY_BY_ENTRY = (*LINEAR, *OTHERS.split())
WHY = "a bias, a scale or a gate"


@forwards("iota")
def _iota(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    return Origin(Made.CONSTANT, frozenset({eqn.params["dimension"]}))


@forwards(*ENTRY_BY_ENTRY)
def _entry_by_entry(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    name, kernels = eqn.primitive.name, [origin for origin in ins if origin.has_params]
    owned, whole = union(o.varies - o.along for o in kernels), union(o.varies for o in kernels)
    data = [
        o for o in ins if (o.is_array or o.made == Made.DATA) and not _is_constant(name, o, (owned, whole))
    ]
    made, mixed = max(origin.made for origin in kernels or ins), max((k.mixed for k in kernels), default=0)
    if kernels and data:
        made = either(ins) if _may_be_kernel(name, ins, data, owned, shape_of(var)) else Made.DATA
        mixed = 2 if name in SUMS else mixed
    scaled = [o.varies for o in data if o.made == Made.DATA or not o.varies <= owned]
    sources = [origin.source for origin in ins]
    return Origin(
        made,
        varies=union(origin.varies for origin in ins),
        mixed=mixed,
        hot=frozenset(dim for dim in range(len(shape_of(var))) if _is_hot(name, ins, dim)),
        along=union([*scaled, *(kernel.along for kernel in kernels)]),
        source=hash((name, str(eqn.params), *sources)) if all(sources) else 0,
    )


def _is_constant(name: str, origin: Origin, extents: tuple[Dims, ...]) -> bool:
    """Whether data beside a kernel are a number or a mask that the function closes over."""
    is_fixed, is_of_same_extent = origin.made == Made.FIXED, origin.varies in extents
    is_mask = name in ("mul", "select_n") and is_of_same_extent and (is_fixed or len(origin.varies) > 1)
    is_noise = name in SUMS and is_of_same_extent and is_fixed
    return (is_fixed or origin.made == Made.CLOSED) and (is_mask or is_noise or not origin.varies)


def _may_be_kernel(name: str, ins: list[Origin], data: list[Origin], owned: Dims, shape: Shape) -> bool:
    """Whether parameters that are scaled, masked or corrected by data may be a kernel still."""
    if name == "select_n" and all(origin.made < Made.FIXED or origin.has_params for origin in ins[1:]):
        return True
    scales = name == "mul" or (name == "div" and ins[0].has_params)
    is_linear = name in (*LINEAR, "max", "min", "clamp")
    is_of_same_extent = owned == big(shape) and len(shape) > 1 and is_linear
    return all((scales and owned - o.varies) or (is_of_same_extent and o.is_array) for o in data)


def _is_hot(name: str, ins: list[Origin], dim: int) -> bool:
    if name == "eq":
        return any(a.is_distinct(dim) and dim not in b.varies for a, b in (ins, ins[::-1]))
    is_kept = all(dim in origin.hot or dim not in origin.varies for origin in ins)
    return name in SCALING and is_kept and any(dim in origin.hot for origin in ins)


@backwards(*ENTRY_BY_ENTRY)
def _entry_by_entry_back(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    of_result = _terms_of_sum(step, uses[0]) if step.name in SUMS else uses[0]
    if step.name in ("select_n", "max", "min", "clamp") and sum(origin.has_params for origin in step.ins) > 1:
        of_result = frozenset(use.alone() for use in of_result)
    found: list[Iterable[Use]] = []
    for number, (origin, var) in enumerate(zip(step.ins, step.eqn.invars, strict=True)):
        others, old = [other for n, other in enumerate(step.ins) if n != number], shape_of(var)
        along = union(other.varies for other in others) - origin.varies
        sources = [[dim] if old and old[dim] == size else [] for dim, size in enumerate(step.new)]
        mine = set()
        for use in of_result if origin.made >= Made.PARAMS else ():
            use = _of_one_operand(step, use, origin, others)
            if use.dims and along:
                use = use._replace(spread=use.spread.union(*(use.labels(dim) for dim in along)))
                use = _without_labels(use, along)
            mine.add(use if old == step.new else use.moved_back(sources, old))
        found.append(mine)
    return found


def _without_labels(use: Use, dims: Dims) -> Use:
    return use.relabeled(lambda dim, labels: NONE if dim in dims else labels)


def _terms_of_sum(step: Step, uses: Uses) -> Uses:
    """The uses of a sum of data, with the sum that it is a part of as their row: `x0 * w[0] + x1 * w[1]`."""
    outputs = [use for use in uses if use.how == "output"]
    if sum(bool(origin.varies) for origin in step.ins) < 2 or not outputs:
        return uses
    rows = {use.hidden for use in outputs}
    row = rows.pop() if len(rows) == 1 and outputs[0].hidden else frozenset({(id(step), NONE)})
    return uses.difference(outputs).union(use._replace(hidden=row) for use in outputs)


def _of_one_operand(step: Step, use: Use, origin: Origin, others: list[Origin]) -> Use:
    name, whole = step.name, big(step.new)
    if use.how == "output":
        return _of_activation(step, use, origin, others)
    if use.how != "kernel" or name not in SUMS or not whole:
        return use
    # One term of a kernel: a kernel too (`w + a @ b`), or a bias (`a @ b + c`).
    is_spread = not origin.varies >= whole and not any(use.labels(dim) >= OUT for dim in origin.varies)
    if is_spread and any(other.mixed for other in others):
        return Use("other", f"{name}: {WHY}")
    beside = [other for other in others if other.varies >= whole]
    if any(o.made in (Made.FROZEN, Made.PARAMS) or (o.is_either and o.mixed < 2) for o in beside):
        return use._replace(base="sure")
    is_doubtful = any(other.is_array or other.is_either for other in beside)
    return use._replace(base=use.base or "maybe") if is_doubtful else use


def _of_activation(step: Step, use: Use, origin: Origin, others: list[Origin]) -> Use:
    """The use of one operand, if the result is returned, or an activation."""
    name, result, other = step.name, step.outs[0], Use("other", f"{step.name}: {WHY}")
    # In `h * w` with `h = closed_over @ v` the other side may be a kernel, but more likely is an activation.
    is_data = all(not o.has_params or o.mixed == 2 != origin.mixed for o in others)
    if (
        name == "mul"
        and origin.has_params
        and is_data
        and (kernel := _spelled_out(step, use, origin, others))
    ):
        return kernel
    if origin.made == Made.PARAMS and result.made > Made.PARAMS:
        of_dims = [use.labels(dim) for dim in big(step.new) if use.dims]
        is_penalty = bool(of_dims) and all(labels >= TOTAL for labels in of_dims)  # `(w - start) ** 2`
        is_norm = any(labels >= REDUCED for labels in of_dims)  # `rsqrt(((w * style) ** 2).sum())`, a scale
        if result.is_either and (is_penalty or is_norm) and not any(o.has_params for o in others):
            return Use("statistic")
        return _term(step, use, origin, others, other)
    if origin.is_either and origin.mixed == 2 and any(_may_be_scaled(origin, o) for o in others):
        return other
    if name not in LINEAR:
        lost = {SUM: REDUCED}
        return use.relabeled(lambda d, of_one: lost.get(of_one, of_one - SUM))._replace(hidden=frozenset())
    if origin.is_either and result.made == Made.DATA:  # no penalty on parameters, but a part of activations
        loss = {TOTAL: LOSS}
        use = use.relabeled(lambda d, of_one: of_one - TOTAL - REDUCED | loss.get(of_one & TOTAL, NONE))
    # Only a sum right after a product makes a contraction of it, not that of `x * scale * weight`.
    scaled = union(o.varies for o in others if o.made > Made.FROZEN and name not in SUMS)
    return use.relabeled(lambda dim, labels: labels - SUM if dim in scaled else labels)


def _may_be_scaled(origin: Origin, other: Origin) -> bool:
    """Whether `other` may be data that parameters scale, as `x` in `x * (w @ rotation)[0]`."""
    is_argument = other.made == Made.RAW and not other.varies < origin.varies
    return other.made == Made.DATA or is_argument or (other.is_either and other.made != origin.made)


def _spelled_out(step: Step, use: Use, origin: Origin, others: list[Origin]) -> Use | None:
    """A product entry by entry and a sum over some dimensions, a contraction: `(x[:, :, None] * w).sum(1)`.

    Where all is summed, and the parameter has no dimension of its own, it is a scale, and the sum a loss.
    """
    data = union(other.varies - other.hot for other in others)
    along = {dim for dim in range(len(use.dims)) if use.labels(dim) >= SUM} & origin.varies & data
    is_loss = not origin.varies - data and any(use.labels(dim) & (TOTAL | LOSS) for dim in along)
    if not along or is_loss:
        return None
    labels = _beside_data(step, origin, union(other.varies for other in others))
    own = origin.varies - data  # what is summed of these is a sum of the parameter alone
    summed = use.relabeled(
        lambda d, of_one: (
            IN if d in along and of_one >= SUM else REDUCED if d in own and of_one >= SUM else labels[d]
        )
    )
    return Use("kernel", "reduce_sum", summed.dims)


def _term(step: Step, use: Use, origin: Origin, others: list[Origin], other: Use) -> Use:
    """One of several products that are added up, `x0 * w[0] + x1 * w[1]`, or else certainly no kernel.

    If all the `x` are parts of one array, and all the `w`, it is a contraction: a convolution, tap by tap.
    """
    if step.name != "mul" or not use.hidden or len(others) != 1 or not others[0].source:
        return other
    ((row, _),) = use.hidden
    dims = labeled(step.new, _beside_data(step, origin, others[0].varies))
    return other._replace(how="term", dims=dims, hidden=frozenset({((row, others[0].source), IN)}))


def _beside_data(step: Step, origin: Origin, data: Dims) -> list[Labels]:
    """The labels of parameters that are multiplied with data entry by entry, without a sum."""
    own = range(len(step.new))
    return [NONE if dim not in origin.varies else BATCH if dim in data else OUT for dim in own]
