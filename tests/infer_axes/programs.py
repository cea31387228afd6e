"""Programs put together at random whose true fan-ins are known, and what `infer_axes` says of them.

    python tests/infer_axes/programs.py --programs 20000 --seeds 1 2 3
    python tests/infer_axes/programs.py --case 1:77

A program is a start, one to three layers, a loss, a wrapper and a source of its data. Each kernel is stored
in a random way and goes through up to four preparations before it is used. The parts are in program_layers.py
and program_kernels.py, and below; a new one is a function there, registered by `@part`.

What counts as the truth, where it could be argued about:

- What one operation sums together with the data is fan-in. In `sum(x[:, k] @ w[k] for k in range(3))` the
  axis of `k` is a batch axis, as in an ensemble. In `sum(roll(x, k) * w[k] for k in range(3))` it is the only
  fan-in.
- In `x @ (w @ matrix)` and in `x @ (matrix @ w)`, with a constant matrix, axis 0 of `w` is fan-in: the data
  meet it, through the matrix or not.
- A parameter that holds a part of a kernel's inputs, as in `x @ concatenate([w, u])`, has its own part of
  every weight vector for its fan-in.
- A fan-in of fewer than two weights is none, and axes of size 1 are neither right nor wrong.
- No axes are right where a weight vector is a part of an axis, or an axis holds inputs and outputs.
"""

import argparse
import collections
import dataclasses
import os
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import program_kernels  # noqa: F401 (it registers its parts)
import program_layers  # noqa: F401
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from program_parts import LAYERS, LOSSES, SOURCES, STARTS, WRAPPERS, Builder, Parameter, part
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from gc_optax import infer_axes

VERDICTS = ("right", "wrong", "warned", "silent")

# Losses.


@part(LOSSES, "none", entrywise=True)
def outputs(b: Builder, tokens: int, channels: int) -> Any:
    return lambda v, y: y


@part(LOSSES, "mean")
def mean(b: Builder, tokens: int, channels: int) -> Any:
    return lambda v, y: y.mean()


@part(LOSSES, "largest output")
def largest(b: Builder, tokens: int, channels: int) -> Any:
    return lambda v, y: y.max()


@part(LOSSES, "squared error")
def squared_error(b: Builder, tokens: int, channels: int) -> Any:
    target = b.batch_of(tokens, channels)
    return lambda v, y: jnp.mean((y - v[target]) ** 2)


@part(LOSSES, "cross-entropy")
def cross_entropy(b: Builder, tokens: int, channels: int) -> Any:
    labels = b.batch_of(tokens, dtype=jnp.int32)
    if b.chance(0.5):
        return lambda v, y: -jnp.sum(jax.nn.one_hot(v[labels], channels) * jax.nn.log_softmax(y), -1).mean()

    def loss(v, y):
        picked = jnp.take_along_axis(y, v[labels][..., None], -1)[..., 0]
        return (jax.nn.logsumexp(y, axis=-1) - picked).mean()

    return loss


@part(LOSSES, "weight decay")
def weight_decay(b: Builder, tokens: int, channels: int) -> Any:
    names = list(b.params)
    return lambda v, y: y.mean() + 0.1 * sum(jnp.sum(v[name] ** 2) for name in names)


@part(LOSSES, "with other outputs")
def with_other_outputs(b: Builder, tokens: int, channels: int) -> Any:
    names = list(b.params)
    return lambda v, y: (y.sum(), {"norms": [jnp.linalg.norm(v[name]) for name in names], "outputs": y})


# Wrappers of the model, a function of all arrays but the data, and of the data.


@part(WRAPPERS, "none", entrywise=True)
def no_wrapper(b: Builder, model: Any) -> Any:
    return model


@part(WRAPPERS, "jit")
def jitted(b: Builder, model: Any) -> Any:
    return jax.jit(model)


@part(WRAPPERS, "remat")
def rematerialized(b: Builder, model: Any) -> Any:
    return jax.checkpoint(model)


def for_one(model: Any) -> Any:
    """The model of one example: of arrays without a batch axis."""

    def apply(v, example):
        return model(v, jax.tree.map(lambda array: array[None], example))[0]

    return apply


@part(WRAPPERS, "vmap over the examples")
def over_examples(b: Builder, model: Any) -> Any:
    if not b.can_be_vmapped:
        return model
    return jax.vmap(for_one(model), (None, 0))


@part(WRAPPERS, "lax.map over the examples")
def mapped(b: Builder, model: Any) -> Any:
    return lambda v, data: lax.map(lambda example: for_one(model)(v, example), data)


