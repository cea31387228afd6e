"""What optax does by the rank of an array, on a transformer of 20 parameters, and gc_optax beside it.

Each rule is run for one step, on random parameters and gradients. What it should do is what it does itself
where nothing is to be guessed: where every weight matrix is an array (fan-in, fan-out) of its own, each layer
of a stack too, and everything else is a vector. Which these matrices are is written out by hand below. A
parameter is wrong if its update is another one.

The model is run plain, with one layer, and with four layers in `nn.scan`. It has the same 20 parameters in
both. The axes of gc_optax are those that `infer_axes` reads off it.

    python benchmarks/rank_rules.py [--json PATH]
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import are_matrices
from rich.console import Console

import gc_optax
from gc_optax import WeightAxes

LAYERS = 4
CLIPPING = 0.01
RANK = 4  # of GaLore: less than any side of a matrix, so that a matrix that is projected shows it


class Block(nn.Module):
    """A transformer block with attention beside the MLP: activations (batch, length, 16) to the same."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Adds what attention and MLP make of the normalized activations."""
        h = nn.LayerNorm(name="norm")(x)
        attended = nn.MultiHeadDotProductAttention(2, qkv_features=12, name="attention")(h)
        widened = nn.gelu(nn.Dense(40, name="up")(h))
        return x + attended + nn.Dense(16, name="down")(widened), None


