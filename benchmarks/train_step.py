"""What gradient centralization adds to a whole training step, and to the compilation of the update.

A training step is the forward pass, the backward pass and the update with AdamW, compiled, parameters and
state donated. It runs for the network of the quickstart, for a ResNet-18 and for a small transformer. The
update alone is compiled for two trees of 1,000 leaves, of ten sizes: layers of a kernel and three vectors;
and kernels only, which no model has.

Times are ratios to the plain way, measured as in `overhead.py`; "plain again" shows how far noise goes.

    python benchmarks/train_step.py [--rounds N] [--compilations N] [--json PATH]
"""

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import Decoder, ResNet
from rich.progress import track

import gc_optax

sys.path.append(str(pathlib.Path(__file__).absolute().parent.parent / "examples"))
from quickstart import CNN

# By convention: on these models it differs from `infer_axes` in one leaf, the table of positions.
OPTIMIZERS = {
    "plain": optax.adamw(1e-3),
    "gc_optax": gc_optax.centralized(optax.adamw(1e-3), gc_optax.centralize(gc_optax.out_last)),
    "optax.centralize": gc_optax.centralized(optax.adamw(1e-3), optax.centralize()),
}


def training_step(
    model: nn.Module, variables: Any, batch: tuple[jax.Array, jax.Array]
) -> dict[str, Callable[[], Any]]:
    """A whole step in every way: functions that take it, all from the parameters that the last one left."""
    params, others = variables["params"], {name: variables[name] for name in variables if name != "params"}
    state = OPTIMIZERS["plain"].init(params)

    def loss(params: Any, others: Any) -> tuple[jax.Array, Any]:
        inputs, labels = batch
        train = {"train": True} if others else {}
        logits, others = model.apply({"params": params} | others, inputs, **train, mutable=list(others))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), others

    def compiled(optimizer: optax.GradientTransformation) -> jax.stages.Compiled:
        def step(params: Any, others: Any, state: Any) -> tuple[Any, Any, Any]:
            gradients, others = jax.grad(loss, has_aux=True)(params, others)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), others, state

        return jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, others, state).compile()

    programs = {name: compiled(optimizer) for name, optimizer in OPTIMIZERS.items()}
    return harness.stepping(harness.with_again(programs), (params, others, state))


def models() -> dict[str, tuple[nn.Module, tuple[jax.Array, jax.Array]]]:
    """Every model with a batch of noise, which takes as long as any other."""
    random = np.random.default_rng(0)

    def images(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32))

    def integers(below: int, *shape: int) -> jax.Array:
        return jnp.asarray(random.integers(below, size=shape))

    decoder = Decoder(layers=6, embed=256, heads=8, vocabulary=8192)
    return {
        "quickstart, batch 32": (CNN(), (images(32, 8, 8, 1), integers(10, 32))),
        "ResNet-18, batch 16 of 96 x 96": (
            ResNet((2, 2, 2, 2), bottleneck=False),
            (images(16, 96, 96, 3), integers(1000, 16)),
        ),
        "transformer, batch 8 of 256": (decoder, (integers(8192, 8, 256), integers(8192, 8, 256))),
    }


def trees() -> dict[str, Any]:
    """Parameters of 1,000 leaves, as shapes."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    widths = [64 + 8 * (index % 10) for index in range(1000)]
    return {
        "250 kernels, 750 vectors": [
            {"kernel": leaf(n, 64), "bias": leaf(64), "norm": {"scale": leaf(64), "bias": leaf(64)}}
            for n in widths[:250]
        ],
        "1,000 kernels": [{"kernel": leaf(n, 64)} for n in widths],
    }


def compilation(params: Any) -> dict[str, Callable[[], Any]]:
    """Tracing, lowering and compiling the update in every way: functions that do it from cold caches."""

    def compile_anew(optimizer: optax.GradientTransformation) -> None:
        jax.clear_caches()
        harness.compile_update(optimizer, params, state)

    state = jax.eval_shape(OPTIMIZERS["plain"].init, params)  # `centralized` adds nothing to it
    ways = {name: functools.partial(compile_anew, optimizer) for name, optimizer in OPTIMIZERS.items()}
    return harness.with_again(ways)


def main() -> None:
    """Measures training steps and compilations, and prints a table of each."""
    parser = harness.command_line(__doc__)
    parser.add_argument("--rounds", type=harness.positive, default=31, help="steps of each (default: 31)")
    parser.add_argument("--compilations", type=harness.positive, default=3, help="of each (default: 3)")
    arguments = parser.parse_args()

    console = harness.wide_console()
    console.print(harness.machine())
    steps, compilations = {}, {}
    given = models().items()
    for name, (model, batch) in track(given, description="training steps", transient=True, console=console):
        variables = jax.jit(model.init)(jax.random.key(0), batch[0])
        steps[name] = harness.take_turns(training_step(model, variables, batch), arguments.rounds)
    harness.report_ratios("time of a training step with AdamW, as a ratio to the plain one", steps, console)
    for name, params in track(trees().items(), description="compilations", transient=True, console=console):
        compilations[name] = harness.take_turns(compilation(params), arguments.compilations)
    title = "time to trace and compile the update, as a ratio to the plain one"
    harness.report_ratios(title, compilations, console)
    harness.save({"machine": harness.machine(), "steps": steps, "compilations": compilations}, arguments.json)


if __name__ == "__main__":
    main()
