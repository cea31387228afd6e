"""Trains a small Flax network with and without gradient centralization, on real handwritten digits.

The 1,797 images of 8x8 pixels come with scikit-learn, so nothing is downloaded. The same network is trained
three ways, from the same initializations and with the same order of the data:

- the optimizer alone,
- `gc_optax.centralize()` before it, which averages over the fan-in axes of Flax's kernels,
- `optax.centralize()` before it, which averages over the axes that are right for PyTorch's.

At the end there is a table, and a picture of the loss and the accuracy after every epoch.

    python examples/quickstart.py [--optimizer adam] [--epochs 20] [--seeds 5] [--output quickstart.png]
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gc_optax

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
}
LEARNING_RATES = {"sgd": 0.05, "adam": 2e-3, "adamw": 2e-3, "rmsprop": 1e-3}


class Digits(NamedTuple):
    """Images of shape (n, 8, 8, 1) with values from 0 to 1, and labels of shape (n,)."""

    images: jax.Array
    labels: jax.Array


class Curve(NamedTuple):
    """One training run: what was measured after each epoch, and the seconds that its training steps took."""

    train_loss: list[float]
    test_accuracy: list[float]
    seconds: float


class CNN(nn.Module):
    """Two convolutions and two dense layers: images (batch, 8, 8, 1) to logits (batch, 10)."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes the logits of the ten digits."""
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def load() -> tuple[Digits, Digits]:
    """Four fifths of the images of each digit to train on, the others to test with."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def loss(params: optax.Params, digits: Digits) -> jax.Array:
    """The mean cross-entropy."""
    logits = CNN().apply(params, digits.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, digits.labels).mean()


@jax.jit
def evaluate(params: optax.Params, train: Digits, test: Digits) -> tuple[jax.Array, jax.Array]:
    """The loss on all training images and the accuracy on all test images."""
    predicted = CNN().apply(params, test.images).argmax(-1)
    return loss(params, train), (predicted == test.labels).mean()


def initialize(seed: int, train: Digits) -> optax.Params:
    """The network's first parameters."""
    return CNN().init(jax.random.key(seed), train.images[:1])


def compile_step(optimizer: optax.GradientTransformation, train: Digits, batch_size: int) -> Callable:
    """The training step, compiled ahead so that no clock sees the compiler."""

    def step(params, state, train, rows):
        gradients = jax.grad(loss)(params, Digits(train.images[rows], train.labels[rows]))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = initialize(0, train)
    rows = np.arange(batch_size)
    return jax.jit(step).lower(params, optimizer.init(params), train, rows).compile()


def run(
    optimizer: optax.GradientTransformation,
    step: Callable,
    seed: int,
    train: Digits,
    test: Digits,
    arguments: argparse.Namespace,
    after_epoch: Callable[[], None],
) -> Curve:
    """Trains once and measures after every epoch; the clock runs only while it trains."""
    params = initialize(seed, train)
    state = optimizer.init(params)
    order = np.random.default_rng(seed)
    batches = len(train.labels) // arguments.batch_size
    losses, accuracies, seconds = [], [], 0.0
    for _ in range(arguments.epochs):
        start = time.perf_counter()
        shuffled = order.permutation(len(train.labels))[: batches * arguments.batch_size]
        for rows in shuffled.reshape(batches, arguments.batch_size):
            params, state = step(params, state, train, rows)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - start
        train_loss, accuracy = evaluate(params, train, test)
        losses.append(float(train_loss))
        accuracies.append(float(accuracy))
        after_epoch()
    return Curve(losses, accuracies, seconds)


