"""The tree of axes for `optax.contrib.galore`, which projects the gradient of each matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from whole_models import SOME_OF_THE_MODELS, by_path

import gc_optax
from gc_optax import WeightAxes, infer_axes

needs_galore = pytest.mark.skipif(
    not hasattr(optax.contrib, "GaLoreDimensionNumbers"), reason="optax has it since 0.2.7"
)


def galore(numbers, **options):
    return optax.contrib.galore(0.1, rank=3, weight_dimension_numbers=numbers, **options)


def trained(optimizer, gradients, params):
    """The parameters after one step for each of `gradients`."""
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def read_from(*shape):
    """The axes of a kernel that know its rank: the last is fan-out, the others fan-in."""
    return gc_optax.out_last({"kernel": jnp.ones(shape)})["kernel"]


@needs_galore
def test_axes_convert_to_those_of_galore_where_there_is_a_single_matrix():
    numbers = optax.contrib.GaLoreDimensionNumbers
    assert WeightAxes((0,), (1,)).to_galore() == numbers((0,), (1,))
    assert WeightAxes((-3,), (-2, -1)).to_galore() == numbers((-3,), (-2, -1))
    assert read_from(2, 3, 4).to_galore() == numbers((0, 1), (2,))
    assert WeightAxes((), (0, 1)).to_galore() is None
    assert WeightAxes((0, 1)).to_galore() is None


@needs_galore
def test_galore_leaves_to_adam_what_has_batch_axes():
    assert WeightAxes((1,), (2,)).to_galore() is None
    assert WeightAxes((-3,), (-1,)).to_galore() is None
    known = read_from(2, 3, 4).with_batch_axes(0)
    assert known.to_galore() is None
    assert WeightAxes((0,), (1,)).to_galore() is not None
    layers_last = gc_optax.infer_axes(
        lambda w, x: jnp.einsum("bi,iol->bol", x, w).prod(-1).sum(), jnp.ones((4, 6, 3)), jnp.ones((2, 4))
    ).with_batch_axes(2)
    assert (layers_last.fan_in, layers_last.fan_out, layers_last.to_galore()) == ((0,), (1,), None)
    # Adam in full rank, with a step that does not depend on the size of the gradient.
    params, gradients = normal(0, 3, 8, 6), [normal(seed, 3, 8, 6) for seed in (1, 2)]
    by_galore = trained(galore({"w": known.to_galore()}), [{"w": g} for g in gradients], {"w": params})["w"]
    np.testing.assert_allclose(by_galore, trained(optax.adam(0.1), gradients, params), atol=1e-6)
    # Without a rank nothing shows the third axis, and optax says so.
    with pytest.raises(ValueError, match="All axes must be specified"):
        galore(WeightAxes((0,), (1,)).to_galore()).init(jnp.ones((4, 6, 3)))


@needs_galore
@pytest.mark.parametrize(
    ("shape", "fan_in", "fan_out"),
    [((8, 2, 5), (0,), (1, 2)), ((2, 4, 6), (0, 1), (2,)), ((6, 8), (1,), (0,))],
    ids=["query", "out", "out first"],
)
def test_galore_of_a_kernel_is_galore_of_its_matrix(shape, fan_in, fan_out):
    axes = WeightAxes(fan_in, fan_out)

    def matrix(array):
        return jnp.transpose(array, fan_in + fan_out).reshape(np.prod([shape[axis] for axis in fan_in]), -1)

    params, gradients = normal(0, *shape), [normal(seed, *shape) for seed in range(1, 5)]
    plain = trained(galore(None, update_proj_gap=2), map(matrix, gradients), matrix(params))
    ours = trained(galore(axes.to_galore(), update_proj_gap=2), gradients, params)
    np.testing.assert_allclose(matrix(ours), plain, atol=1e-5)
    # The gradient of a step has rank 3 and the whole matrix.
    first = trained(galore(axes.to_galore()), gradients[:1], params) - params
    assert np.linalg.matrix_rank(np.asarray(matrix(first), np.float64), tol=1e-4) == 3


def galore_of_numpy(gradients, params, rank, learning_rate, every):
    """GaLore with Adam for one matrix with at least as many rows as columns, in float64."""
    params = np.asarray(params, np.float64)
    first = second = 0
    for step, gradient in enumerate(np.asarray(gradients, np.float64)):
        if step % every == 0:
            projector = np.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
        low = projector.T @ gradient
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        params = params - learning_rate * projector @ (corrected[0] / (np.sqrt(corrected[1]) + 1e-8))
    return params


@needs_galore
def test_galore_of_an_attention_kernel_is_that_of_numpy():
    params, gradients = normal(0, 12, 2, 4), [normal(seed, 12, 2, 4) for seed in range(1, 4)]
    ours = trained(galore(WeightAxes((0,), (1, 2)).to_galore(), update_proj_gap=2), gradients, params)
    matrices = [gradient.reshape(12, 8) for gradient in gradients]
    expected = galore_of_numpy(matrices, params.reshape(12, 8), rank=3, learning_rate=0.1, every=2)
    np.testing.assert_allclose(ours.reshape(12, 8), expected, atol=2e-4)


def expected_update(axes, gradient):
    """The first update of GaLore with rank 3 and a rate of 0.1, or of Adam where there is no matrix."""
    gradient = np.asarray(gradient, np.float64)
    if len(axes.fan_in + axes.fan_out) < gradient.ndim or not (axes.fan_in and axes.fan_out):
        return -0.1 * gradient / (np.abs(gradient) + 1e-8)
    turned = gradient.transpose(axes.fan_in + axes.fan_out)
    matrix = turned.reshape(math.prod(gradient.shape[axis] for axis in axes.fan_in), -1)
    tall = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    update = galore_of_numpy([tall], np.zeros_like(tall), rank=3, learning_rate=0.1, every=1)
    update = update if tall is matrix else update.T
    return update.reshape(turned.shape).transpose(np.argsort(axes.fan_in + axes.fan_out))


@pytest.mark.slow
@needs_galore
@pytest.mark.parametrize("build", SOME_OF_THE_MODELS, ids=lambda build: build.__name__)
def test_the_matrices_of_a_model_are_projected_and_nothing_else(build):
    with jax.default_prng_impl("rbg"):
        case = build()
    axes, random = by_path(infer_axes(case.loss, case.params, *case.args)), np.random.default_rng(0)
    params = by_path(case.params)  # without the `None` in a module of Equinox, which GaLore does not take
    gradients = jax.tree.map(lambda leaf: np.float32(random.normal(size=leaf.shape)), params)
    optimizer = galore(jax.tree.map(WeightAxes.to_galore, axes))
    updates, _ = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(params), params)
    expected = jax.tree.map(expected_update, axes, gradients)
    for path, update in updates.items():
        np.testing.assert_allclose(update, expected[path], atol=2e-4, err_msg=path)


@needs_galore
@pytest.mark.parametrize("spec", [P("rows"), P(None, None, "columns"), P("rows", None, "columns")])
def test_a_sharded_matrix_is_projected_as_a_whole(spec):
    mesh = jax.make_mesh((2, 4), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    gradient = normal(1, 12, 2, 4)
    optimizer = galore(WeightAxes((0,), (1, 2)).to_galore())
    sharded = jax.device_put(gradient, NamedSharding(mesh, spec))
    update, _ = jax.jit(optimizer.update)(sharded, optimizer.init(sharded), sharded)
    np.testing.assert_allclose(update, expected_update(WeightAxes((0,), (1, 2)), gradient), atol=2e-4)


def over_a_stack(optimizer):
    """The optimizer of one layer for a stack of them in axis 0, as the docstring of `to_galore` has it."""

    def mapped(params):
        one = jax.eval_shape(optimizer.init, jax.tree.map(lambda leaf: leaf[0], params))
        return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, one)

    def init(params):
        return jax.vmap(optimizer.init, out_axes=mapped(params))(params)

    def update(updates, state, params):
        in_state = mapped(params)
        update = jax.vmap(optimizer.update, in_axes=(0, in_state, 0), out_axes=(0, in_state))
        return update(updates, state, params)

    return optax.GradientTransformation(init, update)


@needs_galore
def test_galore_over_a_stack_is_galore_of_each_layer():
    numbers = {"query": WeightAxes((0,), (1, 2)).to_galore(), "bias": None}
    optimizer = galore(numbers, update_proj_gap=2, weight_decay=0.1)

    def arrays(seed):
        return {"query": normal(seed, 3, 8, 2, 5), "bias": normal(seed, 3, 5)}

    params, gradients = arrays(0), [arrays(seed) for seed in range(1, 5)]
    stacked = over_a_stack(optimizer)
    ours = jax.jit(lambda params: trained(stacked, gradients, params))(params)
    layers = [jax.tree.map(lambda leaf, at=at: leaf[at], (params, gradients)) for at in range(3)]
    one_each = [trained(optimizer, those, one) for one, those in layers]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_each)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), ours, expected)
    # The decomposition is a branch that most steps do not take: were the count mapped too, all would.
    program = str(jax.make_jaxpr(stacked.update)(gradients[0], stacked.init(params), params))
    assert program.count(" cond[") == 1
    assert program.count(" svd[") == 1


def test_without_galore_in_optax_the_error_names_the_version(monkeypatch):
    monkeypatch.delattr(optax.contrib, "GaLoreDimensionNumbers", raising=False)
    with pytest.raises(ImportError, match=r"GaLoreDimensionNumbers, which optax has since 0\.2\.7; optax "):
        WeightAxes((0,), (1,)).to_galore()
    assert WeightAxes(()).to_galore() is None
