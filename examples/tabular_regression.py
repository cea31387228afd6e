"""Predicts the course of diabetes from ten measurements, with a head that `optax.centralize` freezes unseen.

The table of 442 patients comes with scikit-learn: age, sex, body mass index, blood pressure and six blood
tests, and how far the disease had progressed a year later. A multilayer perceptron with dropout learns it
with the Huber loss, three ways, from the same initializations, with the same patients in each batch and the
same units dropped:

- AdamW alone,
- `gc_optax.centralize` before it, with the exact axes that `infer_axes` reads off the loss,
- `optax.centralize` before it, which averages each kernel's gradient over every axis but the first.

The last layer is `Dense(1)`, whose kernel has the shape (64, 1). The mean over its last axis, of one entry,
is the gradient itself, so `optax.centralize` leaves nothing of it: the kernel keeps its random
initialization, but for the little that the weight decay takes. The table and the right half of the picture
have the distance that it moved. The test loss does not give it away, since the hidden layers learn around the
head. The exact axes are the 64 inputs of the head, and it trains.

Each seed has its own split into patients to train on and patients to test with. The splits share patients, so
the interval is one for this table, and narrower than one for other patients. All arms have one learning rate,
tuned for none of them. Linear regression does no worse on a table as small as this: the example shows what
the axes do, and is no evidence for or against centralization.

    python examples/tabular_regression.py [--epochs 60] [--seeds 30] [--output tabular_regression.png]
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import gc_optax

TEST_PATIENTS = 111  # of 442


class Patients(NamedTuple):
    """Measurements of shape (n, 10) and the progression of the disease of shape (n,), both standardized."""

    measurements: jax.Array
    progression: jax.Array


class MLP(nn.Module):
    """Two hidden layers with dropout: measurements (batch, 10) to predictions (batch,)."""

    @nn.compact
    def __call__(self, x: jax.Array, *, training: bool) -> jax.Array:
        """Predicts the progression, with dropout while it trains."""
        for _ in range(2):
            x = nn.relu(nn.Dense(64)(x))
            x = nn.Dropout(0.2, deterministic=not training)(x)
        return nn.Dense(1, name="head")(x).squeeze(-1)


def load(seed: int) -> tuple[Patients, Patients]:
    """Patients to train on and others to test with, standardized by the mean and spread of the former."""
    measurements, progression = load_diabetes(return_X_y=True, scaled=False)
    columns = np.column_stack([measurements, progression])
    train, test = train_test_split(columns, test_size=TEST_PATIENTS, random_state=seed)
    scaler = StandardScaler().fit(train)
    parts = [jnp.asarray(scaler.transform(part), jnp.float32) for part in (train, test)]
    return Patients(parts[0][:, :-1], parts[0][:, -1]), Patients(parts[1][:, :-1], parts[1][:, -1])


def loss(params: optax.Params, patients: Patients, dropout: jax.Array) -> jax.Array:
    """The mean Huber loss, with those units dropped that the random key `dropout` says."""
    predicted = MLP().apply(params, patients.measurements, training=True, rngs={"dropout": dropout})
    return optax.huber_loss(predicted, patients.progression).mean()


@jax.jit
def evaluate(params: optax.Params, patients: Patients) -> jax.Array:
    """The mean Huber loss without dropout."""
    predicted = MLP().apply(params, patients.measurements, training=False)
    return optax.huber_loss(predicted, patients.progression).mean()


def initialize(seed: int) -> optax.Params:
    """The network's first parameters."""
    return MLP().init(jax.random.key(seed), jnp.zeros((1, 10)), training=False)


def make_epoch(optimizer: optax.GradientTransformation) -> Callable:
    """One pass over the patients, a batch to a step, compiled as one program."""

    @jax.jit
    def epoch(params, state, train, batches, key):
        def step(carry, batch):
            params, state = carry
            rows, dropout = batch
            gradients = jax.grad(loss)(params, jax.tree.map(lambda column: column[rows], train), dropout)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        steps = batches, jax.random.split(key, len(batches))
        return jax.lax.scan(step, (params, state), steps)[0]

    return epoch


def train_epochs(
    optimizer: optax.GradientTransformation,
    epoch: Callable,
    seed: int,
    train: Patients,
    test: Patients,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, float]]:
    """Trains once and measures after every epoch."""
    params = initialize(seed)
    first_head = params["params"]["head"]["kernel"]
    state = optimizer.init(params)
    order = np.random.default_rng(seed)
    number = len(train.progression) // arguments.batch_size
    for key in jax.random.split(jax.random.key(seed), arguments.epochs):
        batches = order.permutation(len(train.progression))[: number * arguments.batch_size]
        params, state = epoch(params, state, train, batches.reshape(number, arguments.batch_size), key)
        yield {
            "training loss": evaluate(params, train),
            "test loss": evaluate(params, test),
            "head moved": jnp.linalg.norm(params["params"]["head"]["kernel"] - first_head),
        }


def linear_regression(seed: int) -> float:
    """The test loss of least squares on the split of `seed`, for scale."""
    train, test = load(seed)
    model = LinearRegression().fit(*train)
    return float(optax.huber_loss(model.predict(test.measurements), test.progression).mean())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = comparison.make_parser(
        "Predicts the course of diabetes, with and without gradient centralization.",
        output="tabular_regression.png",
        seeds=30,
    )
    parser.add_argument(
        "--learning-rate", type=comparison.positive_number, default=1e-3, help="of AdamW, in all three arms"
    )
    parser.add_argument(
        "--epochs", type=comparison.positive_integer, default=60, help="passes over the training patients"
    )
    parser.add_argument(
        "--batch-size", type=comparison.positive_integer, default=32, help="patients in a step"
    )
    arguments = parser.parse_args()
    patients = len(load(0)[0].progression)
    if arguments.batch_size > patients:
        parser.error(f"argument --batch-size: there are only {patients} training patients")
    return arguments


def main() -> None:
    """Trains, prints the table and saves the picture."""
    arguments = parse_arguments()
    console = Console(markup=False)
    params = initialize(0)
    axes = gc_optax.infer_axes(loss, params, load(0)[0], jax.random.key(0))
    comparison.print_summary(console, gc_optax.summarize(params, axes))
    adamw = optax.adamw(arguments.learning_rate)
    optimizers = {
        "adamw alone": adamw,
        "gc_optax.centralize": optax.chain(gc_optax.centralize(axes), adamw),
        "optax.centralize": optax.chain(optax.centralize(), adamw),
    }
    title = (
        f"MLP on the diabetes table: adamw at {arguments.learning_rate:g}, "
        f"{arguments.epochs} epochs, batches of {arguments.batch_size}"
    )
    runs = comparison.Comparison(
        title, list(optimizers), seeds=arguments.seeds, points=range(1, arguments.epochs + 1)
    )
    with runs.measuring(console):
        epochs = {name: make_epoch(optimizer) for name, optimizer in optimizers.items()}
        for seed in range(arguments.seeds):
            train, test = load(seed)
            for name, optimizer in optimizers.items():
                for measured in train_epochs(optimizer, epochs[name], seed, train, test, arguments):
                    runs.add(name, seed, measured)
    runs.report(console, {"training loss": 4, "test loss": 4, "head moved": 4}, compare=["test loss"])
    finished = len(runs.at_end("test loss")["adamw alone"])
    if finished:
        linear = comparison.spread([linear_regression(seed) for seed in range(finished)], 4)
        console.print(f"For scale: linear regression has a test loss of {linear}.")
    runs.draw(["test loss", "head moved"], arguments.output)
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
