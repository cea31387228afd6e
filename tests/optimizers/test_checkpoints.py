"""Checkpoints written without centralization load with it, and the other way round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gc_optax import centralize, centralized


def plain():
    return optax.adamw(1e-2)


def with_centralization():
    return centralized(optax.adamw(1e-2))


DIRECTIONS = {"onto": (plain, with_centralization), "off": (with_centralization, plain)}


def start(optimizer):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.zeros(4)}
    state = TrainState.create(apply_fn=None, params=params, tx=optimizer)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            leaf, NamedSharding(mesh, P("fsdp", "tp") if np.ndim(leaf) == 2 else P())
        ),
        state,
    )


def train(state, steps):
    def loss(params):
        x = jnp.arange(16.0).reshape(2, 8) / 8
        return jnp.sum((jnp.tanh(x @ params["kernel"] + params["bias"]) - 0.5) ** 2)

    for _ in range(steps):
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
    return state


def through_orbax(state, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", like)


def through_flax(state, like, folder):
    file = folder / "state.msgpack"
    file.write_bytes(serialization.to_bytes(state))
    return serialization.from_bytes(like, file.read_bytes())


@pytest.mark.parametrize("through", [through_orbax, through_flax])
@pytest.mark.parametrize(("before", "after"), DIRECTIONS.values(), ids=DIRECTIONS)
def test_a_run_goes_on_with_the_other_optimizer(before, after, through, tmp_path):
    written = train(start(before()), 3)
    restored = through(written, start(after()), tmp_path)

    assert jax.tree.structure(restored.opt_state) == jax.tree.structure(written.opt_state)
    jax.tree.map(
        np.testing.assert_array_equal,
        (restored.step, restored.params, restored.opt_state),
        (written.step, written.params, written.opt_state),
    )
    gone_on = train(restored, 3)
    without_the_file = train(written.replace(tx=after()), 3)
    # Flax restores whole arrays, so its sums are not taken in the order of the shards.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
        gone_on.params,
        without_the_file.params,
    )
    stayed = train(written, 3)
    assert np.abs(gone_on.params["kernel"] - stayed.params["kernel"]).max() > 1e-3, "centralization matters"


@pytest.mark.parametrize("through", [through_orbax, through_flax])
def test_a_chain_keeps_a_slot_and_does_not_load(through, tmp_path):
    written = train(start(plain()), 1)
    with pytest.raises(ValueError, match=r"opt_state|structure|does not match"):
        through(written, start(optax.chain(centralize(), plain())), tmp_path)
