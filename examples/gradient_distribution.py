"""Shows what gradient centralization does to the distribution of gradients and of weights over a training.

A small Flax network with ReLUs learns the 1,797 handwritten digits that come with scikit-learn, without and
with `gc_optax.centralize`, from the same weights and with the same order of the data. At the end there are
tables of the two ways and of the layers, and a picture with six panels, a to e of the first seed:

- a: the entries of one gradient, before and after centralization;
- b: the means of its weight vectors' gradients: after centralization they are all 0;
- c: the share of the squared norm of each layer's gradient that is removed, or would be without it;
- d: the means of some weight vectors of one layer;
- e: the weights of that layer at the end;
- f: the training loss of every seed.

    python examples/gradient_distribution.py [--optimizer sgd] [--epochs 20] [--seeds 3]
                                             [--output gradient_distribution.png]

Where the share comes from: a dense layer y = x W has the gradient x^T d, where d is the gradient of y.
Centralization makes it (x - mean_i(x))^T d, with the mean over the inputs i of each example: what it removes
is what the mean of the input activations contributes. Behind a ReLU, whose outputs are never negative, that
is much; right behind a LayerNorm at its initialization it is nothing. For a convolution the same holds with
its patches. If the entries of a gradient had nothing to do with each other, the share would be 1 / fan-in.

What becomes of the weights: SGD, with momentum too, moves along centralized gradients only, so the means of
the weight vectors stay where the initialization put them, up to rounding. Adam divides each entry by a number
of its own, so with `--optimizer adam` they move all the same. What would keep them is
`gc_optax.centralized(optax.adam(2e-3), where="updates")`.

This is a look inside and no evidence about accuracy: one small network, few seeds, and a learning rate that
is the same without and with centralization and was chosen for neither.
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gc_optax

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
}
LEARNING_RATES = {"sgd": 0.05, "adam": 2e-3}
WITHOUT, WITH = "without GC", "with GC"
ARM_COLORS = dict(zip((WITHOUT, WITH), comparison.COLORS, strict=False))
LAYERS = ("conv_0", "conv_1", "dense", "head")
# None of them is the color of an arm.
LAYER_COLORS = ("#000000", "#e69f00", "#cc79a7", "#56b4e9")
LAYER_MARKERS = ("o", "s", "^", "D")
SHOWN = "dense"  # the layer of the histograms: 64 weight vectors with 512 inputs from behind a ReLU
DRAWN = 16  # of its weight vectors: more lines hide each other


class Digits(NamedTuple):
    """Images of shape (n, 8, 8, 1) with values from 0 to 1, and labels of shape (n,)."""

    images: jax.Array
    labels: jax.Array


class CNN(nn.Module):
    """Two convolutions and two dense layers: images (batch, 8, 8, 1) to logits (batch, 10)."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes the logits of the ten digits."""
        x = nn.relu(nn.Conv(16, (3, 3), name="conv_0")(images))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv_1")(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(64, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="head")(x)


def load() -> tuple[Digits, Digits]:
    """Four fifths of the images of each digit to train on, the others to test with."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


@jax.jit
def initialize(seed: int, train: Digits) -> optax.Params:
    """The network's first parameters."""
    return CNN().init(jax.random.key(seed), train.images[:1])


def batches(train: Digits, seed: int, epoch: int, batch_size: int) -> Iterator[Digits]:
    """The batches of an epoch, in an order that the seed and the epoch alone decide."""
    order = np.random.default_rng([seed, epoch]).permutation(len(train.labels))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield Digits(train.images[rows], train.labels[rows])


def loss(params: optax.Params, digits: Digits) -> jax.Array:
    """The mean cross-entropy."""
    logits = CNN().apply(params, digits.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits.labels).mean()


@jax.jit
def evaluate(params: optax.Params, train: Digits, test: Digits) -> tuple[jax.Array, jax.Array]:
    """The loss on all training images and the accuracy on all test images."""
    predicted = CNN().apply(params, test.images).argmax(-1)
    return loss(params, train), (predicted == test.labels).mean()


