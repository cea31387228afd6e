"""Trains an Equinox network with the axes that are read off it, and with those of another layout.

Equinox keeps the weight of a linear layer as (out, in), as PyTorch does; Flax and Haiku keep it as (in, out).
No shape tells the two apart. A multilayer perceptron learns the regression problem Friedman #1, whose data
scikit-learn makes, three ways, from the same initializations and with the same order of the data:

- Adam alone,
- `centralize(infer_axes(...))` before it: over the inputs of each weight vector, as the model uses them,
- `centralize(out_last)` before it: over the outputs, which is right for Flax and wrong here. `centralize()`
  takes the same axes for this model.

The tables of `summarize` show both. Nothing else tells that the second are wrong: no error is raised, and the
network trains. All arms have Adam's usual learning rate; ten seeds on one problem are no evidence for or
against centralization.

    python examples/equinox_regression.py [--epochs 40] [--seeds 10] [--output equinox_regression.png]
"""

import comparison  # first: from here on Ctrl-C ends in one line

# isort: split
import argparse
from collections.abc import Callable, Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.datasets import make_friedman1

import gc_optax

ROWS = 500  # to train on, and as many to test with
BATCH_SIZE = 50


def load() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Ten features and a noisy target to train on, then to test with, standardized by the former."""
    x, y = make_friedman1(2 * ROWS, noise=1.0, random_state=0)
    x, y = ((data - data[:ROWS].mean(0)) / data[:ROWS].std(0) for data in (x, y))
    return tuple(jnp.asarray(part, jnp.float32) for part in (x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:]))


def initialize(seed: int) -> eqx.nn.MLP:
    """Two hidden layers of 64 units: features (10,) to a number."""
    return eqx.nn.MLP(10, "scalar", width_size=64, depth=2, key=jax.random.key(seed))


def loss(model: eqx.nn.MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error."""
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


evaluate = eqx.filter_jit(loss)


def make_step(optimizer: optax.GradientTransformation) -> Callable:
    """The training step, which also gives the loss before it."""

    @eqx.filter_jit
    def step(model, state, x, y, rows):
        before, gradients = eqx.filter_value_and_grad(loss)(model, x[rows], y[rows])
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(model, updates), state, before

    return step


def train_epochs(
    optimizer: optax.GradientTransformation, step: Callable, seed: int, data: Sequence[jax.Array], epochs: int
) -> Iterator[dict[str, float]]:
    """Trains once; after every epoch it gives the mean loss of the batches and the loss on the test rows."""
    x, y, test_x, test_y = data
    model = initialize(seed)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        losses = []
        for rows in order.permutation(ROWS).reshape(-1, BATCH_SIZE):
            model, state, before = step(model, state, x, y, rows)
            losses.append(before)
        yield {"training loss": jnp.stack(losses).mean(), "test loss": evaluate(model, test_x, test_y)}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = comparison.make_parser(
        "Trains an Equinox network, with and without gradient centralization.",
        output="equinox_regression.png",
        seeds=10,
    )
    parser.add_argument(
        "--learning-rate", type=comparison.positive_number, default=1e-3, help="of Adam, in all arms"
    )
    parser.add_argument(
        "--epochs", type=comparison.positive_integer, default=40, help="passes over the training rows"
    )
    return parser.parse_args()


def main() -> None:
    """Shows the axes, trains, prints the table and saves the picture."""
    arguments = parse_arguments()
    console = Console(markup=False)
    data = load()
    model = initialize(0)  # its activations are leaves of it too; they are no arrays, and are left alone
    exact = gc_optax.infer_axes(loss, model, *data[:2])
    for name, axes in [("infer_axes", exact), ("out_last", gc_optax.out_last)]:
        console.print(f"\nThe axes of {name}:")
        comparison.print_summary(console, gc_optax.summarize(model, axes))
    adam = optax.adam(arguments.learning_rate)
    optimizers = {
        "adam alone": adam,
        "exact axes": optax.chain(gc_optax.centralize(exact), adam),
        "axes of out_last": optax.chain(gc_optax.centralize(gc_optax.out_last), adam),
    }
    title = f"Equinox MLP on Friedman #1: adam at {arguments.learning_rate:g}, {arguments.epochs} epochs"
    runs = comparison.Comparison(
        title, list(optimizers), seeds=arguments.seeds, points=range(1, arguments.epochs + 1)
    )
    with runs.measuring(console):
        steps = {name: make_step(optimizer) for name, optimizer in optimizers.items()}
        for seed in range(arguments.seeds):
            for name, optimizer in optimizers.items():
                for measured in train_epochs(optimizer, steps[name], seed, data, arguments.epochs):
                    runs.add(name, seed, measured)
    runs.report(console, {"training loss": 4, "test loss": 4}, compare=["training loss", "test loss"])
    runs.draw(["training loss", "test loss"], arguments.output, log=["training loss", "test loss"])
    runs.finish(console, arguments.output)


if __name__ == "__main__":
    main()
