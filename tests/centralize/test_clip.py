"""Adaptive gradient clipping: equal to optax's where that is right, and right where it is not."""

import math
import re
import warnings

import equinox as eqx
import flax.linen as nn
import haiku as hk
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from collectives import collectives
from flax import nnx
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gc_optax.nnx
from gc_optax import WeightAxes, adaptive_grad_clip, centralize, infer_axes, out_first, out_last
from gc_optax._text import path_text


def arrays(*shape, seed=0, dtype=jnp.float32):
    """A gradient and weights. Their entries, and so the lengths of their vectors, differ by much."""
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape) * 10 ** random.normal(size=shape), dtype) for _ in range(2)]


def clipped(gradients, params, *args, **options):
    optimizer = adaptive_grad_clip(*args, **options)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return updates


# Equal to optax's, where that is right


def optax_takes_rank_5():
    """Whether this version of optax knows convolutions of three dimensions."""
    kernel = jnp.ones((2, 2, 2, 2, 2))
    try:
        optax.adaptive_grad_clip(1.0).update(kernel, optax.EmptyState(), kernel)
    except ValueError:
        return False
    return True


HAS_RANK_5 = optax_takes_rank_5()
# Shape and fan-in.
RIGHT_IN_OPTAX = {
    "dense": ((17, 6), (0,)),
    "dense, many outputs": ((40, 300), (0,)),
    "dense, many inputs": ((2000, 9), (0,)),
    "dense, one output": ((300, 1), (0,)),
    "dense, one input": ((1, 300), (0,)),
    "dense, one of both": ((1, 1), (0,)),
    "convolution": ((3, 3, 8, 4), (0, 1, 2)),
    "convolution, one filter": ((3, 3, 16, 1), (0, 1, 2)),
    "convolution, 1x1": ((1, 1, 64, 32), (0, 1, 2)),
    "convolution, depthwise": ((3, 3, 1, 32), (0, 1, 2)),
    "convolution, of one entry each": ((1, 1, 1, 7), (0, 1, 2)),
    **({"convolution, 3d": ((2, 2, 2, 8, 4), (0, 1, 2, 3))} if HAS_RANK_5 else {}),
    "vector of weights": ((9,), (0,)),
    "bias": ((33,), ()),
    "long bias": ((5000,), ()),
    "scalar": ((), ()),
}


@jax.jit
def compiled_optax(gradient, weights, clipping):
    optimizer = optax.adaptive_grad_clip(clipping)
    return optimizer.update(gradient, optimizer.init(weights), weights)[0]


compiled = jax.jit(clipped, static_argnums=3)


@st.composite
def gradients_and_weights(draw):
    shape, fan_in = draw(st.sampled_from(list(RIGHT_IN_OPTAX.values())))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    smallest, largest = draw(st.sampled_from([(0, 0), (-3, 3), (-42, -38), (-25, 25), (30, 38)]))
    pair = []
    for _ in range(2):
        entries = random.normal(size=shape) * 10 ** random.uniform(smallest, largest, size=shape)
        pair.append(
            (entries * (random.random(size=shape) > draw(st.sampled_from([0, 0.5, 1])))).astype(dtype)
        )
    return *pair, fan_in


@pytest.mark.thorough
@settings(max_examples=150)
@given(gradients_and_weights(), st.sampled_from([0.0, 0.01, 0.3, 1.0, 7.0]))
def test_equals_optax_to_the_last_bit(case, clipping):
    gradient, weights, fan_in = case
    axes = WeightAxes(fan_in)
    with jax.enable_x64(gradient.dtype == np.float64):
        gradient, weights = jnp.asarray(gradient), jnp.asarray(weights)
        optimizer = optax.adaptive_grad_clip(clipping)
        expected, _ = optimizer.update(gradient, optimizer.init(weights), weights)
        result = clipped(gradient, weights, clipping, axes)
        assert result.dtype == expected.dtype == gradient.dtype
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(
            compiled(gradient, weights, clipping, axes), compiled_optax(gradient, weights, clipping)
        )