def kernels(tree: Any) -> dict[str, Any]:
    """What a tree with the structure of the parameters has for the kernel of each layer."""
    return {layer: tree["params"][layer]["kernel"] for layer in LAYERS}


def vector_means(kernel: jax.Array, fan_in: tuple[int, ...]) -> np.ndarray:
    """The mean of every weight vector over its inputs, in float64 so that it adds no rounding of its own."""
    with np.errstate(invalid="ignore"):  # of runs that diverged
        return np.asarray(kernel, np.float64).mean(fan_in).ravel()


def make_step(optimizer: optax.GradientTransformation, axes: Any) -> Callable:
    """A training step that also returns which share of each gradient centralization removes, or would."""

    @jax.jit
    def step(params, state, digits):
        gradients = jax.grad(loss)(params, digits)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, gc_optax.removed_fraction(gradients, axes)

    return step


def train_epochs(
    optimizer: optax.GradientTransformation,
    step: Callable,
    axes: Any,
    seed: int,
    train: Digits,
    test: Digits,
    arguments: argparse.Namespace,
) -> Iterator[tuple[dict[str, float], np.ndarray]]:
    """Trains once; before it and after every epoch it yields what it measured, and the shown kernel."""
    params = initialize(seed, train)
    state = optimizer.init(params)
    fan_in = {layer: weight.fan_in for layer, weight in kernels(axes).items()}
    first_means = {layer: vector_means(kernel, fan_in[layer]) for layer, kernel in kernels(params).items()}
    # Before the first epoch there is one gradient to look at: that of the first step, which is not taken yet.
    *_, removed = step(params, state, next(batches(train, seed, 0, arguments.batch_size)))
    shares = [removed]
    for epoch in range(arguments.epochs + 1):
        train_loss, accuracy = evaluate(params, train, test)
        measured = {"training loss": train_loss, "test accuracy, %": 100 * accuracy}
        for layer, kernel in kernels(params).items():
            # The mean over the steps since the last measurement.
            measured[f"{layer}: removed"] = np.mean([kernels(removed)[layer] for removed in shares])
            distances = abs(vector_means(kernel, fan_in[layer]) - first_means[layer])
            measured[f"{layer}: moved"] = distances.mean()
        yield measured, np.asarray(kernels(params)[SHOWN], np.float64)
        shares = []
        if epoch < arguments.epochs:
            for batch in batches(train, seed, epoch, arguments.batch_size):
                params, state, removed = step(params, state, batch)
                shares.append(removed)


def print_layers(console: Console, runs: comparison.Comparison, axes: Any, params: optax.Params) -> None:
    """Prints, for each layer, how much is removed and how far the means of its weight vectors move."""
    finished = len(runs.at_end("training loss")[WITH])
    kept = {arm: runs.curves[arm][: max(1, finished)] for arm in runs.arms}

    def mean(arm: str, metric: str, point: int, form: str) -> str:
        """The mean over the seeds; "-" where none has started."""
        return format(np.mean([run[metric][point] for run in kept[arm]]), form) if kept[arm] else "-"

    headings = ["layer", "fan-in", "first share", "last share", "with GC", "moved", "with GC"]
    rows = []
    for layer, kernel in kernels(params).items():
        fan_in = math.prod(kernel.shape[axis] for axis in kernels(axes)[layer].fan_in)
        removed, moved = f"{layer}: removed", f"{layer}: moved"
        row = [layer, f"{fan_in}", mean(WITHOUT, removed, 0, ".1%")]
        row += [mean(arm, removed, -1, ".1%") for arm in runs.arms]
        row += [mean(arm, moved, -1, ".1e") for arm in runs.arms]
        rows.append(row)
    comparison.print_table(console, "Layers, without and with GC", headings, rows)
    console.print(
        "share: of the gradient's squared norm that GC removes, first step and last epoch\n"
        "moved: distance of the weight vectors' means from where they began\n"
        f"both: {f'mean of {finished} seeds' if finished > 1 else 'one seed'}"
    )


