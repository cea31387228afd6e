"""What gc_optax costs where nothing is compiled: its import, and an update without `jit`.

`import gc_optax` is compared with `import optax`, which it imports too, each in a process of its own that
finds its bytecode ready. The update is that of 1,000 kernels of 1, 10, 100 and 1,000 shapes, by `centralize`
and by `optax.centralize`.

The ways take turns; what is printed are medians over the rounds of the ratio to optax within the round, with
their quartiles. Optax takes part twice, and "optax again" shows how far noise goes.

    python benchmarks/outside_jit.py [--rounds N] [--json PATH]
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import machine, positive, spread, take_turns, wide_console, writable
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gc_optax

PLAIN, AGAIN = "optax", "optax again"
KERNELS = 1000

MEASURED_IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def imports(rounds: int, bytecode: str) -> dict[str, list[float]]:
    """The seconds of an import, in every round; `bytecode` is a folder for what Python compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = bytecode
    times: dict[str, list[float]] = {PLAIN: [], "gc_optax": [], AGAIN: []}
    random = np.random.default_rng(0)

    def seconds(module: str) -> float:
        command = [sys.executable, "-c", MEASURED_IMPORT.format(module)]
        return float(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    for module in ("optax", "gc_optax"):  # to compile it
        seconds(module)
    for _ in range(rounds):
        for name in random.permutation(list(times)):
            times[name].append(seconds(name.partition(" ")[0]))
    return times


def updates(shapes: int) -> dict[str, Callable[[], Any]]:
    """The update of kernels of so many shapes in every way: functions that run it."""
    params = {
        f"layer_{number}": {"kernel": jnp.ones((8 + number % shapes // 40, 8 + number % shapes % 40))}
        for number in range(KERNELS)
    }
    ways = {
        PLAIN: optax.centralize(),
        "by convention": gc_optax.centralize(gc_optax.out_last),
        "by a tree of axes": gc_optax.centralize(gc_optax.out_last(params)),
        "with a mask function": gc_optax.centralize(gc_optax.out_last, mask=are_matrices),
        AGAIN: optax.centralize(),
    }
    return {name: functools.partial(way.update, params, way.init(params)) for name, way in ways.items()}


def are_matrices(params: Any) -> Any:
    """The mask that many write: what has more than one axis."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def report(title: str, runs: dict[str, dict[str, list[float]]], console: Console) -> None:
    """Prints the ratios to optax."""
    table = Table(title=title, caption="median (quartiles) of the ratios within a round", box=box.SIMPLE_HEAD)
    (ways, *_) = runs.values()
    for heading in ("", *ways):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, seconds in runs.items():
        ratios = (str(spread(np.divide(seconds[way], seconds[PLAIN]))) for way in ways if way != PLAIN)
        table.add_row(name, f"{np.median(seconds[PLAIN]) * 1e3:,.1f} ms", *ratios)
    console.print(table)


def main() -> None:
    """Measures imports and updates, and prints a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=31, help="measurements of each (default: 31)")
    parser.add_argument("--json", type=writable, help="also write every measurement to this file")
    arguments = parser.parse_args()

    console = wide_console()
    console.print(machine())
    with tempfile.TemporaryDirectory() as bytecode, console.status("imports"):
        imported = {"import": imports(arguments.rounds, bytecode)}
    report("time of an import, as a ratio to that of optax", imported, console)
    updated = {}
    for shapes in track((1, 10, 100, 1000), description="updates", transient=True, console=console):
        updated[f"{shapes:,} shape{'s' * (shapes > 1)}"] = take_turns(updates(shapes), arguments.rounds)
    report(f"time of an update of {KERNELS:,} kernels without jit, as a ratio to optax", updated, console)
    if arguments.json:
        written = {"machine": machine(), "imports": imported, "updates": updated}
        arguments.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
