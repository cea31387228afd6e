"""What a primitive does to the origins of its arguments and to the uses of its results, one rule for each.

A primitive is added by the functions that `forwards` and `backwards` decorate or, if it only moves entries,
by the one that `moves` does. Without any, what becomes of its arguments is unclear, and a warning says so. So
it is where a rule gives a use of another rank than the argument has.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .._axes import Role
from ._origins import Made, Origin, Sources, computed
from ._program import Shape, folded, shape_of
from ._uses import NO_USES, Use, Uses


class Step(NamedTuple):
    """An equation, what is known of its arguments and results, and its bodies as they were read.

    It has the name of its primitive, and the shapes of its first argument (`old`) and result (`new`).
    """

    eqn: Any
    ins: list[Origin]
    outs: list[Origin]
    bodies: list["Tape"]

    @property
    def name(self) -> str:
        return str(self.eqn.primitive.name)

    @property
    def old(self) -> Shape:
        return shape_of(self.eqn.invars[0])

    @property
    def new(self) -> Shape:
        return shape_of(self.eqn.outvars[0])


class Tape(NamedTuple):
    """A jaxpr that was read forwards: its equations, and what is known of its results."""

    jaxpr: Any
    steps: list[Step]
    outs: list[Origin]


# From the equation, the origins of its arguments, and one of its results: the origin of that.
Forward = Callable[[Any, list[Origin], Any], Origin]
# From the equation and the uses of its results: the uses of each argument.
Backward = Callable[[Step, list[Uses]], list[Iterable[Use]]]
FORWARDS: dict[str, Forward] = {}
BACKWARDS: dict[str, Backward] = {}


def forwards(*names: str) -> Callable[[Forward], Forward]:
    """The function says where a result of these primitives comes from."""

    def register(rule: Forward) -> Forward:
        FORWARDS.update(dict.fromkeys(names, rule))
        return rule

    return register


def backwards(*names: str) -> Callable[[Backward], Backward]:
    """The function says how each argument of these primitives is used, if its results are used so."""

    def register(rule: Backward) -> Backward:
        BACKWARDS.update(dict.fromkeys(names, rule))
        return rule

    return register


def moves(*names: str) -> Callable[[Callable[[Any, Shape, Shape], Sources]], None]:
    """The function says which old dimensions each new one comes from, and these primitives do no more."""

    def register(sources_of: Callable[[Any, Shape, Shape], Sources]) -> None:
        @forwards(*names)
        def forward(eqn: Any, ins: list[Origin], var: Any) -> Origin:
            return ins[0].moved(sources_of(eqn, shape_of(eqn.invars[0]), shape_of(var)))

        @backwards(*names)
        def backward(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
            sources = sources_of(step.eqn, step.old, step.new)
            return [{use.moved_back(sources, step.old) for use in uses[0]}]

    return register


def origin_of_result(eqn: Any, ins: list[Origin], var: Any) -> Origin:
    """Where a result of an equation comes from."""
    rule = FORWARDS.get(eqn.primitive.name)
    origin = rule(eqn, ins, var) if rule else computed(ins, var)
    met = origin.met or any(of_one.met for of_one in ins)
    return origin._replace(value=folded(eqn, [of_one.value for of_one in ins]), met=met)


def uses_of_arguments(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    """How the arguments of an equation are used."""
    rule = BACKWARDS.get(step.name)
    if rule:
        return rule(step, uses)
    return [unclear(step, NO_USES.union(*uses), number) for number in range(len(step.ins))]


def unclear(step: Step, uses: Uses, number: int) -> Uses:
    """How an argument is used, if nothing is known of what an equation does with it."""
    origin = step.ins[number]
    if origin.made < Made.PARAMS or not uses:
        return NO_USES
    if origin.made == Made.PARAMS and any(out.made > Made.PARAMS for out in step.outs):
        why = f"{step.name}: an operation on it together with the data that infer_axes cannot read"
        return frozenset({Use("unclear", why)})
    lost = Use("unclear", f"{step.name}: what became of it cannot be read")
    # An activation, a statistic or a bias is one, whatever it is computed from; a scale may be half a kernel.
    kept = [use.how in ("output", "statistic") or (use.how == "other" and use.op != "mul") for use in uses]
    return frozenset(
        Use(use.how, use.why, role=use.role) if is_kept else lost
        for use, is_kept in zip(uses, kept, strict=True)
    )


def absorbed(use: Use, origin: Origin, result: Origin, why: str, role: Role = "") -> Use:
    """Says of parameters that become a part of activations that they are no kernel."""
    is_part = origin.made == Made.PARAMS and result.made > Made.PARAMS
    return Use("other", why, role=role) if is_part and use.how == "output" else use
