"""Gradients that are shards: `partition_specs` inside `shard_map`."""

import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from collectives import collectives
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gc_optax import WeightAxes, centralize, centralize_gradients, centralized

# Shape, fan-in and spec: fan-in split, fan-out split, both, each by one mesh axis, by two, and not at all.
SHARDED = {
    "replicated": ((8, 6), (0,), P()),
    "fan-in": ((8, 6), (0,), P("fsdp")),
    "fan-out": ((8, 6), (0,), P(None, "tp")),
    "fan-in and fan-out": ((8, 6), (0,), P("fsdp", "tp")),
    "fan-in by tp": ((8, 8), (0,), P("tp", "fsdp")),
    "fan-in by both": ((16, 6), (0,), P(("fsdp", "tp"))),
    "fan-in of one entry on each device": ((8, 6), (0,), P(("tp", "fsdp"), None)),
    "fan-out by both": ((6, 8), (0,), P(None, ("fsdp", "tp"))),
    "convolution": ((3, 3, 8, 4), (0, 1, 2), P(None, None, "fsdp", "tp")),
    "two axes of fan-in": ((4, 3, 6), (0, 2), P("fsdp", None, "tp")),
    "experts": ((4, 8, 6), (1,), P("fsdp", "tp")),
    "scanned": ((3, 8, 6), (1,), P(None, "fsdp", "tp")),
    "fan-in last": ((6, 8), (1,), P(None, ("fsdp", "tp"))),
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def normal(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), shape, dtype) + 1


def on_shards(fn, mesh, specs, **options):
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(specs,), out_specs=specs, **options))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("shape", "fan_in", "spec"), SHARDED.values(), ids=SHARDED)
def test_shards_give_what_the_whole_gives(shape, fan_in, spec, check_vma, mesh):
    gradient = normal(*shape)
    project = on_shards(
        lambda g: centralize_gradients(g, fan_in, partition_specs=spec), mesh, spec, check_vma=check_vma
    )
    np.testing.assert_allclose(project(gradient), centralize_gradients(gradient, fan_in), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "fan_in", "spec"), SHARDED.values(), ids=SHARDED)
def test_nothing_is_sent_but_the_means_of_weight_vectors_that_are_split(shape, fan_in, spec, mesh):
    program = on_shards(lambda g: centralize_gradients(g, fan_in, partition_specs=spec), mesh, spec)
    sent = collectives(program.lower(normal(*shape)).compile())

    shard = jax.sharding.NamedSharding(mesh, spec).shard_shape(shape)
    means = np.prod([size for axis, size in enumerate(shard) if axis not in fan_in])
    split = any(shard[axis] < shape[axis] for axis in fan_in)
    assert dict(sent) == ({("all-reduce", means): 1} if split else {})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_means_across_shards_are_taken_in_at_least_float32(dtype, mesh):
    gradient = normal(8, 6, dtype=dtype)
    project = on_shards(lambda g: centralize_gradients(g, 0, partition_specs=P("fsdp")), mesh, P("fsdp"))
    centralized_shards = project(gradient)
    assert centralized_shards.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(centralized_shards, np.complex64),
        np.asarray(centralize_gradients(gradient, 0), np.complex64),
        atol=1e-6,
        rtol=jnp.finfo(dtype).eps,
    )


def through_optimizer(gradients, *args, **options):
    tx = centralize(*args, **options)
    updates, _ = tx.update(gradients, tx.init(gradients))
    return updates


@pytest.mark.parametrize("centralization", [centralize_gradients, through_optimizer])
def test_axes_and_masks_are_about_the_whole_parameters(centralization, mesh):
    # On a device "head" has the shape (1, 6) and "thin" (2, 2): alone, "head" would be left as it is.
    gradients = {"head": {"kernel": normal(4, 6)}, "thin": {"kernel": normal(8, 2)}, "ids": jnp.arange(4)}
    specs = {"head": P("fsdp"), "thin": P("fsdp"), "ids": P("fsdp")}
    seen = []

    def mask(params):
        seen.append(jax.tree.map(jnp.shape, params))
        return jax.tree.map(lambda leaf: isinstance(leaf, jax.Array) and leaf.shape[0] != 8, params)

    def project(gradients):
        return centralization(gradients, mask=mask, partition_specs=specs)

    result = on_shards(project, mesh, specs)(gradients)
    assert all(shapes["head"]["kernel"] == (4, 6) and shapes["ids"] == (4,) for shapes in seen)
    expected = gradients | {"head": {"kernel": centralize_gradients(gradients["head"]["kernel"])}}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, expected)


