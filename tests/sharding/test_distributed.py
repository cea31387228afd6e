"""Parameters that are split over devices: the numbers, the shardings and what is sent between the devices."""

import contextlib
import math
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded_training
from collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gc_optax
from gc_optax import centralize, centralize_gradients

# A shape, its fan-in, and the specs that people give to such a kernel.
KERNELS = {
    "dense": ((16, 24), (0,), [P(), P("fsdp"), P(None, "tp"), P("fsdp", "tp"), P("tp", "fsdp")]),
    "dense by both": ((16, 24), (0,), [P(("fsdp", "tp")), P(None, ("fsdp", "tp")), P("tp")]),
    "convolution": ((3, 3, 8, 16), (0, 1, 2), [P(None, None, "fsdp", "tp"), P(None, None, None, "fsdp")]),
    "query": ((16, 4, 8), (0,), [P("fsdp", "tp"), P(None, "tp")]),
    "out": ((4, 8, 16), (0, 1), [P("tp", None, "fsdp"), P("tp")]),
    "experts": ((8, 16, 4), (1,), [P("fsdp", None, "tp"), P("fsdp", "tp"), P(("fsdp", "tp"))]),
    "scanned": ((3, 16, 8), (1,), [P(None, "fsdp", "tp"), P(None, "tp", "fsdp")]),
    "out first": ((24, 16), (1,), [P("tp", "fsdp"), P("fsdp")]),
}
CASES = [
    pytest.param(shape, fan_in, spec, id=f"{name} {spec}")
    for name, (shape, fan_in, specs) in KERNELS.items()
    for spec in specs
]


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def mesh(request):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def update_step(centralization):
    optimizer = optax.chain(centralization, optax.adamw(1e-2))

    @jax.jit
    def step(params, gradients):
        updates, state = optimizer.update(gradients, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state[1][0].mu

    return step


def arrays(shape):
    random = np.random.default_rng(0)
    return [np.float32(random.normal(size=shape) + 1) for _ in range(2)]


@pytest.mark.parametrize(("shape", "fan_in", "spec"), CASES)
def test_sharded_updates_are_those_of_one_device(shape, fan_in, spec, mesh):
    step = update_step(centralize(fan_in))
    whole = arrays(shape)
    split = jax.device_put(whole, NamedSharding(mesh, spec))

    result = step(*split)

    one_device = jax.make_mesh((1, 1), mesh.axis_names, axis_types=mesh.axis_types, devices=jax.devices()[:1])
    with jax.set_mesh(one_device):
        expected = step(*jax.device_put(whole, NamedSharding(one_device, P())))

    for sharded, one in zip(result, expected, strict=True):
        assert sharded.sharding.is_equivalent_to(NamedSharding(mesh, spec), len(shape))
        np.testing.assert_allclose(sharded, one, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("shape", "fan_in", "spec"), CASES)
def test_only_the_means_of_split_weight_vectors_are_sent(shape, fan_in, spec, mesh):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))] * 2
    plain = collectives(update_step(optax.identity()).lower(*arguments).compile())
    sent = collectives(update_step(centralize(fan_in)).lower(*arguments).compile())

    shard = NamedSharding(mesh, spec).shard_shape(shape)
    means = math.prod(size for axis, size in enumerate(shard) if axis not in fan_in)
    split = any(shard[axis] < shape[axis] for axis in fan_in)
    assert sent - plain == ({("all-reduce", means): 1} if split else {})
    assert not plain


def test_a_tree_of_all_of_them_sends_every_mean_once(mesh):
    kernels = {
        f"{name} {spec}": (shape, fan_in, NamedSharding(mesh, spec))
        for shape, fan_in, spec, name in ((*case.values, case.id) for case in CASES)
    }
    params = {k: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s) for k, (shape, _, s) in kernels.items()}
    axes = {k: fan_in for k, (_, fan_in, _) in kernels.items()}
    sent = collectives(update_step(centralize(axes)).lower(params, params).compile())

    expected = 0
    for shape, fan_in, sharding in kernels.values():
        shard = sharding.shard_shape(shape)
        if any(shard[axis] < shape[axis] for axis in fan_in):
            expected += math.prod(size for axis, size in enumerate(shard) if axis not in fan_in)
    assert {kind for kind, _ in sent} == {"all-reduce"}
    assert sum(size * count for (_, size), count in sent.items()) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_dimension_that_does_not_divide(dtype):
    # Automatic sharding pads inside of a program. Arguments and results have to divide.
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(13, 5)) + 1, dtype)

    @jax.jit
    def project(gradient):
        split = jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, P("x")))
        return centralize_gradients(split, 0)

    np.testing.assert_allclose(
        np.asarray(project(gradient), np.float32),
        np.asarray(centralize_gradients(gradient, 0), np.float32),
        rtol=jnp.finfo(dtype).eps,
        atol=1e-6,
    )


@pytest.mark.slow
def test_two_processes_train_as_one_device_does(tmp_path):
    path = tmp_path / "params.npz"
    logs = [tmp_path / f"process_{process}.txt" for process in range(2)]
    package = str(pathlib.Path(gc_optax.__file__).parent.parent)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    with contextlib.ExitStack() as running:
        processes = []
        for process, log in enumerate(logs):
            command = [sys.executable, sharded_training.__file__, coordinator, "2", str(process), str(path)]
            processes.append(
                subprocess.Popen(
                    command,
                    stdout=running.enter_context(log.open("w")),
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONPATH": package},
                )
            )
            running.callback(processes[-1].wait)
            running.callback(processes[-1].kill)
        deadline = time.monotonic() + 300
        # Where one fails, the other waits for it.
        while {process.poll() for process in processes} <= {None, 0} and time.monotonic() < deadline:
            if all(process.poll() == 0 for process in processes):
                break
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)

    one = sharded_training.train(sharded_training.mesh_of(1, 1))
    plain = sharded_training.train(
        sharded_training.mesh_of(1, 1), centralization=lambda axes: optax.identity()
    )
    with np.load(path) as several:
        assert several.files == list(one)
        for name, expected in one.items():
            np.testing.assert_allclose(several[name], expected, rtol=0, atol=1e-5, err_msg=name)
            if expected.ndim == 2:
                assert np.abs(plain[name] - expected).max() > 1e-3, "centralization matters"
