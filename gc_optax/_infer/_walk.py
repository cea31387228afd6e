"""The two passes over a program: forwards for what each array is made of, backwards for how it is used."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._axes import Role
from ._origins import CONSTANT, Made, Origin, big, join, join_all
from ._program import Shape, bodies_of, closed_over, indices, is_kind, is_literal, loop_of, opened, shape_of
from ._rules import Step, Tape, absorbed, origin_of_result, uses_of_arguments
from ._uses import BATCH, FOLLOWED, IN, NO_USES, NONE, OUT, OUTPUT, PART, Piece, Use, Uses, put_together

LOOPS = ("scan", "while")
EACH_BY_ITSELF = (
    *("device_put", "mesh_cast", "optimization_barrier", "pcast", "pmax", "pmin", "ppermute", "psum"),
    *("psum_invariant", "pvary", "reshard", "stop_gradient"),
)
# JAX keeps the body of a function: two calls of it have the same variables, which stand for other arrays.
CALLS = itertools.count(1)
# What makes an array of nothing, or of a number.
MAKING_ARRAYS = ("broadcast_in_dim", "random_bits", "rng_bit_generator", "threefry2x32")


def read(jaxpr: Any, ins: Sequence[Origin], own: bool, alone: bool) -> Tape:
    """Goes through a jaxpr forwards.

    Args:
        jaxpr: the jaxpr, open or closed.
        ins: what is known of its inputs.
        own: whether it has a derivative of its own, `custom_vjp`: then it does not say where gradients go.
        alone: whether there are no data but those that the function makes itself: `x = jnp.ones((8, 4))`.
    """
    inside, steps, call = opened(jaxpr), [], next(CALLS)
    env = {var: _given(var, value, alone) for var, value in closed_over(jaxpr)}
    env.update(zip(inside.invars, ins, strict=True))

    def look(atom: Any) -> Origin:
        origin = _given(atom, atom.val, alone) if is_literal(atom) else env[atom]
        return origin if origin.source or is_literal(atom) else origin._replace(source=hash((call, id(atom))))

    for eqn in inside.eqns:
        origins, name = [look(atom) for atom in eqn.invars], eqn.primitive.name
        outs, bodies = _results(eqn, origins, own, alone)
        outs = [settled(origin, var, name, own, alone) for origin, var in zip(outs, eqn.outvars, strict=True)]
        env.update(zip(eqn.outvars, outs, strict=True))
        steps.append(Step(eqn, origins, outs, bodies))
    return Tape(inside, steps, [look(atom) for atom in inside.outvars])


def _given(atom: Any, value: Any, alone: bool) -> Origin:
    """Where what is closed over, or stands in an equation, comes from."""
    made = Made.CLOSED if alone else Made.FIXED
    is_array = shape_of(atom) and not is_kind(atom, jax.dtypes.prng_key)
    return Origin(made if is_array else Made.CONSTANT, big(shape_of(atom)), value=indices(value))


def _results(eqn: Any, ins: list[Origin], own: bool, alone: bool) -> tuple[list[Origin], list[Tape]]:
    name = eqn.primitive.name
    if name in LOOPS:
        return _loop(eqn, ins, own, alone)
    if bodies := bodies_of(eqn):
        own = own or name.startswith("custom_")
        tapes = [read(body, ins[name == "cond" :], own, alone) for body in bodies]
        outs = [join_all(each) for each in zip(*(tape.outs for tape in tapes), strict=True)]
        return outs, tapes
    if _is_each_by_itself(eqn):
        return ins, []
    return [origin_of_result(eqn, ins, var) for var in eqn.outvars], []


def _is_each_by_itself(eqn: Any) -> bool:
    """Whether every result is an argument, of the same shape, in the same place."""
    shapes = [[shape_of(atom) for atom in atoms] for atoms in (eqn.invars, eqn.outvars)]
    return eqn.primitive.name in EACH_BY_ITSELF and shapes[0] == shapes[1]


def settled(origin: Origin, var: Any, name: str, own: bool, alone: bool) -> Origin:
    """What is known of a variable, with what its kind of numbers and the primitive that made it say."""
    if is_kind(var, jax.dtypes.prng_key):
        return CONSTANT
    if alone and origin.made == Made.CONSTANT and name in MAKING_ARRAYS and shape_of(var):
        return origin._replace(made=Made.CLOSED, varies=big(shape_of(var)))
    is_index = not is_kind(var, jnp.inexact)
    if is_index:
        origin = origin._replace(met=False)
    is_stopped = name == "stop_gradient" or is_index
    if is_stopped and not own and origin.made == Made.DATA:
        # As if it were an argument: the ascent of `w + stop_gradient(step)`.
        return origin._replace(made=Made.RAW)
    return origin._replace(made=Made.FROZEN) if is_stopped and not own and origin.has_params else origin


def _loop(eqn: Any, ins: list[Origin], own: bool, alone: bool) -> tuple[list[Origin], list[Tape]]:
    """Reads the body of a loop again until what it carries along is the same before and after."""
    body, first, fixed, carried = loop_of(eqn)
    ins, end = ins[first:], fixed + carried
    carry = [origin._replace(value=None) for origin in ins[fixed:end]]
    ranks = (len(shape_of(var)) for var in eqn.invars[first + end :])
    each = [o.moved([[dim] for dim in range(1, rank)]) for o, rank in zip(ins[end:], ranks, strict=True)]
    while True:
        tape = read(body, [*ins[:fixed], *carry, *each], own, alone)
        joined = list(map(join, carry, tape.outs[:carried]))
        if joined == carry:
            break
        carry = joined
    for origin, var in zip(tape.outs[carried:], eqn.outvars[carried:], strict=True):
        stacked = origin.moved([[], *([dim] for dim in range(len(shape_of(var)) - 1))])
        joined.append(stacked._replace(varies=(stacked.varies | {0}) & big(shape_of(var)), source=0))
    return joined, [tape]


# Backwards.

MOST_ROUNDS = 16
LOOP = "a loop or a branch"
# What a rule says that forgot a dimension.
UNFIT = Use("unclear", "infer_axes: what became of it cannot be read")


def read_back(tape: Tape, outputs: Sequence[Uses], own: bool = False) -> list[Uses]:
    """Goes through a jaxpr backwards: how its inputs are used, if its outputs are used so."""
    env: dict[Any, set[Use]] = {}

    def add(atom: Any, origin: Origin, uses: Iterable[Use]) -> None:
        is_used = not is_literal(atom) and (own or is_kind(atom, jnp.inexact))
        if is_used and (origin.has_params or origin.made == Made.DATA):
            fitting = (use if _fits(use, shape_of(atom)) else UNFIT for use in uses)
            found = map(_of_data, fitting) if origin.made == Made.DATA else fitting
            env.setdefault(atom, set()).update(found)

    def look(atom: Any, axis: int | None = None) -> Uses:
        uses = env.get(atom, NO_USES)
        of_row = {use for use in uses if [dim for dim, _, _ in use.window] == [axis]}
        return put_together(uses - of_row, shape_of(atom)) | of_row

    for end in zip(tape.jaxpr.outvars, tape.outs, outputs, strict=True):
        add(*end)
    for step in reversed(tape.steps):
        # Of what stands in a row, a part may be used in a way of its own.
        axis = step.eqn.params.get({"concatenate": "dimension", "stack": "axis"}.get(step.name))
        uses = [look(var, axis) for var in step.eqn.outvars]
        if any(uses):
            for start in zip(step.eqn.invars, step.ins, _before(step, uses, own), strict=True):
                add(*start)
    return [look(var) for var in tape.jaxpr.invars]


def _fits(use: Use, shape: Shape) -> bool:
    return len(use.dims) == len(shape) or not use.has_dims


def _of_data(use: Use) -> Use:
    """The use of data: an output, whatever is done with it. What only scales a whole kernel is a weak one."""
    if use.how in ("output", "followed"):
        return use
    own = NONE.union(*(use.labels(dim) for dim in range(len(use.dims))))
    is_scale_of_kernel = use.how == "kernel" and use.spread >= IN | OUT and not own & (IN | OUT)
    return OUTPUT._replace(weak=use.weak or is_scale_of_kernel)


def _before(step: Step, uses: list[Uses], own: bool) -> list[Iterable[Use]]:
    """How the arguments of an equation are used. Weak uses of its results make weak uses of its arguments."""
    if weak := NO_USES.union(*uses).difference(*([use for use in of_one if not use.weak] for of_one in uses)):
        certain = _before(step, [of_one - weak for of_one in uses], own)
        parts = [frozenset(use._replace(weak=False) for use in of_one & weak) for of_one in uses]
        of_parts = [part | (of_one & {FOLLOWED}) for part, of_one in zip(parts, uses, strict=True)]
        both = zip(certain, _before(step, of_parts, own), strict=True)
        return [{*strong, *map(_weakened, others)} for strong, others in both]
    if not any(of_one - {FOLLOWED} for of_one in uses) or (step.name == "stop_gradient" and not own):
        return [NO_USES] * len(step.ins)
    if step.name in LOOPS:
        return _loop_back(step, uses, own)
    if step.bodies:
        return _bodies_back(step, uses, own or step.name.startswith("custom_"))
    if _is_each_by_itself(step.eqn):
        return list(uses)
    return _with_roles(step, uses)


def _weakened(use: Use) -> Use:
    return use if use == FOLLOWED else use._replace(weak=True)


def _with_roles(step: Step, uses: list[Uses]) -> list[Iterable[Use]]:
    """The uses of the arguments of an equation, with the roles of the weights that meet the data in it.

    In `tanh(x @ v) @ w` the data meet nothing after `w`: its role is `output`, and `tanh(x @ v)` is followed
    by a weight. So when the reading comes to `x @ v`, that is followed, and `x` has met no weight before.
    """
    is_followed = any(FOLLOWED in of_one for of_one in uses)
    found = [set(mine) for mine in uses_of_arguments(step, [of_one - {FOLLOWED} for of_one in uses])]
    met = [any(use.changes_data for use in mine) for mine in found]
    for number, mine in enumerate(found):
        if new := {use for use in mine if not use.role and (use.changes_data or use.how == "term")}:
            is_first = not any(origin.met for origin in step.ins[:number] + step.ins[number + 1 :])
            role: Role = "output" if not is_followed else "input" if is_first else "hidden"
            found[number] = {*(mine - new), *(use._replace(role=role) for use in new)}
        if mine and (is_followed or any(met[:number] + met[number + 1 :])):
            found[number].add(FOLLOWED)
    return list(found)


def _bodies_back(step: Step, uses: list[Uses], own: bool) -> list[Iterable[Use]]:
    """The uses of what goes into a function or into branches. Inside `shard_map` arrays are smaller."""
    found: list[set[Use]] = [set() for _ in step.ins]
    for tape in step.bodies:
        after = list(map(_entered, uses, tape.outs, step.outs)) if len(step.bodies) > 1 else uses
        inside = [_resized(of_one, var) for of_one, var in zip(after, tape.jaxpr.outvars, strict=True)]
        for number, of_one in enumerate(read_back(tape, inside, own), start=step.name == "cond"):
            found[number] |= _resized(of_one, step.eqn.invars[number])
    return list(found)


def _resized(uses: Uses, atom: Any) -> Uses:
    return frozenset(use.resized(shape_of(atom)) for use in uses)


def _entered(uses: Uses, origin: Origin, slot: Origin) -> Uses:
    """How an array is used that takes the place of another: the state that a loop begins with."""
    why = f"{LOOP}: it takes the place of the data: a starting value, say"
    return frozenset(absorbed(use.alone(), origin, slot, why) for use in uses)


def _loop_back(step: Step, uses: list[Uses], own: bool) -> list[Iterable[Use]]:
    _, first, fixed, carried = loop_of(step.eqn)
    tape, slots, carry, end = step.bodies[0], step.outs[:carried], list(uses[:carried]), fixed + carried
    each = [frozenset(_of_one_round(use, id(step)) for use in of_one) for of_one in uses[carried:]]
    rounds = 0
    while rounds < MOST_ROUNDS:
        ins = read_back(tape, [*map(_entered, carry, tape.outs[:carried], slots), *each], own)
        joined = [a | b for a, b in zip(carry, ins[fixed:end], strict=True)]
        if joined == carry:
            break
        rounds += list(map(_without_roles, joined)) != list(map(_without_roles, carry))
        carry = joined
    else:
        lost = Use("unclear", f"{step.name}: a loop reshapes it from round to round")
        carry = [frozenset({lost}) if of_one else NO_USES for of_one in carry]
    starts = map(_entered, carry, step.ins[first + fixed :], slots)
    looped = zip(ins[end:], step.eqn.invars[first + end :], strict=True)
    rows = (
        frozenset(_of_all_rounds(use, id(step), shape_of(var)) for use in of_one) for of_one, var in looped
    )
    return [*[NO_USES] * first, *ins[:fixed], *starts, *rows]


def _without_roles(uses: Uses) -> Uses:
    """In a line of delays a role takes a round for each. The rounds are bounded for what may never end."""
    return frozenset(use._replace(role="") for use in uses) - {FOLLOWED}


def _of_one_round(use: Use, loop: int) -> Use:
    """The use of what a loop stacks up, for what comes from one round: a piece of a row."""
    hidden = use.hidden | {(loop, use.labels(0))} if use.dims and use.how != "output" else use.hidden
    return use._replace(dims=use.dims[1:], hidden=hidden)


def _of_all_rounds(use: Use, loop: int, shape: Shape) -> Use:
    """The use of an array that a loop goes through, which puts the pieces together again in their order."""
    if use.how not in ("kernel", "unclear"):
        return use._replace(how="other" if use.how == "term" else use.how, dims=())
    if not use.has_dims:
        return use
    own = NONE.union(*(labels for row, labels in use.hidden if row == loop))
    left = frozenset((row, labels) for row, labels in use.hidden if row != loop)
    is_piece = not own and any(labels >= IN for _, labels in left)
    first = (Piece(shape[0], IN | PART if is_piece else own or BATCH),)
    return use._replace(dims=(first, *use.dims), hidden=left)
