"""The pictures that `--plot` asks for."""

import pathlib
from typing import Any

import harness
import numpy as np
from matplotlib.figure import Figure


def plot_overhead(runs: list[dict[str, Any]], dtype: str, path: pathlib.Path) -> None:
    """Draws the ratio of every way in every case, with its quartiles and the floor."""
    optimizers = list(dict.fromkeys(run["optimizer"] for run in runs))
    names = list(dict.fromkeys(run["case"] for run in runs))
    rows = np.arange(len(names))[::-1]
    size = (2 + 3.6 * len(optimizers), 1.5 + 0.42 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(optimizers), sharey=True, squeeze=False)[0]
    for panel, optimizer in zip(panels, optimizers, strict=True):
        chosen = [run for run in runs if run["optimizer"] == optimizer]
        _, *ways = chosen[0]["temporary_bytes"]
        for index, way in enumerate(ways):
            low, median, high = np.transpose([harness.ratio(run["seconds"], way) for run in chosen])
            heights, errors = rows + 0.22 * (1 - index), [median - low, high - median]
            panel.errorbar(median, heights, xerr=errors, fmt="osD"[index], markersize=4, label=way)
        floors = [run["floor"] for run in chosen]
        panel.plot(floors, rows, "|", color="black", markersize=18, label="floor: bytes")
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set(title=f"{optimizer}, {dtype}", xlabel="time of the update / plain step")
        panel.set(yticks=rows, yticklabels=names)
        panel.grid(axis="x", alpha=0.3)
    labels = panels[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def plot_trace(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws time and memory over the number of equations of the models that are not scanned."""
    unrolled = sorted((run for run in runs if run["blocks"] != "scanned"), key=lambda run: run["equations"])
    counts = [run["equations"] for run in unrolled]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    times, memory = figure.subplots(1, 2)
    tracing = [run["seconds_tracing"] for run in unrolled]
    reading = [np.subtract(run["seconds"], run["seconds_tracing"]) for run in unrolled]
    for seconds, label in ((tracing, "tracing by JAX"), (reading, "reading")):
        times.plot(counts, np.median(seconds, axis=1), marker="o", label=label)
    memory.plot(counts, [run["extra_memory"] / harness.MEGABYTE for run in unrolled], marker="o")
    for panel, title, unit in ((times, "time", "s"), (memory, "memory above import flax", "MB")):
        panel.set(title=title, xlabel="equations", ylabel=unit, xlim=(0, None), ylim=(0, None))
    times.legend(frameon=False)
    figure.savefig(path, dpi=150)
