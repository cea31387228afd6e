"""Trains with and without gradient centralization, and keeps the result of every run.

    python benchmarks/evidence.py --task digits --optimizer adamw --seeds 100

What is there:

- Tasks and optimizers are in `evidence_tasks.py`.
- Arms are the ways to centralize, in `ARMS`. Within a seed all arms have the same initial weights, the same
  data in the same order and the same number of steps.
- Each arm has a learning rate and a weight decay of its own. They are chosen on validation data, with seeds
  that no test uses: see `Grid.choose`.

Every finished run is a line of `evidence_results/TASK.jsonl`. What is there is not run again: what was
stopped goes on where it was. `evidence_analysis.py` makes the tables and pictures from these files.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# One thread for each process: sums in the same order on every number of processors, so the same bits. A
# processor of another kind may round otherwise.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from evidence_tasks import TASKS, ConvNet, Examples, Task
from harness import positive
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import gc_optax

RESULTS = pathlib.Path(__file__).parent / "evidence_results"
DATA_DIR = pathlib.Path("fashion-mnist")  # set by `set_data_dir`
MEASUREMENTS = 10  # of one run, evenly spaced; the last one after the last step
FIRST_TUNING_SEED = 10_000
ROW_OF_RATES = range(-2, 3)  # powers of two around the middle of the grid
DECAYS = {"sgd": (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), "muon": (0.0,)}
DECOUPLED_DECAYS = (0.0, 0.01, 0.1, 1.0, 10.0)
BY_LAYER = ("digits", "mnist1d_mlp")  # GC on one layer at a time
BY_LAYER_OPTIMIZERS = ("sgd", "adamw")
SEEDS_BY_LAYER = 50
FIRST_DECAY = 2  # the index where the search begins: 1e-3 for SGD, 0.1 where decay is decoupled


# Arms


def project_off_random(axes: Any, seed: jax.Array) -> optax.GradientTransformation:
    r"""The control: off a fixed random direction, where GC projects off the mean direction.

    Every weight vector has a unit vector \(u\) of its own; its gradient \(g\) becomes \(g - (u \cdot g) u\).
    With \(u = (1, ..., 1) / \sqrt{n}\) this is GC.

    Args:
        axes: as for `gc_optax.centralize`, for every leaf.
        seed: of the directions.
    """

    def mean_part(tree: Any) -> Any:
        return jax.tree.map(jnp.subtract, tree, gc_optax.centralize_gradients(tree, axes))

    def init(params: Any) -> Any:
        drawn = optax.tree.random_like(jax.random.key(seed), params, jax.random.normal)
        squares = mean_part(jax.tree.map(jnp.square, drawn))
        # Scaled to entries with a mean square of 1, for which the mean of the products is all that it takes.
        # What is not centralized has no mean part, and no direction to project off.
        return jax.tree.map(lambda r, s: jnp.where(s > 0, r / jnp.sqrt(s), 0), drawn, squares)

    def update(updates: Any, directions: Any, params: Any = None) -> tuple[Any, Any]:
        along = mean_part(jax.tree.map(jnp.multiply, updates, directions))
        return jax.tree.map(lambda u, d, a: u - a * d, updates, directions, along), directions

    return optax.GradientTransformation(init, update)


class Arm(NamedTuple):
    """A way to centralize: what stands before the optimizer, or what is done with its updates."""

    title: str
    wrap: Callable[[optax.GradientTransformation, Any, jax.Array], optax.GradientTransformation]


ARMS = {
    "none": Arm("no GC", lambda optimizer, axes, seed: optimizer),
    "gradients": Arm(
        "GC of the gradients",
        lambda optimizer, axes, seed: gc_optax.centralized(optimizer, gc_optax.centralize(axes)),
    ),
    "updates": Arm(
        "GC of the updates",
        lambda optimizer, axes, seed: gc_optax.centralized(
            optimizer, gc_optax.centralize(axes), where="updates"
        ),
    ),
    "optax": Arm(
        "optax.centralize", lambda optimizer, axes, seed: optax.chain(optax.centralize(), optimizer)
    ),
    "random": Arm(
        "a random direction",
        lambda optimizer, axes, seed: optax.chain(project_off_random(axes, seed), optimizer),
    ),
    "convolutions": Arm(
        "GC of convolutions only",
        lambda optimizer, axes, seed: gc_optax.centralized(
            optimizer, gc_optax.centralize(gc_optax.conv_only(axes))
        ),
    ),
}


def on_one_layer(name: str) -> Arm:
    """GC of the gradient of one layer, for example of `Dense_0`."""

    def wrap(optimizer: Any, axes: Any, seed: jax.Array) -> optax.GradientTransformation:
        alone = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if name in slashed(path).split("/") else gc_optax.WeightAxes(()), axes
        )
        return gc_optax.centralized(optimizer, gc_optax.centralize(alone))

    return Arm(f"GC of {name} only", wrap)


def slashed(path: Any) -> str:
    """The path of a leaf, with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def find_arm(name: str) -> Arm:
    """An arm by its name; that of a layer is "layer:" and the layer's."""
    return on_one_layer(name.removeprefix("layer:")) if name.startswith("layer:") else ARMS[name]