@pytest.mark.parametrize("centralization", [centralize_gradients, through_optimizer])
def test_the_whole_arrays_that_a_mask_finds_are_not_in_the_program(centralization, mesh):
    spec = P("fsdp", "tp")

    def mask(gradient):
        return isinstance(gradient, jax.Array) and gradient.shape == (4096, 64)

    def project(gradient):
        return centralization(gradient, 0, mask=mask, partition_specs=spec)

    gradient = normal(4096, 64)
    program, same = (on_shards(fn, mesh, spec).lower(gradient) for fn in (project, lambda g: g))
    assert "all_reduce" in program.as_text()
    assert program.as_text().count("4096x64x") == same.as_text().count("4096x64x") > 0
    assert program.compile().memory_analysis().temp_size_in_bytes < gradient.nbytes / 8


@pytest.mark.parametrize("centralization", [centralize_gradients, through_optimizer])
def test_the_warning_names_whole_shapes(centralization, mesh):
    def project(gradients):
        return centralization(gradients, partition_specs=P("fsdp"))

    with pytest.warns(UserWarning, match=r"\['experts'\], shape \(4, 6, 2\): mean over axes \(0, 1\)"):
        on_shards(project, mesh, P("fsdp"))({"experts": normal(4, 6, 2)})


def test_a_fan_in_of_one_is_left_alone_on_shards_too(mesh):
    gradient = normal(1, 8)
    spec = P(None, "fsdp")
    result = on_shards(lambda g: centralize_gradients(g, partition_specs=spec), mesh, spec)(gradient)
    np.testing.assert_array_equal(result, gradient)


def test_specs_may_be_a_tree_a_prefix_or_a_function(mesh):
    gradients = {"a": {"kernel": normal(8, 4), "bias": normal(8)}, "b": normal(4, 4), "none": None}
    tree = {"a": {"kernel": P("fsdp"), "bias": P("fsdp")}, "b": P(), "none": None}
    prefix = {"a": P("fsdp"), "b": P(), "none": P()}
    expected = centralize_gradients(gradients)
    for specs in (tree, prefix, lambda _: prefix):
        project = on_shards(
            lambda g, specs=specs: centralize_gradients(g, partition_specs=specs), mesh, prefix
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), project(gradients), expected)


def test_boxes_of_flax_say_how_they_are_split(mesh):
    kernel = nn.Partitioned(normal(8, 4), names=("fsdp", None))
    gradients = {"kernel": kernel, "bias": normal(4)}
    # The specs that shard_map gets stand in boxes too, as the arrays do.
    specs = {"kernel": kernel.replace(value=P("fsdp", None)), "bias": P()}

    def project(gradients):
        return centralize_gradients(gradients, partition_specs=nn.get_partition_spec)

    result = on_shards(project, mesh, specs)(gradients)
    np.testing.assert_allclose(result["kernel"].value, centralize_gradients(kernel.value), atol=1e-6)


def test_a_spec_may_say_reduced(mesh):
    gradient = normal(8, 6)
    reduced = P("fsdp", reduced={"tp"})
    project = on_shards(lambda g: centralize_gradients(g, partition_specs=reduced), mesh, P("fsdp"))
    np.testing.assert_allclose(project(gradient), centralize_gradients(gradient), rtol=0, atol=1e-6)