@pytest.mark.parametrize(
    "around",
    [pytest.param(lambda update: update, marks=pytest.mark.thorough), jax.jit],
    ids=["eager", "jitted"],
)
def test_a_tree_of_all_of_them_equals_optax_to_the_last_bit(around):
    pairs = {name: arrays(*shape, seed=len(name)) for name, (shape, _) in RIGHT_IN_OPTAX.items()}
    gradients, params = ({name: pair[number] for name, pair in pairs.items()} for number in range(2))
    axes = {name: WeightAxes(fan_in) for name, (_, fan_in) in RIGHT_IN_OPTAX.items()}
    ours, theirs = adaptive_grad_clip(0.7, axes, eps=0.02), optax.adaptive_grad_clip(0.7, eps=0.02)
    results = [around(each.update)(gradients, optax.EmptyState(), params)[0] for each in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    changed = jax.tree.map(lambda before, after: bool(jnp.any(before != after)), gradients, results[0])
    assert 0 < sum(changed.values()) < len(changed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whose", ["gradient", "weights"])
def test_what_is_not_finite_stays_in_its_own_vector_and_becomes_what_it_becomes_in_optax(bad, whose):
    gradient, weights = clean = arrays(40, 6)
    pair = (
        (gradient.at[3, 2].set(bad), weights)
        if whose == "gradient"
        else (gradient, weights.at[3, 2].set(bad))
    )
    result = np.asarray(compiled(*pair, 0.01, WeightAxes((0,))))
    np.testing.assert_array_equal(result, compiled_optax(*pair, 0.01))
    other = np.arange(6) != 2
    np.testing.assert_array_equal(
        result[:, other], np.asarray(compiled(*clean, 0.01, WeightAxes((0,))))[:, other]
    )
    assert np.any(result[:, 2] != np.asarray(compiled(*clean, 0.01, WeightAxes((0,))))[:, 2])


# Right, where optax's is not

WRONG_IN_OPTAX = {
    "scanned": ((3, 8, 6), (1,)),
    "query": ((8, 2, 4), (0,)),
    "out": ((2, 4, 8), (0, 1)),
    "experts": ((4, 8, 6), (1,)),
    "1d": ((3, 4, 5), (0, 1)),
    "scanned convolution": ((2, 3, 3, 4, 5), (1, 2, 3)),
    "out first": ((6, 8), (1,)),
    "out first, convolution": ((5, 4, 3, 3), (1, 2, 3)),
    "apart": ((4, 3, 6, 2), (0, 2)),
    "of rank 6": ((2, 2, 3, 3, 4, 5), (2, 3, 4)),
    "lookup": ((11, 8), ()),
    "scanned biases": ((3, 8), ()),
    "a fan-in of one": ((3, 1, 8), (1,)),
}


@pytest.mark.parametrize(
    ("shape", "fan_in"),
    [*RIGHT_IN_OPTAX.values(), *WRONG_IN_OPTAX.values()],
    ids=[*RIGHT_IN_OPTAX, *WRONG_IN_OPTAX],
)
def test_matches_the_oracle(shape, fan_in):
    gradient, weights = arrays(*shape)
    vectors = fan_in if math.prod(shape[axis] for axis in fan_in) > 1 else ()
    for clipping in (0.01, 1.0, 100.0):
        result = compiled(gradient, weights, clipping, WeightAxes(fan_in))
        np.testing.assert_allclose(result, oracle.clip(gradient, weights, clipping, vectors), rtol=2e-6)


@pytest.mark.parametrize("name", ["scanned", "experts", *["scanned convolution"] * HAS_RANK_5])
def test_a_large_gradient_in_one_layer_or_expert_scales_no_other(name):
    shape, fan_in = WRONG_IN_OPTAX[name]
    gradient, weights = arrays(*shape)
    alone = np.asarray(clipped(gradient, weights, 1.0, fan_in))
    beside = np.asarray(clipped(gradient.at[1].multiply(1e6), weights, 1.0, fan_in))
    others = np.arange(shape[0]) != 1
    np.testing.assert_array_equal(beside[others], alone[others])
    theirs = np.asarray(compiled_optax(gradient.at[1].multiply(1e6), weights, 1.0))
    assert np.abs(theirs[others] / alone[others]).min() < 0.1, "optax scales them"


def test_a_stack_of_biases_is_one_leaf_unless_its_axes_say_otherwise():
    gradient, weights = arrays(3, 8)
    assert np.ptp(clipped(gradient, weights, 0.01, WeightAxes(())) / gradient) < 1e-6
    apart = clipped(gradient, weights, 0.01, WeightAxes(fan_in=(), fan_out=(1,)))
    np.testing.assert_allclose(apart, oracle.clip(gradient, weights, 0.01, (1,)), rtol=2e-6)


def test_a_stack_of_dense_layers_on_one_feature_is_one_vector_for_each_layer():
    def model(w, x):
        return jax.lax.scan(lambda x, w: (jnp.mean(x @ w, 1, keepdims=True), None), x, w)[0]

    gradient, weights = arrays(3, 1, 8)
    axes = infer_axes(model, weights, jnp.ones((5, 1)))
    assert (axes.fan_in, axes.fan_out, axes.role) == ((), (2,), "hidden")
    apart = oracle.clip(gradient, weights, 0.01, (1, 2))
    np.testing.assert_allclose(clipped(gradient, weights, 0.01, axes), apart, rtol=2e-6)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.relu(nn.Dense(12)(x))), None


class LinenModel(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        if self.scanned:
            x, _ = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
                name="block"
            )(x, None)
        else:
            x, _ = LinenBlock(name="block")(x, None)
        return nn.Dense(5, name="head")(x)


def linen(scanned):
    model = LinenModel(scanned)
    tokens = jnp.arange(12).reshape(3, 4) % 11
    params = model.init(jax.random.key(0), tokens)["params"]
    attention = {"query": (0,), "key": (0,), "value": (0,), "out": (0, 1)}
    inputs = {f"MultiHeadDotProductAttention_0/{name}": fan_in for name, fan_in in attention.items()}
    inputs |= {"Dense_0": (0,), "Dense_1": (0,)}
    truth = {
        f"block/{name}/kernel": tuple(axis + scanned for axis in fan_in) for name, fan_in in inputs.items()
    }
    return lambda params, x: model.apply({"params": params}, x), params, tokens, truth | {"head/kernel": (0,)}


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        return self.head(self.attention(x.reshape(x.shape[0], -1, 8)).mean(1))


images = jnp.linspace(-1, 1, 96).reshape(2, 4, 4, 3)
NNX_TRUTH = {
    "conv/kernel": (0, 1, 2),
    "head/kernel": (0,),
    **{f"attention/{name}/kernel": (0,) for name in ("query", "key", "value")},
    "attention/out/kernel": (0, 1),
}


def nnx_model():
    graph, params, rest = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), params, images, NNX_TRUTH