@part(WRAPPERS, "custom_vjp")
def with_own_gradient(b: Builder, model: Any) -> Any:
    if b.has_frozen:
        return model
    wrapped = jax.custom_vjp(lambda v, data: model(v, data))
    wrapped.defvjp(lambda v, data: (model(v, data), (v, data)), lambda res, g: jax.vjp(model, *res)[1](g))
    return wrapped


@part(WRAPPERS, "cond")
def conditional(b: Builder, model: Any) -> Any:
    flag = b.flag()

    def apply(v, data):
        return lax.cond(v[flag], lambda: model(v, data), lambda: 0 * model(v, data))

    return apply


@part(WRAPPERS, "shard_map")
def sharded(b: Builder, model: Any) -> Any:
    if b.batch != 4:
        return model
    mesh = AbstractMesh((2,), ("devices",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        model, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P("devices"), check_vma=False
    )


@part(WRAPPERS, "parameters in one vector")
def raveled(b: Builder, model: Any) -> Any:
    names = list(b.params)

    def apply(v, data):
        vector, restored = ravel_pytree({name: v[name] for name in names})
        return model({**v, **restored(vector)}, data)

    return apply


# Where the data come from.


def filled(data: Any, value: Any) -> Any:
    """The data with an array in the place of each shape."""
    return jax.tree.map(value, data)


@part(SOURCES, "arguments", entrywise=True)
def arguments(data: Any) -> Any:
    return None


@part(SOURCES, "closed over")
def closed_over(data: Any) -> Any:
    held = filled(data, lambda s: np.ones(s.shape, s.dtype))
    return lambda: held


@part(SOURCES, "made inside")
def made_inside(data: Any) -> Any:
    return lambda: filled(data, lambda s: jnp.ones(s.shape, s.dtype))


@part(SOURCES, "random inside")
def random_inside(data: Any) -> Any:
    return lambda: filled(data, lambda s: jax.random.uniform(jax.random.key(0), s.shape).astype(s.dtype))


@dataclasses.dataclass
class Program:
    """A function of parameters and arguments, and the truth."""

    fn: Any
    params: dict[str, Parameter]
    args: tuple[Any, ...]
    parts: list[str]

    def shapes(self) -> dict[str, Any]:
        return {name: jax.ShapeDtypeStruct(p.shape, jnp.float32) for name, p in self.params.items()}


def build(case: str, entrywise: bool = False) -> Program:
    """The program of a case, "SEED:NUMBER".

    An entrywise one is of one layer, of parts whose fan-in the gradient of one output shows.
    """
    b = Builder(case, entrywise)
    start, steps, tokens, channels = draw_layers(b)
    loss_name, loss = b.draw(LOSSES, "loss")
    loss = loss(b, tokens, channels)
    wrapper_name, wrapper = b.draw(WRAPPERS, "wrapper")

    def model(v: Any, data: Any) -> Any:
        v = {**v, **data}
        h = start(v)
        for step in steps:
            h = step(v, h)
        return h

    model = wrapper(b, model)

    def fn(params: Any, side: Any, data: Any) -> Any:
        v = {**params, **side}
        return loss({**v, **data}, model(v, data))

    name, source = b.draw(SOURCES, "data")
    if b.needs_arguments or b.side:
        name, source = "data: arguments", SOURCES["arguments"]
    parts = [loss_name, wrapper_name, name]
    make = source(b.data)
    if make is None:
        return Program(fn, b.params, (b.side, b.data), parts)
    return Program(lambda params: fn(params, {}, make()), b.params, (), parts)


def residual(apply: Any) -> Any:
    return lambda v, h: h + apply(v, h)


def draw_layers(b: Builder) -> Any:
    """The start, the functions that follow it, and how many tokens and channels they leave."""
    name, drawn = b.draw(STARTS, "start")
    b.trail.append(name)
    start, tokens, channels = drawn(b)
    b.trail.clear()
    steps: list[Any] = []
    count = 1 if b.entrywise else b.random.choice([1, 2, 2, 3])
    while len(steps) < count or not b.params:
        name, layer = b.draw(LAYERS, "layer")
        b.trail.append(name)
        before = dict(b.params)
        drawn = layer(b, tokens, channels)
        b.trail.clear()
        if drawn is None:
            b.params = before
            continue
        steps.append(drawn[0])
        if drawn[1:] == (tokens, channels) and not b.entrywise and b.chance(0.2):
            steps[-1] = residual(drawn[0])
        _, tokens, channels = drawn
        if not b.entrywise and b.chance(0.4):
            steps.append(lambda v, h: jnp.tanh(h))
    return start, steps, tokens, channels


# The answers.


@dataclasses.dataclass
class Answer:
    """What was said of a parameter, and what that is worth: "right", "wrong", "warned" or "silent"."""

    parameter: Parameter
    fan_in: tuple[int, ...]
    verdict: str
    why: str


def told_apart(shape: tuple[int, ...], axes: tuple[int, ...]) -> set[int]:
    """The axes without those of size 1, about which there is nothing to say."""
    return {axis for axis in axes if shape[axis] > 1}


def read(program: Program, infer: Any = infer_axes) -> tuple[dict[str, Answer], str]:
    """What `infer` says of every parameter, and its warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        axes = infer(program.fn, program.shapes(), *program.args)
    warning = "\n".join(str(c.message) for c in caught)
    answers = {}
    for name, parameter in program.params.items():
        answer, truth = (
            told_apart(parameter.shape, fan_in) for fan_in in (axes[name].fan_in, parameter.fan_in)
        )
        if answer == truth:
            verdict = "right"
        elif answer:
            verdict = "wrong"
        else:
            verdict = "warned" if f"['{name}']" in warning else "silent"
        answers[name] = Answer(parameter, axes[name].fan_in, verdict, axes[name].why)
    return answers, warning


# The command.


def show(case: str) -> int:
    """Prints one program: its jaxpr, the truth and the answers."""
    program = build(case)
    console = Console()
    console.print(str(jax.make_jaxpr(program.fn)(program.shapes(), *program.args)), markup=False)
    console.print("; ".join(program.parts), markup=False)
    answers, warning = read(program)
    table = Table("parameter", "shape", "truth", "answer", "verdict", "why", "parts")
    for name, answer in answers.items():
        p = answer.parameter
        truth = str(p.fan_in) if p.has_axes else "no axes"
        row = (name, p.shape, truth, answer.fan_in, answer.verdict, answer.why, "; ".join(p.parts))
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)
    console.print(warning, markup=False)
    return int(any(answer.verdict == "wrong" for answer in answers.values()))


Counts = dict[str, collections.Counter[str]]


def counted(title: str, counts: Counts) -> Table:
    """A table of verdicts, those with the most wrong ones first."""
    table = Table(title, *VERDICTS)
    for name, verdicts in sorted(counts.items(), key=lambda row: (-row[1]["wrong"], -row[1]["silent"])):
        table.add_row(escape(name), *(f"{verdicts[verdict]:,}" for verdict in VERDICTS))
    return table


def survey(seeds: list[int], count: int, shown: int) -> int:
    """Prints how many parameters are right, wrong, warned and silent, and in which parts of programs."""
    console = Console()
    by_seed: Counts = collections.defaultdict(collections.Counter)
    by_part: Counts = collections.defaultdict(collections.Counter)
    wrong, failed = [], []
    cases = [(seed, f"{seed}:{number}") for seed in seeds for number in range(count)]
    for seed, case in track(cases, "Programs", console=console, disable=not console.is_terminal):
        program = build(case)
        try:
            answers, _ = read(program)
        except Exception as error:
            failed.append(f"{case} {type(error).__name__}: {str(error)[:200]}; {program.parts}")
            continue
        for name, answer in answers.items():
            by_seed[f"seed {seed}"][answer.verdict] += 1
            for name_of_part in {*answer.parameter.parts, *program.parts}:
                by_part[name_of_part][answer.verdict] += 1
            if answer.verdict == "wrong":
                wrong.append(f"--case {case}, {name}: {answer}")
    console.print(counted("parameters", by_seed))
    console.print(counted("parts", {part: n for part, n in by_part.items() if n["wrong"] or n["silent"]}))
    for line in [*wrong[:shown], *failed[:shown]]:
        console.print(line, markup=False)
    console.print(f"{len(wrong):,} parameters wrong, {len(failed):,} programs that could not be read")
    return int(bool(wrong or failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=1000, help="how many of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--show", type=int, default=10, metavar="N", help="print the first N wrong answers")
    parser.add_argument("--case", metavar="SEED:NUMBER", help="print one program, the truth and the answers")
    options = parser.parse_args()
    return show(options.case) if options.case else survey(options.seeds, options.programs, options.show)


if __name__ == "__main__":
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    sys.exit(main())
