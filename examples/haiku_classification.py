"""Classifies handwritten digits with a small Haiku network, whose separable convolution gets its exact axes.

The 1,797 images of 8x8 pixels come with scikit-learn. The network has an ordinary convolution and a separable
one: a depthwise convolution, in which each channel has a window of its own, and a pointwise one, which mixes
the channels. It is trained three ways, from the same initializations and with the same order of the data:

- Adam alone,
- `gc_optax.centralize` before it, with the exact axes that `infer_axes` reads off the loss: a weight vector
  of the depthwise convolution has the 9 inputs of its window, one of the pointwise its 16 channels,
- `optax.centralize` before it, which averages each kernel's gradient over every axis but the first: for the
  depthwise kernel, of shape (3, 3, 1, 16), over one side of the window and all channels.

All arms have the same learning rate, tuned for none of them. A few seeds on a few images are no evidence for
or against centralization.

    python examples/haiku_classification.py [--epochs 20] [--seeds 5] [--output haiku_classification.png]
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
from collections.abc import Callable, Iterator, Sequence

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gc_optax

BATCH_SIZE = 64


@hk.without_apply_rng
@hk.transform
def network(images: jax.Array) -> jax.Array:
    """Computes the logits of the ten digits: images (batch, 8, 8, 1) to (batch, 10)."""
    x = jax.nn.relu(hk.Conv2D(16, 3, name="conv")(images))
    x = hk.DepthwiseConv2D(1, 3, stride=2, name="depthwise")(x)
    x = jax.nn.relu(hk.Conv2D(32, 1, name="pointwise")(x))
    return hk.Linear(10, name="head")(hk.Flatten()(x))


def load() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Images and labels to train on, then to test with."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
    return train_images, train_labels, test_images, test_labels


def loss(params: hk.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    logits = network.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def accuracy(params: hk.Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """How many images of a hundred it gets right."""
    return 100 * (network.apply(params, images).argmax(-1) == labels).mean()


def make_step(optimizer: optax.GradientTransformation) -> Callable:
    """The training step, which also gives the loss before it."""

    @jax.jit
    def step(params, state, images, labels, rows):
        before, gradients = jax.value_and_grad(loss)(params, images[rows], labels[rows])
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, before

    return step


def train_epochs(
    optimizer: optax.GradientTransformation, step: Callable, seed: int, data: Sequence[jax.Array], epochs: int
) -> Iterator[dict[str, float]]:
    """Trains once; after every epoch it gives the mean loss of the batches and the test accuracy."""
    images, labels, test_images, test_labels = data
    params = network.init(jax.random.key(seed), images[:1])
    state = optimizer.init(params)
    order = np.random.default_rng(seed)
    batches = len(labels) // BATCH_SIZE
    for _ in range(epochs):
        losses = []
        for rows in order.permutation(len(labels))[: batches * BATCH_SIZE].reshape(batches, BATCH_SIZE):
            params, state, before = step(params, state, images, labels, rows)
            losses.append(before)
        yield {
            "training loss": jnp.stack(losses).mean(),
            "test accuracy, %": accuracy(params, test_images, test_labels),
        }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = comparison.make_parser(
        "Classifies digits with Haiku, with and without gradient centralization.",
        output="haiku_classification.png",
        seeds=5,
    )
    parser.add_argument(
        "--learning-rate", type=comparison.positive_number, default=2e-3, help="of Adam, in all arms"
    )
    parser.add_argument(
        "--epochs", type=comparison.positive_integer, default=20, help="passes over the training images"
    )
    return parser.parse_args()


def main() -> None:
    """Shows the axes, trains, prints the table and saves the picture."""
    arguments = parse_arguments()
    console = Console(markup=False)
    data = load()
    params = network.init(jax.random.key(0), data[0][:1])
    axes = gc_optax.infer_axes(loss, params, *data[:2])
    comparison.print_summary(console, gc_optax.summarize(params, axes))
    adam = optax.adam(arguments.learning_rate)
    optimizers = {
        "adam alone": adam,
        "gc_optax.centralize": optax.chain(gc_optax.centralize(axes), adam),
        "optax.centralize": optax.chain(optax.centralize(), adam),
    }
    title = f"Haiku CNN on 8x8 digits: adam at {arguments.learning_rate:g}, {arguments.epochs} epochs"
    runs = comparison.Comparison(
        title, list(optimizers), seeds=arguments.seeds, points=range(1, arguments.epochs + 1)
    )
    with runs.measuring(console):
        steps = {name: make_step(optimizer) for name, optimizer in optimizers.items()}
        for seed in range(arguments.seeds):
            for name, optimizer in optimizers.items():
                for measured in train_epochs(optimizer, steps[name], seed, data, arguments.epochs):
                    runs.add(name, seed, measured)
    runs.report(
        console, {"training loss": 4, "test accuracy, %": 2}, compare=["training loss", "test accuracy, %"]
    )
    console.print(f"One of the {len(data[2])} test images is {100 / len(data[2]):.2f} points.")
    runs.draw(["training loss", "test accuracy, %"], arguments.output, log=["training loss"])
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