def haiku():
    def forward(x):
        x = hk.Conv2D(8, 3)(x)
        x = hk.LayerNorm(-1, True, True)(x)
        return hk.Linear(1)(hk.LSTM(6)(x.mean((1, 2)), hk.LSTM(6).initial_state(2))[0])

    model = hk.transform(forward)
    params = model.init(jax.random.key(0), images)
    return (
        lambda params, x: model.apply(params, None, x),
        params,
        images,
        {"conv2_d/w": (0, 1, 2), "linear/w": (0,), "lstm/linear/w": (0,)},
    )


def equinox(scanned):
    keys = jax.random.split(jax.random.key(0), 3)
    make = lambda key: eqx.nn.Linear(8, 8, key=key)  # noqa: E731
    layer = eqx.filter_vmap(make)(keys) if scanned else make(keys[0])
    model = {"layer": layer, "conv": eqx.nn.Conv2d(3, 8, 3, key=keys[1])}
    params, static = eqx.partition(model, eqx.is_array)

    def forward(params, x):
        model = eqx.combine(params, static)
        x = jax.vmap(model["conv"])(x.transpose(0, 3, 1, 2)).mean((2, 3))
        if not scanned:
            return jax.vmap(model["layer"])(x)
        arrays, rest = eqx.partition(model["layer"], eqx.is_array)
        return jax.lax.scan(lambda x, layer: (jax.vmap(eqx.combine(layer, rest))(x), None), x, arrays)[0]

    return forward, params, images, {"layer/weight": (1 + scanned,), "conv/weight": (1, 2, 3)}


