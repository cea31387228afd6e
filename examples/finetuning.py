"""Fine-tunes a small Flax network in full and by LoRA, each with and without gradient centralization.

A network is pretrained on the handwritten digits 0 to 4 that come with scikit-learn, and saved in an Orbax
checkpoint. From there it learns the digits 5 to 9, of which it sees a few images only, in four ways:

- full fine-tuning: AdamW on all parameters,
- the same with gradient centralization (GC),
- LoRA: each kernel W becomes W + (alpha / r) A @ B, and only the adapters A and B are trained,
- the same with GC.

`gc_optax.infer_axes` is given the loss as LoRA trains it: a function of the adapters, the frozen network and
a batch. Only its first argument counts as parameters, so it reads off the axes of A, of shape (in, r), and of
B, of shape (r, out). The table of them is printed. A weight vector of B has r entries: of its gradient, GC
removes one direction out of r, which is much where r is small.

At the end there are a table and a picture. All four ways have the same learning rate, which was chosen for
none of them: for LoRA alone one would look for another. Each seed draws its own images to train on, and its
own first weights of a new head and of A. With `--checkpoint` the pretrained network is kept in a folder, and
the next run reads it from there. Digits of 8x8 pixels and a network this small are no evidence for others.

With the defaults the loss falls faster with GC, in full and by LoRA. The accuracy of full fine-tuning ends
where it does without, and that of LoRA ends almost a point lower.

    python examples/finetuning.py [--checkpoint FOLDER] [--rank 4] [--shots 20] [--seeds 20] [--output FILE]
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
import contextlib
import json
import os
import pathlib
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gc_optax

CLASSES = 5
WIDTH = 128
PRETRAINING_EPOCHS = 30
PRETRAINING_BATCH = 32
ALPHA = 8.0
# The names of both in the folder.
CHECKPOINT = "pretrained"
RECORD = "pretrained.json"


class Digits(NamedTuple):
    """Images of shape (n, 64) with values from 0 to 1, and labels of shape (n,) from 0 to 4."""

    images: jax.Array
    labels: jax.Array


class Task(NamedTuple):
    """Digits to train on and others to test with."""

    train: Digits
    test: Digits


class MLP(nn.Module):
    """Three dense layers: images (batch, 64) to logits (batch, 5)."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes the logits of the five digits."""
        x = nn.relu(nn.Dense(WIDTH, name="hidden_0")(images))
        x = nn.relu(nn.Dense(WIDTH, name="hidden_1")(x))
        return nn.Dense(CLASSES, name="head")(x)


# What an arm trains and what it leaves alone, to the parameters of the network.
Merge = Callable[[optax.Params, optax.Params], optax.Params]


def all_parameters(params: optax.Params, frozen: optax.Params) -> optax.Params:
    """Full fine-tuning: the network is what is trained."""
    return params