class Transformer(nn.Module):
    """A classifier of texts: tokens (batch, 8) to logits (batch, 10)."""

    scanned: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeds, mixes neighbours, adds positions, and classifies the mean of what the layers return."""
        x = nn.Embed(50, 16, name="embedding")(tokens)
        x = nn.Conv(16, (3,), name="conv")(x)
        x = x + self.param("positions", nn.initializers.normal(0.02), (8, 16))
        block = Block
        if self.scanned:
            block = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = block(name="layers")(x, None)
        return nn.Dense(10, name="head")(x.mean(1))


NO_WEIGHT = WeightAxes(())
PROJECTION = WeightAxes((0,), (1, 2), role="hidden")  # (embed, heads, head)

# Of the plain model, by hand. Under `nn.scan` the layers have one axis more, in front.
TRUE_AXES = {
    "embedding/embedding": WeightAxes((), role="lookup"),
    "positions": NO_WEIGHT,
    "conv/kernel": WeightAxes((0, 1), (2,), role="hidden"),  # the data have met the embedding
    "conv/bias": NO_WEIGHT,
    "layers/norm/scale": NO_WEIGHT,
    "layers/norm/bias": NO_WEIGHT,
    "layers/attention/query/kernel": PROJECTION,
    "layers/attention/query/bias": NO_WEIGHT,
    "layers/attention/key/kernel": PROJECTION,
    "layers/attention/key/bias": NO_WEIGHT,
    "layers/attention/value/kernel": PROJECTION,
    "layers/attention/value/bias": NO_WEIGHT,
    "layers/attention/out/kernel": WeightAxes((0, 1), (2,), role="hidden"),  # (heads, head, embed)
    "layers/attention/out/bias": NO_WEIGHT,
    "layers/up/kernel": WeightAxes((0,), (1,), role="hidden"),
    "layers/up/bias": NO_WEIGHT,
    "layers/down/kernel": WeightAxes((0,), (1,), role="hidden"),
    "layers/down/bias": NO_WEIGHT,
    "head/kernel": WeightAxes((0,), (1,), role="output"),
    "head/bias": NO_WEIGHT,
}


class Model(NamedTuple):
    """What the rules run on, what is true of it, and what `infer_axes` says; trees of one structure."""

    params: Any
    gradients: Any
    truth: Any
    inferred: Any


def model(*, scanned: bool) -> Model:
    """The transformer with random parameters and gradients."""
    transformer, tokens = Transformer(scanned), jnp.zeros((2, 8), int)
    shapes = jax.eval_shape(transformer.init, jax.random.key(0), tokens)["params"]
    truth = {
        path: stacked(axes) if scanned and path.startswith("layers/") else axes
        for path, axes in TRUE_AXES.items()
    }
    random = np.random.default_rng(0)
    params, gradients = (
        jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), shapes)
        for _ in range(2)
    )
    return Model(
        params,
        gradients,
        truth=flax.traverse_util.unflatten_dict(truth, sep="/"),
        inferred=gc_optax.infer_axes(
            lambda params, tokens: transformer.apply({"params": params}, tokens), shapes, tokens
        ),
    )


def stacked(axes: WeightAxes) -> WeightAxes:
    """The axes of a parameter of one layer where all layers are in one array."""
    fan_in, fan_out = (tuple(axis + 1 for axis in side) for side in (axes.fan_in, axes.fan_out))
    return dataclasses.replace(axes, fan_in=fan_in, fan_out=fan_out)


def each_matrix(inner, axes):
    """`inner` on a tree in which every weight is a list of its matrices (fan-in, fan-out)."""

    def order(axes, leaf):
        batch = (axis for axis in range(leaf.ndim) if axis not in axes.fan_in + axes.fan_out)
        return (*batch, *axes.fan_in, *axes.fan_out)

    def split(axes, leaf):
        if not (axes.fan_in and axes.fan_out):
            return leaf
        sides = [math.prod(leaf.shape[axis] for axis in side) for side in (axes.fan_in, axes.fan_out)]
        return list(leaf.transpose(order(axes, leaf)).reshape(-1, *sides))

    def join(axes, leaf, matrices):
        if not (axes.fan_in and axes.fan_out):
            return matrices
        there = order(axes, leaf)
        return jnp.stack(matrices).reshape([leaf.shape[axis] for axis in there]).transpose(np.argsort(there))

    def init(params):
        return inner.init(jax.tree.map(split, axes, params))

    def update(updates, state, params):
        matrices, of_params = (jax.tree.map(split, axes, tree) for tree in (updates, params))
        matrices, state = inner.update(matrices, state, of_params)
        return jax.tree.map(join, axes, updates, matrices), state

    return optax.GradientTransformation(init, update)


class Rule(NamedTuple):
    """A rule of optax, and what it is for.

    Attributes:
        by_rank: the transformation as optax has it.
        by_axes: the same by a tree of axes.
        takes: whether a parameter with these axes is one of those that the rule is for.
        of_weights: whether the rest does not count, because nothing says what the rule should do there.
        out_first: whether the rule reads a matrix as (fan-out, fan-in).
    """

    by_rank: optax.GradientTransformation
    by_axes: Callable[[Any], optax.GradientTransformation]
    takes: Callable[[WeightAxes], bool] = lambda axes: axes.is_weight
    of_weights: bool = False
    out_first: bool = False


def muon_of_weights(axes: Any) -> optax.GradientTransformation:
    """Muon for every weight, and Adam for the rest."""
    numbers = jax.tree.map(WeightAxes.to_muon, axes)
    return optax.contrib.muon(1.0, muon_weight_dimension_numbers=numbers)


def muon_of_hidden(axes: Any) -> optax.GradientTransformation:
    """Muon for the hidden weights, and Adam for the rest."""
    numbers = jax.tree.map(lambda leaf: leaf.to_muon() if leaf.role == "hidden" else None, axes)
    return optax.contrib.muon(1.0, muon_weight_dimension_numbers=numbers)


def galore_of_weights(axes: Any) -> optax.GradientTransformation:
    """GaLore for every weight, and Adam for the rest. It takes no stack of matrices, but a list of them."""
    stacks = jax.tree.map(lambda leaf: WeightAxes(()) if leaf.to_galore() else leaf, axes)

    def numbers(tree: Any) -> Any:
        """For all that is a matrix in what `each_matrix` makes of the parameters."""
        matrix = optax.contrib.GaLoreDimensionNumbers()
        return jax.tree.map(
            lambda leaf, part: [matrix] * len(part) if isinstance(part, list) else leaf.to_galore(),
            axes,
            tree,
        )

    return each_matrix(optax.contrib.galore(1.0, RANK, weight_dimension_numbers=numbers), stacks)


RULES = {
    "centralize": Rule(optax.centralize(), gc_optax.centralize, out_first=True),
    "muon, every weight": Rule(optax.contrib.muon(1.0), muon_of_weights),
    "muon, hidden weights": Rule(
        optax.contrib.muon(1.0), muon_of_hidden, takes=lambda axes: axes.role == "hidden"
    ),
    "adaptive_grad_clip": Rule(
        optax.adaptive_grad_clip(CLIPPING),
        lambda axes: gc_optax.adaptive_grad_clip(CLIPPING, axes),
        of_weights=True,
    ),
    "decay mask, ndim > 1": Rule(
        optax.add_decayed_weights(1.0, are_matrices),
        lambda axes: optax.add_decayed_weights(1.0, gc_optax.decay_mask(axes)),
    ),
    "galore": Rule(optax.contrib.galore(1.0, RANK), galore_of_weights),
}


def first_update(optimizer: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    """What an optimizer makes of the gradients in its first step."""
    return jax.jit(lambda: optimizer.update(gradients, optimizer.init(params), params)[0])()


def wanted(rule: Rule, on: Model) -> Any:
    """The update that is right."""

    def taken(axes: WeightAxes) -> WeightAxes:
        sides = (axes.fan_out, axes.fan_in) if rule.out_first else (axes.fan_in, axes.fan_out)
        return WeightAxes(*sides) if rule.takes(axes) else NO_WEIGHT

    def vector(axes: WeightAxes, leaf: jax.Array) -> jax.Array:
        return leaf if rule.takes(axes) else leaf.reshape(-1)

    by_matrix = each_matrix(rule.by_rank, jax.tree.map(taken, on.truth))
    given = (jax.tree.map(vector, on.truth, tree) for tree in (on.params, on.gradients))
    updates = first_update(by_matrix, *given)
    return jax.tree.map(lambda update, leaf: update.reshape(leaf.shape), updates, on.params)


def wrong(rule: Rule, optimizer: optax.GradientTransformation, on: Model) -> list[str]:
    """The parameters that an optimizer updates in another way than the right one."""
    updates, right = first_update(optimizer, on.params, on.gradients), wanted(rule, on)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, axes), update, expected in zip(
            jax.tree.leaves_with_path(on.truth), jax.tree.leaves(updates), jax.tree.leaves(right), strict=True
        )
        if (axes.is_weight or not rule.of_weights) and not np.allclose(update, expected, rtol=1e-3, atol=1e-5)
    ]


def scaled_down(clip: Callable[[Any], optax.GradientTransformation], on: Model) -> float:
    """How many times smaller the gradients of the other layers get by a large one in the first layer.

    Every gradient is half of what is let through, but that of the first layer is a hundred times as large.
    The gradients of the other layers should stay as they are.

    Returns:
        The median over the weights of the other layers.
    """
    small = jax.tree.map(lambda leaf: CLIPPING / 2 * leaf, on.params)
    large_in_first = jax.tree.map(lambda leaf: leaf.at[0].multiply(100), small["layers"])
    gradients = small | {"layers": large_in_first}
    updates = first_update(clip(on.inferred), on.params, gradients)
    ratios = [
        (gradient[1:] / update[1:]).ravel()
        for axes, gradient, update in zip(
            *(jax.tree.leaves(tree["layers"]) for tree in (on.truth, gradients, updates)), strict=True
        )
        if axes.is_weight
    ]
    return float(np.median(np.concatenate(ratios)))


def measure() -> dict[str, Any]:
    """The parameters that each rule gets wrong, by rank and by axes."""
    models = {"plain": model(scanned=False), "scanned": model(scanned=True)}
    rules = {
        name: {
            kind: {
                "optax": wrong(rule, rule.by_rank, on),
                "gc_optax": wrong(rule, rule.by_axes(on.inferred), on),
                "of": sum(leaf.is_weight or not rule.of_weights for leaf in jax.tree.leaves(on.truth)),
            }
            for kind, on in models.items()
        }
        for name, rule in RULES.items()
    }
    clip = RULES["adaptive_grad_clip"]
    factors = {
        "optax": scaled_down(lambda _: clip.by_rank, models["scanned"]),
        "gc_optax": scaled_down(clip.by_axes, models["scanned"]),
    }
    return {"rules": rules, "scaled down": factors}


def report(measured: dict[str, Any], console: Console) -> None:
    """Prints how many parameters are wrong, which ones, and the factor of the clipping."""
    ours = ("optax", "gc_optax")
    headings = ["rule of optax", *(f"{kind}: {whose}" for kind in ("plain", "scanned") for whose in ours)]
    counts = harness.table("parameters whose update is wrong", headings, [])
    for name, by_kind in measured["rules"].items():
        cells = (f"{len(found[whose])} of {found['of']}" for found in by_kind.values() for whose in ours)
        counts.add_row(name, *cells)

    headings = ["parameter", *measured["rules"]]
    names = harness.table("which ones, by optax (p: plain, s: scanned)", headings, [])
    for path in TRUE_AXES:
        cells = (
            "".join(kind[0] for kind, found in by_kind.items() if path in found["optax"])
            for by_kind in measured["rules"].values()
        )
        names.add_row(path, *cells)
    console.print(counts, names)

    by_optax, by_us = measured["scaled down"].values()
    console.print(
        "adaptive_grad_clip, scanned: beside a large gradient in the first layer, those of the other layers"
        f" are divided by {by_optax:.1f} (optax), {by_us:.1f} (gc_optax)",
        soft_wrap=True,
    )


def main() -> None:
    """Runs every rule and prints what came of it."""
    arguments = harness.command_line(__doc__).parse_args()

    console = harness.wide_console()
    console.print(harness.machine())
    measured = measure()
    report(measured, console)
    harness.save({"machine": harness.machine(), **measured}, arguments.json)


if __name__ == "__main__":
    main()
