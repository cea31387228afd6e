"""Trains a small Flax network to tell folders of images apart, with and without GC.

This is the "horses or humans" workflow of the Keras tutorials, in JAX. Give it a folder that has a folder of
PNG or JPEG images for each class, two or more (on the left), or one that is split already (on the right):

    photos/horses/1.jpg ...              photos/train/horses/1.jpg ...    photos/validation/horses/8.jpg ...
    photos/humans/2.png ...              photos/train/humans/2.png ...    photos/validation/humans/9.png ...

    python examples/image_folder.py --data photos [--size 32] [--epochs 20] [--output image_folder.png]

If it is not split, one image in five of each class is held out. Without `--data` the script draws images of
its own, of squares and of triangles, and reads them in the same way.

In every step the training images are turned, shifted, sheared, zoomed and flipped at random, about as far as
in the tutorials. Both arms start from the same weights and see the same images, changed in the same way, with
the learning rate of the tutorials.

At the end there is a table of the training time (without compiling), and of the accuracy and the loss on the
validation images; and a picture of both after every epoch, above a strip of what the network was shown. Three
seeds on one small set of images are no evidence for or against GC: see what it does with yours.
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.scipy.ndimage import map_coordinates
from matplotlib.figure import Figure, SubFigure
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from sklearn.model_selection import train_test_split

import gc_optax

ENDINGS = (".png", ".jpg", ".jpeg")
LEAST_SIZE = 8  # what three poolings make one pixel of
DRAWN = 300  # images of each class that the script draws itself
SHOWN_CLASSES, SHOWN_IMAGES = 3, 10  # in the picture
# How far an image is changed at most: as in the Keras tutorials, but that their shear is smaller.
ROTATION = np.deg2rad(40)
SHIFT = SHEAR = ZOOM = 0.2


class DataError(Exception):
    """What is wrong with a folder of images."""


class Images(NamedTuple):
    """Pixels of shape (n, size, size, 3) with values from 0 to 255, and labels of shape (n,)."""

    pixels: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array


class Data(NamedTuple):
    """The names of the classes, and images to train on and to validate with."""

    classes: list[str]
    train: Images
    validation: Images


def visible(folder: pathlib.Path) -> list[pathlib.Path]:
    """What is in a folder, without what systems and tools hide in it: .DS_Store, .ipynb_checkpoints."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error


def find_images(folder: pathlib.Path) -> tuple[dict[str, list[pathlib.Path]], list[pathlib.Path]]:
    """The image files of each class, and what else there is."""
    found, others = {}, []
    for entry in visible(folder):
        if entry.is_dir():
            inside = visible(entry)
            files = [path for path in inside if path.suffix.lower() in ENDINGS and path.is_file()]
            found[entry.name] = files
            others += sorted(set(inside) - set(files))
        else:
            others.append(entry)
    if not any(found.values()):
        raise DataError(f"{folder} has no folders with PNG or JPEG images in them, one for each class")
    for name, files in found.items():
        if not files:
            raise DataError(f"{folder / name} has no PNG or JPEG images in it")
    if len(found) == 1:
        raise DataError(f"{folder} has only one class, {next(iter(found))}: two are the least to tell apart")
    return found, others


def read_image(path: pathlib.Path, size: int) -> np.ndarray:
    """The pixels of an image as one sees it, stretched to a square: (size, size, 3)."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as file:
            image = ImageOps.exif_transpose(file)  # decodes all of it
    except Exception as error:  # a decoder on damaged data: OSError, SyntaxError, ValueError and more
        raise DataError(f"{path} is no PNG or JPEG image that can be read: {error}") from error
    if image.mode.startswith("I"):  # grey with 16 bits, of which Pillow's conversions keep the low ones
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def read_images(found: dict[str, list[pathlib.Path]], size: int, console: Console) -> Images:
    """The images of all classes, with the number of its class as each one's label."""
    files = [(label, path) for label, paths in enumerate(found.values()) for path in paths]
    pixels = []
    with comparison.progress_bar(console, len(files), "images") as (progress, bar):
        progress.update(bar, description="reading")
        for _, path in files:
            pixels.append(read_image(path, size))
            progress.advance(bar)
    return Images(np.stack(pixels), np.array([label for label, _ in files]))