def draw_gradient(
    entries: Axes, means: Axes, gradients: dict[str, jax.Array], fan_in: tuple[int, ...]
) -> None:
    """Panels a and b: one gradient, its entries and the means of its weight vectors."""
    for axes, values in (
        (entries, {arm: np.ravel(kernel) for arm, kernel in gradients.items()}),
        (means, {arm: vector_means(kernel, fan_in) for arm, kernel in gradients.items()}),
    ):
        largest = max(abs(value).max() for value in values.values())
        bins = np.linspace(-largest, largest, 62)  # 61 of them: one has 0 in its middle
        for (arm, value), color in zip(values.items(), ARM_COLORS.values(), strict=True):
            axes.hist(value, bins, color=color, alpha=0.6, label=arm)
        axes.legend()
    entries.set(title=f"a  First gradient of {SHOWN}", xlabel="entry", ylabel="entries", yscale="log")
    means.set(title="b  Means of that gradient's vectors", xlabel="mean entry", ylabel="weight vectors")


def draw_removed(axes: Axes, runs: comparison.Comparison) -> None:
    """Panel c: how much of each layer's gradient is removed, or would be."""
    for layer, color, marker in zip(LAYERS, LAYER_COLORS, LAYER_MARKERS, strict=True):
        for arm, style in ((WITHOUT, ":"), (WITH, "-")):
            for run in runs.curves[arm][:1]:
                values = 100 * np.array(run[f"{layer}: removed"])
                points = runs.points[: len(values)]
                axes.plot(points, values, style, color=color, marker=marker, markersize=4)
        axes.plot([], [], color=color, marker=marker, markersize=4, label=layer)
    axes.set(title="c  Share that GC removes", xlabel="epochs", ylabel="% of squared norm", ylim=(0, 100))
    axes.legend(title="dotted: without GC", ncols=2, loc="upper right")


def draw_drift(
    axes: Axes, runs: comparison.Comparison, shown: dict[str, list[np.ndarray]], fan_in: tuple[int, ...]
) -> None:
    """Panel d: the means of some weight vectors of one layer."""
    for arm, color in ARM_COLORS.items():
        if shown[arm]:
            means = [vector_means(kernel, fan_in)[:DRAWN] for kernel in shown[arm]]
            lines = axes.plot(runs.points[: len(means)], means, color=color, linewidth=1)
            lines[0].set_label(arm)
    axes.set(title=f"d  Means of {DRAWN} weight vectors of {SHOWN}", xlabel="epochs", ylabel="mean weight")
    axes.legend()


def draw_weights(axes: Axes, shown: dict[str, list[np.ndarray]]) -> None:
    """Panel e: the weights of one layer, at first and at the end."""
    drawn = [("at first", "black", shown[WITHOUT][0])]
    drawn += [(arm, color, shown[arm][-1]) for arm, color in ARM_COLORS.items() if shown[arm]]
    # A run that diverged has weights that no axis holds.
    finite = [weights[np.isfinite(weights)] for _, _, weights in drawn]
    bins = np.histogram_bin_edges(np.concatenate(finite), 60)
    for (label, color, _), weights in zip(drawn, finite, strict=True):
        axes.hist(weights, bins, histtype="step", linewidth=1.5, color=color, label=label)
    axes.set(title=f"e  Weights of {SHOWN} at the end", xlabel="weight", ylabel="weights", yscale="log")
    axes.legend()


def draw_loss(axes: Axes, runs: comparison.Comparison) -> None:
    """Panel f: the training loss, a line for each seed."""
    for arm, color in ARM_COLORS.items():
        for seed, run in enumerate(runs.curves[arm]):
            values = run["training loss"]
            axes.plot(runs.points[: len(values)], values, color=color, label=None if seed else arm)
    axes.set(title="f  Training loss of every seed", xlabel="epochs", yscale="log")
    axes.legend()