def test_optimizers_are_initialized_outside_and_inside(mesh):
    specs = {"w": P("fsdp"), "masked": P()}
    params = {"w": normal(8, 6), "masked": normal(4, 4)}
    optimizer = optax.masked(
        optax.chain(centralize(partition_specs={"w": P("fsdp"), "masked": P()}), optax.sgd(1.0)),
        {"w": True, "masked": False},
    )

    def inside(params):
        updates, _ = optimizer.update(params, optimizer.init(params))
        return updates

    def outside(params):
        updates, _ = optimizer.update(params, state)
        return updates

    state = optimizer.init(params)
    expected = params | {"w": -centralize_gradients(params["w"])}
    for update in (inside, outside):
        result = on_shards(update, mesh, specs)(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, expected)


def test_only_some_mesh_axes_are_manual(mesh):
    # XLA sees to the mean over "tp", as under jit, and partition_specs to that over "fsdp".
    gradient = jax.device_put(normal(4, 6, 8), jax.NamedSharding(mesh, P("fsdp", None, "tp")))
    spec = P("fsdp")
    project = on_shards(
        lambda g: centralize_gradients(g, (0, 2), partition_specs=spec), mesh, spec, axis_names={"fsdp"}
    )
    np.testing.assert_allclose(project(gradient), centralize_gradients(gradient, (0, 2)), rtol=0, atol=1e-6)


NOT_SAID = {
    "one that varies": ({"w": P("fsdp")}, {}, r"\['w'\], shape \(2, 6\): may be split by fsdp\n"),
    "by both": ({"w": P("fsdp", "tp")}, {}, r"\['w'\], shape \(2, 3\): may be split by fsdp, tp\n"),
    "of one input each": (
        {"w": P(("fsdp", "tp"))},
        {},
        r"\['w'\], shape \(1, 6\): may be split by fsdp, tp\n",
    ),
    "not checked": ({"w": P()}, {"check_vma": False}, r"\['w'\], .* may be split by fsdp, tp\n"),
    "one axis manual": ({"w": P("tp")}, {"axis_names": {"tp"}}, r"\['w'\], .* may be split by tp\n"),
}


@pytest.mark.parametrize(("specs", "options", "message"), NOT_SAID.values(), ids=NOT_SAID)
def test_a_shard_of_which_nobody_said_so_is_warned_about(specs, options, message, mesh):
    gradients, specs = {"b": normal(8), "w": normal(8, 6)}, {"b": P(), **specs}
    project = on_shards(lambda g: through_optimizer(g, {"w": 0, "b": None}), mesh, specs, **options)
    with pytest.warns(UserWarning, match=message) as caught:
        project(gradients)
    (warning,) = [warning for warning in caught if "gc_optax" in str(warning.message)]
    assert warning.filename == __file__
    assert "['b']" not in str(warning.message)
    with pytest.warns(UserWarning, match=message):
        on_shards(lambda g: centralize_gradients(g, {"w": 0, "b": None}), mesh, specs, **options)(gradients)


SAID = {
    "whole": (P("fsdp"), {"partition_specs": P()}, {}),
    "whole, not checked": (P("fsdp"), {"partition_specs": P()}, {"check_vma": False}),
    "checked to be whole": (P(), {}, {}),
    "left alone": (P("fsdp"), {"mask": False}, {}),
}


