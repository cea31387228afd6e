"""How a `Dense(1)` head trains under three centralizations: right axes, PyTorch's axes, none.

A Flax network with one hidden layer and a `Dense(1)` head learns the regression problem Friedman #1. The
head's kernel has shape (64, 1). `optax.centralize` averages it over its last axis, which has one entry, so
what is left of its gradient is zero.

    python benchmarks/frozen_head.py [--steps N] [--seeds N] [--json PATH]
"""

from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.console import Console
from rich.table import Table
from sklearn.datasets import make_friedman1

from gc_optax import centralize

OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "gc_optax.centralize + adam": optax.chain(centralize(), optax.adam(1e-2)),
    "optax.centralize + adam": optax.chain(optax.centralize(), optax.adam(1e-2)),
}


class Regression(nn.Module):
    """A network with one hidden layer: inputs (batch, features) to outputs (batch, 1)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Predicts one number for each row of `x`."""
        return nn.Dense(1, name="head")(nn.relu(nn.Dense(64)(x)))


def friedman() -> tuple[jax.Array, jax.Array]:
    """500 rows of ten features, and a target of mean 0 and variance 1."""
    x, y = make_friedman1(500, noise=0.0, random_state=0)
    return jnp.asarray(x, jnp.float32), jnp.asarray((y - y.mean()) / y.std(), jnp.float32)[:, None]


def train(optimizer: optax.GradientTransformation, seed: int, steps: int) -> dict[str, float]:
    """Trains on all rows at each step; gives the last loss and how far the head's kernel went."""
    x, y = friedman()
    model = Regression()
    start = model.init(jax.random.key(seed), x)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((model.apply(params, x) - y) ** 2)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (end, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    moved = jnp.linalg.norm(end["params"]["head"]["kernel"] - start["params"]["head"]["kernel"])
    return {"loss": float(loss(end)), "head_moved": float(moved)}


def main() -> None:
    """Runs every optimizer with every seed and prints a table."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--steps", type=harness.positive, default=500, help="full-batch steps (default: 500)")
    parser.add_argument("--seeds", type=harness.positive, default=5, help="initializations (default: 5)")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"argument --seeds: a spread needs at least 2, got {arguments.seeds}")

    runs = {
        name: [train(optimizer, seed, arguments.steps) for seed in range(arguments.seeds)]
        for name, optimizer in OPTIMIZERS.items()
    }
    table = Table(
        title=f"Dense(1) head, {arguments.steps} steps, mean ± standard deviation of {arguments.seeds} seeds"
    )
    for heading in ("optimizer", "training loss", "distance the head's kernel moved"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, results in runs.items():
        columns = [np.array([result[key] for result in results]) for key in ("loss", "head_moved")]
        table.add_row(name, *(f"{values.mean():.4f} ± {values.std(ddof=1):.4f}" for values in columns))
    Console().print(table)
    harness.save(runs, arguments.json)


if __name__ == "__main__":
    main()