MODELS = {
    "linen": lambda: linen(False),
    "linen, scanned": lambda: linen(True),
    "nnx": nnx_model,
    "haiku": haiku,
    "equinox": lambda: equinox(False),
    "equinox, scanned": lambda: equinox(True),
}


def by_path(tree):
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.thorough
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_match_the_oracle(make):
    forward, params, inputs, truth = make()
    axes = infer_axes(forward, params, inputs)
    leaves, structure = jax.tree.flatten(params)
    pairs = [arrays(*leaf.shape, seed=number) for number, leaf in enumerate(leaves)]
    # Every second gradient is too small to be clipped.
    gradients = jax.tree.unflatten(structure, [pair[0] / 1e5 ** (n % 2) for n, pair in enumerate(pairs)])
    params = jax.tree.unflatten(structure, [pair[1] for pair in pairs])
    result = by_path(jax.jit(lambda *given: clipped(*given, 0.7, axes))(gradients, params))
    assert truth.keys() <= result.keys()
    gradients, params = by_path(gradients), by_path(params)
    changed = 0
    for path, leaf in result.items():
        expected = oracle.clip(gradients[path], params[path], 0.7, truth.get(path, ()))
        np.testing.assert_allclose(leaf, expected, rtol=2e-6, err_msg=path)
        changed += bool(np.any(leaf != gradients[path]))
    assert 0 < changed < len(result)


# Half precision and other dtypes


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("around", [lambda update: update, jax.jit], ids=["eager", "jitted"])
def test_half_precision_is_rounded_once(dtype, around):
    gradient, weights = (leaf.astype(dtype) for leaf in arrays(512, 8))
    result = around(lambda *pair: clipped(*pair, 0.3, 0))(gradient, weights)
    assert result.dtype == dtype
    exact = oracle.clip(gradient, weights, 0.3, (0,))
    eps, least = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(np.float64(result), exact, rtol=eps / 2 * 1.001 + 1e-6, atol=least)
    kept = exact == np.float64(gradient)
    np.testing.assert_array_equal(np.asarray(result)[kept], np.asarray(gradient)[kept])


def test_squares_that_float16_does_not_hold():
    gradient, weights = jnp.full((64, 4), 1000.0, jnp.float16), jnp.full((64, 4), 300.0, jnp.float16)
    np.testing.assert_allclose(np.float32(clipped(gradient, weights, 0.5, 0)), 150, rtol=1e-3)
    np.testing.assert_array_equal(clipped(gradient, weights, 5.0, 0), gradient)
    assert not np.all(np.isclose(np.float32(compiled_optax(gradient, weights, 0.5)), 150)), "as in optax"


@pytest.mark.parametrize(
    ("dtype", "dtype_of_weights"),
    [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.float8_e4m3fn, jnp.bfloat16)],
)
def test_gradients_keep_their_dtype(dtype, dtype_of_weights):
    gradient, weights = (jnp.clip(leaf, -100, 100) for leaf in arrays(64, 4))
    gradient, weights = gradient.astype(dtype), weights.astype(dtype_of_weights)
    result = clipped(gradient, weights, 0.3, 0)
    assert result.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(result, np.float64), oracle.clip(gradient, weights, 0.3, (0,)),
        rtol=max(1e-6, float(jnp.finfo(dtype).eps)), atol=float(jnp.finfo(dtype).smallest_normal),
    )  # fmt: skip


def test_complex_numbers_have_the_norm_of_their_absolute_values():
    gradient, weights = (leaf + 1j * leaf[::-1] for leaf in arrays(16, 4))
    ratios = np.real(clipped(gradient, weights, 0.3, 0) / gradient)[0]
    lengths = [np.linalg.norm(leaf, axis=0) for leaf in (gradient, weights)]
    np.testing.assert_allclose(ratios, np.minimum(1, 0.3 * lengths[1] / lengths[0]), rtol=1e-5)
    assert np.any(ratios < 1)


