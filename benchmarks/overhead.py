"""What gradient centralization, or adaptive gradient clipping, adds to the update step of an optimizer.

The step (the optimizer and `optax.apply_updates`, compiled, parameters and state donated) runs on the real
parameter trees of five models and on eight single tensors, in four ways: without centralization, with
`gc_optax.centralize`, with `optax.centralize`, and with `g - g.mean(axes)` over the right axes. They take
turns in one process; what is printed are medians over the rounds of the ratio to the plain step within the
round, with their quartiles. The plain step takes part twice, and "plain again" shows how far noise goes.

The floor is what counting bytes gives: every gradient, state and parameter is read once and every state and
parameter written once, and centralization reads once more the gradients that it centralizes.

With `--transformation adaptive_grad_clip` the ways are without clipping, with `gc_optax.adaptive_grad_clip`,
and with `optax.adaptive_grad_clip`. Clipping reads once more every gradient and every parameter.

`--peers` adds PyTorch (the rule in the authors' code before `torch.optim.AdamW`, foreach and fused) and Keras
(all axes but the last, before `keras.optimizers.AdamW`), each as a ratio to its own plain step.

    python benchmarks/overhead.py [--transformation NAME] [--optimizers NAME ...] [--cases NAME ...]
                                  [--rounds N] [--dtype NAME] [--peers NAME ...] [--json PATH] [--plot PATH]
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import (
    MEGABYTE,
    Spread,
    copy_bandwidth,
    machine,
    positive,
    spread,
    take_turns,
    wide_console,
    writable,
)
from models import LSTM, Decoder, ResNet, VisionTransformer, shapes
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gc_optax
from gc_optax import WeightAxes

TOKENS = jax.ShapeDtypeStruct((1, 64), jnp.int32)
IMAGES = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
MODELS: dict[str, tuple[nn.Module, jax.ShapeDtypeStruct]] = {
    "ResNet-50": (ResNet((3, 4, 6, 3), bottleneck=True), IMAGES),
    "ViT-B/16": (VisionTransformer(layers=12, embed=768, heads=12, patch=16, classes=1000), IMAGES),
    "GPT-2 124M": (Decoder(layers=12, embed=768, heads=12, vocabulary=50_257), TOKENS),
    "GPT-2 124M, scanned": (Decoder(12, 768, 12, 50_257, scanned=True), TOKENS),
    "LSTM, 2 x 1500": (LSTM(layers=2, hidden=1500, vocabulary=10_000), TOKENS),
}
TENSORS = {
    (4096, 1024): (0,),
    (1024, 4096): (0,),
    (4096, 4096): (0,),
    (256, 8192): (0,),
    (3, 3, 512, 512): (0, 1, 2),
    (50000, 256): (0,),
    (768, 12, 64): (0,),
    (12, 768, 3072): (1,),
}
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "sgd": optax.sgd(1e-3, momentum=0.9),
    "lion": optax.lion(1e-4),
}
PLAIN, AGAIN, CENTRALIZED = "plain", "plain again", "centralized"


class Case(NamedTuple):
    """Parameters as shapes and dtypes, and their axes."""

    params: Any
    axes: Any


def naive(axes: Any) -> optax.GradientTransformation:
    """The centralization that one writes by hand."""

    def subtract(gradient: jax.Array, weight: WeightAxes) -> jax.Array:
        return gradient - gradient.mean(weight.fan_in, keepdims=True) if weight.fan_in else gradient

    return optax.stateless(lambda updates, _: jax.tree.map(subtract, updates, axes))


Way = Callable[[Any], optax.GradientTransformation]


class Transformation(NamedTuple):
    """The ways to do the same from the axes of a case, and the bytes that are read once more for it."""

    ways: dict[str, Way]
    read_again: Callable[[Case], int]


TRANSFORMATIONS = {
    "centralize": Transformation(
        {
            PLAIN: lambda _: optax.identity(),
            "gc_optax": gc_optax.centralize,
            "optax.centralize": lambda _: optax.centralize(),
            "naive": naive,
        },
        lambda case: size(
            jax.tree.map(lambda leaf, weight: leaf if weight.fan_in else None, case.params, case.axes)
        ),
    ),
    "adaptive_grad_clip": Transformation(
        {
            PLAIN: lambda _: optax.identity(),
            "gc_optax": lambda axes: gc_optax.adaptive_grad_clip(0.01, axes),
            "optax.adaptive_grad_clip": lambda _: optax.adaptive_grad_clip(0.01),
        },
        lambda case: 2 * size(case.params),
    ),
}


def model_case(name: str, dtype: jnp.dtype) -> Case:
    """The parameters of a model, and the axes that `infer_axes` reads off its forward pass."""
    model, inputs = MODELS[name]
    variables = shapes(model, inputs)
    params, others = variables.pop("params"), variables

    def forward(params: Any, others: Any, inputs: jax.Array) -> jax.Array:
        return model.apply({"params": params} | others, inputs)

    axes = gc_optax.infer_axes(forward, params, others, inputs)
    return Case(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params), axes)


def tensor_case(shape: tuple[int, ...], fan_in: tuple[int, ...], dtype: jnp.dtype) -> Case:
    """A single tensor; its outputs are the axes behind the inputs or, where there are none, before them."""
    fan_out = tuple(range(fan_in[-1] + 1, len(shape))) or tuple(range(fan_in[0]))
    weight = WeightAxes(fan_in, fan_out, "given", "given")
    return Case({"w": jax.ShapeDtypeStruct(shape, dtype)}, {"w": weight})


def size(tree: Any) -> int:
    """The bytes of all arrays in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_update(case: Case, optimizer: optax.GradientTransformation, way: Way) -> jax.stages.Compiled:
    """The program from (parameters, state, gradients) to (parameters, state).

    Results come in the order of the arguments that are donated to them: JAX gives each result the first
    donated buffer of its size that is left, and where that is another one's, XLA copies.
    """
    transformation = way(case.axes)

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        gradients, _ = transformation.update(gradients, transformation.init(params), params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, case.params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(case.params, state, case.params).compile()


def stepping(
    programs: dict[str, jax.stages.Compiled], params: Any, state: Any, gradients: Any
) -> dict[str, Callable[[], Any]]:
    """A function for each program that takes a step, all from where the last step of any of them ended."""

    def runner(program: jax.stages.Compiled) -> Callable[[], Any]:
        def run() -> Any:
            nonlocal params, state
            params, state = program(params, state, gradients)
            return params

        return run

    return {name: runner(program) for name, program in programs.items()}


def measure(
    case: Case, optimizer: optax.GradientTransformation, transformation: Transformation, rounds: int
) -> dict[str, Any]:
    """Times and temporary memory of every way, and the bytes that the step has to move."""
    programs = {name: compile_update(case, optimizer, way) for name, way in transformation.ways.items()}
    leaves, structure = jax.tree.flatten(case.params)
    random = np.random.default_rng(0)

    def normal() -> Any:
        drawn = [jnp.asarray(random.standard_normal(leaf.shape, np.float32), leaf.dtype) for leaf in leaves]
        return jax.tree.unflatten(structure, drawn)

    gradients, params = normal(), normal()
    state = jax.jit(optimizer.init)(params)
    streams = size(gradients) + 2 * size(params) + 2 * size(state)

    times = take_turns(stepping(programs | {AGAIN: programs[PLAIN]}, params, state, gradients), rounds)
    temporary = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "leaves": len(leaves),
        "bytes": streams,
        "floor": (streams + transformation.read_again(case)) / streams,
        "seconds": times,
        "temporary_bytes": temporary,
    }


