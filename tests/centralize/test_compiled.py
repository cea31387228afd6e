"""What XLA makes of it: no centralized copy of the gradient is written, on no platform is there a product."""

import math
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from gc_optax import centralize, centralize_gradients

MEGABYTE = 2**20
# Fan-in first, in the middle and last; few means and many; and two axes that are not next to each other.
SHAPES = {
    (4096, 1024): (0,),
    (1024, 4096): (0,),
    (4096, 4096): (0,),
    (256, 8192): (0,),
    (3, 3, 512, 512): (0, 1, 2),
    (50000, 256): (0,),
    (768, 12, 64): (0,),
    (12, 768, 3072): (1,),
    (16384, 1024): (1,),
    (512, 512, 3, 3): (1, 2, 3),
    (3, 3, 512, 256): (0, 1, 3),
}


def compiled(centralization, params):
    optimizer = optax.chain(centralization, optax.adamw(1e-3))

    # Results in the order of the arguments that are donated to them: else XLA has to copy.
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def trees():
    each = {str(shape): ({"w": shape}, {"w": fan_in}) for shape, fan_in in SHAPES.items()}
    together = {"w" + "x".join(map(str, shape)): (shape, fan_in) for shape, fan_in in SHAPES.items()}
    all_of_them = ({k: shape for k, (shape, _) in together.items()}, {k: a for k, (_, a) in together.items()})
    return each | {"all of them": all_of_them}


@pytest.mark.skipif(
    jax.__version_info__ < (0, 9, 1),
    reason="XLA sums blocks of 32 first, and keeps their sums: no copy, but more than the means",
)
@pytest.mark.parametrize(("shapes", "axes"), trees().values(), ids=trees())
def test_the_update_takes_no_more_memory_than_the_means(shapes, axes):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    means = sum(
        4 * math.prod(size for axis, size in enumerate(shape) if axis not in axes[name])
        for name, shape in shapes.items()
    )
    plain = compiled(optax.identity(), params).memory_analysis().temp_size_in_bytes
    centralized = compiled(centralize(axes), params).memory_analysis().temp_size_in_bytes

    assert centralized - plain <= means + MEGABYTE
    smallest = min(4 * math.prod(shape) for shape in shapes.values())
    assert means + MEGABYTE < smallest, "the bound must tell a copy of the gradient"
    assert plain < smallest, "the plain program must not copy either"


@pytest.mark.parametrize(("shape", "fan_in"), SHAPES.items())
def test_the_update_computes_no_array_of_the_gradients_size_more(shape, fan_in):
    def results_of_full_size(centralization):
        program = compiled(centralization, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}).as_text()
        entry = program[program.index("ENTRY") :]
        size = "f32\\[" + ",".join(map(str, shape)) + "\\]"
        return len(re.findall(rf"= {size}\S* (?!parameter)", entry))

    plain = results_of_full_size(optax.identity())
    assert plain >= 3, "the moments and the parameters must have been found"
    assert results_of_full_size(centralize({"w": fan_in})) == plain


def test_on_every_platform_the_mean_is_a_sum_kept_apart_and_no_product():
    def step(momentum, gradient):
        return 0.9 * momentum + centralize_gradients(gradient, 0)

    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    apart = {"cpu": "reduce_precision", "cuda": "optimization_barrier", "tpu": "optimization_barrier"}
    for platform, fence in apart.items():
        program = str(export.export(jax.jit(step), platforms=[platform])(gradient, gradient).mlir_module())
        assert fence in program
        assert "dot" not in program

    everywhere = export.export(jax.jit(step), platforms=list(apart))(gradient, gradient)
    expected = 0.9 * gradient + (gradient - gradient.mean(0))
    np.testing.assert_allclose(everywhere.call(gradient, gradient), expected, rtol=0, atol=1e-6)


def test_no_sharded_gradient_is_gathered():
    code = """
        import re

        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        from gc_optax import centralize_gradients

        mesh = jax.make_mesh((8,), ("x",))
        for shape, axis, spec in (
            ((50000, 256), 0, ("x",)),
            ((50000, 256), 0, (None, "x")),
            ((12, 768, 3072), 1, (None, "x")),
        ):
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            gradient = jax.ShapeDtypeStruct(shape, jnp.float32)
            project = jax.jit(lambda g: centralize_gradients(g, axis), in_shardings=sharding)
            program = project.lower(gradient).compile().as_text()
            print(sorted(set(re.findall("all-gather|all-reduce|all-to-all|collective-permute", program))))
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | flags,
    )
    assert run.stdout.splitlines() == ["['all-reduce']", "[]", "['all-reduce']"]