def test_what_is_no_array_of_floats_passes_as_it_is():
    passing = {
        "int": jnp.arange(3),
        "bool": jnp.array(True),
        "float0": np.zeros(3, jax.dtypes.float0),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(0),
        "text": "relu",
    }
    gradient, weights = arrays(4)
    updates = clipped(passing | {"bias": gradient}, passing | {"bias": weights}, 0.01, out_last)
    assert jax.tree.structure(updates) == jax.tree.structure(passing | {"bias": gradient})
    for name, leaf in passing.items():
        assert updates[name] is leaf or isinstance(leaf, optax.MaskedNode), name
    assert np.all(updates["bias"] != gradient)


# Inside of what optax and Flax put around it


def tree_of_pairs():
    shapes = {"hidden": (3, 8, 6), "head": (6, 5), "bias": (5,)}
    pairs = {name: arrays(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    axes = {
        "hidden": WeightAxes((1,), (2,), role="hidden"),
        "head": WeightAxes((0,), (1,), role="output"),
        "bias": WeightAxes(()),
    }
    return *({name: pair[number] for name, pair in pairs.items()} for number in range(2)), axes


def expected_of(gradients, params, axes, clipping=0.01):
    return {
        name: oracle.clip(gradients[name], params[name], clipping, axes[name].fan_in) for name in gradients
    }


def assert_close(actual, desired):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, desired)


def test_a_chain_clips_centralizes_and_steps():
    gradients, params, axes = tree_of_pairs()
    optimizer = optax.chain(adaptive_grad_clip(0.01, axes), centralize(axes), optax.adamw(1e-2))
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    by_hand = {
        name: leaf if not axes[name].fan_in else oracle.centralize(leaf, axes[name].fan_in)
        for name, leaf in expected_of(gradients, params, axes).items()
    }
    adamw = optax.adamw(1e-2)
    expected, _ = adamw.update(jax.tree.map(jnp.float32, by_hand), adamw.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), updates, expected)


def test_several_small_steps():
    gradients, params, axes = tree_of_pairs()
    optimizer = optax.MultiSteps(optax.chain(adaptive_grad_clip(0.01, axes), optax.sgd(1.0)), 2)
    state = optimizer.init(params)
    none, state = optimizer.update(gradients, state, params)
    updates, _ = optimizer.update(jax.tree.map(lambda leaf: 3 * leaf, gradients), state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(none))
    summed = jax.tree.map(lambda leaf: 2 * leaf, gradients)
    assert_close(jax.tree.map(jnp.negative, updates), expected_of(summed, params, axes))


def test_all_but_the_last_layer():
    gradients, params, axes = tree_of_pairs()
    mask = jax.tree.map(lambda a: a.role != "output", axes)
    optimizer = optax.masked(adaptive_grad_clip(0.01, axes), mask)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["head"], gradients["head"])
    assert_close(updates, expected_of(gradients, params, axes) | {"head": gradients["head"]})


@pytest.mark.thorough
def test_all_but_the_last_layer_of_a_model_by_the_roles_that_infer_axes_reads():
    forward, params, tokens, truth = linen(True)
    axes = infer_axes(forward, params, tokens)
    mask = jax.tree.map(lambda a: a.role != "output", axes)
    optimizer = optax.masked(adaptive_grad_clip(0.01, axes), mask)
    gradients = jax.tree.map(lambda leaf: leaf + 10, params)
    updates = by_path(jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0])
    params = by_path(params)
    for path, gradient in by_path(gradients).items():
        clipped_one = oracle.clip(gradient, params[path], 0.01, truth.get(path, ()))
        expected = gradient if path == "head/kernel" else clipped_one
        np.testing.assert_allclose(updates[path], expected, rtol=1e-5, err_msg=path)
        assert np.any(clipped_one != gradient), path


def test_a_schedule_of_the_clipping():
    gradients, params, axes = tree_of_pairs()
    schedule = optax.linear_schedule(0.01, 0.03, 2)
    factory = optax.inject_hyperparams(adaptive_grad_clip, static_args="axes")
    optimizer = factory(clipping=schedule, axes=lambda _: axes)
    state = optimizer.init(params)
    for clipping in (0.01, 0.02, 0.03):
        updates, state = jax.jit(optimizer.update)(gradients, state, params)
        assert_close(updates, expected_of(gradients, params, axes, clipping))