def load(folder: pathlib.Path, size: int, console: Console) -> Data:
    """Reads the images of a folder; tells what in it is no image."""
    names = {entry.name for entry in visible(folder) if entry.is_dir()}
    if {"train", "validation"} <= names:
        found, others = find_images(folder / "train")
        held_out, more = find_images(folder / "validation")
        if odd := sorted(set(found) ^ set(held_out)):
            lacking = "validation" if odd[0] in found else "train"
            raise DataError(f"{folder / lacking} has no class {odd[0]}, the other folder has one")
        others += more + [entry for entry in visible(folder) if entry.name not in ("train", "validation")]
    else:
        found, others = find_images(folder)
        held_out = {}
        for name, files in found.items():
            if len(files) < 5:
                raise DataError(f"{folder / name} has only {len(files)} images: to hold out takes 5")
    if others:
        named = ", ".join(str(path.relative_to(folder)) for path in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        console.print(f"skipped {len(others)} that are no PNG or JPEG: {named}{more}", soft_wrap=True)
    train = read_images(found, size, console)
    if held_out:
        return Data(list(found), train, read_images(held_out, size, console))
    split = train_test_split(*train, test_size=0.2, stratify=train.labels, random_state=0)
    train_pixels, validation_pixels, train_labels, validation_labels = split
    return Data(list(found), Images(train_pixels, train_labels), Images(validation_pixels, validation_labels))


def draw_shapes(folder: pathlib.Path, count: int) -> None:
    """Saves images of squares and of triangles: light on dark, anywhere, turned, under scratches."""
    random = np.random.default_rng(0)
    for name, corners in {"squares": 4, "triangles": 3}.items():
        (folder / name).mkdir()
        for number in range(count):
            dark, light = random.integers(0, 110, 3), random.integers(110, 256, 3)
            image = Image.new("RGB", (96, 96), tuple(dark))
            draw = ImageDraw.Draw(image)
            circle = (*random.uniform(36, 60, 2), random.uniform(20, 34))
            draw.regular_polygon(circle, corners, rotation=random.uniform(0, 360), fill=tuple(light))
            for _ in range(4):
                ends, color = random.uniform(0, 96, 4), random.integers(0, 256, 3)
                draw.line(tuple(ends), fill=tuple(color), width=3)
            image.save(folder / name / f"{number}.png")


def augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """Turns, shifts, shears, zooms and flips an image at random; its edges are drawn out to the border.

    JAX's own resampling does it, a function of key and image like all else in the step: with one matrix for
    the five changes it blurs the image once. Keras's layers (`RandomRotation` and others) keep random state,
    and each of them resamples.
    """
    turn, shift, shear, zoom, flip = jax.random.split(key, 5)
    angle = jax.random.uniform(turn, minval=-ROTATION, maxval=ROTATION)
    turned = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    sheared = jnp.eye(2).at[0, 1].set(jax.random.uniform(shear, minval=-SHEAR, maxval=SHEAR))
    zoomed = jax.random.uniform(zoom, (2,), minval=1 - ZOOM, maxval=1 + ZOOM)
    flipped = jnp.array([1, jnp.where(jax.random.bernoulli(flip), 1, -1)])
    # Where each pixel comes from, with the origin in the middle of the image.
    matrix = turned @ sheared @ jnp.diag(zoomed * flipped)
    size = image.shape[0]
    middle = (size - 1) / 2
    pixels = jnp.mgrid[:size, :size] - middle
    shifted = size * jax.random.uniform(shift, (2, 1, 1), minval=-SHIFT, maxval=SHIFT)
    source = jnp.einsum("ij,jhw->ihw", matrix, pixels) + middle + shifted
    resample = jax.vmap(lambda channel: map_coordinates(channel, source, order=1, mode="nearest"), -1, -1)
    return resample(image)


class CNN(nn.Module):
    """Three convolutions and two dense layers: pixels (batch, size, size, 3) to logits (batch, classes)."""

    classes: int

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Computes the logits of the classes."""
        x = pixels / 255
        for features in (16, 32, 64):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


@functools.partial(jax.jit, static_argnames="model")
def initialize(model: CNN, seed: int, train: Images) -> optax.Params:
    """The network's first parameters."""
    return model.init(jax.random.key(seed), train.pixels[:1])


def loss(params: optax.Params, model: CNN, images: Images) -> jax.Array:
    """The mean cross-entropy."""
    logits = model.apply(params, images.pixels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()


@functools.partial(jax.jit, static_argnames="model")
def evaluate(params: optax.Params, model: CNN, images: Images) -> tuple[jax.Array, jax.Array]:
    """The accuracy and the loss on all images, of which no more than 256 are worked on at a time."""
    logits = jax.lax.map(lambda image: model.apply(params, image[None])[0], images.pixels, batch_size=256)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, images.labels)
    return (logits.argmax(-1) == images.labels).mean(), losses.mean()


def compile_step(
    model: CNN, optimizer: optax.GradientTransformation, train: Images, batch_size: int
) -> Callable:
    """The training step, compiled ahead so that no clock sees the compiler."""

    def step(params, state, key, train, rows):
        pixels = jax.vmap(augment)(jax.random.split(key, batch_size), train.pixels[rows].astype(jnp.float32))
        gradients = jax.grad(loss)(params, model, Images(pixels, train.labels[rows]))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = initialize(model, 0, train)
    arguments = params, optimizer.init(params), jax.random.key(0), train, np.arange(batch_size)
    return jax.jit(step).lower(*arguments).compile()


def train_epochs(
    model: CNN,
    optimizer: optax.GradientTransformation,
    step: Callable,
    seed: int,
    data: Data,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, float]]:
    """Trains once and measures after every epoch; the clock runs only while it trains."""
    params = initialize(model, seed, data.train)
    state = optimizer.init(params)
    order = np.random.default_rng(seed)
    key = jax.random.key(seed)
    batches = len(data.train.labels) // arguments.batch_size
    seconds = 0.0
    for _ in range(arguments.epochs):
        start = time.perf_counter()
        shuffled = order.permutation(len(data.train.labels))[: batches * arguments.batch_size]
        for rows in shuffled.reshape(batches, arguments.batch_size):
            key, changes = jax.random.split(key)
            params, state = step(params, state, changes, data.train, rows)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - start
        accuracy, validation_loss = evaluate(params, model, data.validation)
        yield {
            "training, s": seconds,
            "validation accuracy, %": 100 * accuracy,
            "validation loss": validation_loss,
        }