@pytest.mark.parametrize(("spec", "arguments", "options"), SAID.values(), ids=SAID)
def test_nothing_is_warned_of_where_nothing_can_be_wrong(spec, arguments, options, mesh):
    gradient, project = (
        normal(8, 6),
        on_shards(lambda g: through_optimizer(g, 0, **arguments), mesh, spec, **options),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        project(gradient)
    assert not [warning for warning in caught if "gc_optax" in str(warning.message)]


def test_a_mesh_of_one_device_splits_nothing():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    gradient = normal(8, 6)
    centralized_shard = on_shards(lambda g: centralize_gradients(g, 0), mesh, P("data"))(gradient)
    np.testing.assert_allclose(centralized_shard, centralize_gradients(gradient, 0), rtol=0, atol=1e-6)


def test_pmap_is_a_shard_map():
    shards = normal(8, 2, 3)
    project = jax.pmap(lambda g: centralize_gradients(g, 0, partition_specs=P("x")), axis_name="x")
    whole = shards.reshape(16, 3)
    np.testing.assert_allclose(
        project(shards).reshape(16, 3), centralize_gradients(whole, 0), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_a_training_loop_with_gathered_weights_is_that_of_one_device(where, mesh):
    axes = {"up": 0, "down": WeightAxes((0,), (1,)), "bias": None}
    specs = {"up": P("fsdp", "tp"), "down": P("tp", "fsdp"), "bias": P()}
    params = {"up": 0.3 * normal(8, 16), "down": 0.3 * normal(16, 4), "bias": jnp.zeros(4)}
    x, y = normal(32, 8), jnp.sin(normal(32, 4))

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"] - y) ** 2)

    def train(params, optimizer, gradients):
        state = optimizer.init(params)
        for _ in range(5):
            updates, state = optimizer.update(gradients(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    def gathered(params):
        def whole(shard, spec):
            for axis, name in enumerate(spec):
                shard = lax.all_gather(shard, name, axis=axis, tiled=True)
            return shard

        return jax.tree.map(whole, params, specs)

    def on_shard(params, x, y):
        # Every device along "tp" has the same part of the batch, and its share of the loss.
        gradients = jax.grad(lambda params: loss(gathered(params), x, y) / 8)
        reduced = {"up": (), "down": (), "bias": ("fsdp", "tp")}

        def summed(params):
            return jax.tree.map(
                lambda g, names: lax.psum(g, names) if names else g,
                gradients(params),
                reduced,
                is_leaf=lambda node: isinstance(node, tuple),
            )

        tx = centralized(optax.adamw(0.01), centralize(axes, partition_specs=specs), where=where)
        return train(params, tx, summed)

    steps = jax.shard_map(
        on_shard, mesh=mesh, in_specs=(specs, P("fsdp"), P("fsdp")), out_specs=specs, check_vma=False
    )
    one = train(
        params,
        centralized(optax.adamw(0.01), centralize(axes), where=where),
        jax.grad(lambda p: loss(p, x, y)),
    )
    shards = jax.jit(steps)(params, x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), shards, one)


@pytest.mark.parametrize(
    ("partition_specs", "error", "message"),
    [
        (P("fsdpp"), ValueError, "names the mesh axis 'fsdpp'; manual here are fsdp, tp"),
        (P("fsdp", None, "tp"), ValueError, "has 3 entries for 2 axes"),
        (P(P.UNCONSTRAINED), ValueError, "does not say how the array is split"),
        (P("fsdp", "fsdp"), ValueError, "names the mesh axis 'fsdp' more than once"),
        ("fsdp", TypeError, "partition_specs for ['w'], shape (2, 6) must be a PartitionSpec, got 'fsdp'"),
        ({"w": None}, TypeError, "must be a PartitionSpec, got None"),
        ({"v": P()}, ValueError, "partition_specs does not have the structure of the parameters"),
    ],
)  # fmt: skip
def test_mistakes_in_specs_are_named(partition_specs, error, message, mesh):
    def project(gradients):
        return centralize_gradients(gradients, partition_specs=partition_specs)

    with pytest.raises(error, match=re.escape(message)):
        on_shards(project, mesh, {"w": P("fsdp")})({"w": normal(8, 6)})


def test_specs_are_an_error_outside_of_shard_map():
    gradients = {"w": normal(8, 6)}
    optimizer = centralize(partition_specs=P())
    state = optimizer.init(gradients)
    with pytest.raises(ValueError, match=r"here no mesh axis is manual\. Under jit"):
        optimizer.update(gradients, state)
    with pytest.raises(ValueError, match=r"here no mesh axis is manual\. Under jit"):
        jax.jit(lambda g: centralize_gradients(g, partition_specs=P("fsdp")))(gradients)
    with pytest.raises(ValueError, match="has 3 entries for 2 axes"):
        centralize(partition_specs=P(None, None, "tp")).init(gradients)