# One run


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """What tells one run from the others; `on` is "validation" or "test"."""

    task: str
    optimizer: str
    arm: str
    rate: float
    decay: float
    on: str
    seed: int
    steps: int


class Model(NamedTuple):
    """The functions of a task, which all arms share, and the axes of its parameters.

    Variables are the parameters and what else the model keeps: `(params, statistics)`. `initial(seed)` makes
    them; `gradients(variables, examples)` gives the gradients and the next statistics; `measure(variables,
    examples)` the loss and the share of errors; `removed(variables, examples)` for each weight the
    `removed_fraction` of its gradient and the squared norm of it.
    """

    axes: Any
    initial: Callable[..., Any]
    gradients: Callable[..., Any]
    measure: Callable[..., Any]
    removed: Callable[..., Any]


def make_optimizer(name: str, rate: Any, decay: Any, steps: int, axes: Any) -> optax.GradientTransformation:
    """An optimizer whose rate rises for a twentieth of the steps, and falls to 0 as a cosine does."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), steps)
    mask = gc_optax.decay_mask(axes)

    def schedule(count: jax.Array) -> jax.Array:
        return rate * shape(count + 1)  # the step without a rate is the last one, and not the first

    if name == "sgd":
        decayed = optax.add_decayed_weights(decay, mask)  # L2, as the authors' SGD has it
        return optax.chain(decayed, optax.sgd(schedule, momentum=0.9))
    if name == "muon":
        hidden = jax.tree.map(lambda leaf: leaf.to_muon() if leaf.role == "hidden" else None, axes)
        return optax.contrib.muon(schedule, muon_weight_dimension_numbers=hidden)
    factory = {"adamw": optax.adamw, "lion": optax.lion}[name]
    return factory(schedule, weight_decay=decay, mask=mask)


@functools.cache
def compile_model(task_name: str) -> Model:
    """What does not depend on the optimizer or the arm."""
    task = TASKS[task_name]
    example = task.split(0, DATA_DIR).train.rows(slice(2))

    def apply(variables: Any, inputs: Any, train: bool) -> tuple[jax.Array, Any]:
        params, statistics = variables
        mutable = ["batch_stats"] if train else []
        return task.model.apply({"params": params, **statistics}, inputs, train, mutable=mutable)

    def initial(seed: Any) -> Any:
        statistics = dict(task.model.init(jax.random.key(seed), example.inputs, False))
        return statistics.pop("params"), statistics

    def loss(params: Any, statistics: Any, examples: Examples) -> tuple[jax.Array, Any]:
        outputs, statistics = apply((params, statistics), examples.inputs, True)
        return task.loss(outputs, examples.targets), statistics

    def gradients(variables: Any, examples: Examples) -> Any:
        return jax.grad(loss, has_aux=True)(*variables, examples)

    def measure(variables: Any, examples: Examples) -> tuple[jax.Array, jax.Array]:
        outputs, _ = apply(variables, examples.inputs, False)
        wrong = jnp.mean(outputs.argmax(-1) != examples.targets)  # of no meaning for numbers
        return task.loss(outputs, examples.targets), wrong

    def removed(variables: Any, examples: Examples) -> Any:
        found, _ = gradients(variables, examples)
        fractions = gc_optax.removed_fraction(found, axes)
        return jax.tree.map(lambda fraction, g: (fraction, jnp.sum(g**2)), fractions, found)

    shapes = jax.eval_shape(initial, 0)
    axes = gc_optax.infer_axes(loss, *shapes, example)
    return Model(axes, jax.jit(initial), gradients, jax.jit(measure), jax.jit(removed))


@functools.cache
def compile_arm(task_name: str, optimizer_name: str, arm_name: str, steps: int) -> tuple[Any, Any]:
    """How an arm starts and steps; seed, rate and decay are arguments, so that one program serves every run.

    Returns:
        `start(variables, settings)`, which makes a state, and `step(state, train, rows)`, which trains on
        some rows of the training examples. The variables are the first of the state.
    """
    model, arm = compile_model(task_name), find_arm(arm_name)

    def optimizer(settings: Any) -> optax.GradientTransformation:
        seed, rate, decay = settings
        return arm.wrap(make_optimizer(optimizer_name, rate, decay, steps, model.axes), model.axes, seed)

    def start(variables: Any, settings: Any) -> Any:
        return variables, optimizer(settings).init(variables[0]), settings

    def step(state: Any, train: Examples, rows: jax.Array) -> Any:
        (params, statistics), inner, settings = state
        batch = Examples(train.inputs[rows], train.targets[rows])
        gradients, statistics = model.gradients((params, statistics), batch)
        updates, inner = optimizer(settings).update(gradients, inner, params)
        return (optax.apply_updates(params, updates), statistics), inner, settings

    return jax.jit(start), jax.jit(step, donate_argnums=0)


def draw_batches(task: Task, seed: int, examples: int, steps: int) -> Iterable[np.ndarray]:
    """The rows of each step: passes over the training examples, each in an order of its own."""
    order = np.random.default_rng(seed)
    each = examples // task.batch
    passes = (order.permutation(examples)[: each * task.batch] for _ in range(math.ceil(steps / each)))
    return (rows for one in passes for rows in one.reshape(each, task.batch))


def train(run: Run) -> dict[str, Any]:
    """Trains once.

    Returns:
        The run, and what was measured at some of the steps: on test or validation data the `loss` and, but
        for regression, the `error` in percent. For tests without GC, also `removed`: for each parameter the
        removed fraction and the squared norm of its gradient on 512 training examples, before the first step
        and after a twentieth of all. Where a loss is no number the run ends, and `diverged` says when.
    """
    task = TASKS[run.task]
    model = compile_model(run.task)
    start, step = compile_arm(run.task, run.optimizer, run.arm, run.steps)
    split = task.split(run.seed, DATA_DIR)
    examples, judges = jax.device_put((split.train, getattr(split, run.on)))
    some = split.train.rows(slice(512))
    state = start(model.initial(run.seed), (run.seed, run.rate, run.decay))
    points = sorted({max(1, run.steps * (n + 1) // MEASUREMENTS) for n in range(MEASUREMENTS)})
    labelled = not jnp.issubdtype(split.train.targets.dtype, jnp.floating)
    measured: dict[str, Any] = dataclasses.asdict(run) | {"at": [], "loss": []}
    measured |= {"error": []} if labelled else {}
    removed = []
    with_removed = run.arm == "none" and run.on == "test"
    for number, rows in zip(
        range(run.steps), draw_batches(task, run.seed, len(split.train.targets), run.steps), strict=False
    ):
        if with_removed and number in (0, max(1, run.steps // 20)):
            removed.append(model.removed(state[0], some))
        state = step(state, examples, rows)
        if number + 1 in points:
            loss, error = map(float, model.measure(state[0], judges))
            if not math.isfinite(loss):
                return measured | {"diverged": number + 1}
            measured["at"].append(number + 1)
            measured["loss"].append(float(f"{loss:.6g}"))
            if labelled:
                measured["error"].append(round(100 * error, 4))
    if with_removed:
        measured["removed"] = [
            {
                slashed(path): [float(f"{value:.4g}") for value in pair]
                for path, pair in jax.tree.flatten_with_path(
                    tree, is_leaf=lambda node: isinstance(node, tuple)
                )[0]
            }
            for tree in removed
        ]
    return measured


# Which runs there are


def as_run(measured: Mapping[str, Any]) -> Run:
    """The run that a line is about."""
    return Run(*(measured[field.name] for field in dataclasses.fields(Run)))


class Results:
    """The lines of a folder of results, one file for each task; what is added is written at once."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.lines: dict[Run, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            text = path.read_text()
            if text and not text.endswith("\n"):
                raise SystemExit(f"The last line of {path} was cut off while it was written: remove it.")
            for line in text.splitlines():
                measured = json.loads(line)
                self.lines[as_run(measured)] = measured

    def add(self, measured: dict[str, Any]) -> None:
        """Keeps a result, and writes it."""
        self.lines[as_run(measured)] = measured
        with (self.folder / f"{measured['task']}.jsonl").open("a") as file:
            file.write(json.dumps(measured) + "\n")

    def final(self, run: Run) -> float:
        """The metric at the end, lower is better; one that diverged is as good as one that learnt nothing."""
        measured, task = self.lines[run], TASKS[run.task]
        return task.nothing_learnt if "diverged" in measured else measured[task.metric][-1]


