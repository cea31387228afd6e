"""Trains a Flax network with batch norm and dropout on Fashion-MNIST or digits, with and without GC.

A complete small training program: a `TrainState` with batch statistics, dropout, augmentation, a cosine
schedule with warm-up, and AdamW or SGD with momentum. `gc_optax.infer_axes` reads the axes off the very loss
that is trained, with the batch statistics and the dropout key as arguments. Both arms start from the same
weights, see the same images, shifted and mirrored in the same way, and drop the same units.

    python examples/image_classification.py [--optimizer adamw] [--epochs 30] [--seeds 3]

trains on the 1,797 digits of 8x8 pixels that come with scikit-learn. With a folder that has the four gzipped
files of Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist), as they are published, it trains on
these; `--subset` takes the first so many of the 60,000 training images:

    python examples/image_classification.py --data-dir FOLDER --subset 6000 --epochs 10

At the end there is a table of the accuracy and the loss on the test images, and a picture of both after every
epoch. The learning rates are usual ones, tuned for neither arm.
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
import functools
import gzip
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gc_optax

IDX_UINT8 = 8
FASHION_MNIST = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
CLASSES = 10
OPTIMIZERS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "sgd": lambda schedule: optax.sgd(schedule, momentum=0.9),
}
LEARNING_RATES = {"adamw": 2e-3, "sgd": 0.05}
WARMUP = 0.1  # of all steps


class DataError(Exception):
    """What is wrong with a file of images or labels."""


class Images(NamedTuple):
    """Pixels of shape (n, height, width, 1) with values from 0 to 1, and labels of shape (n,)."""

    pixels: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    """Images to train on and to test with; whether a mirrored one is still of its class."""

    name: str
    train: Images
    test: Images
    mirrored: bool


class TrainState(train_state.TrainState):
    """Flax's state of a training, with the running statistics of the batch norms."""

    batch_stats: Any


class CNN(nn.Module):
    """Two stages of convolutions with batch norm, a hidden layer with dropout: pixels to logits."""

    @nn.compact
    def __call__(self, pixels: jax.Array, *, train: bool) -> jax.Array:
        """Computes the logits of the ten classes."""
        x = pixels
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.3, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


def read_idx(path: pathlib.Path, dimensions: int) -> np.ndarray:
    """Reads a gzipped IDX file: two zeros, a type, the number of dimensions, their sizes, and the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:2] != b"\0\0":
        raise DataError(f"{path} is no IDX file: it starts with {content[:4].hex(' ') or 'nothing'}")
    if content[2] != IDX_UINT8:
        raise DataError(f"{path} holds numbers of type {content[2]:#04x}, not bytes, {IDX_UINT8:#04x}")
    if content[3] != dimensions:
        raise DataError(f"{path} has {content[3]} dimensions, not {dimensions}")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    if len(content) != start + np.prod(shape, dtype=object):
        raise DataError(f"{path} has {len(content) - start} bytes of data, not {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def load_fashion_mnist(folder: pathlib.Path) -> Data:
    """The published 60,000 images to train on, and 10,000 to test with."""
    parts = {}
    for part, (images_name, labels_name) in FASHION_MNIST.items():
        pixels, labels = read_idx(folder / images_name, 3), read_idx(folder / labels_name, 1)
        if len(pixels) != len(labels):
            raise DataError(f"{folder / labels_name} has {len(labels)} labels for {len(pixels)} images")
        if labels.max(initial=0) >= CLASSES:
            raise DataError(
                f"{folder / labels_name} has the label {labels.max()}, the last one is {CLASSES - 1}"
            )
        parts[part] = Images((pixels[..., None] / 255).astype(np.float32), labels)
    return Data("Fashion-MNIST", parts["train"], parts["test"], mirrored=True)


def load_8x8_digits() -> Data:
    """Four fifths of the images of each digit to train on, the others to test with."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    split = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train_pixels, test_pixels, train_labels, test_labels = split
    return Data(
        "digits", Images(train_pixels, train_labels), Images(test_pixels, test_labels), mirrored=False
    )


def augment(key: jax.Array, image: jax.Array, mirrored: bool) -> jax.Array:
    """Shifts an image by at most an eighth of its size, and mirrors every other one where that is allowed."""
    shift, flip = jax.random.split(key)
    margin = image.shape[0] // 8
    corner = jax.random.randint(shift, (2,), 0, 2 * margin + 1)
    padded = jnp.pad(image, ((margin, margin), (margin, margin), (0, 0)))
    image = jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)
    return jnp.where(mirrored & jax.random.bernoulli(flip), image[:, ::-1], image)


def loss(
    params: optax.Params, batch_stats: Any, key: jax.Array, pixels: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Any]:
    """The mean cross-entropy with dropout, and the batch statistics that the step leaves behind."""
    logits, updated = CNN().apply(
        {"params": params, "batch_stats": batch_stats},
        pixels,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updated["batch_stats"]


@functools.partial(jax.jit, static_argnames="mirrored")
def train_step(
    state: TrainState, key: jax.Array, train: Images, rows: jax.Array, *, mirrored: bool
) -> TrainState:
    """One step on the training images in `rows`, each changed at random."""
    augmenting, dropout = jax.random.split(jax.random.fold_in(key, state.step))
    keys = jax.random.split(augmenting, len(rows))
    pixels = jax.vmap(augment, (0, 0, None))(keys, train.pixels[rows], mirrored)
    gradients, batch_stats = jax.grad(loss, has_aux=True)(
        state.params, state.batch_stats, dropout, pixels, train.labels[rows]
    )
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats)


