"""How long `infer_axes` takes on large transformers, and how much memory.

Decoders of up to 48 layers and a billion parameters, their blocks unrolled or under `nn.scan`, given as
shapes. Each is measured in a process of its own: the time from cold caches, the tracing by JAX included,
and how far the peak of the resident memory is above what importing Flax takes.

    python benchmarks/trace.py [--layers N ...] [--repeats N] [--json PATH] [--plot PATH]
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

import jax
import jax.numpy as jnp
import numpy as np
from harness import MEGABYTE, positive, writable
from jax.extend import core
from models import Decoder, shapes
from rich import box
from rich.console import Console
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


def measure(layers: int, scanned: bool, repeats: int) -> dict[str, Any]:
    """Measures one model; the first thing that a process does after its imports."""
    before = peak_memory()
    model = Decoder(layers, embed=1280, heads=20, vocabulary=50_257, scanned=scanned)
    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    params = shapes(model, tokens)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply(params, tokens).mean()

    seconds, seconds_tracing = [], []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        infer_axes(loss, params, tokens)
        seconds.append(time.perf_counter() - start)
    extra = peak_memory() - before
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        closed = jax.make_jaxpr(loss)(params, tokens)
        seconds_tracing.append(time.perf_counter() - start)
    return {
        "layers": layers,
        "scanned": scanned,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "equations": equations(closed.jaxpr),
        "seconds": seconds,
        "seconds_tracing": seconds_tracing,
        "extra_memory": extra,
    }


def report(runs: list[dict[str, Any]], repeats: int) -> None:
    """Prints the table, and how the time grows."""
    table = Table(
        title="infer_axes on decoders given as shapes",
        caption=f"median of {repeats}; reading: an equation, tracing apart; memory: above import flax",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("blocks", "layers", "params", "equations", "infer_axes", "tracing", "reading", "memory"):
        table.add_column(heading, justify="left" if heading == "blocks" else "right", no_wrap=True)
    for run in runs:
        total, tracing = np.median(run["seconds"]), np.median(run["seconds_tracing"])
        table.add_row(
            "scanned" if run["scanned"] else "unrolled",
            str(run["layers"]),
            f"{run['parameters'] / 1e9:.2f} B",
            f"{run['equations']:,}",
            f"{total:.2f} s",
            f"{tracing:.2f} s",
            f"{(total - tracing) / run['equations'] * 1e6:.0f} µs",
            f"{run['extra_memory'] / MEGABYTE:.0f} MB",
        )
    console = Console()
    console.print(table)
    unrolled = [run for run in runs if not run["scanned"]]
    if len(unrolled) > 1:
        counts, times = ([run["equations"] for run in unrolled], [np.median(r["seconds"]) for r in unrolled])
        power = np.polyfit(np.log(counts), np.log(times), 1)[0]
        console.print(f"unrolled: time grows as the number of equations to the power of {power:.2f}")


def plot(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws time and memory over the number of equations of the unrolled models."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unrolled = [run for run in runs if not run["scanned"]]
    counts = [run["equations"] for run in unrolled]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for key, label in (("seconds", "infer_axes"), ("seconds_tracing", "tracing by JAX alone")):
        times.plot(counts, [np.median(run[key]) for run in unrolled], marker="o", label=label)
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
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--json", type=writable, help="also write every measurement to this file")
    parser.add_argument("--plot", type=writable, help="also draw a picture into this file")
    arguments = parser.parse_args()

    models = [(layers, False) for layers in arguments.layers] + [(max(arguments.layers), True)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        running = [pool.submit(measure, *model, arguments.repeats) for model in models]
        runs = [run.result() for run in track(running, description="models", transient=True)]
    report(runs, arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=1))
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