def with_adapters(adapters: optax.Params, base: optax.Params) -> optax.Params:
    """LoRA: the frozen network, with the product of its adapters added to each kernel."""

    def adapt(layer: dict[str, jax.Array], a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
        return {"kernel": layer["kernel"] + ALPHA / a.shape[1] * a @ b, "bias": layer["bias"]}

    return {name: adapt(layer, adapters[name]["A"], adapters[name]["B"]) for name, layer in base.items()}


def make_adapters(base: optax.Params, rank: int, seed: int) -> optax.Params:
    """The first adapters of each kernel: A is random and B is zero, so that they change nothing yet."""
    keys = jax.random.split(jax.random.key(seed), len(base))
    shapes = {name: layer["kernel"].shape for name, layer in base.items()}
    return {
        name: {
            "A": nn.initializers.lecun_normal()(key, (fan_in, rank)),
            "B": jnp.zeros((rank, fan_out)),
        }
        for key, (name, (fan_in, fan_out)) in zip(keys, shapes.items(), strict=True)
    }


def make_loss(merge: Merge) -> Callable[[optax.Params, optax.Params, Digits], jax.Array]:
    """The mean cross-entropy, as a function of what is trained, of what is frozen and of a batch."""

    def loss(trained: optax.Params, frozen: optax.Params, digits: Digits) -> jax.Array:
        logits = MLP().apply({"params": merge(trained, frozen)}, digits.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, digits.labels).mean()

    return loss


def make_step(merge: Merge, optimizer: optax.GradientTransformation) -> Callable:
    """The training step. What is frozen is an argument, so that one compilation serves every seed."""
    loss = make_loss(merge)

    @jax.jit
    def step(trained, state, frozen, train, rows):
        batch = Digits(train.images[rows], train.labels[rows])
        updates, state = optimizer.update(jax.grad(loss)(trained, frozen, batch), state, trained)
        return optax.apply_updates(trained, updates), state

    return step


@jax.jit
def evaluate(params: optax.Params, task: Task) -> dict[str, jax.Array]:
    """The loss on the training images and the accuracy on the test images."""
    right = MLP().apply({"params": params}, task.test.images).argmax(-1) == task.test.labels
    loss = make_loss(all_parameters)(params, {}, task.train)
    return {"training loss": loss, "test accuracy, %": 100 * right.mean()}


class Arm(NamedTuple):
    """A way to train."""

    merge: Merge
    optimizer: optax.GradientTransformation
    step: Callable


def make_arm(merge: Merge, optimizer: optax.GradientTransformation) -> Arm:
    """A way to train, with its step."""
    return Arm(merge, optimizer, make_step(merge, optimizer))


def begin(arm: Arm, base: optax.Params, rank: int, seed: int) -> tuple[optax.Params, optax.Params]:
    """What a way to fine-tune trains at first, and what it leaves alone."""
    return (base, {}) if arm.merge is all_parameters else (make_adapters(base, rank, seed), base)


def train_epochs(
    arm: Arm,
    trained: optax.Params,
    frozen: optax.Params,
    train: Digits,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
) -> Iterator[optax.Params]:
    """Trains, and gives the network's parameters after every epoch."""
    state = arm.optimizer.init(trained)
    order = np.random.default_rng(seed)
    batches = len(train.labels) // batch_size
    for _ in range(epochs):
        shuffled = order.permutation(len(train.labels))[: batches * batch_size]
        for rows in shuffled.reshape(batches, batch_size):
            trained, state = arm.step(trained, state, frozen, train, rows)
        yield arm.merge(trained, frozen)


def load(first: int) -> Task:
    """Five digits from `first` on, half of the images of each to train on and half to test with."""
    images, labels = load_digits(return_X_y=True)
    these = (labels >= first) & (labels < first + CLASSES)
    images, labels = (images[these] / 16).astype(np.float32), labels[these] - first
    split = train_test_split(images, labels, test_size=0.5, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
    return Task(Digits(train_images, train_labels), Digits(test_images, test_labels))


def draw_shots(train: Digits, shots: int, seed: int) -> Digits:
    """A few images of each digit."""
    generator = np.random.default_rng(seed)
    of_each = [np.flatnonzero(train.labels == label) for label in range(CLASSES)]
    rows = np.concatenate([generator.permutation(those)[:shots] for those in of_each])
    return Digits(train.images[rows], train.labels[rows])


def initialize(seed: int) -> optax.Params:
    """The network's first parameters."""
    return MLP().init(jax.random.key(seed), jnp.zeros((1, 64)))["params"]


def pretrain(task: Task) -> optax.Params:
    """Trains the network on the old digits."""
    arm = make_arm(all_parameters, optax.adamw(1e-3))
    *_, params = train_epochs(
        arm,
        initialize(0),
        {},
        task.train,
        seed=0,
        epochs=PRETRAINING_EPOCHS,
        batch_size=PRETRAINING_BATCH,
    )
    return params


def describe(params: optax.Params) -> dict[str, dict[str, list[int]]]:
    """The shapes of the network's parameters, as JSON has them."""
    return jax.tree.map(lambda leaf: list(leaf.shape), params)


def file_checksums(path: pathlib.Path) -> dict[str, int]:
    """The checksum of each file of a checkpoint."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): zlib.crc32(file.read_bytes()) for file in files}


def save(folder: pathlib.Path, params: optax.Params) -> None:
    """Writes a checkpoint, and beside it a record of what is in it: Orbax reads some damaged files too."""
    path = folder.absolute() / CHECKPOINT
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)
    record = {"network": describe(params), "files": file_checksums(path)}
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def restore(folder: pathlib.Path) -> optax.Params:
    """The parameters of a checkpoint. One that is not what was saved is a ValueError."""
    path, like = folder.absolute() / CHECKPOINT, initialize(0)
    try:
        record = json.loads((folder / RECORD).read_text())
        network, files = record["network"], record["files"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / RECORD} is not a record of this example") from error
    if network != describe(like):
        raise ValueError(f"{path} holds another network")
    if files != file_checksums(path):
        raise ValueError(f"{path} is damaged: its files are not what was saved")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def pretrained(folder: pathlib.Path, parser: argparse.ArgumentParser, console: Console) -> optax.Params:
    """The pretrained network of the folder, which is made and saved if there is none."""
    old_digits = load(0)
    if (folder / RECORD).exists():
        console.print(f"The pretrained network is read from {folder.absolute()}", soft_wrap=True)
    else:
        save(folder, pretrain(old_digits))
    try:
        params = restore(folder)
    except ValueError as error:
        parser.error(f"argument --checkpoint: {error}")
    accuracy = evaluate(params, old_digits)["test accuracy, %"]
    console.print(f"It knows {accuracy:.1f} % of the test images of the old digits.")
    return params


def make_arms(
    base: optax.Params, new_digits: Task, arguments: argparse.Namespace, console: Console
) -> dict[str, Arm]:
    """The four ways to fine-tune, with the axes of what each one trains."""
    batch = jax.tree.map(lambda array: array[: arguments.batch_size], new_digits.train)
    adapters = make_adapters(base, arguments.rank, 0)
    arms = {}
    for name, merge, trained, frozen in (
        ("full", all_parameters, base, {}),
        ("LoRA", with_adapters, adapters, base),
    ):
        axes = gc_optax.infer_axes(make_loss(merge), trained, frozen, batch)
        adamw = optax.adamw(arguments.learning_rate, mask=gc_optax.decay_mask(axes))
        arms[name] = make_arm(merge, adamw)
        arms[f"{name} with GC"] = make_arm(merge, optax.chain(gc_optax.centralize(axes), adamw))
    comparison.print_summary(console, gc_optax.summarize(adapters, axes))
    return arms


def checkpoint_folder(text: str) -> pathlib.Path:
    """A folder that holds a checkpoint of this script, or that one can be written to."""
    folder = pathlib.Path(text)
    try:
        if (folder / RECORD).exists():
            return folder
        there = folder if folder.exists() else folder.absolute().parent
        if not there.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {there}")
        if there == folder and any(folder.iterdir()):
            raise argparse.ArgumentTypeError(f"{text} holds something else than the network of this example")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from error
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to")
    return folder


def parse_arguments(new_digits: Task) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The command line, and its parser for what shows later."""
    parser = comparison.make_parser(
        "Fine-tunes a small Flax network in full and by LoRA, with and without gradient centralization.",
        output="finetuning.png",
        seeds=20,
    )
    count = comparison.positive_integer
    parser.add_argument(
        "--checkpoint",
        type=checkpoint_folder,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="where the pretrained network is, or goes (default: a temporary folder)",
    )
    parser.add_argument("--rank", type=count, default=4, help="r, of the adapters")
    parser.add_argument("--shots", type=count, default=20, help="images of each new digit to train on")
    parser.add_argument("--epochs", type=count, default=30, help="passes over them")
    parser.add_argument("--batch-size", type=count, default=20, help="images in a step")
    parser.add_argument(
        "--learning-rate", type=comparison.positive_number, default=3e-3, help="of AdamW, in all arms"
    )
    arguments = parser.parse_args()
    fewest = int(np.bincount(new_digits.train.labels).min())
    if arguments.shots > fewest:
        parser.error(f"argument --shots: there are only {fewest} images of a digit")
    if arguments.batch_size > arguments.shots * CLASSES:
        parser.error(f"argument --batch-size: there are only {arguments.shots * CLASSES} images to train on")
    if arguments.rank > WIDTH:
        parser.error(f"argument --rank: the network is only {WIDTH} wide")
    return arguments, parser


def main() -> None:
    """Pretrains, fine-tunes, prints the table and saves the picture."""
    new_digits = load(CLASSES)
    arguments, parser = parse_arguments(new_digits)
    console = Console(markup=False)
    with contextlib.ExitStack() as stack:
        if "checkpoint" in arguments:
            folder = arguments.checkpoint
        else:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        params = pretrained(folder, parser, console)
    arms = make_arms(params, new_digits, arguments, console)
    title = (
        f"MLP from the digits 0-4 to {arguments.shots} images of each of 5-9: "
        f"AdamW at {arguments.learning_rate:g}, LoRA of rank {arguments.rank}"
    )
    runs = comparison.Comparison(
        title, list(arms), seeds=arguments.seeds, points=range(1, arguments.epochs + 1)
    )
    trained = {name: begin(arm, params, arguments.rank, 0)[0] for name, arm in arms.items()}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in trained.items()}
    with runs.measuring(console):
        for seed in range(arguments.seeds):
            shots = draw_shots(new_digits.train, arguments.shots, seed)
            base = params | {"head": initialize(seed)["head"]}  # the old head knows the old digits
            for name, arm in arms.items():
                for merged in train_epochs(
                    arm,
                    *begin(arm, base, arguments.rank, seed),
                    shots,
                    seed=seed,
                    epochs=arguments.epochs,
                    batch_size=arguments.batch_size,
                ):
                    runs.add(name, seed, evaluate(merged, Task(shots, new_digits.test)))
    runs.report(
        console,
        {"training loss": 5, "test accuracy, %": 2},
        compare=["training loss", "test accuracy, %"],
        against={"full with GC": "full", "LoRA": "full", "LoRA with GC": "LoRA"},
        notes={"trained parameters": {name: f"{size:,}" for name, size in sizes.items()}},
    )
    tested = len(new_digits.test.labels)
    console.print(f"One of the {tested} test images is {100 / tested:.2f} points.")
    runs.draw(["training loss", "test accuracy, %"], arguments.output, log=["training loss"])
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