@jax.jit
def evaluate(state: TrainState, test: Images) -> tuple[jax.Array, jax.Array]:
    """The accuracy and the loss on all images, of which no more than 500 are worked on at a time."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = jax.lax.map(
        lambda image: CNN().apply(variables, image[None], train=False)[0], test.pixels, batch_size=500
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels)
    return (logits.argmax(-1) == test.labels).mean(), losses.mean()


def initialize(seed: int, data: Data, optimizer: optax.GradientTransformation) -> TrainState:
    """The state that a training starts from."""
    variables = jax.jit(functools.partial(CNN().init, train=False))(
        jax.random.key(seed), data.train.pixels[:1]
    )
    return TrainState.create(apply_fn=CNN().apply, tx=optimizer, **variables)


def train_epochs(
    optimizer: optax.GradientTransformation, seed: int, data: Data, arguments: argparse.Namespace
) -> Iterator[dict[str, float]]:
    """Trains once and measures after every epoch."""
    state = initialize(seed, data, optimizer)
    key = jax.random.key(seed)
    order = np.random.default_rng(seed)
    batches = len(data.train.labels) // arguments.batch_size
    for _ in range(arguments.epochs):
        shuffled = order.permutation(len(data.train.labels))[: batches * arguments.batch_size]
        for rows in shuffled.reshape(batches, arguments.batch_size):
            state = train_step(state, key, data.train, rows, mirrored=data.mirrored)
        accuracy, test_loss = evaluate(state, data.test)
        yield {"test accuracy, %": 100 * accuracy, "test loss": test_loss}


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line, with its parser, which also tells what is wrong with the files."""
    parser = comparison.make_parser(
        "Trains a Flax network with batch norm and dropout, with and without gradient centralization.",
        output="image_classification.png",
        seeds=3,
    )
    parser.add_argument(
        "--data-dir",
        type=comparison.existing_folder,
        default=argparse.SUPPRESS,
        help="has the four gzipped files of Fashion-MNIST (default: scikit-learn's digits)",
    )
    parser.add_argument(
        "--subset",
        type=comparison.positive_integer,
        default=argparse.SUPPRESS,
        help="train on the first so many images only (default: all)",
    )
    parser.add_argument(
        "--optimizer", choices=sorted(OPTIMIZERS), default="adamw", help="sgd has momentum 0.9"
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    parser.add_argument(
        "--learning-rate",
        type=comparison.positive_number,
        default=argparse.SUPPRESS,
        help=f"the highest of the schedule (default: {rates})",
    )
    parser.add_argument(
        "--epochs", type=comparison.positive_integer, default=30, help="passes over the training images"
    )
    parser.add_argument("--batch-size", type=comparison.positive_integer, default=64, help="images in a step")
    arguments = parser.parse_args()
    arguments.learning_rate = getattr(arguments, "learning_rate", LEARNING_RATES[arguments.optimizer])
    return parser, arguments


def get_data(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Data:
    """The images that the command line names, on the device."""
    if "data_dir" in arguments:
        try:
            data = load_fashion_mnist(arguments.data_dir)
        except DataError as error:
            parser.exit(2, f"{parser.prog}: error: argument --data-dir: {error}\n")
    else:
        data = load_8x8_digits()
    if "subset" in arguments:
        if arguments.subset > len(data.train.labels):
            parser.error(f"argument --subset: there are only {len(data.train.labels)} training images")
        data = data._replace(train=Images(*(array[: arguments.subset] for array in data.train)))
    if arguments.batch_size > len(data.train.labels):
        parser.error(f"argument --batch-size: there are only {len(data.train.labels)} training images")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, data)


def main() -> None:
    """Trains, prints the table and saves the picture."""
    parser, arguments = parse_arguments()
    data = get_data(parser, arguments)
    console = Console(markup=False)
    images = len(data.train.labels)
    console.print(f"{images} images of {data.name} to train on, {len(data.test.labels)} to test with")

    steps = arguments.epochs * (images // arguments.batch_size)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, arguments.learning_rate, warmup_steps=int(WARMUP * steps), decay_steps=steps
    )
    optimizer = OPTIMIZERS[arguments.optimizer](schedule)
    state = initialize(0, data, optimizer)
    batch = Images(*(array[: arguments.batch_size] for array in data.train))
    axes = gc_optax.infer_axes(loss, state.params, state.batch_stats, jax.random.key(0), *batch)
    comparison.print_summary(console, gc_optax.summarize(state.params, axes))
    optimizers = {
        f"{arguments.optimizer} alone": optimizer,
        f"{arguments.optimizer} with GC": optax.chain(gc_optax.centralize(axes), optimizer),
    }

    title = (
        f"CNN with batch norm and dropout on {data.name}: {arguments.optimizer}, cosine from "
        f"{arguments.learning_rate:g}, {arguments.epochs} epochs, batches of {arguments.batch_size}"
    )
    runs = comparison.Comparison(
        title, list(optimizers), seeds=arguments.seeds, points=range(1, arguments.epochs + 1)
    )
    with runs.measuring(console):
        for seed in range(arguments.seeds):
            for name, tx in optimizers.items():
                for measured in train_epochs(tx, seed, data, arguments):
                    runs.add(name, seed, measured)
    runs.report(console, {"test accuracy, %": 2, "test loss": 4}, compare=["test accuracy, %"])
    tested = len(data.test.labels)
    console.print(f"One of the {tested} test images is {100 / tested:.2f} points.")
    runs.draw(["test accuracy, %", "test loss"], arguments.output, log=["test loss"])
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
