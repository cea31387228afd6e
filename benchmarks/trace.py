"""How long `infer_axes` takes on large transformers, and how much memory.

Decoders of up to 48 layers and a billion parameters, their blocks unrolled or under `nn.scan`, and narrow
ones of up to 595 unrolled layers, which have 50,000 equations. All are given as shapes. Each is measured in
a process of its own: the time from cold caches, how much of it is JAX's own tracing and how much the reading
of what was traced, and how far the peak of the resident memory is above what importing Flax takes.

    python benchmarks/trace.py [--layers N ...] [--equations N ...] [--repeats N] [--json PATH] [--plot PATH]
"""

import concurrent.futures
import multiprocessing
import resource
import sys
import time
from typing import Any
from unittest import mock

import harness
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from models import Decoder, shapes
from rich.progress import track

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


def program(layers: int, kind: str) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """A loss, and the shapes of its parameters and tokens: as wide as GPT-2 large or, to be deep, narrow."""
    if kind == "narrow":
        model = Decoder(layers, embed=64, heads=2, vocabulary=256)
    else:
        model = Decoder(layers, embed=1280, heads=20, vocabulary=50_257, scanned=kind == "scanned")
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


def medians(run: dict[str, Any]) -> np.ndarray:
    """Over the repeats: seconds of `infer_axes`, of tracing, of reading, and the ratio of the last two."""
    whole, tracing = np.array([run["seconds"], run["seconds_tracing"]])
    reading = whole - tracing
    return np.median([whole, tracing, reading, reading / tracing], axis=1)


def report(runs: list[dict[str, Any]], repeats: int) -> None:
    """Prints the table, and how the time grows."""
    headings = "layers, params, equations, infer_axes, tracing, reading, ratio, an equation, memory"
    times = harness.table(
        "infer_axes on decoders given as shapes",
        ["blocks"],
        headings.split(", "),
        caption=f"median of {repeats}; infer_axes is tracing and reading; memory: above import flax",
        padding=(0, 1, 0, 0),
    )
    for run in runs:
        *seconds, ratio = medians(run)
        times.add_row(
            run["blocks"],
            str(run["layers"]),
            f"{run['parameters'] / 1e9:.2f} B",
            f"{run['equations']:,}",
            *(f"{part:.2f} s" for part in seconds),
            f"{ratio:.2f}",
            f"{seconds[-1] / run['equations'] * 1e6:.0f} µs",
            f"{run['extra_memory'] / harness.MEGABYTE:.0f} MB",
        )
    console = harness.wide_console()
    console.print(times)

    ratios = [medians(run)[-1] for run in runs]
    worst = runs[np.argmax(ratios)]
    name = f"{worst['layers']} layers, {worst['blocks']}"
    console.print(f"the largest ratio of reading to tracing is {max(ratios):.2f}, of {name}")
    for kind in ("unrolled", "narrow"):
        alike = [run for run in runs if run["blocks"] == kind]
        counts = [run["equations"] for run in alike]
        if len(set(counts)) > 1:
            # The power of the number of equations that times grow with is a slope, by least squares.
            slopes, _ = np.polyfit(np.log(counts), np.log([medians(run)[:3] for run in alike]), 1)
            told = f"{slopes[0]:.2f}, reading alone to the power of {slopes[2]:.2f}"
            console.print(f"{kind}: time grows as the number of equations to the power of {told}")


def main() -> None:
    """Measures every model and prints a table."""
    parser = harness.command_line(__doc__)
    narrow = [5000, 10_000, 20_000, 50_000]
    parser.add_argument(
        "--layers", type=harness.positive, nargs="+", default=[6, 12, 24, 48], help="default: 6 12 24 48"
    )
    described = f"also narrow decoders of so many (default: {narrow})"
    parser.add_argument("--equations", type=harness.positive, nargs="*", default=narrow, help=described)
    parser.add_argument("--repeats", type=harness.positive, default=3, help="of each (default: 3)")
    parser.add_argument("--plot", type=harness.writable, help="also draw a picture into this file")
    arguments = parser.parse_args()

    models = [(layers, "unrolled") for layers in arguments.layers] + [(max(arguments.layers), "scanned")]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        # This process does nothing but wait: the peak of its memory is where that of the others begins.
        deep = [pool.submit(layers_for, wanted) for wanted in arguments.equations]
        models += [(layers.result(), "narrow") for layers in deep]
        running = [pool.submit(measure, *model, arguments.repeats) for model in models]
        runs = [run.result() for run in track(running, description="models", transient=True)]
    print(harness.machine())
    report(runs, arguments.repeats)
    harness.save(runs, arguments.json)
    if arguments.plot:
        from plots import plot_trace

        plot_trace(runs, arguments.plot)


if __name__ == "__main__":
    main()
