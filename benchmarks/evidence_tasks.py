"""What `evidence.py` trains: the data, the models and the loss of each task.

A task is one row of `TASKS`: a model of Flax, a function that splits the data for a seed, and how long it
trains. Its split has three parts. What a setting is chosen on is never tested on: the validation part is set
aside once. From the rest each seed draws what it trains on and, from the small sets, what it is tested on.
"""

import functools
import gzip
import math
import pathlib
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import LSTM, Decoder
from sklearn.datasets import load_diabetes, load_digits, make_friedman1

BYTES = 256
WINDOW = 64


class Examples(NamedTuple):
    """Inputs (n, ...) and targets: labels (n,), numbers (n,) or, of language models, bytes (n, length)."""

    inputs: np.ndarray
    targets: np.ndarray

    def rows(self, rows: Any) -> "Examples":
        """Some of them."""
        return Examples(self.inputs[rows], self.targets[rows])


class Split(NamedTuple):
    """What a seed trains on, what settings are chosen on, and what it is tested on."""

    train: Examples
    validation: Examples
    test: Examples


class ConvNet(nn.Module):
    """Convolutions, each with a ReLU: (batch, *spatial, channels) to logits (batch, 10).

    Args:
        features: the channels of each convolution.
        strides: its stride, along every spatial axis.
        window: the shape of the windows.
        norm: what stands between a convolution and its ReLU.
        hidden: units of a dense layer on all positions; where there is none, a dense layer on their mean.
    """

    features: Sequence[int]
    strides: Sequence[int]
    window: Sequence[int] = (3, 3)
    norm: Literal["none", "batch", "group"] = "none"
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Classifies; `train` normalizes by the batch and updates the collection `batch_stats`."""
        for features, stride in zip(self.features, self.strides, strict=True):
            x = nn.Conv(features, self.window, stride, use_bias=self.norm == "none")(x)
            if self.norm == "batch":
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            if self.norm == "group":
                x = nn.GroupNorm(num_groups=8)(x)
            x = nn.relu(x)
        if self.hidden is None:
            return nn.Dense(10)(x.mean(range(1, x.ndim - 1)))
        return nn.Dense(10)(nn.relu(nn.Dense(self.hidden)(x.reshape(len(x), -1))))


class MLP(nn.Module):
    """Two hidden layers with ReLU: (batch, inputs) to (batch, outputs)."""

    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits or, with one output, the prediction."""
        x = nn.relu(nn.Dense(self.hidden)(x))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.outputs)(x)


class LanguageModel(nn.Module):
    """A model of bytes, which does the same in training as in testing."""

    model: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Predicts the byte after each position: (batch, length) to logits (batch, length, 256)."""
        return self.model(x)


def resplit(examples: Examples, seed: int, *, validation: int, train: int, test: int) -> Split:
    """Sets `validation` of the examples aside, the same for all seeds, and draws the others for a seed."""
    order = np.random.default_rng(0).permutation(len(examples.targets))
    fixed, rest = order[:validation], order[validation:]
    drawn = np.random.default_rng(seed).permutation(rest)
    parts = drawn[:train], fixed, drawn[train : train + test]
    return Split(*(examples.rows(part) for part in parts))


def digits(seed: int, folder: pathlib.Path) -> Split:
    """The 1,797 handwritten digits of scikit-learn: 1,024 to train on, 373 to test with."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    return resplit(Examples(images, labels.astype(np.int32)), seed, validation=400, train=1024, test=373)


@functools.cache
def _mnist1d() -> Examples:
    from mnist1d.data import get_dataset_args, make_dataset

    data = make_dataset(get_dataset_args())  # with its own seed: what is published
    inputs = np.concatenate([data["x"], data["x_test"]]).astype(np.float32)
    return Examples(inputs, np.concatenate([data["y"], data["y_test"]]).astype(np.int32))


def mnist1d(seed: int, folder: pathlib.Path) -> Split:
    """The 5,000 signals of MNIST-1D, of 40 values each: 3,000 to train on, 1,000 to test with."""
    return resplit(_mnist1d(), seed, validation=1000, train=3000, test=1000)