def draw(
    runs: comparison.Comparison,
    shown: dict[str, list[np.ndarray]],
    gradients: dict[str, jax.Array],
    fan_in: tuple[int, ...],
    output: pathlib.Path,
) -> None:
    """Saves the picture; of a run that was stopped, as far as it has come."""
    figure = Figure(figsize=(9, 10.5), layout="constrained")
    figure.suptitle(runs.title)
    panels = figure.subplots(3, 2)
    draw_gradient(panels[0, 0], panels[0, 1], gradients, fan_in)
    draw_removed(panels[1, 0], runs)
    draw_drift(panels[1, 1], runs, shown, fan_in)
    draw_weights(panels[2, 0], shown)
    draw_loss(panels[2, 1], runs)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=130)


def parse_arguments(training_images: int) -> argparse.Namespace:
    """The command line."""
    parser = comparison.make_parser(
        "Shows what gradient centralization does to the distribution of gradients and of weights.",
        output="gradient_distribution.png",
        seeds=3,
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="sgd", help="sgd has momentum 0.9")
    parser.add_argument(
        "--learning-rate",
        type=comparison.positive_number,
        default=argparse.SUPPRESS,
        help=f"(default: {rates})",
    )
    parser.add_argument(
        "--epochs", type=comparison.positive_integer, default=20, help="passes over the training images"
    )
    parser.add_argument("--batch-size", type=comparison.positive_integer, default=64, help="images in a step")
    arguments = parser.parse_args()
    arguments.learning_rate = getattr(arguments, "learning_rate", LEARNING_RATES[arguments.optimizer])
    if arguments.batch_size > training_images:
        parser.error(f"argument --batch-size: there are only {training_images} training images")
    return arguments


def main() -> None:
    """Trains, prints the tables and saves the picture."""
    train, test = load()
    arguments = parse_arguments(len(train.labels))
    console = Console(markup=False)
    title = (
        f"CNN on 8x8 digits: {arguments.optimizer} at {arguments.learning_rate:g}, "
        f"{arguments.epochs} epochs, batches of {arguments.batch_size}"
    )
    runs = comparison.Comparison(
        title, [WITHOUT, WITH], seeds=arguments.seeds, points=range(arguments.epochs + 1)
    )
    shown: dict[str, list[np.ndarray]] = {WITHOUT: [], WITH: []}
    with runs.measuring(console):
        params = initialize(0, train)
        first_batch = next(batches(train, 0, 0, arguments.batch_size))
        axes = gc_optax.infer_axes(loss, params, first_batch)
        optimizer = OPTIMIZERS[arguments.optimizer](arguments.learning_rate)
        optimizers = {WITHOUT: optimizer, WITH: optax.chain(gc_optax.centralize(axes), optimizer)}
        steps = {arm: make_step(tx, axes) for arm, tx in optimizers.items()}
        for seed in range(arguments.seeds):
            for arm, tx in optimizers.items():
                for measured, kernel in train_epochs(tx, steps[arm], axes, seed, train, test, arguments):
                    if seed == 0:
                        shown[arm].append(kernel)
                    runs.add(arm, seed, measured)
    runs.report(console, {"training loss": 5, "test accuracy, %": 2}, compare=["test accuracy, %"])
    console.print()
    print_layers(console, runs, axes, params)
    before = jax.jit(jax.grad(loss))(params, first_batch)
    after = jax.jit(functools.partial(gc_optax.centralize_gradients, axes=axes))(before)
    gradients = {"before GC": kernels(before)[SHOWN], "after GC": kernels(after)[SHOWN]}
    draw(runs, shown, gradients, kernels(axes)[SHOWN].fan_in, arguments.output)
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