@pytest.mark.thorough
@pytest.mark.parametrize("boxed", [True, False])
def test_nnx_optimizers_hand_over_boxes(boxed):
    def loss(model):
        return 100 * jnp.sum(model(images) ** 2)

    model = NNXModel(nnx.Rngs(0))
    axes = gc_optax.nnx.infer_axes(loss, model)
    before = by_path(jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)))
    gradients = nnx.grad(loss)(model)
    as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # its name before Flax 0.12.7
    tx = optax.chain(adaptive_grad_clip(0.1, axes if boxed else as_pure(axes)), optax.sgd(1.0))
    nnx.Optimizer(model, tx, wrt=nnx.Param).update(model, gradients)
    for path, leaf in by_path(gradients).items():
        expected = oracle.clip(leaf, before[path], 0.1, NNX_TRUTH.get(path, ()))
        moved = before[path] - by_path(nnx.state(model, nnx.Param))[path]
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6, err_msg=path)


def test_axes_are_what_centralize_accepts():
    gradient, weights = arrays(4, 6)
    inputs_last = oracle.clip(gradient, weights, 0.1, (1,))
    muon = optax.contrib.MuonDimensionNumbers(1, 0)
    for axes in (1, -1, (1,), WeightAxes((1,)), muon, out_first, lambda _: 1):
        np.testing.assert_allclose(clipped(gradient, weights, 0.1, axes), inputs_last, rtol=2e-6)


def test_the_default_is_that_of_centralize_with_its_warning():
    gradient, weights = arrays(3, 8, 6)
    message = (
        r"\['w'\], shape \(3, 8, 6\): norm over axes \(0, 1\)\n"
        r"Settle it exactly with adaptive_grad_clip\(clipping, gc_optax\.infer_axes\(loss, params, batch\)\)"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        result = clipped({"w": gradient}, {"w": weights}, 0.1)
    assert [warning.filename for warning in caught] == [__file__]
    np.testing.assert_allclose(result["w"], oracle.clip(gradient, weights, 0.1, (0, 1)), rtol=2e-6)
    assert "centralize" not in str(caught[0].message)


def test_a_tree_that_is_changed_later_reaches_no_step():
    gradient, weights = arrays(4, 6)
    axes = {"w": 0}
    optimizer = adaptive_grad_clip(0.1, axes)
    axes["w"] = 1
    updates, _ = optimizer.update({"w": gradient}, optimizer.init({"w": weights}), {"w": weights})
    np.testing.assert_allclose(updates["w"], oracle.clip(gradient, weights, 0.1, (0,)), rtol=2e-6)


# Sharded

SHARDED = {
    "fan-in": ((8, 6), (0,), P("fsdp")),
    "fan-out": ((8, 6), (0,), P(None, "tp")),
    "fan-in and fan-out": ((8, 6), (0,), P("fsdp", "tp")),
    "fan-in by both": ((16, 6), (0,), P(("fsdp", "tp"))),
    "one input on each device": ((8, 6), (0,), P(("tp", "fsdp"))),
    "convolution": ((3, 3, 8, 4), (0, 1, 2), P(None, None, "fsdp", "tp")),
    "experts": ((4, 8, 6), (1,), P("fsdp", "tp")),
    "scanned": ((3, 8, 6), (1,), P(None, "fsdp", "tp")),
    "bias": ((8,), (), P("fsdp")),
    "lookup": ((8, 6), (), P("fsdp", "tp")),
    "fan-in of one": ((1, 8), (0,), P(None, ("fsdp", "tp"))),
    "replicated": ((8, 6), (0,), P()),
    "scalar": ((), (), P()),
}
sharded = pytest.mark.parametrize(("shape", "fan_in", "spec"), SHARDED.values(), ids=SHARDED)


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)


def norms_sent(shape, fan_in, sharding):
    """What a program is to send: of gradient and weights every norm that is taken across shards."""
    shard = sharding.shard_shape(shape)
    inputs = fan_in if math.prod(shape[axis] for axis in fan_in) > 1 else range(len(shape))
    norms = math.prod(size for axis, size in enumerate(shard) if axis not in inputs)
    return {("all-reduce", norms): 2} if any(shard[axis] < shape[axis] for axis in inputs) else {}


