"""Trains a small Keras network by `fit` with and without gradient centralization, saves it and loads it.

It is the usual work with Keras: `compile`, `fit` with a callback, `save`, `load_model`. Gradient
centralization (GC) is one call around the optimizer:

    axes = gc_optax.keras.infer_axes(model, images)
    model.compile(gc_optax.keras.centralized(keras.optimizers.Adam(1e-3), axes), ...)

The axes are read off what the model computes, and the table of them is printed. The network, with batch
normalization and dropout, learns the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn. Adam
alone and Adam with GC start from the same weights, see the same batches in the same order, drop the same
activations, and have the same learning rate, the default of Keras.

At the end there are a table, and a picture of the loss and the accuracy after every epoch. The last model is
saved and loaded, and the loaded one trains on: the optimizer is still centralized, and goes on from its last
step. Five seeds on images this small are no evidence for other networks.

With the defaults the loss of the training batches, dropout included, falls faster with GC, and the accuracy
ends where it does without.

    python examples/keras_fit.py [--epochs 20] [--seeds 5] [--output keras_fit.png]
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

# Keras reads this when it is imported, before the backend in its configuration file, which stays as it is.
os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

try:
    import gc_optax.keras
except ImportError as error:
    # The environment asks for another backend: the error says what to do.
    raise SystemExit(str(error)) from None

import keras
from keras import layers

ADAM, ADAM_WITH_GC = "Adam", "Adam with GC"


class Digits(NamedTuple):
    """Images of shape (n, 8, 8, 1) with values from 0 to 1, and labels of shape (n,)."""

    images: np.ndarray
    labels: np.ndarray


class Record(keras.callbacks.Callback):
    """Hands what `fit` has measured to the comparison, after every epoch."""

    def __init__(self, runs: comparison.Comparison, arm: str, seed: int):
        super().__init__()
        self.runs, self.arm, self.seed = runs, arm, seed

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Adds the loss of the epoch's batches, dropout included, and the accuracy after it."""
        measured = {"training loss": logs["loss"], "test accuracy, %": 100 * logs["val_accuracy"]}
        self.runs.add(self.arm, self.seed, measured)


def whole_batches(digits: Digits, batch_size: int) -> Digits:
    """As many of the digits as fill batches: a smaller last one would have to be compiled for."""
    count = len(digits.labels) // batch_size * batch_size
    return Digits(digits.images[:count], digits.labels[:count])


def load() -> tuple[Digits, Digits]:
    """Four fifths of the images of each digit to train on, the others to test with."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    labels = labels.astype(np.int32)  # the integers of JAX
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    return Digits(train_images, train_labels), Digits(test_images, test_labels)


def make_model() -> keras.Model:
    """Two convolutions and two dense layers: images (batch, 8, 8, 1) to logits (batch, 10)."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv_0"),
            layers.BatchNormalization(name="norm_0"),
            layers.ReLU(),
            layers.Conv2D(32, 3, padding="same", use_bias=False, name="conv_1"),
            layers.BatchNormalization(name="norm_1"),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu", name="hidden"),
            layers.Dropout(0.5),
            layers.Dense(10, name="logits"),
        ],
        name="cnn",
    )


def make_optimizer(arm: str, model: keras.Model, images: np.ndarray, learning_rate: float) -> Any:
    """Adam, and with GC over the axes that are exact for the model."""
    adam = keras.optimizers.Adam(learning_rate)
    if arm == ADAM:
        return adam
    return gc_optax.keras.centralized(adam, gc_optax.keras.infer_axes(model, images))


def fit(
    arm: str,
    seed: int,
    train: Digits,
    test: Digits,
    runs: comparison.Comparison,
    arguments: argparse.Namespace,
) -> keras.Model:
    """Trains a new model in one of the ways."""
    # All of it follows from the seed: the first weights, the order of the batches, what dropout drops.
    keras.utils.set_random_seed(seed)
    model = make_model()
    model.compile(
        make_optimizer(arm, model, train.images[:1], arguments.learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        train.images,
        train.labels,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        validation_data=(test.images, test.labels),
        validation_batch_size=len(test.labels),
        callbacks=[Record(runs, arm, seed)],
        verbose=0,  # the progress bar of the comparison shows the time left of all runs
    )
    return model


def print_axes(train: Digits, console: Console) -> None:
    """Prints the table of the axes that GC averages over."""
    model = make_model()
    axes = gc_optax.keras.infer_axes(model, train.images[:1])
    variables = {variable.path: variable.value for variable in model.trainable_variables}
    comparison.print_summary(console, gc_optax.summarize(variables, axes))


def save_load_and_go_on(
    model: keras.Model, train: Digits, test: Digits, batch_size: int, console: Console
) -> None:
    """Saves the model, loads it, and trains the loaded one for another epoch."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        model.save(path)
        # No custom_objects: gc_optax.keras has told Keras of its optimizers.
        loaded = keras.models.load_model(path)
    saved_step = int(loaded.optimizer.iterations)
    expected, predicted = (
        each.predict(test.images, batch_size=len(test.labels), verbose=0) for each in (model, loaded)
    )
    loaded.fit(train.images, train.labels, batch_size=batch_size, verbose=0)
    same = "the same" if np.array_equal(expected, predicted) else "other"
    console.print(
        f"Saved and loaded: {type(loaded.optimizer).__name__} after {saved_step} steps, {same} predictions; "
        f"trained on to step {int(loaded.optimizer.iterations)}."
    )


def parse_arguments(training_images: int) -> argparse.Namespace:
    """The command line."""
    parser = comparison.make_parser(
        "Trains a small Keras network on digits by `fit`, with and without gradient centralization.",
        output="keras_fit.png",
        seeds=5,
    )
    count = comparison.positive_integer
    parser.add_argument(
        "--learning-rate", type=comparison.positive_number, default=1e-3, help="of Adam, in both arms"
    )
    parser.add_argument("--epochs", type=count, default=20, help="passes over the training images")
    parser.add_argument("--batch-size", type=count, default=64, help="images in a step")
    arguments = parser.parse_args()
    if arguments.batch_size > training_images:
        parser.error(f"argument --batch-size: there are only {training_images} training images")
    return arguments


def main() -> None:
    """Trains, prints the table, saves the picture, and shows that a saved model goes on."""
    train, test = load()
    arguments = parse_arguments(len(train.labels))
    train = whole_batches(train, arguments.batch_size)
    console = Console(markup=False)
    print_axes(train, console)
    title = (
        f"Keras CNN on 8x8 digits: Adam at {arguments.learning_rate:g}, "
        f"{arguments.epochs} epochs, batches of {arguments.batch_size}"
    )
    runs = comparison.Comparison(
        title, [ADAM, ADAM_WITH_GC], seeds=arguments.seeds, points=range(1, arguments.epochs + 1)
    )
    with runs.measuring(console):
        for seed in range(arguments.seeds):
            for arm in runs.arms:
                model = fit(arm, seed, train, test, runs, arguments)
    runs.report(
        console, {"training loss": 4, "test accuracy, %": 2}, compare=["training loss", "test accuracy, %"]
    )
    console.print(f"One of the {len(test.labels)} test images is {100 / len(test.labels):.2f} points.")
    runs.draw(["training loss", "test accuracy, %"], arguments.output, log=["training loss"])
    if not runs.stopped:
        save_load_and_go_on(model, train, test, arguments.batch_size, console)
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