@dataclasses.dataclass(frozen=True)
class Point:
    """A setting on the grid: the power of two of the rate, and the index of the decay."""

    rate: int
    decay: int

    def neighbours(self, decays: int) -> list["Point"]:
        """Twice and half the rate; more and less decay, where there is."""
        rates = [Point(self.rate + by, self.decay) for by in (-1, 1)]
        return rates + [Point(self.rate, d) for d in (self.decay - 1, self.decay + 1) if 0 <= d < decays]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The settings of an arm: learning rates that are powers of two apart, and a row of weight decays."""

    task: str
    optimizer: str
    arm: str
    steps: int
    tuning_seeds: int

    @property
    def decays(self) -> Sequence[float]:
        """The decays to choose from; the language models hardly see a text twice, and have a fixed one."""
        row = DECAYS.get(self.optimizer, DECOUPLED_DECAYS)
        return row if TASKS[self.task].tunes_decay else row[min(FIRST_DECAY, len(row) - 1) :][:1]

    @property
    def first_decay(self) -> int:
        """The index of the decay with which the search begins."""
        return min(FIRST_DECAY, len(self.decays) - 1)

    def run(self, point: Point, on: str, seed: int) -> Run:
        """One run with a setting."""
        rate = TASKS[self.task].rates[self.optimizer] * 2.0**point.rate
        return Run(self.task, self.optimizer, self.arm, rate, self.decays[point.decay], on, seed, self.steps)

    def tuning(self, point: Point) -> list[Run]:
        """The runs that judge a setting."""
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.tuning_seeds)
        return [self.run(point, "validation", seed) for seed in seeds]

    def choose(self, results: Results) -> tuple[Point | None, list[Run]]:
        """The best setting, and what has to be run before it is known.

        First come five rates with the decay in the middle. From the best of them on, the neighbours of the
        best setting so far are tried, until none is better: then the best rate lies within the grid.
        """
        row = [Point(rate, self.first_decay) for rate in ROW_OF_RATES]
        known: dict[Point, float] = {}

        def missing(points: Iterable[Point]) -> list[Run]:
            runs = {point: self.tuning(point) for point in points}
            left = [run for tuning in runs.values() for run in tuning if run not in results.lines]
            if not left:
                known.update({p: statistics.fmean(map(results.final, tuning)) for p, tuning in runs.items()})
            return left

        points = row
        while True:
            if left := missing(points):
                return None, left
            best = min(known, key=lambda point: known[point])
            points = [point for point in best.neighbours(len(self.decays)) if point not in known]
            if not points:
                return best, []


def layers(task: Task) -> list[str]:
    """The layers of a model that have a kernel."""
    example = task.split(0, DATA_DIR).train.rows(slice(2))
    params = jax.eval_shape(lambda: task.model.init(jax.random.key(0), example.inputs, False))["params"]
    return [name for name in params if "kernel" in params[name]]


def arms_of(task: Task) -> list[str]:
    """The arms of a task: convolutions only, where there are convolutions."""
    return [arm for arm in ARMS if arm != "convolutions" or isinstance(task.model, ConvNet)]


def by_layer(grid: Grid, best: Point, seeds: int) -> list[Run]:
    """GC of one layer at a time, at the best rate without GC and at a quarter of it."""
    arms = ["none", "gradients", *(f"layer:{name}" for name in layers(TASKS[grid.task]))]
    return [
        dataclasses.replace(grid, arm=arm).run(Point(best.rate + by, best.decay), "test", seed)
        for by in (0, -2)
        for arm in arms
        for seed in range(min(seeds, SEEDS_BY_LAYER))
    ]


def needed(results: Results, chosen: argparse.Namespace) -> list[Run]:
    """What is to be run next; what comes after that depends on how it ends."""
    runs: dict[Run, None] = {}
    for name in chosen.task:
        for optimizer in [optimizer for optimizer in TASKS[name].rates if optimizer in chosen.optimizer]:
            runs |= dict.fromkeys(needed_by(results, name, optimizer, chosen))
    return [run for run in runs if run not in results.lines]


def needed_by(results: Results, name: str, optimizer: str, chosen: argparse.Namespace) -> list[Run]:
    """What a task with an optimizer needs next; a part of it may be there.

    An arm is tuned and then tested. It and "no GC" are tested with the setting of each other too: where they
    differ only with settings that differ, the choice may have made the difference.
    """
    task, runs, best = TASKS[name], [], {}
    seeds = range(chosen.seeds or task.seeds)
    grid = Grid(name, optimizer, "none", chosen.steps or task.steps, chosen.tuning_seeds or task.tuning_seeds)
    for arm in [arm for arm in arms_of(task) if arm in chosen.arm or arm == "none"]:
        best[arm], left = dataclasses.replace(grid, arm=arm).choose(results)
        runs += left
    for arm, point in best.items():
        pairs = itertools.product({arm, "none"}, {point, best["none"]} - {None})
        runs += [
            dataclasses.replace(grid, arm=one).run(at, "test", seed) for one, at in pairs for seed in seeds
        ]
    if best["none"] and name in BY_LAYER and optimizer in BY_LAYER_OPTIMIZERS:
        runs += by_layer(grid, best["none"], len(seeds))
    return list(dict.fromkeys(runs))


# The command line


def set_data_dir(folder: pathlib.Path) -> None:
    """Says where Fashion-MNIST is."""
    global DATA_DIR
    DATA_DIR = folder


def prepare_process(folder: pathlib.Path, cores: Any) -> None:
    """For one process of several: it keeps to a processor of its own."""
    set_data_dir(folder)
    if cores is not None:
        os.sched_setaffinity(0, {cores.get()})


@contextlib.contextmanager
def trainers(processes: int, data_dir: pathlib.Path) -> Iterator[Callable[[Sequence[Run]], Iterable[Any]]]:
    """A function that trains runs, in this process or in several, and gives what it measured as it comes."""
    set_data_dir(data_dir)
    if processes == 1:
        yield lambda runs: map(train, runs)
        return
    context = multiprocessing.get_context("spawn")
    cores = None
    if hasattr(os, "sched_getaffinity") and processes <= len(os.sched_getaffinity(0)):
        cores = context.SimpleQueue()
        for core in sorted(os.sched_getaffinity(0))[:processes]:
            cores.put(core)
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, prepare_process, (data_dir, cores))

    def in_pool(runs: Sequence[Run]) -> Iterator[Any]:
        # Processes start with the first of them, and take over from here that Ctrl-C is not for them.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        futures = [pool.submit(train, run) for run in runs]
        signal.signal(signal.SIGINT, before)
        return (future.result() for future in concurrent.futures.as_completed(futures))

    try:
        yield in_pool
    finally:
        pool.shutdown(cancel_futures=True)


def perform(runs: Sequence[Run], trainer: Any, keep: Callable[[dict[str, Any]], None]) -> None:
    """Trains each, with a bar that shows the time left, and hands over what comes."""
    columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
    with Progress(*columns, speed_estimate_period=600) as bar:
        shown = bar.add_task("compiling", total=len(runs))
        for one in trainer(runs):
            keep(one)
            text = f"{one['task']} {one['optimizer']} {one['arm']} {one['rate']:g} {one['decay']:g}"
            bar.update(shown, advance=1, description=text)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    optimizers = sorted({optimizer for task in TASKS.values() for optimizer in task.rates})
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="all by default")
    parser.add_argument("--optimizer", nargs="+", choices=optimizers, default=optimizers)
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=positive, help="tests of each arm; by default those of the task")
    parser.add_argument("--tuning-seeds", type=positive, help="runs that judge a setting; for a quick try")
    parser.add_argument("--steps", type=positive, help="of each run; for a quick try")
    parser.add_argument("--processes", type=positive, default=1)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--data-dir", type=pathlib.Path, default=DATA_DIR, help="of Fashion-MNIST")
    parser.add_argument(
        "--again",
        action="store_true",
        help="run the tests of the first SEEDS seeds again, and say which do not give what the results have",
    )
    chosen = parser.parse_args()
    if (chosen.steps or chosen.tuning_seeds) and chosen.results == RESULTS:
        parser.error("a quick try with --steps or --tuning-seeds needs a folder of its own: give --results")
    if chosen.steps == 1:
        parser.error("argument --steps: must be at least 2, of which the last has a learning rate of 0")
    if not any(name in TASKS[task].rates for task in chosen.task for name in chosen.optimizer):
        parser.error(f"{', '.join(chosen.task)} is not run with {', '.join(chosen.optimizer)}")
    for name in chosen.task:
        try:
            TASKS[name].split(0, chosen.data_dir)
        except FileNotFoundError as error:
            parser.error(f"{name} needs Fashion-MNIST, and there is no {error.filename}: give --data-dir")
        except ImportError as error:
            parser.error(f"{name} needs {error.name}: pip install '.[evidence]'")
    return chosen


def compare_again(results: Results, trainer: Any, chosen: argparse.Namespace) -> bool:
    """Runs what the results have once more, and says whether it came out the same."""
    runs = [
        run
        for run in results.lines
        if run.task in chosen.task and run.optimizer in chosen.optimizer
        if run.arm in chosen.arm or (run.arm not in ARMS and chosen.arm == list(ARMS))
        if run.on == "test" and run.seed < (chosen.seeds or TASKS[run.task].seeds)
    ]
    differ: list[str] = []

    def compare(measured: dict[str, Any]) -> None:
        kept = results.lines[as_run(measured)]
        if measured != kept:
            losses = [line["loss"][-1] if line["loss"] else math.inf for line in (kept, measured)]
            differ.append(f"not the same: {as_run(measured)}, a loss of {losses[1]} and not of {losses[0]}")

    perform(runs, trainer, compare)
    print(f"{len(runs) - len(differ)} of {len(runs)} runs gave the results that are kept.", *differ, sep="\n")
    return bool(runs) and not differ


def main() -> None:
    """Runs what is not there yet."""
    chosen = parse_arguments()
    chosen.results.mkdir(parents=True, exist_ok=True)
    results = Results(chosen.results)
    try:
        with trainers(chosen.processes, chosen.data_dir) as trainer:
            if chosen.again:
                sys.exit(not compare_again(results, trainer, chosen))
            while runs := needed(results, chosen):
                perform(runs, trainer, results.add)
    except KeyboardInterrupt:
        print(f"Stopped by Ctrl-C; {len(results.lines)} runs are kept in {chosen.results}.", file=sys.stderr)
        sys.exit(130)
    print(f"All is there: {len(results.lines)} runs in {chosen.results}.")


if __name__ == "__main__":
    main()