def train_all(
    optimizers: dict[str, optax.GradientTransformation],
    train: Digits,
    test: Digits,
    arguments: argparse.Namespace,
    console: Console,
) -> dict[str, list[Curve]]:
    """Every way with every seed. The ways take turns, so that a busy machine slows all of them alike."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    curves: dict[str, list[Curve]] = {name: [] for name in optimizers}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("compiling", total=len(optimizers) * arguments.seeds * arguments.epochs)
        steps = {
            name: compile_step(optimizer, train, arguments.batch_size)
            for name, optimizer in optimizers.items()
        }
        for seed in range(arguments.seeds):
            for name, optimizer in optimizers.items():
                progress.update(bar, description=f"seed {seed + 1}: {name}")
                curve = run(
                    optimizer, steps[name], seed, train, test, arguments, lambda: progress.advance(bar)
                )
                curves[name].append(curve)
        progress.update(bar, description="trained")
    return curves


def spread(values: np.ndarray, digits: int) -> str:
    """Mean and standard deviation over the seeds; the mean alone where there is one seed."""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def report(curves: dict[str, list[Curve]], title: str, test_images: int, console: Console) -> None:
    """Prints the table, and how the two centralizations compare with none, seed by seed."""
    seeds = len(next(iter(curves.values())))
    caption = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "1 seed"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("gradients go through")
    for heading in ("train loss", "test accuracy, %", "training, s"):
        table.add_column(heading, justify="right")
    accuracy = {name: 100 * np.array([c.test_accuracy[-1] for c in runs]) for name, runs in curves.items()}
    for name, runs in curves.items():
        losses = np.array([c.train_loss[-1] for c in runs])
        seconds = np.array([c.seconds for c in runs])
        table.add_row(name, spread(losses, 5), spread(accuracy[name], 2), spread(seconds, 2))
    console.print(table)

    alone, *centralizations = curves
    console.print(f"Test accuracy against {alone}, seed by seed")
    console.print(f"(one of the {test_images} test images is {100 / test_images:.2f} points):")
    for name in centralizations:
        difference = accuracy[name] - accuracy[alone]
        mean = round(difference.mean(), 2) + 0.0  # no "-0.00"
        console.print(
            f"  {name}: {mean:+.2f} points; "
            f"higher with {np.sum(difference > 0)} of {seeds} seeds, lower with {np.sum(difference < 0)}"
        )


def draw(curves: dict[str, list[Curve]], title: str, output: pathlib.Path) -> None:
    """The loss and the accuracy by epoch: the mean of the seeds as a line, their range as a band."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    colors = ("#666666", "#0072b2", "#d55e00")  # apart for colour-blind readers too
    for (name, runs), color in zip(curves.items(), colors, strict=True):
        epochs = np.arange(1, len(runs[0].train_loss) + 1)
        for axes, values in (
            (loss_axes, np.array([c.train_loss for c in runs])),
            (accuracy_axes, 100 * np.array([c.test_accuracy for c in runs])),
        ):
            axes.plot(epochs, values.mean(0), color=color, label=name, marker="o", markersize=3)
            axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    loss_axes.set(xlabel="epoch", ylabel="training loss")
    if any(0 < value < np.inf for runs in curves.values() for c in runs for value in c.train_loss):
        loss_axes.set_yscale("log")
    accuracy_axes.set(xlabel="epoch", ylabel="test accuracy, %")
    # The first epochs fall so far below the rest that they would flatten everything else.
    finals = [100 * accuracy for runs in curves.values() for c in runs for accuracy in c.test_accuracy[1:]]
    if finals:
        accuracy_axes.set_ylim(max(0.0, np.quantile(finals, 0.05) - 2), min(100.2, max(finals) + 0.5))
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    accuracy_axes.legend(loc="lower right", title="line: mean of the seeds, band: their range")
    figure.savefig(output, dpi=130)


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
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:] not in formats:
        raise argparse.ArgumentTypeError(f"{text} must end in one of {', '.join(formats)}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent}")
    return path


def parse_arguments(training_images: int) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Trains a small Flax network on digits, with and without gradient centralization.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    parser.add_argument(
        "--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="sgd has momentum 0.9"
    )
    parser.add_argument(
        "--learning-rate", type=positive_number, default=argparse.SUPPRESS, help=f"(default: {rates})"
    )
    parser.add_argument("--epochs", type=positive_integer, default=20, help="passes over the training images")
    parser.add_argument("--seeds", type=positive_integer, default=5, help="runs of each way")
    parser.add_argument("--batch-size", type=positive_integer, default=64, help="images in a step")
    parser.add_argument(
        "--output", type=picture_path, default="quickstart.png", help="where the picture goes"
    )
    arguments = parser.parse_args()
    arguments.learning_rate = getattr(arguments, "learning_rate", LEARNING_RATES[arguments.optimizer])
    if arguments.batch_size > training_images:
        parser.error(f"argument --batch-size: there are only {training_images} training images")
    return arguments


def main() -> None:
    """Trains, prints the table and saves the picture."""
    train, test = load()
    arguments = parse_arguments(len(train.labels))
    console = Console()
    optimizer = OPTIMIZERS[arguments.optimizer](arguments.learning_rate)
    curves = train_all(
        {
            f"{arguments.optimizer} alone": optimizer,
            "gc_optax.centralize": optax.chain(gc_optax.centralize(), optimizer),
            "optax.centralize": optax.chain(optax.centralize(), optimizer),
        },
        train,
        test,
        arguments,
        console,
    )
    title = (
        f"CNN on 8x8 digits: {arguments.optimizer} at {arguments.learning_rate:g}, "
        f"{arguments.epochs} epochs, batches of {arguments.batch_size}"
    )
    report(curves, title, len(test.labels), console)
    draw(curves, title, arguments.output)
    console.print(f"The curves are in {arguments.output.absolute()}", soft_wrap=True)


if __name__ == "__main__":
    main()