def expected_shards(gradient, weights, fan_in):
    vectors = fan_in if math.prod(gradient.shape[axis] for axis in fan_in) > 1 else ()
    return oracle.clip(gradient, weights, 0.7, vectors)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@sharded
def test_under_jit_shards_give_what_the_whole_gives_and_only_norms_are_sent(shape, fan_in, spec, kind):
    mesh = make_mesh(kind)
    sharding = NamedSharding(mesh, spec)
    optimizer = optax.chain(adaptive_grad_clip(0.7, WeightAxes(fan_in)), optax.sgd(1.0, momentum=0.9))

    def step(gradient, weights):
        return optimizer.update(gradient, optimizer.init(weights), weights)[0]

    pair = arrays(*shape)
    with jax.set_mesh(mesh):
        split = jax.device_put(pair, sharding)
        program = jax.jit(step).lower(*split).compile()
        updates = program(*split)
    sent = collectives(program)
    assert sent.keys() == norms_sent(shape, fan_in, sharding).keys()
    # Where two axes of a vector are split, XLA sums over one mesh axis after the other.
    assert set(sent.values()) <= {4 if not fan_in and len(spec) == 2 else 2}
    assert updates.sharding.is_equivalent_to(sharding, len(shape))
    np.testing.assert_allclose(-np.asarray(updates), expected_shards(*pair, fan_in), rtol=2e-6)


def on_shards(fn, spec, **options):
    return jax.jit(jax.shard_map(fn, mesh=make_mesh(), in_specs=(spec, spec), out_specs=spec, **options))


@pytest.mark.parametrize("check_vma", [True, False])
@sharded
def test_in_shard_map_shards_give_what_the_whole_gives_and_only_norms_are_sent(
    shape, fan_in, spec, check_vma
):
    def clip(gradient, weights):
        return clipped(gradient, weights, 0.7, WeightAxes(fan_in), partition_specs=spec)

    pair = arrays(*shape)
    program = on_shards(clip, spec, check_vma=check_vma).lower(*pair).compile()
    split = jax.device_put(pair, NamedSharding(make_mesh(), spec))
    assert dict(collectives(program)) == norms_sent(shape, fan_in, NamedSharding(make_mesh(), spec))
    np.testing.assert_allclose(program(*split), expected_shards(*pair, fan_in), rtol=2e-6)


def test_a_shard_of_which_nobody_said_so_is_warned_about():
    specs = {"kernel": P("fsdp"), "bias": P("fsdp"), "head": P(), "scale": P()}
    shapes = {"kernel": (8, 6), "bias": (8,), "head": (8, 2), "scale": ()}
    gradients = {name: arrays(*shape)[0] for name, shape in shapes.items()}
    axes = {"kernel": WeightAxes((0,)), "bias": None, "head": WeightAxes((0,)), "scale": None}
    message = (
        r"takes the norm of the shard\. These may be parts of a larger one:\n"
        r"  \['bias'\], shape \(2,\): may be split by fsdp\n"
        r"  \['kernel'\], shape \(2, 6\): may be split by fsdp\n"
        r"Say how they are split, with adaptive_grad_clip\(clipping, axes, partition_specs=\.\.\.\), or"
    )
    with pytest.warns(UserWarning, match=message):
        on_shards(lambda g, w: clipped(g, w, 0.7, axes), specs)(gradients, gradients)
    with pytest.warns(UserWarning, match=r"\['head'\], .* may be split by fsdp, tp\n") as caught:
        on_shards(lambda g, w: clipped(g, w, 0.7, axes), specs, check_vma=False)(gradients, gradients)
    assert "['scale']" not in str(caught[0].message), "a scalar is no part of anything"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_shards(lambda g, w: clipped(g, w, 0.7, axes, partition_specs=specs), specs)(gradients, gradients)


# Mistakes


