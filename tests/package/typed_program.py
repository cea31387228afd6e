"""What type checkers make of a user's program: `tests/package/test_package.py` has two of them look at it.

An ignored error which is none is an error.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gc_optax
from gc_optax import (
    WeightAxes,
    adaptive_grad_clip,
    centralize,
    centralized,
    conv_only,
    infer_axes,
    out_first,
    out_last,
)


class Params(NamedTuple):
    kernel: int
    bias: None


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.sum(x @ params["kernel"])


def right(params: dict[str, jax.Array], x: jax.Array) -> None:
    axes = infer_axes(loss, params, x)
    bare = {"encoder": {"kernel": 0, "bias": None}, "decoder": {"kernel": (0, -1)}, "head": None}
    known = {"kernel": WeightAxes((0,)), "bias": None}
    muon = {"kernel": optax.contrib.MuonDimensionNumbers(0, 1)}
    for given in (axes, bare, known, muon):
        centralize(given)
    centralize()
    centralize(0)
    centralize((0, 1))
    centralize([{"kernel": 0}, {"kernel": 1}])
    centralize(Params(0, None))
    centralize(WeightAxes((0,)))
    centralize(optax.contrib.MuonDimensionNumbers(0, 1))
    centralize(out_last)
    centralize(conv_only(out_first))
    centralize(conv_only(axes))
    centralize(lambda params: jax.tree.map(lambda leaf: 0, params))
    centralize(mask=lambda params: True)
    centralize(mask=jnp.array(True))
    centralize(bare, mask={"encoder": True, "decoder": False, "head": False})
    centralize(partition_specs=jax.sharding.PartitionSpec("x"))
    centralize(partition_specs={"kernel": jax.sharding.PartitionSpec("x", None)})
    for mask in (gc_optax.decay_mask(axes), gc_optax.decay_mask(bare), gc_optax.decay_mask(out_last)):
        centralize(mask=mask)
    gc_optax.decay_mask(None, lookups=True)(params)
    gc_optax.decay_mask(conv_only(out_last))(params)["kernel"]
    WeightAxes((0,), (1, 2)).with_batch_axes(1, -1).to_muon()
    centralized(optax.adam(1e-3))
    centralized(optax.adam(1e-3), centralize(axes), where="updates")
    optax.chain(centralize(axes), optax.sgd(0.1))
    gc_optax.optimizers.adamw(1e-3, centralization=centralize(axes))
    adaptive_grad_clip(0.01)
    adaptive_grad_clip(jnp.array(0.01), axes, eps=1e-2, partition_specs=jax.sharding.PartitionSpec("x"))
    optax.chain(adaptive_grad_clip(0.01, bare), optax.sgd(0.1))
    centralize(gc_optax.nnx.infer_axes(loss, nnx.Linear(8, 1, rngs=nnx.Rngs(0)), x))
    gc_optax.keras.centralized("adam", gc_optax.keras.infer_axes("a model", x), where="updates")
    print(axes["kernel"].fan_in, conv_only(out_last)(params)["kernel"])


def wrong(params: dict[str, jax.Array], x: jax.Array) -> None:
    bare = {"kernel": 0, "bias": None}
    centralize("out_last")  # type: ignore[arg-type]
    centralize(0.0)  # type: ignore[arg-type]
    centralize(x)  # type: ignore[arg-type]
    centralize(out_last, mask="kernel")  # type: ignore[arg-type]
    centralize(out_last, mask=0)  # type: ignore[arg-type]
    centralize(out_last, True)  # type: ignore[call-arg]
    centralize(partition_specs="x")  # type: ignore[arg-type]
    adaptive_grad_clip(out_last)  # type: ignore[arg-type]
    adaptive_grad_clip(0.01, "out_last")  # type: ignore[arg-type]
    adaptive_grad_clip()  # type: ignore[call-arg]
    centralized(bare)  # type: ignore[arg-type]
    centralized(out_last)  # type: ignore[arg-type]
    centralized(optax.adam(1e-3), bare)  # type: ignore[arg-type]
    centralized(optax.adam(1e-3), out_last)  # type: ignore[arg-type]
    centralized(optax.adam(1e-3), where="update")  # type: ignore[arg-type]
    gc_optax.decay_mask("out_last")  # type: ignore[call-overload]
    gc_optax.decay_mask(out_last, True)  # type: ignore[call-overload]
    WeightAxes((0,)).with_batch_axes("0")  # type: ignore[arg-type]
    conv_only("out_last")  # type: ignore[call-overload]
    infer_axes(params, loss)  # type: ignore[arg-type]
    gc_optax.nnx.infer_axes(params, loss)  # type: ignore[arg-type]
    gc_optax.keras.centralized("adam", where="update")  # type: ignore[arg-type]
    gc_optax.nnx.infer_axis(loss)  # type: ignore[attr-defined]
    gc_optax.centralise(0)  # type: ignore[attr-defined]
    WeightAxes(0)  # type: ignore[arg-type]
