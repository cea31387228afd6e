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

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import LSTM, Decoder, ResNet, VisionTransformer, shapes
from peers import PEERS, report_peers
from rich.console import Console
from rich.progress import track

import gc_optax
from gc_optax import WeightAxes

PLAIN = "plain"
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


def measure(
    case: Case, optimizer: optax.GradientTransformation, transformation: Transformation, rounds: int
) -> dict[str, Any]:
    """Times and temporary memory of every way, and the bytes that the step has to move."""
    optimizers = {name: optax.chain(way(case.axes), optimizer) for name, way in transformation.ways.items()}
    gradients, params = harness.normal(case.params, seed=0), harness.normal(case.params, seed=1)
    state = jax.jit(optimizers[PLAIN].init)(params)  # that of all ways: what is in front has none
    programs = {name: harness.compile_update(chain, params, state) for name, chain in optimizers.items()}
    streams = size(gradients) + 2 * size(params) + 2 * size(state)
    steps = harness.stepping(harness.with_again(programs), (params, state), gradients)
    temporary = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    leaves = jax.tree.leaves(case.params)
    return {
        "parameters": sum(leaf.size for leaf in leaves),
        "leaves": len(leaves),
        "bytes": streams,
        "floor": (streams + transformation.read_again(case)) / streams,
        "seconds": harness.take_turns(steps, rounds),
        "temporary_bytes": temporary,
    }


def report(runs: list[dict[str, Any]], bandwidth: float, console: Console) -> None:
    """Prints the ratios under one optimizer, and the temporary memory above the plain step's."""
    optimizer = runs[0]["optimizer"]
    _, *ways = runs[0]["seconds"]
    times = harness.table(
        f"{optimizer}: time of the update, as a ratio to the plain step",
        ["case"],
        ["parameters", "plain", "share", "floor", *ways],
        caption=f"{harness.OF_RATIOS}; share: of a copy's bandwidth, gc_optax",
    )
    title = f"{optimizer}: temporary memory above the plain step's, MB"
    memory = harness.table(title, ["case"], ["plain step", *ways[:-1]])
    for run in runs:
        streamed = run["floor"] * run["bytes"] / np.median(run["seconds"]["gc_optax"])
        times.add_row(
            run["case"],
            f"{run['parameters'] / 1e6:.1f} M",
            harness.milliseconds(run["seconds"][PLAIN]),
            f"{streamed / bandwidth:.0%}",
            f"{run['floor']:.2f}",
            *(str(harness.ratio(run["seconds"], way)) for way in ways),
        )
        plain, *others = (value / harness.MEGABYTE for value in run["temporary_bytes"].values())
        memory.add_row(run["case"], f"{plain:.1f}", *(f"{other - plain:+.1f}" for other in others))
    console.print(times, memory)
    ratios = {run["case"]: harness.ratio(run["seconds"], "gc_optax").median for run in runs}
    for kind, names in (("model tree", MODELS), ("single tensor", map(str, TENSORS))):
        chosen = [name for name in names if name in ratios]
        if chosen:
            worst = max(chosen, key=ratios.__getitem__)
            told = f"the largest ratio of gc_optax on a {kind} is {ratios[worst]:.2f}, on {worst}"
            console.print(f"{optimizer}: {told}")


def main() -> None:
    """Measures every case under every optimizer, and prints the tables."""
    parser = harness.command_line(__doc__)
    known = [*MODELS, *map(str, TENSORS)]
    parser.add_argument("--transformation", choices=TRANSFORMATIONS, default="centralize")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS], metavar="NAME")
    parser.add_argument("--cases", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--rounds", type=harness.positive, default=15, help="of measurements (default: 15)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="other frameworks, under AdamW")
    parser.add_argument("--plot", type=harness.writable, help="also draw a picture into this file")
    arguments = parser.parse_args()
    for peer in arguments.peers:
        if importlib.util.find_spec(peer) is None:
            parser.error(f"argument --peers: there is no {peer} here; pip install '.[peers]'")

    console = harness.wide_console()
    bandwidth = harness.copy_bandwidth()
    settings = f"{arguments.dtype}; {arguments.transformation}"
    console.print(f"{harness.machine()}; a copy moves {bandwidth / 1e9:.1f} GB/s; {settings}")
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
            found = PEERS[peer](*case, arguments.rounds)
            peers += [{"case": name, "peer": kind, "seconds": times} for kind, times in found.items()]
    if peers:
        report_peers(peers, console)
    about = {"machine": harness.machine(), "transformation": arguments.transformation}
    measured = {"dtype": arguments.dtype, "copy_bandwidth": bandwidth, "runs": runs, "peers": peers}
    harness.save(about | measured, arguments.json)
    if arguments.plot:
        from plots import plot_overhead

        plot_overhead(runs, arguments.dtype, arguments.plot)


if __name__ == "__main__":
    main()