def authors_rule(gradients: list[Any]) -> None:
    """The centralization of the authors' code, in place on PyTorch's gradients."""
    for gradient in gradients:
        if gradient.dim() > 1:
            gradient.add_(-gradient.mean(dim=tuple(range(1, gradient.dim())), keepdim=True))


def pytorch(case: Case, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times PyTorch's AdamW with and without the authors' rule, on the same weights in PyTorch's layout."""
    import torch

    def layout(leaf: jax.ShapeDtypeStruct, weight: WeightAxes) -> list[tuple[int, ...]]:
        if not weight.fan_in:
            return [leaf.shape]
        sizes = [math.prod(leaf.shape[axis] for axis in axes) for axes in (weight.fan_out, weight.fan_in)]
        return [tuple(sizes)] * (leaf.size // math.prod(sizes))

    pairs = zip(jax.tree.leaves(case.params), jax.tree.leaves(case.axes), strict=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(jax.tree.leaves(case.params)[0].dtype))
    params = [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        for leaf, weight in pairs
        for shape in layout(leaf, weight)
    ]
    gradients = [torch.randn_like(param) for param in params]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient

    def runner(optimizer: Any, centralize: bool) -> Callable[[], Any]:
        def run() -> None:
            if centralize:
                authors_rule(gradients)
            optimizer.step()

        return run

    def wait(_: None) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = {}
    for kind in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(params, lr=1e-3, **{kind: True})
        ways = {way: runner(optimizer, way == CENTRALIZED) for way in (PLAIN, CENTRALIZED)}
        times[f"PyTorch {torch.__version__}, {kind}"] = take_turns(ways, rounds, wait=wait)
    return times


def keras(case: Case, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times Keras's AdamW on JAX with and without a mean over all axes but the last."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    leaves = jax.tree.leaves(case.params)
    random = np.random.default_rng(0)
    gradients = [jnp.asarray(random.standard_normal(leaf.shape, np.float32), leaf.dtype) for leaf in leaves]
    optimizer = keras.optimizers.AdamW(1e-3)
    variables = [
        keras.Variable(jnp.zeros_like(gradient), dtype=str(gradient.dtype)) for gradient in gradients
    ]
    optimizer.build(variables)
    params = [variable.value for variable in variables]
    state = [variable.value for variable in optimizer.variables]

    def all_but_last(gradient: jax.Array) -> jax.Array:
        if gradient.ndim < 2:
            return gradient
        return gradient - gradient.mean(tuple(range(gradient.ndim - 1)), keepdims=True)

    def compiled(centralize: bool) -> Any:
        def step(params: Any, state: Any, gradients: Any) -> Any:
            if centralize:
                gradients = [all_but_last(gradient) for gradient in gradients]
            return optimizer.stateless_apply(state, gradients, params)

        return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients).compile()

    programs = {way: compiled(way == CENTRALIZED) for way in (PLAIN, CENTRALIZED)}
    ways = stepping(programs, params, state, gradients)
    return {f"Keras {keras.__version__}, jax": take_turns(ways, rounds)}


PEERS = {"torch": pytorch, "keras": keras}


def ratio(run: dict[str, Any], way: str) -> Spread:
    """How many times as long as the plain step, round by round."""
    return spread(np.divide(run["seconds"][way], run["seconds"][PLAIN]))


def report(runs: list[dict[str, Any]], bandwidth: float, console: Console) -> None:
    """Prints the ratios under one optimizer, and the temporary memory above the plain step's."""
    optimizer = runs[0]["optimizer"]
    others = [way for way in runs[0]["temporary_bytes"] if way != PLAIN]
    times = Table(
        title=f"{optimizer}: time of the update, as a ratio to the plain step",
        caption="median (quartiles) of the ratios within a round; share: of a copy's bandwidth, gc_optax",
        box=box.SIMPLE_HEAD,
    )
    memory = Table(title=f"{optimizer}: temporary memory above the plain step's, MB", box=box.SIMPLE_HEAD)
    for table, headings in (
        (times, ["parameters", "plain", "share", "floor", *others, AGAIN]),
        (memory, ["plain step", *others]),
    ):
        table.add_column("case", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        plain, ours = (float(np.median(run["seconds"][way])) for way in (PLAIN, "gc_optax"))
        times.add_row(
            run["case"],
            f"{run['parameters'] / 1e6:.1f} M",
            f"{plain * 1e3:.1f} ms",
            f"{run['floor'] * run['bytes'] / ours / bandwidth:.0%}",
            f"{run['floor']:.2f}",
            *(str(ratio(run, way)) for way in (*others, AGAIN)),
        )
        temporary = {way: value / MEGABYTE for way, value in run["temporary_bytes"].items()}
        memory.add_row(
            run["case"],
            f"{temporary[PLAIN]:.1f}",
            *(f"{temporary[way] - temporary[PLAIN]:+.1f}" for way in others),
        )
    console.print(times, memory)
    for kind, names in (("model tree", MODELS), ("single tensor", map(str, TENSORS))):
        chosen = [run for run in runs if run["case"] in set(names)]
        if chosen:
            worst = max(chosen, key=lambda run: ratio(run, "gc_optax").median)
            console.print(
                f"{optimizer}: the largest ratio of gc_optax on a {kind} is "
                f"{ratio(worst, 'gc_optax').median:.2f}, on {worst['case']}"
            )


def report_peers(runs: list[dict[str, Any]], console: Console) -> None:
    """Prints what the centralization of other frameworks adds to their own AdamW."""
    table = Table(
        title="other frameworks: time of the update, as a ratio to their own plain step",
        caption="median (quartiles) of the ratios within a round",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("case", "peer", "plain", "with centralization"):
        table.add_column(heading, justify="left" if heading in ("case", "peer") else "right", no_wrap=True)
    for run in runs:
        plain, centralized = (np.array(run["seconds"][way]) for way in (PLAIN, CENTRALIZED))
        table.add_row(
            run["case"], run["peer"], f"{np.median(plain) * 1e3:.1f} ms", str(spread(centralized / plain))
        )
    console.print(table)


def plot(runs: list[dict[str, Any]], dtype: str, path: pathlib.Path) -> None:
    """Draws the ratio of every way in every case, with its quartiles and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    optimizers = list(dict.fromkeys(run["optimizer"] for run in runs))
    names = list(dict.fromkeys(run["case"] for run in runs))
    rows = np.arange(len(names))[::-1]
    figure, panels = pyplot.subplots(
        1,
        len(optimizers),
        figsize=(2 + 3.6 * len(optimizers), 1.5 + 0.42 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, optimizer in zip(panels[0], optimizers, strict=True):
        chosen = [run for run in runs if run["optimizer"] == optimizer]
        for index, way in enumerate(way for way in runs[0]["temporary_bytes"] if way != PLAIN):
            spreads = [ratio(run, way) for run in chosen]
            medians = [spread.median for spread in spreads]
            errors = [
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ]
            heights = rows + 0.22 * (1 - index)
            panel.errorbar(medians, heights, xerr=errors, fmt="osD"[index], markersize=4, label=way)
        panel.plot(
            [run["floor"] for run in chosen], rows, "|", color="black", markersize=18, label="floor: bytes"
        )
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set(
            title=f"{optimizer}, {dtype}",
            xlabel="time of the update / plain step",
            yticks=rows,
            yticklabels=names,
        )
        panel.grid(axis="x", alpha=0.3)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures every case under every optimizer, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*MODELS, *map(str, TENSORS)]
    parser.add_argument(
        "--transformation",
        choices=TRANSFORMATIONS,
        default="centralize",
        metavar="NAME",
        help="what is added: centralize (default) or adaptive_grad_clip",
    )
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS], metavar="NAME")
    parser.add_argument("--cases", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--rounds", type=positive, default=15, help="measurements of each (default: 15)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="other frameworks, under AdamW")
    parser.add_argument("--json", type=writable, help="also write every measurement to this file")
    parser.add_argument("--plot", type=writable, help="also draw a picture into this file")
    arguments = parser.parse_args()
    for peer in arguments.peers:
        if importlib.util.find_spec(peer) is None:
            parser.error(f"argument --peers: there is no {peer} here; pip install '.[peers]'")

    console = wide_console()
    bandwidth = copy_bandwidth()
    console.print(
        f"{machine()}; a copy moves {bandwidth / 1e9:.1f} GB/s; {arguments.dtype}; {arguments.transformation}"
    )
    dtype = jnp.dtype(arguments.dtype)
    tensors = {str(shape): tensor_case(shape, fan_in, dtype) for shape, fan_in in TENSORS.items()}
    cases = {name: tensors.get(name) or model_case(name, dtype) for name in arguments.cases}
    transformation = TRANSFORMATIONS[arguments.transformation]
    runs, peers = [], []
    for optimizer in dict.fromkeys(arguments.optimizers):
        for name, case in track(cases.items(), description=optimizer, transient=True, console=console):
            run = measure(case, OPTIMIZERS[optimizer], transformation, arguments.rounds)
            runs.append({"optimizer": optimizer, "case": name} | run)
        report([run for run in runs if run["optimizer"] == optimizer], bandwidth, console)
    for peer in dict.fromkeys(arguments.peers):
        for name, case in track(cases.items(), description=peer, transient=True, console=console):
            found = PEERS[peer](case, arguments.rounds)
            peers += [{"case": name, "peer": kind, "seconds": times} for kind, times in found.items()]
    if peers:
        report_peers(peers, console)
    if arguments.json:
        measured = {"dtype": arguments.dtype, "copy_bandwidth": bandwidth, "runs": runs, "peers": peers}
        about = {"machine": machine(), "transformation": arguments.transformation}
        arguments.json.write_text(json.dumps(about | measured, indent=1))
    if arguments.plot:
        plot(runs, arguments.dtype, arguments.plot)


if __name__ == "__main__":
    main()
