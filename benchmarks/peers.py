"""What centralization adds to the AdamW of other frameworks, for `overhead.py --peers`."""

import functools
import math
import os
from typing import Any

import harness
import jax
import jax.numpy as jnp
from rich.console import Console

from gc_optax import WeightAxes

PLAIN, CENTRALIZED = "plain", "centralized"


def pytorch(params: Any, axes: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times PyTorch's AdamW with and without the authors' rule, on the same weights in PyTorch's layout."""
    import torch

    def layout(leaf: jax.ShapeDtypeStruct, weight: WeightAxes) -> list[tuple[int, ...]]:
        if not weight.fan_in:
            return [leaf.shape]
        sizes = [math.prod(leaf.shape[axis] for axis in side) for side in (weight.fan_out, weight.fan_in)]
        return [tuple(sizes)] * (leaf.size // math.prod(sizes))

    leaves = jax.tree.leaves(params)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(leaves[0].dtype))
    tensors = [
        torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        for leaf, weight in zip(leaves, jax.tree.leaves(axes), strict=True)
        for shape in layout(leaf, weight)
    ]
    gradients = [torch.randn_like(tensor) for tensor in tensors]
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient

    def centralized_step(optimizer: Any) -> None:
        authors_rule(gradients)
        optimizer.step()

    def wait(_: None) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = {}
    for kind in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(tensors, lr=1e-3, **{kind: True})
        ways = {PLAIN: optimizer.step, CENTRALIZED: functools.partial(centralized_step, optimizer)}
        times[f"PyTorch {torch.__version__}, {kind}"] = harness.take_turns(ways, rounds, wait=wait)
    return times


def authors_rule(gradients: list[Any]) -> None:
    """The centralization of the authors' code, in place on PyTorch's gradients."""
    for gradient in gradients:
        if gradient.dim() > 1:
            gradient.add_(-gradient.mean(dim=tuple(range(1, gradient.dim())), keepdim=True))


def keras(params: Any, axes: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times Keras's AdamW on JAX with and without a mean over all axes but the last, whatever `axes` are."""
    del axes
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    gradients = harness.normal(jax.tree.leaves(params), seed=0)
    optimizer = keras.optimizers.AdamW(1e-3)
    variables = [keras.Variable(jnp.zeros_like(leaf), dtype=str(leaf.dtype)) for leaf in gradients]
    optimizer.build(variables)
    start = tuple([variable.value for variable in held] for held in (variables, optimizer.variables))

    def compiled(centralize: bool) -> jax.stages.Compiled:
        def step(params: Any, state: Any, gradients: Any) -> Any:
            if centralize:
                gradients = [all_but_last(gradient) for gradient in gradients]
            return optimizer.stateless_apply(state, gradients, params)

        return jax.jit(step, donate_argnums=(0, 1)).lower(*start, gradients).compile()

    programs = {way: compiled(way == CENTRALIZED) for way in (PLAIN, CENTRALIZED)}
    steps = harness.stepping(programs, start, gradients)
    return {f"Keras {keras.__version__}, jax": harness.take_turns(steps, rounds)}


def all_but_last(gradient: jax.Array) -> jax.Array:
    """The gradient without its mean over all axes but the last."""
    if gradient.ndim < 2:
        return gradient
    return gradient - gradient.mean(tuple(range(gradient.ndim - 1)), keepdims=True)


def report_peers(runs: list[dict[str, Any]], console: Console) -> None:
    """Prints what the centralization of other frameworks adds to their own AdamW."""
    times = harness.table(
        "other frameworks: time of the update, as a ratio to their own plain step",
        ["case", "peer"],
        ["plain", "with centralization"],
        caption=harness.OF_RATIOS,
    )
    for run in runs:
        centralized = str(harness.ratio(run["seconds"], CENTRALIZED))
        times.add_row(run["case"], run["peer"], harness.milliseconds(run["seconds"][PLAIN]), centralized)
    console.print(times)


PEERS = {"torch": pytorch, "keras": keras}