def test_parameters_are_needed():
    gradient, weights = arrays(4, 6)
    optimizer = adaptive_grad_clip(0.1, 0)
    with pytest.raises(
        ValueError, match=r"needs the parameters .* optimizer\.update\(gradients, state, params\)"
    ):
        optimizer.update(gradient, optimizer.init(weights))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones((6, 4))}, "of ['w'], shape (4, 6), got an array of dtype float32 and shape (6, 4"),
        ({"w": jnp.ones((4, 6), int)}, "of ['w'], shape (4, 6), got an array of dtype int32"),
        ({"w": jax.ShapeDtypeStruct((4, 6), jnp.float32)}, "must have an array of floats of the same shape"),
        ({"w": None}, "of ['w'], shape (4, 6), got None"),
        ({"w": {"v": jnp.ones(4)}}, "of ['w'], shape (4, 6), got a dict with ['v']"),
        ({"v": jnp.ones((4, 6))}, "params does not have the structure of the updates: at the root"),
        ({"params": {"w": jnp.ones((4, 6))}}, "Below ['params'] of the params the two fit"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit_are_named(params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        adaptive_grad_clip(0.1, {"w": 0}).update({"w": jnp.ones((4, 6))}, optax.EmptyState(), params)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clipping": -0.01}, ValueError, "clipping must be at least 0, got -0.01"),
        ({"clipping": float("nan")}, ValueError, "clipping must be at least 0, got nan"),
        ({"clipping": jnp.array(-1.0)}, ValueError, "clipping must be at least 0, got -1.0"),
        ({"clipping": 0.1, "eps": -1e-3}, ValueError, "eps must be at least 0, got -0.001"),
        ({"clipping": 0.1, "eps": np.nan}, ValueError, "eps must be at least 0, got nan"),
        ({"clipping": {"w": 0}}, TypeError, "clipping must be a number, got a dict with ['w']"),
        ({"clipping": jnp.ones(3)}, TypeError, "clipping must be a number, got an array of dtype float32"),
        ({"clipping": out_last}, TypeError, "clipping must be a number, got <function out_last"),
        ({"clipping": np.array("x")}, TypeError, "clipping must be a number, got an array of dtype <U1"),
        (
            {"clipping": 0.1, "eps": jnp.array(1j)},
            TypeError,
            "eps must be a number, got an array of dtype comp",
        ),
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        adaptive_grad_clip(**arguments)


def test_numbers_of_python_are_no_gradients():
    optimizer = adaptive_grad_clip(0.1, {"w": None})
    with pytest.raises(TypeError, match=r"the gradient of \['w'\] must be an array, got 5\.0"):
        optimizer.update({"w": 5.0}, optax.EmptyState(), {"w": 1.0})
    updates, _ = optimizer.update({"w": np.float64(5)}, optax.EmptyState(), {"w": np.float64(1)})
    np.testing.assert_allclose(updates["w"], 0.1, rtol=1e-6)


def test_arrays_of_numpy_are_taken_as_jax_takes_them():
    ones = np.ones((3, 2))  # float64, which JAX has only if it is told to
    updates, _ = adaptive_grad_clip(0.1, 0).update(ones, optax.EmptyState(), ones)
    assert updates.dtype == jnp.float32
    np.testing.assert_allclose(updates, 0.1, rtol=1e-6)


def test_axes_and_specs_that_do_not_fit_are_refused_by_init():
    params = {"w": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match="axis 2 is out of range for rank 2"):
        adaptive_grad_clip(0.1, {"w": 2}).init(params)
    with pytest.raises(ValueError, match="has 3 entries for 2 axes"):
        adaptive_grad_clip(0.1, {"w": 0}, partition_specs=P(None, None, "tp")).init(params)
    with pytest.raises(ValueError, match="here no mesh axis is manual"):
        adaptive_grad_clip(0.1, {"w": 0}, partition_specs=P()).update(params, optax.EmptyState(), params)


def test_a_placeholder_without_leaves_is_initialized():
    optimizer = optax.chain(adaptive_grad_clip(0.1, {"w": 0}), optax.adam(1e-3))
    params = {"w": jnp.ones((4, 6))}
    doubled = optax.tree_map_params(optimizer, lambda leaf: leaf + 1, optimizer.init(params))
    np.testing.assert_array_equal(doubled[1][0].mu["w"], 1)
