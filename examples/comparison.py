"""What the examples share: Ctrl-C, the command line, the progress bar, and a comparison's table and picture.

Nothing here is about gradient centralization. An example trains one model in a few ways, its *arms*, with the
same seeds for each: every arm starts from the same weights and sees the same data in the same order. It hands
what it measures to a `Comparison`:

    comparison = Comparison("MLP on digits", ["adam alone", "adam with GC"], seeds=5, points=range(1, 21))
    with comparison.measuring(console):
        ...
        comparison.add("adam alone", seed, {"loss": 0.02, "accuracy, %": 97.5})  # after every epoch
    comparison.report(console, {"loss": 4, "accuracy, %": 2}, compare=["accuracy, %"])
    comparison.draw(["loss", "accuracy, %"], output)

Consoles are made with `markup=False`: the user's names may have brackets, which Rich takes for its markup.

Import it before anything that takes long to import: from then on Ctrl-C ends the program in one line.
"""

import os
import sys


def end_in_one_line(kind, error, traceback):
    """Python's way to tell of an error, but that Ctrl-C is none."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("\nStopped by Ctrl-C.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Where XLA is still compiling, Python's own way out may end in a segmentation fault.
    os._exit(130)


# Before the imports that take seconds.
sys.excepthook = end_in_one_line

# ruff: noqa: E402
import argparse
import contextlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure, SubFigure
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats

FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")
COLORS = ("#666666", "#0072b2", "#d55e00", "#009e73")  # apart for colour-blind readers too


def positive_integer(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def positive_number(text: str) -> float:
    """An argument that is a rate."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


def picture_path(text: str) -> pathlib.Path:
    """A path that the picture can be written to: found out before the training, not after it."""
    path = pathlib.Path(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text} must end in one of {', '.join(FORMATS)}")
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder")
        if not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent}")
        is_new = not path.exists() and not path.is_symlink()
        path.open("ab").close()
        if is_new:
            path.unlink(missing_ok=True)  # another process of the same run may have been first
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from error
    return path


def existing_folder(text: str) -> pathlib.Path:
    """A folder that is there."""
    path = pathlib.Path(text)
    try:
        is_there = path.is_dir()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from error
    if not is_there:
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute()}")
    return path


def make_parser(description: str, *, output: str, seeds: int) -> argparse.ArgumentParser:
    """A command line with what every example takes: `--seeds` and `--output`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=positive_integer, default=seeds, help="runs of each arm")
    parser.add_argument("--output", type=picture_path, default=output, help="where the picture goes")
    return parser


@contextlib.contextmanager
def progress_bar(console: Console, total: int, unit: str) -> Iterator[tuple[Progress, int]]:
    """A bar with the time left, and the task on it; a narrow terminal has no room for what is going on."""
    time_left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = [BarColumn(), MofNCompleteColumn(), TextColumn(unit), time_left]
    if console.width >= 80:
        columns.append(TextColumn("{task.description}", markup=False))
    # By default Rich forgets what is older than 30 seconds, and an epoch may take longer.
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        yield progress, progress.add_task("compiling", total=total)


def print_table(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; on a terminal that is too narrow for it, one line for each cell, under the row's name."""
    console.print(title)  # not as the table's own, which would be wrapped at its width
    table = Table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width:
        console.print(table)
        return
    for name, *cells in rows:
        console.print(name)
        for heading, cell in zip(headings[1:], cells, strict=True):
            console.print(f"  {heading}: {cell}")


