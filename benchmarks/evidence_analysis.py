"""Makes the tables and the pictures of docs/evidence.md from the runs that `evidence.py` kept.

    python benchmarks/evidence_analysis.py

Every arm is compared with "no GC" seed by seed: both have the same initial weights and the same data, and
each has the learning rate and the weight decay that were best for it on validation data. All metrics are such
that lower is better, so a negative difference is a gain.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import math
import pathlib
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from evidence import ARMS, RESULTS, ROW_OF_RATES, Grid, Point, Results, Run, arms_of
from evidence_tasks import TASKS, Task
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from scipy import stats

DOCS = pathlib.Path(__file__).parent.parent / "docs"
ALL_LAYERS = "all layers"
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "lion": "Lion", "muon": "Muon"}
COLORS = {
    "none": "#666666",
    "gradients": "#0072b2",
    "updates": "#56b4e9",
    "optax": "#d55e00",
    "random": "#009e73",
    "convolutions": "#cc79a7",
}
CLAIM = ("p", "both as best without GC", "both as best for the arm", "")
MARKERS = dict(zip(COLORS, "osD^vP", strict=True))


# Statistics


class Paired(NamedTuple):
    """The mean of paired differences, its 95 % interval by Student's t, and the p-value of a mean of zero."""

    mean: float
    low: float
    high: float
    p: float

    def scaled(self, by: float) -> "Paired":
        """In another unit, for example percent of something."""
        return Paired(self.mean * by, self.low * by, self.high * by, self.p)

    def told(self, digits: int) -> str:
        """For instance "-0.21 (-0.33 to -0.09)"."""
        return f"{self.mean:+.{digits}f} ({self.low:+.{digits}f} to {self.high:+.{digits}f})"

    @property
    def shows(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def pair(values: Sequence[float], others: Sequence[float]) -> Paired:
    """How far some values lie from others, seed by seed."""
    differences = np.subtract(values, others)
    if len(differences) < 2:
        raise ValueError(f"an interval needs two seeds or more, got {len(differences)}")
    if not differences.any():
        return Paired(0.0, 0.0, 0.0, 1.0)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    return Paired(float(differences.mean()), float(interval.low), float(interval.high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of a single false finding among all of them stays below 5 % at 0.05."""
    corrected = [0.0] * len(p_values)
    so_far = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = so_far
    return corrected


class Correlation(NamedTuple):
    """Spearman's rank correlation with a 95 % interval."""

    rho: float
    low: float
    high: float

    def __str__(self) -> str:
        """For instance "-0.40 (-0.80 to +0.20)"."""
        return f"{self.rho:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def correlate(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """How well the order of `x` tells the order of `y`, for at least four points.

    The interval is Fisher's, with the variance of Bonett and Wright, Psychometrika 65 (2000).
    """
    rho = float(stats.spearmanr(x, y).statistic)
    half = stats.norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    center = math.atanh(min(max(rho, -0.9999), 0.9999))
    return Correlation(rho, math.tanh(center - half), math.tanh(center + half))


# What was run


class Curve(NamedTuple):
    """A metric, and the steps after which it was measured."""

    at: list[int]
    metric: list[float]

    @property
    def final(self) -> float:
        """The metric after the last step."""
        return self.metric[-1]

    def steps_to(self, threshold: float) -> float:
        """The step at which it is first as good as a threshold, on straight lines between measurements.

        The last step where it never is, and the first measurement where it is from there on.
        """
        reached = [number for number, value in enumerate(self.metric) if value <= threshold]
        if not reached:
            return self.at[-1]
        if reached[0] == 0:
            return self.at[0]
        before, after = reached[0] - 1, reached[0]
        share = (self.metric[before] - threshold) / (self.metric[before] - self.metric[after])
        return self.at[before] + share * (self.at[after] - self.at[before])


class Setting(NamedTuple):
    """An arm with a rate and a decay."""

    arm: str
    rate: float
    decay: float


@dataclass(frozen=True)
class Case:
    """A task with an optimizer, and its runs."""

    name: str
    optimizer: str
    results: Results

    @property
    def task(self) -> Task:
        """The task."""
        return TASKS[self.name]

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.task.title}, {OPTIMIZERS[self.optimizer]}"

    @functools.cached_property
    def runs(self) -> list[Run]:
        """All of them."""
        return [run for run in self.results.lines if (run.task, run.optimizer) == (self.name, self.optimizer)]

    @functools.cached_property
    def _tests(self) -> dict[Setting, dict[int, dict[str, Any]]]:
        """The lines of the tests, by their setting and then by seed."""
        tests: dict[Setting, dict[int, dict[str, Any]]] = collections.defaultdict(dict)
        for run in sorted(run for run in self.runs if run.on == "test"):
            tests[Setting(run.arm, run.rate, run.decay)][run.seed] = self.results.lines[run]
        return tests

    @functools.cached_property
    def _grid(self) -> Grid:
        """With as many steps and tuning seeds as the runs have."""
        steps = {run.steps for run in self.runs}
        if len(steps) > 1:
            raise SystemExit(f"{self.title}: there are runs of {sorted(steps)} steps, which do not compare")
        tuning = {run.seed for run in self.runs if run.on == "validation"}
        return Grid(self.name, self.optimizer, "none", *steps, len(tuning))

    def grid(self, arm: str) -> Grid:
        """The settings of an arm."""
        return dataclasses.replace(self._grid, arm=arm)

    @functools.cached_property
    def best(self) -> dict[str, Point]:
        """The setting that was chosen for each arm for which the search has ended."""
        chosen = {arm: self.grid(arm).choose(self.results)[0] for arm in arms_of(self.task)}
        return {arm: point for arm, point in chosen.items() if point is not None}

    def tested(self, arm: str, point: Point | None = None) -> dict[int, dict[str, Any]]:
        """What the tests measured, by seed; with the setting that was chosen, or with another."""
        run = self.grid(arm).run(point or self.best[arm], "test", 0)
        return self._tests.get(Setting(arm, run.rate, run.decay), {})

    @functools.cached_property
    def arms(self) -> list[str]:
        """Those that have all their tests, as "no GC" has, and at least two that did not fail."""

        def is_complete(arm: str) -> bool:
            settings = [(self.best[one], self.best[one]) for one in ("none", arm)]
            settings.append((self.best[arm], self.best["none"]))
            tests = [
                self.tested(one, at) for both in settings for one, at in zip((arm, "none"), both, strict=True)
            ]
            has_all = all(test.keys() == tests[0].keys() for test in tests)
            return has_all and all(len(self.paired(arm, *both)[0]) > 1 for both in settings)

        if "none" not in self.best:
            return []
        return [arm for arm in self.best if arm != "none" and is_complete(arm)]

    def failed(self, line: dict[str, Any]) -> bool:
        """Whether a run diverged, or learnt nothing."""
        return "diverged" in line or line[self.task.metric][-1] >= self.task.nothing_learnt

    def paired(
        self, arm: str, point: Point | None = None, without: Point | None = None
    ) -> tuple[list[Curve], list[Curve]]:
        """The curves of the metric of an arm and of "no GC", for the seeds with which neither failed.

        Args:
            arm: which one.
            point: the setting of the arm; by default the one that was chosen for it.
            without: the setting of "no GC"; by default the one that was chosen for it.
        """
        of_arm, of_none = self.tested(arm, point), self.tested("none", without)
        both = [(of_arm[seed], of_none[seed]) for seed in of_arm if seed in of_none]
        trained = [pair for pair in both if not any(map(self.failed, pair))]
        curves = [[Curve(line["at"], line[self.task.metric]) for line in pair] for pair in trained]
        return [curve for curve, _ in curves], [curve for _, curve in curves]


class Claim(NamedTuple):
    """A difference of an arm and "no GC": with the settings that were chosen, and with the same setting.

    Lower is better. A gain has to hold against "no GC" with the setting of the arm too, and a loss for the
    arm with the setting of "no GC": with another setting either might have been as good as the other.

    Args:
        chosen: where each has its own setting.
        at_none: where both have that of "no GC".
        at_own: where both have that of the arm.
        p: the p-value of `chosen`, corrected over all rows.
    """

    chosen: Paired
    at_none: Paired
    at_own: Paired
    p: float = 1.0

    def verdict(self, gain: str, loss: str) -> str:
        """In words, for example "better" for a gain and "worse" for a loss."""
        if not self.chosen.shows:
            return "no difference shown"
        word, same = (gain, self.at_own) if self.chosen.mean < 0 else (loss, self.at_none)
        if self.p >= 0.05:
            return f"{word}, not after correction"
        if not same.shows or same.mean * self.chosen.mean < 0:
            return f"{word}, not with the same setting"
        return word


@dataclass(frozen=True)
class Row:
    """An arm of a case beside "no GC".

    Args:
        case: the task and the optimizer.
        arm: which one.
        seeds: with which neither failed; the differences are over these.
        failed: how many runs of the arm and of "no GC" did.
        without: the mean of the final metric without GC.
        final: the claim about the final metric.
        best: the difference of the best value that was measured.
        steps: the claim about the steps until the metric is what "no GC" has after half of them, in percent.
    """

    case: Case
    arm: str
    seeds: int
    failed: tuple[int, int]
    without: float
    final: Claim
    best: Paired
    steps: Claim

    @property
    def change(self) -> Paired:
        """The final difference, in percent of the metric without GC."""
        return self.final.chosen.scaled(100 / self.without)

    @property
    def verdict(self) -> str:
        """What the final metric shows."""
        word = self.final.verdict("better", "worse")
        more_failed = word == "better" and self.failed[0] > self.failed[1]
        return "better, but more runs failed" if more_failed else word

    @property
    def speed(self) -> str:
        """What the steps to halfway show."""
        return self.steps.verdict("faster", "slower")


def final_difference(curves: Iterable[Curve], others: Iterable[Curve]) -> Paired:
    """How far the metric after the last step lies from that of others, seed by seed."""
    return pair([curve.final for curve in curves], [curve.final for curve in others])


def compare(case: Case, arm: str) -> Row:
    """An arm beside "no GC", seed by seed."""
    with_gc, without = case.paired(arm)
    failed = [sum(map(case.failed, case.tested(one).values())) for one in (arm, "none")]
    halfway = statistics.fmean(curve.metric[len(curve.at) // 2 - 1] for curve in without)
    half = statistics.fmean(curve.steps_to(halfway) for curve in without)

    def steps_difference(curves: Iterable[Curve], others: Iterable[Curve]) -> Paired:
        steps = [[curve.steps_to(halfway) for curve in both] for both in (curves, others)]
        return pair(*steps).scaled(100 / half)

    same = [case.paired(arm, case.best[one], case.best[one]) for one in ("none", arm)]
    return Row(
        case=case,
        arm=arm,
        seeds=len(without),
        failed=(failed[0], failed[1]),
        without=statistics.fmean(curve.final for curve in without),
        final=Claim(*(final_difference(*both) for both in [(with_gc, without), *same])),
        best=pair(*([min(curve.metric) for curve in curves] for curves in (with_gc, without))),
        steps=Claim(*(steps_difference(*both) for both in [(with_gc, without), *same])),
    )


def all_rows(cases: Iterable[Case]) -> list[Row]:
    """Every arm of every case, with p-values that are corrected over all of them."""
    rows = [compare(case, arm) for case in cases for arm in case.arms]
    finals, steps = (
        holm([claim.chosen.p for claim in claims])
        for claims in ([row.final for row in rows], [row.steps for row in rows])
    )
    return [
        dataclasses.replace(row, final=row.final._replace(p=p_final), steps=row.steps._replace(p=p_steps))
        for row, p_final, p_steps in zip(rows, finals, steps, strict=True)
    ]


# What predicts the gain


def removed_of(case: Case, when: int, layer: str | None = None) -> float:
    """The share of the squared norm of the gradients that GC removes, in tests without GC.

    It is the mean over the weights of a model, and over the seeds.

    Args:
        case: whose.
        when: 0 for before the first step, 1 for after a twentieth of them.
        layer: of this layer's weights alone; of all weights that are centralized otherwise.
    """
    lines = [line["removed"] for line in case.tested("none").values()]
    weights = [path for path in lines[0][0] if any(one[path][0] > 0 for line in lines for one in line)]
    if layer is not None:
        weights = [path for path in weights if layer in path.split("/")]
    return statistics.fmean(line[when][path][0] for line in lines for path in weights)


@dataclass(frozen=True)
class Gain:
    """What GC changes, in percent of the metric without it, and what it removes at the start and early on.

    Several optimizers on the same `model` count as one point of a correlation, at their mean.
    """

    model: str
    optimizer: str
    removed: tuple[float, float]
    change: Paired


def gains_of_tasks(rows: Iterable[Row]) -> list[Gain]:
    """Of GC of the gradients on the whole model."""
    return [
        Gain(
            row.case.task.title,
            row.case.optimizer,
            (removed_of(row.case, 0), removed_of(row.case, 1)),
            row.change,
        )
        for row in rows
        if row.arm == "gradients"
    ]


def gains_of_layers(cases: Iterable[Case], by: int) -> list[Gain]:
    """Of GC of one layer at a time and of all, with 2 to the power of `by` times the best rate without GC.

    Layers that were not run are left out.
    """
    found = []
    for case in cases:
        arms = sorted({run.arm for run in case.runs if run.arm.startswith("layer:")})
        for arm in [*arms, "gradients"] if arms else []:
            point = Point(case.best["none"].rate + by, case.best["none"].decay)
            with_gc, without = case.paired(arm, point, point)
            if len(without) < 2:
                continue
            change = final_difference(with_gc, without).scaled(
                100 / statistics.fmean(curve.final for curve in without)
            )
            layer = arm.removeprefix("layer:") if arm != "gradients" else None
            removed = removed_of(case, 0, layer), removed_of(case, 1, layer)
            model = f"{case.task.title}, {layer or ALL_LAYERS}"
            found.append(Gain(model, case.optimizer, removed, change))
    return found


# Tables


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def digits(task: Task) -> int:
    """Decimals of its metric that mean something."""
    return 2 if task.metric == "error" else 4


def told_p(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def short_table(rows: Sequence[Row]) -> str:
    """GC of the gradients on every task."""
    return table(
        ["task and optimizer", "seeds", "without GC", "difference with GC (95 % interval)", "final", "speed"],
        [
            [
                row.case.title,
                str(row.seeds),
                f"{row.without:.{digits(row.case.task)}f} {row.case.task.unit}",
                row.final.chosen.told(digits(row.case.task)),
                row.verdict,
                row.speed,
            ]
            for row in rows
            if row.arm == "gradients"
        ],
    )


def claim_cells(claim: Claim, digits: int) -> list[str]:
    """What full tables tell of a claim; their headings are `CLAIM`."""
    settings = claim.at_none.told(digits), claim.at_own.told(digits)
    return [claim.chosen.told(digits), told_p(claim.p), *settings]


def full_table(rows: Sequence[Row]) -> str:
    """Every arm on every task: the final metric."""
    return table(
        ["task and optimizer", "arm", "seeds; failed", "final", *CLAIM],
        [
            [
                f"{row.case.title}: {row.case.task.unit}",
                ARMS[row.arm].title,
                f"{row.seeds}; {row.failed[0]}, {row.failed[1]}",
                *claim_cells(row.final, digits(row.case.task)),
                row.verdict,
            ]
            for row in rows
        ],
    )


def speed_table(rows: Sequence[Row]) -> str:
    """Every arm on every task: the steps until a threshold, and the best value on the way."""
    return table(
        ["task and optimizer", "arm", "best on the way", "steps to halfway, %", *CLAIM],
        [
            [
                f"{row.case.title}: {row.case.task.unit}",
                ARMS[row.arm].title,
                row.best.told(digits(row.case.task)),
                *claim_cells(row.steps, 1),
                row.speed,
            ]
            for row in rows
        ],
    )


def counts_table(rows: Sequence[Row]) -> str:
    """For each arm, in how many of the cases it is better or worse, and faster or slower."""
    lines = []
    for arm in [arm for arm in ARMS if any(row.arm == arm for row in rows)]:
        mine = [row for row in rows if row.arm == arm]
        changes = [row.change.mean for row in mine]
        counts = [sum(row.verdict == word for row in mine) for word in ("better", "worse")]
        counts += [sum(row.speed == word for row in mine) for word in ("faster", "slower")]
        median = f"{statistics.median(changes):+.1f} ({min(changes):+.1f} to {max(changes):+.1f})"
        lines.append([ARMS[arm].title, str(len(mine)), *map(str, counts), median])
    return table(
        ["arm", "cases", "better", "worse", "faster", "slower", "median change of the metric, % (range)"],
        lines,
    )


def small_rate_table(cases: Iterable[Case]) -> str:
    """Every arm beside no GC on validation data, both with the smallest rate that all were tried with."""
    lines = []
    for case in cases:
        point = Point(ROW_OF_RATES[0], case.grid("none").first_decay)
        cells = []
        for arm in ("gradients", "random", "optax"):
            runs = [case.grid(one).tuning(point) for one in (arm, "none")]
            if len(runs[0]) < 2 or not all(run in case.results.lines for run in itertools.chain(*runs)):
                cells.append("-")
                continue
            finals = [list(map(case.results.final, tuning)) for tuning in runs]
            cells.append(pair(*finals).told(digits(case.task)))
        rate = case.grid("none").run(point, "validation", 0).rate
        ratio = 2.0 ** (case.best["none"].rate - point.rate)
        seeds = case.grid("none").tuning_seeds
        lines.append([f"{case.title}: {case.task.unit}", f"{rate:g} (best / {ratio:g})", str(seeds), *cells])
    headings = ["task and optimizer", "rate", "seeds"]
    return table([*headings, *(ARMS[arm].title for arm in ("gradients", "random", "optax"))], lines)


def settings_table(cases: Iterable[Case]) -> str:
    """What was chosen for each arm, and among what."""
    lines = []
    for case in cases:
        for arm in ["none", *case.arms]:
            grid = case.grid(arm)
            tried = {(r.rate, r.decay) for r in case.runs if r.arm == arm and r.on == "validation"}
            chosen = grid.run(case.best[arm], "test", 0)
            rates = sorted({rate for rate, _ in tried})
            lines.append(
                [
                    case.title,
                    ARMS[arm].title,
                    f"{chosen.rate:g}",
                    f"{rates[0]:g} to {rates[-1]:g} ({len(rates)})",
                    f"{chosen.decay:g}",
                    ", ".join(f"{decay:g}" for decay in sorted({decay for _, decay in tried})),
                ]
            )
    return table(["task and optimizer", "arm", "rate", "rates tried", "decay", "decays tried"], lines)


def removed_table(cases: Iterable[Case]) -> str:
    """What GC removes of the gradient of each weight, without GC and under SGD: the mean over the seeds."""
    lines = []
    for case in [case for case in cases if case.optimizer == "sgd"]:
        tested = [line["removed"] for line in case.tested("none").values()]
        for path in tested[0][0]:
            shares = [statistics.fmean(line[when][path][0] for line in tested) for when in (0, 1)]
            if any(shares):
                lines.append([case.title, f"`{path}`", *(f"{100 * share:.1f} %" for share in shares)])
    return table(
        ["task and optimizer", "weight", "before the first step", "after a twentieth of them"], lines
    )


def correlate_gains(gains: Sequence[Gain], when: int) -> Correlation:
    """Of the removed share with the change: negative where more removed goes with a lower metric."""
    models = {gain.model: [other for other in gains if other.model == gain.model] for gain in gains}
    return correlate(
        [statistics.fmean(gain.removed[when] for gain in same) for same in models.values()],
        [statistics.fmean(gain.change.mean for gain in same) for same in models.values()],
    )


def correlation_table(sets: dict[str, list[Gain]]) -> str:
    """Whether what GC removes tells what it changes."""
    return table(
        ["points", "number", "removed before the first step", "removed after a twentieth"],
        [
            [
                title,
                str(len({gain.model for gain in gains})),
                *(str(correlate_gains(gains, when)) for when in (0, 1)),
            ]
            for title, gains in sets.items()
        ],
    )


def layer_table(cases: Sequence[Case]) -> str:
    """GC of one layer at a time."""
    return table(
        [
            "task, optimizer and layer",
            "removed at the start, early",
            "change at the best rate, %",
            "at a quarter, %",
        ],
        [
            [
                f"{one.model}, {OPTIMIZERS[one.optimizer]}",
                ", ".join(f"{100 * share:.0f} %" for share in one.removed),
                one.change.told(1),
                other.change.told(1),
            ]
            for one, other in zip(gains_of_layers(cases, 0), gains_of_layers(cases, -2), strict=True)
        ],
    )


# Pictures


def draw_forest(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Every arm of every case: the change of the final metric in percent, with its interval."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.62 * len(cases)), layout="constrained")
    axes = figure.subplots()
    arms = [arm for arm in ARMS if arm != "none"]
    for row in rows:
        y = cases.index(row.case) + 0.14 * (arms.index(row.arm) - 2)
        mean, low, high, _ = row.change
        axes.errorbar(
            mean,
            y,
            xerr=[[mean - low], [high - mean]],
            color=COLORS[row.arm],
            fmt=MARKERS[row.arm],
            markersize=4.5,
            capsize=2,
            linewidth=1.2,
        )
    for number in range(1, len(cases), 2):
        axes.axhspan(number - 0.5, number + 0.5, color="#f2f2f2", zorder=0)
    axes.axvline(0, color="#333333", linewidth=1)
    for arm in arms:
        axes.plot([], [], MARKERS[arm], color=COLORS[arm], label=ARMS[arm].title)
    axes.set_yticks(range(len(cases)), [f"{case.title} (n = {len(case.tested('none'))})" for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=10)
    ticks = [-50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 200]
    low, high = min(row.change.low for row in rows), max(row.change.high for row in rows)
    axes.set_xlim(1.15 * min(low, -10), 1.15 * max(high, 10))
    inside = [tick for tick in ticks if 1.15 * min(low, -10) <= tick <= 1.15 * max(high, 10)]
    axes.set_xticks(inside, [f"{tick:+d}" if tick else "0" for tick in inside])
    axes.minorticks_off()
    axes.set_xlabel("better   ←   change of the test metric against no GC, %   →   worse", fontsize=9)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def draw_rates(cases: Sequence[Case], path: pathlib.Path) -> None:
    """The metric on validation data at every rate that an arm was tried with, decay in the middle."""
    shown, columns = ("none", "gradients", "optax", "random"), 4
    height = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(12, 2.4 * height + 0.6), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flat
    for case, panel in zip(cases, panels, strict=False):
        rates: set[float] = set()
        for arm in [arm for arm in shown if arm in ("none", *case.arms)]:
            grid = case.grid(arm)
            tuning = [grid.tuning(Point(rate, grid.first_decay)) for rate in range(-10, 11)]
            tried = [runs for runs in tuning if all(run in case.results.lines for run in runs)]
            rates |= {runs[0].rate for runs in tried}
            panel.plot(
                [runs[0].rate for runs in tried],
                [statistics.fmean(map(case.results.final, runs)) for runs in tried],
                f"{MARKERS[arm]}-",
                color=COLORS[arm],
                markersize=4,
            )
        panel.set_yscale("log")
        panel.set_ylim(top=min(panel.get_ylim()[1], case.task.nothing_learnt))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xscale("log", base=2)
        ticks = sorted(rates)[::2]
        panel.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        panel.minorticks_off()
        panel.set_title(case.title, fontsize=8)
        panel.set_ylabel(case.task.unit, fontsize=8)
        panel.tick_params(labelsize=7)
    for panel in list(panels):
        panel.set_axis_off()
    for arm in shown:
        figure.axes[0].plot([], [], f"{MARKERS[arm]}-", color=COLORS[arm], label=ARMS[arm].title)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("learning rate", fontsize=9)
    figure.savefig(path, dpi=100)


def draw_removed(sets: dict[str, list[Gain]], path: pathlib.Path) -> None:
    """What GC changes over what it removes early in training, with intervals."""
    figure = Figure(figsize=(4 * len(sets), 4), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for (title, gains), panel in zip(sets.items(), panels, strict=True):
        for name, color in zip(OPTIMIZERS, COLORS.values(), strict=False):
            mine = [gain for gain in gains if gain.optimizer == name]
            if not mine:
                continue
            x = [100 * gain.removed[1] for gain in mine]
            means = [gain.change.mean for gain in mine]
            low, high = [gain.change.low for gain in mine], [gain.change.high for gain in mine]
            spread = np.array([np.subtract(means, low), np.subtract(high, means)])
            panel.errorbar(
                x, means, yerr=spread, fmt="o", color=color, markersize=4, capsize=2, label=OPTIMIZERS[name]
            )
        panel.axhline(0, color="#333333", linewidth=1)
        panel.set_title(f"{title}\nrank correlation {correlate_gains(gains, 1)}", fontsize=9)
        panel.set_xlabel("removed early in training, %", fontsize=9)
        panel.set_ylabel("change of the metric with GC, %", fontsize=9)
        panel.tick_params(labelsize=8)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=110)


# The pages


def replace_blocks(page: str, blocks: dict[str, str]) -> str:
    """A page with new text between `<!-- evidence: NAME -->` and `<!-- end -->`, for each name in it."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{blocks[match[2]]}\n\n{match[3]}"

    return re.sub(r"(<!-- evidence: ([\w-]+) -->).*?(<!-- end -->)", block, page, flags=re.DOTALL)


def analyse(folder: pathlib.Path) -> tuple[list[Case], list[Row], dict[str, list[Gain]]]:
    """The cases that were tested, their arms beside "no GC", and what GC removes beside what it changes."""
    results = Results(folder)
    there = {(run.task, run.optimizer) for run in results.lines}
    cases = [
        Case(name, optimizer, results)
        for name, task in TASKS.items()
        for optimizer in task.rates
        if (name, optimizer) in there
    ]
    cases = [case for case in cases if case.arms]
    rows = all_rows(cases)
    sets = {
        "tasks": gains_of_tasks(rows),
        "layers, at the best rate": gains_of_layers(cases, 0),
        "layers, at a quarter of it": gains_of_layers(cases, -2),
    }
    sets = {title: [gain for gain in gains if ALL_LAYERS not in gain.model] for title, gains in sets.items()}
    return cases, rows, {title: gains for title, gains in sets.items() if len({g.model for g in gains}) > 3}


def missing(cases: Sequence[Case]) -> list[str]:
    """What is not there, or not in full, a line for each task with an optimizer."""
    there = {(case.name, case.optimizer): case.arms for case in cases}
    lines = []
    for name, task in TASKS.items():
        for optimizer in task.rates:
            known = ("none", *there.get((name, optimizer), []))
            left = [ARMS[arm].title for arm in arms_of(task) if arm not in known]
            if left:
                lines.append(f"{task.title}, {OPTIMIZERS[optimizer]}: {', '.join(left)}")
    return lines


def make_blocks(cases: list[Case], rows: list[Row], sets: dict[str, list[Gain]]) -> dict[str, str]:
    """The text of every block, by its name."""
    return {
        "short": short_table(rows),
        "full": full_table(rows),
        "speed": speed_table(rows),
        "counts": counts_table(rows),
        "small": small_rate_table(cases),
        "settings": settings_table(cases),
        "removed": removed_table(cases),
        "layers": layer_table(cases),
        "correlation": correlation_table(sets),
    }


def main() -> None:
    """Draws the pictures and writes the tables into the pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="the folder of evidence.md")
    chosen = parser.parse_args()
    analysis = cases, rows, sets = analyse(chosen.results)
    if not rows:
        raise SystemExit(f"{chosen.results} has no arm yet that was tuned and tested as no GC was.")
    pictures = chosen.docs / "evidence"
    pictures.mkdir(parents=True, exist_ok=True)
    draw_forest(rows, pictures / "forest.png")
    draw_rates(cases, pictures / "rates.png")
    if sets:
        draw_removed(sets, pictures / "removed.png")
    blocks = make_blocks(*analysis)
    page = chosen.docs / "evidence.md"
    page.write_text(replace_blocks(page.read_text(), blocks))
    print(blocks["counts"])
    for line in missing(cases):
        print(f"Not there, or not in full: {line}")
    print(f"{len(rows)} rows; written into {page}.")


if __name__ == "__main__":
    main()
