"""Trains a small Flax model that is split over a mesh, on the devices of one process or of several.

As a script it is one of several processes:

    python sharded_training.py <coordinator> <processes> <this process> <file for the parameters>
"""

import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gc_optax

STEPS = 20


def kernel(*mesh_axes):
    return nn.with_partitioning(nn.initializers.lecun_normal(), mesh_axes)


class Network(nn.Module):
    """Hidden layers split along fan-in and fan-out, by FSDP and tensor parallelism in turns."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, kernel_init=kernel("fsdp", "tp"))(x))
        x = nn.relu(nn.Dense(32, kernel_init=kernel("tp", "fsdp"))(x))
        return nn.Dense(1, kernel_init=kernel("fsdp", None))(x)


def loss(params, x, y):
    return jnp.mean((Network().apply({"params": params}, x) - y) ** 2)


def batch(mesh):
    """Every process makes the same numbers and keeps those that its devices have."""
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 16)).astype(np.float32)
    y = np.sin(x.sum(1, keepdims=True))
    split = NamedSharding(mesh, P("fsdp"))
    return tuple(jax.make_array_from_callback(a.shape, split, lambda index, a=a: a[index]) for a in (x, y))


def train(mesh, centralization=None):
    """The parameters after some steps of AdamW, centralized by default, as NumPy arrays by name."""
    x, y = batch(mesh)
    key = jax.random.key(0)

    def init(key):
        return Network().init(key, jnp.ones((1, 16)))["params"]

    shapes = jax.eval_shape(init, key)
    axes = gc_optax.infer_axes(loss, shapes, x, y)
    optimizer = gc_optax.centralized(optax.adamw(1e-2), (centralization or gc_optax.centralize)(axes))

    def start(key):
        params = init(key)
        return params, optimizer.init(params)

    def step(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    shardings = nn.get_sharding(jax.eval_shape(start, key), mesh)
    params, state = jax.jit(start, out_shardings=shardings)(key)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    for _ in range(STEPS):
        params, state = step(params, state, x, y)
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    assert mesh.size == 1 or not any(kernel.sharding.is_fully_replicated for kernel in kernels)
    whole = multihost_utils.process_allgather(nn.unbox(params), tiled=True)
    return {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(whole)}


def mesh_of(*shape):
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def main(coordinator, processes, process, path):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(coordinator, int(processes), int(process))
    assert jax.device_count() == 8, "two processes of four devices each"
    params = train(mesh_of(4, 2))
    if process == "0":
        with pathlib.Path(path).open("wb") as file:
            np.savez(file, **params)


if __name__ == "__main__":
    main(*sys.argv[1:])
