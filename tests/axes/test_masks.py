"""Which parameters weight decay is for, on the frameworks' models and inside optax's transformations."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gc_optax.nnx
from gc_optax import WeightAxes, centralize, conv_only, decay_mask, infer_axes, out_first, out_last
from gc_optax._text import path_text

x = jnp.linspace(-1, 1, 48).reshape(2, 4, 6)


# Models: a dense layer, a stack of three layers under a scan, and a head with a fan-out of one


def linen():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(
                nn.LayerNorm(name="norm")(x)
            )
            return nn.Dense(6, name="dense")(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + self.param("positions", nn.initializers.normal(), (4, 6))
            x, _ = Block(name="plain")(x, None)
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name="stack")(x, None)
            return nn.Dense(1, name="head")(x)

    params = Model().init(jax.random.key(0), x)["params"]
    kernels = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")} | {"dense/kernel"}
    weights = {f"{block}/{kernel}" for block in ("plain", "stack") for kernel in kernels} | {"head/kernel"}
    return params, infer_axes(lambda params, x: Model().apply({"params": params}, x), params, x), weights


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return nnx.Sequential(nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs))

        self.stack = stack(rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.head = nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def layers(x, layer):
            return layer(x)

        return self.head(self.attention(layers(x, self.stack)))


def nnx_loss(model, x):
    return jnp.mean(model(x) ** 2)


as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # its name before Flax 0.12.7
NNX_WEIGHTS = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
NNX_WEIGHTS |= {"stack/layers/1/kernel", "head/kernel"}


def nnx_bare():
    model = NNXModel(nnx.Rngs(0))
    bare = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return bare, nnx.to_pure_dict(gc_optax.nnx.infer_axes(nnx_loss, model, x)), NNX_WEIGHTS


def haiku():
    def block(x):
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return x + hk.MultiHeadAttention(2, 3, w_init=hk.initializers.RandomNormal())(x, x, x)

    def forward(x):
        return hk.Linear(1, name="head")(hk.experimental.layer_stack(3)(block)(x))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), x)
    names = [path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    weights = {name for name in names if name.endswith("/w")}
    assert len(weights) == 5
    return params, infer_axes(model.apply, params, x), weights


class EquinoxModel(eqx.Module):
    stack: eqx.nn.Linear
    norms: eqx.nn.LayerNorm
    head: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))(keys[:3])
        self.norms = eqx.filter_vmap(lambda key: eqx.nn.LayerNorm(6))(keys[:3])
        self.head = eqx.nn.MLP(6, 1, 5, 1, key=keys[3])

    def __call__(self, x):
        arrays, static = eqx.partition((self.stack, self.norms), eqx.is_array)

        def layer(x, arrays):
            linear, norm = eqx.combine(arrays, static)
            return jnp.tanh(linear(norm(x))), None

        return self.head(jax.lax.scan(layer, x, arrays)[0])


def equinox():
    params, static = eqx.partition(EquinoxModel(jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, x):
        return jnp.sum(jax.vmap(jax.vmap(eqx.combine(params, static)))(x))

    weights = {"stack/weight", "head/layers/0/weight", "head/layers/1/weight"}
    return params, infer_axes(loss, params, x), weights


# The oracle: AdamW in float64


def adamw_of_numpy(params, gradients, decayed, learning_rate=0.1, weight_decay=0.5):
    """One parameter after a step of AdamW for each of `gradients`."""
    params, first, second = np.float64(params), 0, 0
    for step, gradient in enumerate(map(np.float64, gradients), start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        adam = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        params = params - learning_rate * (adam + weight_decay * decayed * params)
    return params


def random_like(params, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(random.normal(size=leaf.shape)), params)


def by_path(tree):
    return {path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def step_through(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("model", [linen, nnx_bare, haiku, equinox])
def test_adamw_decays_the_weights_of_a_model_and_nothing_else(model):
    params, axes, weights = model()
    mask = decay_mask(axes)
    decayed = by_path(mask)
    assert set(decayed.values()) == {True, False}
    assert {path for path in decayed if decayed[path]} == weights
    # As everyone writes it, the mask decays in a stack what is no weight.
    assert {path for path, leaf in by_path(params).items() if leaf.ndim > 1} > weights

    params = random_like(params, 0)
    gradients = [random_like(params, seed) for seed in (1, 2)]
    those = [by_path(gradient) for gradient in gradients]
    expected = {
        path: adamw_of_numpy(leaf, [each[path] for each in those], path in weights)
        for path, leaf in by_path(params).items()
    }
    for given in (mask, decay_mask(lambda params: axes)):
        optimizer = optax.chain(
            centralize(lambda params: jax.tree.map(lambda leaf: None, params)),
            optax.adamw(0.1, weight_decay=0.5, mask=given),
        )
        trained = by_path(step_through(optimizer, params, gradients))
        assert trained.keys() == expected.keys()
        for path, leaf in trained.items():
            np.testing.assert_allclose(leaf, expected[path], atol=2e-5, err_msg=path)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "given",
    [
        lambda axes: decay_mask(axes),
        lambda axes: decay_mask(as_pure(axes)),
        lambda axes: decay_mask(lambda params: axes),
        lambda axes: decay_mask(lambda params: as_pure(axes)),
    ],
    ids=["boxed tree", "bare tree", "function to a boxed tree", "function to a bare tree"],
)
@pytest.mark.parametrize("is_masked_adam", [False, True])
def test_nnx_optimizer_decays_with_any_of_them(given, is_masked_adam):
    # `nnx.Optimizer` gives boxed parameters to `init`, and bare gradients and parameters to `update`.
    model = NNXModel(nnx.Rngs(0))
    mask = given(gc_optax.nnx.infer_axes(nnx_loss, model, x))
    adamw = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    tx = optax.masked(optax.adam(0.1), mask) if is_masked_adam else adamw
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start = by_path(jax.tree.map(jnp.copy, nnx.state(model, nnx.Param)))
    zeros = jax.tree.map(jnp.zeros_like, nnx.grad(nnx_loss)(model, x))
    gradients = jax.tree.map(jnp.ones_like, zeros) if is_masked_adam else zeros

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, gradients)

    step(model, optimizer)
    for path, leaf in by_path(nnx.state(model, nnx.Param)).items():
        is_weight = path in NNX_WEIGHTS
        decayed = start[path] * (0.95 if is_weight else 1)
        expected = start[path] + (-0.1 if is_weight else 1) if is_masked_adam else decayed
        np.testing.assert_allclose(leaf, expected, atol=1e-6, err_msg=path)


# Trees by hand, and conventions

KERNELS = {
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "dense": {"kernel": jnp.ones((4, 1)), "scale": jnp.ones((4, 1))},
    "thin": {"kernel": jnp.ones((1, 4))},
    "embed": {"embedding": jnp.ones((5, 4))},
    "count": jnp.arange(6).reshape(2, 3),
    "empty": {"kernel": jnp.ones((0, 4))},
    "absent": None,
    "masked": optax.MaskedNode(),
}
DECAYED = {
    "conv": {"kernel": True, "bias": False},
    "dense": {"kernel": True, "scale": False},
    "thin": {"kernel": True},
    "embed": {"embedding": False},
    "count": False,
    "empty": {"kernel": True},
    "absent": None,
    "masked": optax.MaskedNode(),
}


@pytest.mark.parametrize("axes", [None, out_last, conv_only(out_last), lambda params: out_last(params)])
def test_a_convention_becomes_a_function_of_the_parameters(axes):
    mask = decay_mask(axes)
    assert mask(KERNELS) == DECAYED
    assert decay_mask(axes, lookups=True)(KERNELS) == DECAYED | {"embed": {"embedding": True}}
    # A fan-in of one is left alone by centralization, and decayed all the same.
    assert out_last(KERNELS)["thin"]["kernel"].fan_in == ()
    shapes = jax.eval_shape(lambda: {"dense": KERNELS["dense"]})
    assert mask(shapes) == {"dense": DECAYED["dense"]}
    assert mask({}) == {}


@pytest.mark.parametrize("keep", [lambda axes: axes, conv_only])
def test_a_tree_of_axes_becomes_a_tree(keep):
    axes = keep(out_last(KERNELS))
    decayed = DECAYED | {"absent": False}  # to a tree of axes, `None` is a leaf
    assert decay_mask(axes) == decayed
    assert decay_mask(axes, lookups=True) == decayed | {"embed": {"embedding": True}}


@pytest.mark.parametrize(
    ("axes", "decayed"),
    [
        (0, True),
        (-1, True),
        (np.int64(1), True),
        ((0, 1), True),
        ((), False),
        (None, False),
        (WeightAxes((0,)), True),
        (WeightAxes(()), False),
        (WeightAxes((), (0,), role="output"), True),
        (WeightAxes((), role="lookup"), False),
        (optax.contrib.MuonDimensionNumbers(0, 1), True),
        (optax.contrib.MuonDimensionNumbers((), (1,)), False),
    ],
)
def test_every_kind_of_leaf_that_centralize_takes(axes, decayed):
    params = {"layer": [jnp.ones((2, 3))]}
    assert decay_mask({"layer": [axes]}) == {"layer": [decayed]}
    assert decay_mask(lambda params: {"layer": [axes]})(params) == {"layer": [decayed]}
    centralize({"layer": [axes]}).init(params)


def test_a_tuple_of_ints_may_be_one_parameter_or_several_and_both_are_decayed():
    assert decay_mask({"w": (0, 1)}) == {"w": True}
    assert decay_mask({"w": (0, None)}) == {"w": (True, False)}
    kernel = jnp.ones((2, 3))
    for params in ({"w": kernel}, {"w": (kernel, kernel)}):
        centralize({"w": (0, 1)}).init(params)
        decay = optax.add_decayed_weights(0.5, mask=decay_mask({"w": (0, 1)}))
        updates, _ = decay.update(params, decay.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert all((leaf == 1.5).all() for leaf in jax.tree.leaves(updates))


def test_what_is_absent_stays_absent():
    decay = optax.masked(optax.trace(0.9), decay_mask(out_last))
    floats = {name: leaf for name, leaf in KERNELS.items() if name != "count"}
    updates, _ = decay.update(floats, decay.init(floats), floats)
    assert jax.tree.structure(updates) == jax.tree.structure(floats)
    # A part of the parameters alone, as `optax.partition` shows it, where the axes are of all.
    axes = {"a": {"kernel": 0}, "b": {"kernel": 0, "bias": None}}
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    each = {"a": {"kernel": "plain"}, "b": {"kernel": "decayed", "bias": "decayed"}}
    functions = decay_mask(lambda params: axes), decay_mask(out_last)
    # Where a whole layer is missing, optax takes no mask that is a tree.
    cases = [(decay_mask(axes), each), *((mask, {"a": "plain", "b": "decayed"}) for mask in functions)]
    for mask, labels in cases:
        parts = {"decayed": optax.add_decayed_weights(0.5, mask=mask), "plain": optax.identity()}
        optimizer = optax.partition(parts, labels)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert {path: float(leaf.mean()) for path, leaf in by_path(updates).items()} == {
            "a/kernel": 1.0,
            "b/kernel": 1.5,
            "b/bias": 1.0,
        }


def test_boxes_of_linen_are_looked_into():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    dense = nn.Dense(4, kernel_init=init)
    boxed = dense.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    axes = out_last(boxed)
    assert isinstance(axes["kernel"], nn.Partitioned)
    assert decay_mask(axes) == {"kernel": True, "bias": False}
    for mask in (decay_mask(axes), decay_mask(out_last)):
        for params in (boxed, nn.unbox(boxed)):
            decay = optax.add_decayed_weights(0.5, mask=mask)
            updates, _ = decay.update(params, decay.init(params), params)
            assert jax.tree.structure(updates) == jax.tree.structure(params)
            updates, params = nn.unbox(updates), nn.unbox(params)
            np.testing.assert_allclose(updates["kernel"], 1.5 * params["kernel"])
            np.testing.assert_array_equal(updates["bias"], params["bias"])


def test_out_first_and_what_infer_axes_cannot_read():
    assert decay_mask(out_first)([jnp.ones((3, 2)), jnp.ones(3)]) == [True, False]

    def loss(params, x):
        return jnp.sum(x @ params["kernel"]), (x[:, :, None] * params["unclear"]).sum((1, 2))

    params = {"unclear": jnp.ones((6, 3)), "kernel": jnp.ones((6, 2))}
    with pytest.warns(UserWarning, match=r"\['unclear'\]"):
        axes = infer_axes(loss, params, x[0])
    assert decay_mask(axes) == {"unclear": False, "kernel": True}


def test_the_mask_is_one_for_centralize_too():
    gradients = {"kernel": jnp.arange(6.0).reshape(3, 2), "table": jnp.arange(6.0).reshape(3, 2)}
    axes = {"kernel": 0, "table": WeightAxes((), role="lookup")}
    tx = centralize(lambda params: jax.tree.map(lambda leaf: 0, params), mask=decay_mask(axes))
    updates, _ = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates["kernel"].sum(0), 0, atol=1e-6)
    np.testing.assert_array_equal(updates["table"], gradients["table"])


@pytest.mark.parametrize("is_function", [False, True])
def test_muon_decays_what_it_trains_with_the_mask(is_function):
    axes = {"query": WeightAxes((0,), (1, 2)), "stack": WeightAxes((1,), (2,)), "bias": None, "head": None}
    shapes = {"query": (4, 2, 3), "stack": (2, 3, 5), "bias": (2, 3), "head": (4, 5)}
    params = {
        name: jnp.asarray(np.random.default_rng(0).normal(size=shape)) for name, shape in shapes.items()
    }
    numbers = jax.tree.map(
        lambda leaf: leaf.to_muon() if leaf else None, axes, is_leaf=lambda leaf: leaf is None
    )
    numbers["bias"] = optax.contrib.MuonDimensionNumbers(0, 1)  # optax's rule: it has two axes
    mask = decay_mask((lambda params: axes) if is_function else axes)

    def step(weight_decay):
        muon = optax.contrib.muon(
            0.1,
            ns_steps=1,
            weight_decay=weight_decay,
            weight_decay_mask=mask,
            muon_weight_dimension_numbers=numbers,
        )
        return jax.jit(lambda params: muon.update(params, muon.init(params), params)[0])(params)

    decayed = jax.tree.map(jnp.subtract, step(0.5), step(0.0))
    for name, leaf in decayed.items():
        np.testing.assert_allclose(leaf, -0.05 * params[name] * (name in ("query", "stack")), atol=1e-6)


# Sharded


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_sharded_parameters_are_decayed_as_whole_ones_are(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    params = random_like({"kernel": np.ones((8, 3)), "bias": np.ones((8, 3))}, 0)
    gradients = random_like(params, 1)
    expected = {
        name: adamw_of_numpy(leaf, [gradients[name]], name == "kernel") for name, leaf in params.items()
    }
    for mask in (decay_mask({"kernel": 0, "bias": None}), decay_mask(out_last)):
        optimizer = optax.adamw(0.1, weight_decay=0.5, mask=mask)
        with jax.set_mesh(mesh):
            split = jax.device_put((params, gradients), NamedSharding(mesh, P("x")))
            trained = step_through(optimizer, split[0], [split[1]])
        for name, leaf in trained.items():
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P("x")), 2)
            np.testing.assert_allclose(leaf, expected[name], atol=1e-5)


@pytest.mark.parametrize(
    "axes", [{"kernel": 0, "bias": None}, lambda params: {"kernel": 0, "bias": None}, None]
)
def test_shards_are_decayed_as_the_whole_is(axes):
    # On a device the kernel has a single input.
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = random_like({"kernel": np.ones((8, 3)), "bias": np.ones((8, 3))}, 0)
    gradients = random_like(params, 1)
    optimizer = optax.adamw(0.1, weight_decay=0.5, mask=decay_mask(axes))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"))
    def step(params, gradients):
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    for name, leaf in step(params, gradients).items():
        expected = adamw_of_numpy(params[name], [gradients[name]], name == "kernel")
        np.testing.assert_allclose(leaf, expected, atol=1e-5)


# What is wrong is named


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"a": [0, "out_last"]},
            r"axes for \['a'\]\[1\] must be .* got 'out_last'\. A convention is a function",
        ),
        ({"a": True}, r"axes for \['a'\] must be .* a tree of bools is a mask"),
        ({"a": 0.5}, r"axes for \['a'\] must be a WeightAxes, an int, .* got 0\.5"),
        ({"a": jnp.ones((2, 3))}, r"\['a'\] .* got an array of dtype float32 and shape \(2, 3\)"),
        ({"a": optax.contrib.MuonDimensionNumbers("x", 1)}, r"axes for \['a'\] must be ints, got 'x'"),
        ("out_last", r"axes for the root must be .* A convention is a function: gc_optax\.out_last"),
    ],
)
def test_a_leaf_that_is_no_axes_is_refused_by_name(axes, message):
    with pytest.raises(TypeError, match=message):
        decay_mask(axes)
    if isinstance(axes, dict):
        with pytest.raises(TypeError, match=r"\['a'\]"):
            decay_mask(lambda params: axes)(
                {"a": [jnp.ones((2, 3))] * 2 if isinstance(axes["a"], list) else 1}
            )


def test_a_mask_that_is_taken_for_a_schedule_is_refused():
    kernel = {"kernel": jnp.ones((3, 2))}
    settings = {"learning_rate": 1.0, "weight_decay": 0.1, "mask": decay_mask(out_last)}
    with pytest.raises(TypeError, match=r"needs the parameters, got an array .* tell it static_args=.mask."):
        optax.inject_hyperparams(optax.adamw)(**settings).init(kernel)
    optimizer = optax.inject_hyperparams(optax.adamw, static_args="mask")(**settings)
    assert decay_mask(out_last)(jnp.arange(3)) is False, "a single array of counts is a tree like others"
    zero = jax.tree.map(jnp.zeros_like, kernel)
    updates, _ = optimizer.update(zero, optimizer.init(kernel), kernel)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-6)


def test_a_function_that_does_not_fit_the_parameters_is_refused_by_name():
    params = {"a": {"kernel": jnp.ones((2, 3))}}
    optimizer = optax.adamw(1e-3, mask=decay_mask(lambda params: {"a": {"kernel": 2}}))
    with pytest.raises(
        ValueError, match=r"axes for \['a'\]\['kernel'\], shape \(2, 3\): axis 2 is out of range"
    ):
        optimizer.init(params)
    with pytest.raises(
        ValueError, match=r"at \['a'\] the parameters have .*\['kernel'\], axes has .*\['bias'\]"
    ):
        decay_mask(lambda params: {"a": {"bias": 0}})(params)