def draw_samples(figure: SubFigure, data: Data) -> None:
    """Shows training images of the first classes as a step of the training changes them."""
    figure.suptitle("what the network is shown: training images, each changed at random")
    change = jax.jit(jax.vmap(augment))
    rows = np.atleast_1d(figure.subplots(min(len(data.classes), SHOWN_CLASSES), 1))
    for label, (name, axes) in enumerate(zip(data.classes, rows, strict=False)):
        pixels = data.train.pixels[data.train.labels == label][:SHOWN_IMAGES].astype(np.float32)
        changed = change(jax.random.split(jax.random.key(label), len(pixels)), pixels)
        gap = ((0, 0), (0, 0), (1, 1), (0, 0))
        framed = np.pad(np.asarray(changed).astype(np.uint8), gap, constant_values=255)
        axes.imshow(np.concatenate(framed, axis=1), interpolation="nearest")
        axes.set(xticks=[], yticks=[], ylabel=name)
        axes.spines[:].set_visible(False)


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line, with its parser, which also tells what is wrong with the images."""
    parser = comparison.make_parser(
        "Trains a small Flax network on folders of images, with and without gradient centralization.",
        output="image_folder.png",
        seeds=3,
    )
    parser.add_argument(
        "--data",
        type=comparison.existing_folder,
        metavar="FOLDER",
        help="has a folder of PNG or JPEG images for each class, or two such: train and validation "
        "(default: squares and triangles that the script draws)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--size", type=comparison.positive_integer, default=32, help="side of the images in pixels"
    )
    parser.add_argument(
        "--learning-rate", type=comparison.positive_number, default=1e-3, help="of RMSprop, in both arms"
    )
    parser.add_argument(
        "--epochs", type=comparison.positive_integer, default=20, help="passes over the training images"
    )
    parser.add_argument("--batch-size", type=comparison.positive_integer, default=32, help="images in a step")
    arguments = parser.parse_args()
    if arguments.size < LEAST_SIZE:
        parser.error(f"argument --size: must be at least {LEAST_SIZE}, got {arguments.size}")
    return parser, arguments


def get_data(arguments: argparse.Namespace, console: Console) -> Data:
    """The images that the command line names, or else drawn ones."""
    if "data" in arguments:
        return load(arguments.data, arguments.size, console)
    with tempfile.TemporaryDirectory() as folder:
        console.print(
            f"No --data: drawing {2 * DRAWN} images into a temporary folder, to read them from there."
        )
        draw_shapes(pathlib.Path(folder), DRAWN)
        return load(pathlib.Path(folder), arguments.size, console)


def main() -> None:
    """Reads the images, trains, prints the table and saves the picture."""
    parser, arguments = parse_arguments()
    console = Console(markup=False)
    try:
        data = get_data(arguments, console)
    except DataError as error:
        parser.exit(2, f"{parser.prog}: error: argument --data: {error}\n")
    if arguments.batch_size > len(data.train.labels):
        parser.error(f"argument --batch-size: there are only {len(data.train.labels)} training images")
    console.print(
        f"{len(data.train.labels)} images to train on, {len(data.validation.labels)} to validate with: "
        + ", ".join(data.classes)
    )
    # Once, and not in every step.
    data = data._replace(
        train=Images(*map(jnp.asarray, data.train)), validation=Images(*map(jnp.asarray, data.validation))
    )
    model = CNN(len(data.classes))
    params = initialize(model, 0, data.train)
    axes = gc_optax.infer_axes(loss, params, model, data.train)
    comparison.print_summary(console, gc_optax.summarize(params, axes))
    rmsprop = optax.rmsprop(arguments.learning_rate)
    optimizers = {
        "RMSprop alone": rmsprop,
        "RMSprop with GC": optax.chain(gc_optax.centralize(axes), rmsprop),
    }
    title = (
        f"CNN on {len(data.classes)} folders of images: RMSprop at {arguments.learning_rate:g}, "
        f"{arguments.epochs} epochs, batches of {arguments.batch_size}"
    )
    runs = comparison.Comparison(
        title, list(optimizers), seeds=arguments.seeds, points=range(1, arguments.epochs + 1)
    )
    with runs.measuring(console):
        steps = {
            name: compile_step(model, tx, data.train, arguments.batch_size) for name, tx in optimizers.items()
        }
        # The arms take turns, so that a busy machine slows both alike.
        for seed in range(arguments.seeds):
            for name, tx in optimizers.items():
                for measured in train_epochs(model, tx, steps[name], seed, data, arguments):
                    runs.add(name, seed, measured)
    digits = {"training, s": 2, "validation accuracy, %": 2, "validation loss": 4}
    runs.report(console, digits, compare=["validation accuracy, %"])
    images = len(data.validation.labels)
    console.print(f"One of the {images} validation images is {100 / images:.2f} points.")
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    curves, samples = figure.subfigures(2, 1, height_ratios=(4.3, 2.1))
    runs.draw_on(curves, ["validation accuracy, %", "validation loss"])
    draw_samples(samples, data)
    figure.savefig(arguments.output, dpi=95)
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
