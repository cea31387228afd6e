"""What the benchmarks share: measuring in turns, ratios within a round, and where results are written."""

import argparse
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

MEGABYTE = 2**20


class Spread(NamedTuple):
    """The median of some measurements and the quartiles around it."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        """For instance `1.04 (0.99-1.10)`."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spread(values: Any) -> Spread:
    """The quartiles of some numbers."""
    return Spread(*np.quantile(values, [0.25, 0.5, 0.75]).tolist())


def take_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    least: float = 0.02,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, list[float]]:
    """Measures ways to do the same thing, one after the other in every round.

    A machine that others share is slow at times. Whatever it does hits all ways of a round alike, so the
    ratios within a round can be compared, and the times cannot. The order changes from round to round, so
    that no way always finds the caches and the heap as the same other one has left them.

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
    times: dict[str, list[float]] = {name: [] for name in ways}
    random = np.random.default_rng(0)
    for _ in range(rounds):
        for name in random.permutation(list(ways)):
            times[name].append(seconds(ways[name], repeats))
    return times


def copy_bandwidth(rounds: int = 15) -> float:
    """Bytes that are read and written in a second while an array that no cache holds is overwritten."""
    add_one = jax.jit(lambda array: array + 1, donate_argnums=0)  # no time goes to fresh pages
    array = jnp.zeros(2**26)

    def overwrite() -> jax.Array:
        nonlocal array
        array = add_one(array)
        return array

    return 2 * array.nbytes / statistics.median(take_turns({"copy": overwrite}, rounds)["copy"])


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