def mnist1d_channel(seed: int, folder: pathlib.Path) -> Split:
    """The same with an axis of one channel, for convolutions."""
    return Split(*(Examples(part.inputs[..., None], part.targets) for part in mnist1d(seed, folder)))


@functools.cache
def _fashion(folder: pathlib.Path, name: str) -> Examples:
    images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return Examples(pixels, np.frombuffer(labels, np.uint8, offset=8))


def fashion(seed: int, folder: pathlib.Path) -> Split:
    """Fashion-MNIST: each seed trains on 2,048 of the training images, and is tested with 2,000 others."""
    pool, test = _fashion(folder, "train"), _fashion(folder, "t10k")
    train = 2000 + np.random.default_rng(seed).choice(len(pool.targets) - 2000, 2048, replace=False)
    parts = pool.rows(train), pool.rows(slice(2000)), test.rows(slice(2000))
    return Split(*(Examples(x.astype(np.float32) / 255, y.astype(np.int32)) for x, y in parts))


def standardized(split: Split, *, inputs: bool) -> Split:
    """With targets of mean 0 and variance 1 in training, and inputs too."""
    x, y = split.train
    shift, scale = (x.mean(0), x.std(0)) if inputs else (0, 1)
    parts = [((part.inputs - shift) / scale, (part.targets - y.mean()) / y.std()) for part in split]
    return Split(*(Examples(x.astype(np.float32), y.astype(np.float32)) for x, y in parts))


def diabetes(seed: int, folder: pathlib.Path) -> Split:
    """The 442 patients of scikit-learn, 10 measurements each: 256 to train on, 86 to test with."""
    patients = Examples(*load_diabetes(return_X_y=True, scaled=False))
    split = resplit(patients, seed, validation=100, train=256, test=86)
    return standardized(split, inputs=True)


def friedman(seed: int, folder: pathlib.Path) -> Split:
    """Friedman #1 with noise: 10 inputs between 0 and 1, which have a common offset. 1,024 to train on."""
    examples = Examples(*make_friedman1(3024, noise=1.0, random_state=0))
    split = resplit(examples, seed, validation=1000, train=1024, test=1000)
    return standardized(split, inputs=False)


@functools.cache
def _library() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(folder.glob("*.py")) if not file.name.startswith("_sysconfigdata")]
    contents = [file.read_bytes() for file in files]  # but for that one, the same on every machine
    validation, test = b"".join(contents[0::10]), b"".join(contents[5::10])
    train = b"".join(content for number, content in enumerate(contents) if number % 5)
    return tuple(np.frombuffer(part, np.uint8) for part in (train, validation, test))


def library(seed: int, folder: pathlib.Path) -> Split:
    """The modules of Python's standard library as bytes, cut into windows; other modules to test with."""
    train, validation, test = _library()

    def windows(text: np.ndarray, starts: np.ndarray) -> Examples:
        cut = text[starts[:, None] + np.arange(WINDOW + 1)].astype(np.int32)
        return Examples(cut[:, :-1], cut[:, 1:])

    drawn = np.random.default_rng(seed).integers(0, len(train) - WINDOW, 6400)
    spread = [np.linspace(0, len(text) - WINDOW - 1, 400).astype(int) for text in (validation, test)]
    return Split(windows(train, drawn), windows(validation, spread[0]), windows(test, spread[1]))


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long.

    Args:
        title: what it is, for tables.
        model: maps inputs and `train` to logits or predictions.
        split: the data for a seed; the folder is that of Fashion-MNIST.
        rates: the optimizers, and the learning rate in the middle of the grid of each.
        metric: what counts: "error" in percent, or "loss".
        steps: of training.
        batch: examples in a step.
        seeds: how many runs are tested.
        tuning_seeds: how many runs choose a setting.
        tunes_decay: whether the weight decay is chosen too.
    """

    title: str
    model: nn.Module
    split: Callable[[int, pathlib.Path], Split]
    rates: dict[str, float]
    metric: Literal["error", "loss"]
    steps: int
    batch: int
    seeds: int
    tuning_seeds: int
    tunes_decay: bool = True

    @property
    def nothing_learnt(self) -> float:
        """A metric from which on a run has learnt nothing: hardly better than guessing is."""
        if self.metric == "error":
            return 80.0  # of ten classes
        return math.log(BYTES) if isinstance(self.model, LanguageModel) else 1.0

    @property
    def unit(self) -> str:
        """What the numbers of the metric are."""
        if self.metric == "error":
            return "error, %"
        return "nats a byte" if isinstance(self.model, LanguageModel) else "squared error"

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The mean cross-entropy in nats or, where the targets are no labels, the mean squared error."""
        if jnp.issubdtype(targets.dtype, jnp.floating):
            return jnp.mean((outputs.squeeze(-1) - targets) ** 2)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