def print_summary(console: Console, summary: str) -> None:
    """Prints the table of `gc_optax.summarize`; a terminal too narrow for it has its first columns."""
    if not console.is_terminal:
        console.print(summary, highlight=False, soft_wrap=True)
        return
    table, _, totals = summary.rpartition("\n\n")
    console.print(table, highlight=False, no_wrap=True, overflow="ellipsis")
    console.print(f"\n{totals}", highlight=False)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation over the seeds; the mean alone where there is one seed."""
    with np.errstate(invalid="ignore"):  # of runs that diverged
        mean, deviation = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else None
    return f"{mean:.{digits}f}" if deviation is None else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def difference(values: Sequence[float], others: Sequence[float], digits: int) -> str:
    """How far `values` lie from `others`, seed by seed, and whether the seeds are enough to tell."""
    with np.errstate(invalid="ignore"):
        differences = np.subtract(values, others)
    if not np.isfinite(differences).all():
        return "no comparison, a run has diverged"
    mean = round(differences.mean(), digits) + 0.0  # no "-0.00"
    if len(differences) == 1:
        return f"{mean:+.{digits}f} on one seed, which shows nothing: another may turn it round"
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    low, high = (round(differences.mean() + end, digits) + 0.0 for end in (-half, half))
    verdict = "" if low > 0 or high < 0 else "; it holds 0: no difference shown"
    return f"{mean:+.{digits}f} (95 % interval {low:+.{digits}f} to {high:+.{digits}f}{verdict})"


class Comparison:
    """What is measured of every arm with every seed, at the same points of its training.

    Args:
        title: of the table and of the picture.
        arms: their names, the one without gradient centralization first.
        seeds: how many runs each arm has.
        points: where each run is measured, for example after epochs 1 to 20.
        unit: what the points count.
    """

    def __init__(
        self, title: str, arms: Sequence[str], *, seeds: int, points: Sequence[int], unit: str = "epochs"
    ):
        if len(arms) > len(COLORS):
            raise ValueError(f"there are {len(arms)} arms, and colours for {len(COLORS)}")
        self.title, self.arms, self.seeds, self.points, self.unit = title, list(arms), seeds, points, unit
        self.stopped = False
        # curves[arm][seed][metric] has one number for each point that the run has reached.
        self.curves: dict[str, list[dict[str, list[float]]]] = {arm: [] for arm in arms}

    @contextlib.contextmanager
    def measuring(self, console: Console) -> Iterator[None]:
        """Shows a progress bar, and catches Ctrl-C: what was measured until then can be reported."""
        total = len(self.arms) * self.seeds * self.points[-1]
        try:
            with progress_bar(console, total, self.unit) as (self._progress, self._bar):
                yield
                self._progress.update(self._bar, description="done")
        except KeyboardInterrupt:
            if not any(self.curves.values()):
                raise
            self.stopped = True
            console.print("Stopped by Ctrl-C. What was measured until then:")

    def add(self, arm: str, seed: int, measured: Mapping[str, float]) -> None:
        """Notes what was measured at the next point of the run of `arm` with `seed`."""
        # JAX waits for its devices here. After Ctrl-C meanwhile, no run has half a measurement.
        values = {metric: float(value) for metric, value in measured.items()}
        if seed == len(self.curves[arm]):
            self.curves[arm].append({metric: [] for metric in values})
        run = self.curves[arm][seed]
        number = len(next(iter(run.values())))
        for metric, value in values.items():
            run[metric].append(value)
        since_last = self.points[number] - (self.points[number - 1] if number else 0)
        self._progress.update(self._bar, advance=since_last, description=f"seed {seed + 1}: {arm}")

    def at_end(self, metric: str) -> dict[str, list[float]]:
        """The last value of `metric` in each run, over the seeds that all arms have finished."""
        finished = self._finished_seeds()
        return {arm: [run[metric][-1] for run in runs[:finished]] for arm, runs in self.curves.items()}

    def report(
        self,
        console: Console,
        metrics: Mapping[str, int],
        *,
        compare: Sequence[str],
        against: Mapping[str, str] | None = None,
        notes: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Prints the table of `metrics` (each with its number of decimals), and how the arms compare in some.

        `against` says which arm each arm is compared with, all others with the first if it is left out.
        `notes` are columns of what is not measured: the cell of each arm, by the column's heading.

        Of a run that was stopped, the seeds count that every arm has finished. If there is none, the table
        shows how far each arm has come.
        """
        seeds = self._finished_seeds()
        notes = notes or {}
        if not seeds:
            rows = []
            for arm, runs in self.curves.items():
                last = runs[0] if runs else {}
                reached = self.points[len(next(iter(last.values()))) - 1] if last else 0
                cells = [
                    f"{last[metric][-1]:.{digits}f}" if last else "-" for metric, digits in metrics.items()
                ]
                noted = [column[arm] for column in notes.values()]
                rows.append([arm, *noted, f"{reached} of {self.points[-1]}", *cells])
            print_table(console, self.title, ["arm", *notes, self.unit, *metrics], rows)
            console.print("No seed is finished in every arm: nothing to compare.")
            return
        rows = [
            [
                arm,
                *(column[arm] for column in notes.values()),
                *(spread(self.at_end(metric)[arm], digits) for metric, digits in metrics.items()),
            ]
            for arm in self.arms
        ]
        print_table(console, self.title, ["arm", *notes, *metrics], rows)
        of = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "1 seed"
        console.print(f"{of}, after {self.points[-1]} {self.unit}")
        first, *others = self.arms
        against = against or dict.fromkeys(others, first)
        for metric, other in itertools.product(compare, dict.fromkeys(against.values())):
            values = self.at_end(metric)
            console.print(f"{metric}, against {other}, seed by seed:")
            for arm in (arm for arm in against if against[arm] == other):
                console.print(f"  {arm}: {difference(values[arm], values[other], metrics[metric])}")
        if seeds > 1:
            console.print(
                "Intervals are over seeds, and say nothing of other data, models or learning rates."
            )

    def draw(
        self,
        metrics: Sequence[str],
        output: pathlib.Path,
        *,
        log: Sequence[str] = (),
        levels: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Saves a picture of `metrics`: the mean of the seeds as a line, their range as a band.

        The metrics in `log` get a logarithmic axis. `levels` are horizontal lines of what is no arm: for a
        metric, values of it by their names. Of a run that was stopped, each arm is drawn as far as
        its first seed, or all of its finished ones, have come.
        """
        figure = Figure(figsize=(5.5 * len(metrics), 4.5), layout="constrained")
        self.draw_on(figure, metrics, log=log, levels=levels)
        figure.savefig(output, dpi=115)

    def draw_on(
        self,
        figure: Figure | SubFigure,
        metrics: Sequence[str],
        *,
        log: Sequence[str] = (),
        levels: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Does what `draw` does on a figure, or a part of one, that has more to show."""
        figure.suptitle(self.title)
        for metric, axes in zip(metrics, np.atleast_1d(figure.subplots(1, len(metrics))), strict=True):
            for (arm, runs), color in zip(self.curves.items(), COLORS[: len(self.arms)], strict=True):
                kept = runs[: max(1, self._finished_seeds())]
                if not kept:
                    continue
                curves = np.array([run[metric] for run in kept])
                points = self.points[: curves.shape[1]]
                axes.plot(points, curves.mean(0), color=color, label=arm, marker="o", markersize=3)
                axes.fill_between(points, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
            for name, value in (levels or {}).get(metric, {}).items():
                axes.axhline(value, color="black", linestyle="--", label=name)
            axes.set(xlabel=self.unit, ylabel=metric)
            drawn = [value for runs in self.curves.values() for run in runs for value in run[metric]]
            if metric in log and any(0 < value < np.inf for value in drawn):
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
        bands = "line: mean of the seeds, band: their range" if self._finished_seeds() > 1 else None
        axes.legend(title=bands)

    def finish(self, console: Console, output: pathlib.Path) -> None:
        """Says where the picture is, and ends the program as a stopped one where it was stopped."""
        console.print(f"The picture is in {output.absolute()}", soft_wrap=True)
        if self.stopped:
            raise SystemExit(130)

    def _finished_seeds(self) -> int:
        """How many seeds every arm has finished."""
        done = [
            sum(all(len(values) == len(self.points) for values in run.values()) for run in runs)
            for runs in self.curves.values()
        ]
        return min(done)
