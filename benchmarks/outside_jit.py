"""What gc_optax costs where nothing is compiled: its import, and an update without `jit`.

`import gc_optax` is compared with `import optax`, which it imports too, each in a process of its own that
finds its bytecode ready. The update is that of 1,000 kernels of 1, 10, 100 and 1,000 shapes, by `centralize`
and by `optax.centralize`.

Times are ratios to optax, measured as in `overhead.py`; "optax again" shows how far noise goes.

    python benchmarks/outside_jit.py [--rounds N] [--json PATH]
"""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import harness
import jax.numpy as jnp
import optax
from models import are_matrices
from rich.progress import track

import gc_optax

KERNELS = 1000

MEASURED_IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def imports(rounds: int, bytecode: str) -> dict[str, list[float]]:
    """The seconds of an import, in every round; `bytecode` is a folder for what Python compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = bytecode

    def seconds(module: str) -> float:
        command = [sys.executable, "-c", MEASURED_IMPORT.format(module)]
        return float(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)

    ways = {module: functools.partial(seconds, module) for module in ("optax", "gc_optax")}
    harness.in_turns(ways, rounds=1)  # to compile them
    return harness.in_turns(harness.with_again(ways), rounds)


def updates(shapes: int) -> dict[str, Callable[[], Any]]:
    """The update of kernels of so many shapes in every way: functions that run it."""
    params = {
        f"layer_{number}": {"kernel": jnp.ones((8 + number % shapes // 40, 8 + number % shapes % 40))}
        for number in range(KERNELS)
    }
    ways = {
        "optax": optax.centralize(),
        "by convention": gc_optax.centralize(gc_optax.out_last),
        "by a tree of axes": gc_optax.centralize(gc_optax.out_last(params)),
        "with a mask function": gc_optax.centralize(gc_optax.out_last, mask=are_matrices),
    }
    return harness.with_again(
        {name: functools.partial(way.update, params, way.init(params)) for name, way in ways.items()}
    )


def main() -> None:
    """Measures imports and updates, and prints a table of each."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--rounds", type=harness.positive, default=31, help="of measurements (default: 31)")
    arguments = parser.parse_args()

    console = harness.wide_console()
    console.print(harness.machine())
    with tempfile.TemporaryDirectory() as bytecode, console.status("imports"):
        imported = {"import": imports(arguments.rounds, bytecode)}
    harness.report_ratios("time of an import, as a ratio to that of optax", imported, console)
    updated = {}
    for shapes in track((1, 10, 100, 1000), description="updates", transient=True, console=console):
        name = f"{shapes:,} shape{'s' * (shapes > 1)}"
        updated[name] = harness.take_turns(updates(shapes), arguments.rounds)
    title = f"time of an update of {KERNELS:,} kernels without jit, as a ratio to optax"
    harness.report_ratios(title, updated, console)
    harness.save({"machine": harness.machine(), "imports": imported, "updates": updated}, arguments.json)


if __name__ == "__main__":
    main()