FASHION = {"features": (16, 32, 32), "strides": (2, 2, 1)}
TASKS = {
    "digits": Task(
        "digits, CNN",
        ConvNet((16, 32), (1, 2), hidden=64),
        digits,
        {"sgd": 0.1, "adamw": 4e-3, "lion": 4e-4},
        metric="error",
        steps=320,
        batch=64,
        seeds=100,
        tuning_seeds=16,
    ),
    "mnist1d_cnn": Task(
        "MNIST-1D, Conv1D",
        ConvNet((25, 25, 25), (2, 2, 2), window=(5,), hidden=64),
        mnist1d_channel,
        {"sgd": 0.1, "adamw": 4e-3},
        metric="error",
        steps=450,
        batch=100,
        seeds=50,
        tuning_seeds=16,
    ),
    "mnist1d_mlp": Task(
        "MNIST-1D, MLP",
        MLP(100, 10),
        mnist1d,
        {"sgd": 0.1, "adamw": 4e-3},
        metric="error",
        steps=450,
        batch=100,
        seeds=50,
        tuning_seeds=16,
    ),
    "fashion_bn": Task(
        "Fashion-MNIST, CNN with BatchNorm",
        ConvNet(**FASHION, norm="batch"),
        fashion,
        {"sgd": 0.2, "adamw": 8e-3},
        metric="error",
        steps=320,
        batch=64,
        seeds=20,
        tuning_seeds=8,
    ),
    "fashion_gn": Task(
        "Fashion-MNIST, CNN with GroupNorm",
        ConvNet(**FASHION, norm="group"),
        fashion,
        {"sgd": 0.2, "adamw": 8e-3},
        metric="error",
        steps=320,
        batch=64,
        seeds=20,
        tuning_seeds=8,
    ),
    "diabetes": Task(
        "diabetes, MLP",
        MLP(64, 1),
        diabetes,
        {"sgd": 0.02, "adamw": 2e-3},
        metric="loss",
        steps=200,
        batch=32,
        seeds=50,
        tuning_seeds=16,
    ),
    "friedman": Task(
        "Friedman #1, MLP",
        MLP(64, 1),
        friedman,
        {"sgd": 0.05, "adamw": 4e-3},
        metric="loss",
        steps=640,
        batch=32,
        seeds=50,
        tuning_seeds=16,
    ),
    "transformer": Task(
        "bytes, transformer with LayerNorm",
        LanguageModel(Decoder(layers=2, embed=48, heads=4, vocabulary=BYTES, longest=WINDOW)),
        library,
        {"sgd": 0.4, "adamw": 4e-3, "muon": 2e-2},
        metric="loss",
        steps=400,
        batch=16,
        seeds=10,
        tuning_seeds=3,
        tunes_decay=False,
    ),
    "lstm": Task(
        "bytes, LSTM",
        LanguageModel(LSTM(layers=1, hidden=96, vocabulary=BYTES)),
        library,
        {"sgd": 1.0, "adamw": 1e-2},
        metric="loss",
        steps=400,
        batch=16,
        seeds=10,
        tuning_seeds=3,
        tunes_decay=False,
    ),
}
