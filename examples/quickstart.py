"""Trains a small Flax network with and without gradient centralization, on real handwritten digits.

The 1,797 images of 8x8 pixels come with scikit-learn, so nothing is downloaded. The same network is trained
three ways, from the same initializations and with the same order of the data:

- the optimizer alone,
- `gc_optax.centralize()` before it, which averages over the fan-in axes of Flax's kernels,
- `optax.centralize()` before it, which averages over the axes that are right for PyTorch's.

At the end there is a table, and a picture of the loss and the accuracy after every epoch.

    python examples/quickstart.py [--optimizer adam] [--epochs 20] [--seeds 5] [--output quickstart.png]
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
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


def train_epochs(
    optimizer: optax.GradientTransformation,
    step: Callable,
    seed: int,
    train: Digits,
    test: Digits,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, float]]:
    """Trains once and measures after every epoch; the clock runs only while it trains."""
    params = initialize(seed, train)
    state = optimizer.init(params)
    order = np.random.default_rng(seed)
    batches = len(train.labels) // arguments.batch_size
    seconds = 0.0
    for _ in range(arguments.epochs):
        start = time.perf_counter()
        shuffled = order.permutation(len(train.labels))[: batches * arguments.batch_size]
        for rows in shuffled.reshape(batches, arguments.batch_size):
            params, state = step(params, state, train, rows)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - start
        train_loss, accuracy = evaluate(params, train, test)
        yield {"training loss": train_loss, "test accuracy, %": 100 * accuracy, "training, s": seconds}


def parse_arguments(training_images: int) -> argparse.Namespace:
    """The command line."""
    parser = comparison.make_parser(
        "Trains a small Flax network on digits, with and without gradient centralization.",
        output="quickstart.png",
        seeds=5,
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    parser.add_argument(
        "--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="sgd has momentum 0.9"
    )
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
    """Trains, prints the table and saves the picture."""
    train, test = load()
    arguments = parse_arguments(len(train.labels))
    console = Console(markup=False)
    optimizer = OPTIMIZERS[arguments.optimizer](arguments.learning_rate)
    optimizers = {
        f"{arguments.optimizer} alone": optimizer,
        "gc_optax.centralize": optax.chain(gc_optax.centralize(), optimizer),
        "optax.centralize": optax.chain(optax.centralize(), optimizer),
    }
    title = (
        f"CNN on 8x8 digits: {arguments.optimizer} at {arguments.learning_rate:g}, "
        f"{arguments.epochs} epochs, batches of {arguments.batch_size}"
    )
    runs = comparison.Comparison(
        title, list(optimizers), seeds=arguments.seeds, points=range(1, arguments.epochs + 1)
    )
    with runs.measuring(console):
        steps = {name: compile_step(tx, train, arguments.batch_size) for name, tx in optimizers.items()}
        # The arms take turns, so that a busy machine slows all of them alike.
        for seed in range(arguments.seeds):
            for name, tx in optimizers.items():
                for measured in train_epochs(tx, steps[name], seed, train, test, arguments):
                    runs.add(name, seed, measured)
    runs.report(
        console,
        {"training loss": 5, "test accuracy, %": 2, "training, s": 2},
        compare=["training loss", "test accuracy, %"],
    )
    console.print(f"One of the {len(test.labels)} test images is {100 / len(test.labels):.2f} points.")
    runs.draw(["training loss", "test accuracy, %"], arguments.output, log=["training loss"])
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
