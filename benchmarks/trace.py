"""How long `infer_axes` takes on large transformers, and how much memory.

Decoders of up to 48 layers and a billion parameters, their blocks unrolled or under `nn.scan`, and narrow
ones of up to 595 unrolled layers, which have 50,000 equations. All are given as shapes. Each is measured in
a process of its own: the time from cold caches, how much of it is JAX's own tracing and how much the reading
of what was traced, and how far the peak of the resident memory is above what importing Flax takes.

    python benchmarks/trace.py [--layers N ...] [--equations N ...] [--repeats N] [--json PATH] [--plot PATH]
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import pathlib
import resource
import sys
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from harness import MEGABYTE, machine, positive, wide_console, writable
from jax.extend import core
from models import Decoder, shapes
from rich import box
from rich.progress import track
from rich.table import Table

from gc_optax import infer_axes


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def equations(jaxpr: core.Jaxpr) -> int:
    """The number of equations of a jaxpr, with those of the jaxprs inside it."""
    held = (
        getattr(value, "jaxpr", value)
        for eqn in jaxpr.eqns
        for given in eqn.params.values()
        for value in (given if isinstance(given, tuple | list) else [given])
        if isinstance(value, core.Jaxpr | core.ClosedJaxpr)
    )
    return len(jaxpr.eqns) + sum(map(equations, held))


def decoder(layers: int, kind: str) -> Decoder:
    """A decoder of the width of GPT-2 large or, to be deep, of a small one."""
    if kind == "narrow":
        return Decoder(layers, embed=64, heads=2, vocabulary=256)
    return Decoder(layers, embed=1280, heads=20, vocabulary=50_257, scanned=kind == "scanned")


def program(layers: int, kind: str) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """A loss, and the shapes of its parameters and of its tokens."""
    model = decoder(layers, kind)
    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply(params, tokens).mean()

    return loss, shapes(model, tokens), tokens


def layers_for(wanted: int) -> int:
    """The number of unrolled layers that make a program of at least so many equations."""
    one, two = (
        equations(jax.make_jaxpr(loss)(*given).jaxpr)
        for loss, *given in (program(layers, "narrow") for layers in (1, 2))
    )
    return max(1, -(-(wanted - one) // (two - one)) + 1)


def traced_apart(loss: Any, params: Any, tokens: jax.ShapeDtypeStruct) -> tuple[float, float, int]:
    """The seconds of one `infer_axes`, those of them that JAX traced for, and the number of equations."""
    make_jaxpr, traced = jax.make_jaxpr, []

    def timed(fn: Any) -> Any:
        def trace(*given: Any) -> Any:
            start = time.perf_counter()
            closed = make_jaxpr(fn)(*given)
            traced.append((time.perf_counter() - start, closed.jaxpr))
            return closed

        return trace

    jax.clear_caches()
    with mock.patch.object(jax, "make_jaxpr", timed):
        start = time.perf_counter()
        infer_axes(loss, params, tokens)
        seconds = time.perf_counter() - start
    ((seconds_tracing, jaxpr),) = traced
    return seconds, seconds_tracing, equations(jaxpr)


def measure(layers: int, kind: str, repeats: int) -> dict[str, Any]:
    """Measures one model; the first thing that a process does after its imports."""
    before = peak_memory()
    loss, params, tokens = program(layers, kind)
    measured = [traced_apart(loss, params, tokens) for _ in range(repeats)]
    extra = peak_memory() - before
    return {
        "layers": layers,
        "blocks": kind,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "equations": measured[0][2],
        "seconds": [seconds for seconds, _, _ in measured],
        "seconds_tracing": [tracing for _, tracing, _ in measured],
        "extra_memory": extra,
    }


def reading(run: dict[str, Any]) -> Any:
    """The seconds of every repeat without those of tracing."""
    return np.subtract(run["seconds"], run["seconds_tracing"])


def power(runs: list[dict[str, Any]], seconds: list[float]) -> float:
    """The power of the number of equations that times grow with, by least squares."""
    return float(np.polyfit(np.log([run["equations"] for run in runs]), np.log(seconds), 1)[0])


def report(runs: list[dict[str, Any]], repeats: int) -> None:
    """Prints the table, and how the time grows."""
    table = Table(
        title="infer_axes on decoders given as shapes",
        caption=f"median of {repeats}; infer_axes is tracing and reading; memory: above import flax",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    headings = ("layers", "params", "equations", "infer_axes", "tracing", "reading", "ratio", "an equation")
    table.add_column("blocks", no_wrap=True)
    for heading in (*headings, "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    ratios = [float(np.median(reading(run) / run["seconds_tracing"])) for run in runs]
    for run, ratio in zip(runs, ratios, strict=True):
        seconds = float(np.median(reading(run)))
        table.add_row(
            run["blocks"],
            str(run["layers"]),
            f"{run['parameters'] / 1e9:.2f} B",
            f"{run['equations']:,}",
            f"{np.median(run['seconds']):.2f} s",
            f"{np.median(run['seconds_tracing']):.2f} s",
            f"{seconds:.2f} s",
            f"{ratio:.2f}",
            f"{seconds / run['equations'] * 1e6:.0f} µs",
            f"{run['extra_memory'] / MEGABYTE:.0f} MB",
        )
    console = wide_console()
    console.print(table)
    number = int(np.argmax(ratios))
    slowest = f"{runs[number]['layers']} layers, {runs[number]['blocks']}"
    console.print(f"the largest ratio of reading to tracing is {ratios[number]:.2f}, of {slowest}")
    for kind in ("unrolled", "narrow"):
        alike = [run for run in runs if run["blocks"] == kind]
        if len({run["equations"] for run in alike}) > 1:
            powers = (
                power(alike, [float(np.median(of_one)) for of_one in times])
                for times in ([run["seconds"] for run in alike], map(reading, alike))
            )
            told = "{:.2f}, reading alone to the power of {:.2f}".format(*powers)
            console.print(f"{kind}: time grows as the number of equations to the power of {told}")


def plot(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws time and memory over the number of equations of the models that are not scanned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unrolled = [run for run in runs if run["blocks"] != "scanned"]
    unrolled.sort(key=lambda run: run["equations"])
    counts = [run["equations"] for run in unrolled]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for of_one, label in ((lambda run: run["seconds_tracing"], "tracing by JAX"), (reading, "reading")):
        times.plot(counts, [np.median(of_one(run)) for run in unrolled], marker="o", label=label)
    memory.plot(counts, [run["extra_memory"] / MEGABYTE for run in unrolled], marker="o")
    times.set(title="time", xlabel="equations", ylabel="s", xlim=(0, None), ylim=(0, None))
    memory.set(
        title="memory above import flax", xlabel="equations", ylabel="MB", xlim=(0, None), ylim=(0, None)
    )
    times.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures every model and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=positive, nargs="+", default=[6, 12, 24, 48], help="default: 6 12 24 48"
    )
    parser.add_argument(
        "--equations",
        type=positive,
        nargs="*",
        default=[5000, 10_000, 20_000, 50_000],
        help="also narrow decoders of so many (default: 5000 10000 20000 50000)",
    )
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--json", type=writable, help="also write every measurement to this file")
    parser.add_argument("--plot", type=writable, help="also draw a picture into this file")
    arguments = parser.parse_args()

    models = [(layers, "unrolled") for layers in arguments.layers] + [(max(arguments.layers), "scanned")]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        # This process does nothing but wait: the peak of its memory is where that of the others begins.
        deep = [pool.submit(layers_for, wanted) for wanted in arguments.equations]
        models += [(layers.result(), "narrow") for layers in deep]
        running = [pool.submit(measure, *model, arguments.repeats) for model in models]
        runs = [run.result() for run in track(running, description="models", transient=True)]
    print(machine())
    report(runs, arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1))
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
