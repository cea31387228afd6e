"""What the benchmarks share: the update, measuring in turns, tables of ratios, and the command line."""

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

MEGABYTE = 2**20
OF_RATIOS = "median (quartiles) of the ratios within a round"


def normal(tree: Any, seed: int) -> Any:
    """Random arrays with the shapes and dtypes of a tree."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape, np.float32), leaf.dtype), tree
    )


def compile_update(
    optimizer: optax.GradientTransformation, params: Any, state: Any, **options: Any
) -> jax.stages.Compiled:
    """The program from (parameters, state, gradients) to (parameters, state); `options` are those of `jit`.

    Results come in the order of the arguments that are donated to them: JAX gives each result the first
    donated buffer of its size that is left, and where that is another one's, XLA copies.
    """

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1), **options).lower(params, state, params).compile()


def stepping(
    programs: Mapping[str, Callable[..., Any]], state: tuple[Any, ...], *inputs: Any
) -> dict[str, Callable[[], Any]]:
    """A function for each program that takes a step, all from where the last step of any of them ended.

    Args:
        programs: from `state` and `inputs` to the next state. What `state` holds may be donated.
        state: the parameters, and what else a step changes.
        inputs: what every step gets.

    Returns:
        Functions that return the new parameters.
    """

    def run(program: Callable[..., Any]) -> Any:
        nonlocal state
        state = program(*state, *inputs)
        return state[0]

    return {name: functools.partial(run, program) for name, program in programs.items()}


def with_again(ways: Mapping[str, Any]) -> dict[str, Any]:
    """The ways, and the first once more: how far its ratio to itself is from 1 is how far noise goes."""
    first = next(iter(ways))
    return {**ways, f"{first} again": ways[first]}


def in_turns(measurements: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Takes each measurement once in every round.

    A machine that others share is slow at times. Whatever it does hits all measurements of a round alike, so
    the ratios within a round can be compared, and the times cannot. The order changes from round to round, so
    that none always finds the caches and the heap as the same other one has left them.
    """
    measured: dict[str, list[float]] = {name: [] for name in measurements}
    random = np.random.default_rng(0)
    for _ in range(rounds):
        for name in random.permutation(list(measurements)):
            measured[name].append(measurements[name]())
    return measured


def take_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    least: float = 0.02,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, list[float]]:
    """Times ways to do the same thing `in_turns`.

    Args:
        ways: functions that start some work.
        rounds: how many measurements of each.
        least: seconds that one measurement takes at least; short work is repeated.
        wait: returns when the work is done of which it gets the result.

    Returns:
        For each way the seconds of one call, in every round.
    """

    def seconds(way: Callable[[], Any], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            result = way()
        wait(result)
        return (time.perf_counter() - start) / repeats

    shortest = min(seconds(way, 1) for _ in range(2) for way in ways.values())
    repeats = max(1, round(least / shortest))
    return in_turns({name: functools.partial(seconds, way, repeats) for name, way in ways.items()}, rounds)


def copy_bandwidth(rounds: int = 15) -> float:
    """Bytes that are read and written in a second while an array that no cache holds is overwritten."""
    add_one = jax.jit(lambda array: (array + 1,), donate_argnums=0)  # no time goes to fresh pages
    array = jnp.zeros(2**26)
    size = array.nbytes
    return 2 * size / statistics.median(take_turns(stepping({"copy": add_one}, (array,)), rounds)["copy"])


class Spread(NamedTuple):
    """The median of some measurements and the quartiles around it."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        """For instance `1.04 (0.99-1.10)`."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(seconds: Mapping[str, list[float]], way: str) -> Spread:
    """How many times as long as the first way another one takes, round by round."""
    first = next(iter(seconds.values()))
    return Spread(*np.quantile(np.divide(seconds[way], first), [0.25, 0.5, 0.75]).tolist())


def machine() -> str:
    """What the figures were measured on, in one line."""
    device = jax.devices()[0]
    name = f"{os.cpu_count()}-core CPU" if device.platform == "cpu" else device.device_kind
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, optax {optax.__version__}"
    return f"{name}, {versions}"


def wide_console() -> Console:
    """Where a report goes: a terminal as it is, and a pipe or a file wide enough for every column."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def table(title: str, names: Sequence[str], numbers: Sequence[str], **style: Any) -> Table:
    """An empty table with columns of names, and then of numbers, by their headings."""
    empty = Table(title=title, box=box.SIMPLE_HEAD, **style)
    for heading in names:
        empty.add_column(heading, no_wrap=True)
    for heading in numbers:
        empty.add_column(heading, justify="right", no_wrap=True)
    return empty


def milliseconds(seconds: Sequence[float]) -> str:
    """The median time, for people."""
    return f"{np.median(seconds) * 1e3:,.1f} ms"


def report_ratios(title: str, runs: Mapping[str, dict[str, list[float]]], console: Console) -> None:
    """Prints for each run the time of the first way, and those of the others as ratios to it."""
    first, *others = next(iter(runs.values()))
    ratios = table(title, [""], [first, *others], caption=OF_RATIOS)
    for name, seconds in runs.items():
        ratios.add_row(name, milliseconds(seconds[first]), *(str(ratio(seconds, way)) for way in others))
    console.print(ratios)


def command_line(documentation: str) -> argparse.ArgumentParser:
    """A parser with what a module says of itself, and with the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--json", type=writable, help="also write all that was measured to this file")
    return parser


def save(measured: Any, path: pathlib.Path | None) -> None:
    """Writes what `--json` asks for."""
    if path:
        path.write_text(json.dumps(measured, indent=1))


def writable(given: str) -> pathlib.Path:
    """The path of a file to write, for argparse; a mistake shows before the work and not after it."""
    path = pathlib.Path(given)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent}")
    return path


def positive(given: str) -> int:
    """An integer that is at least 1, for argparse."""
    number = int(given)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
