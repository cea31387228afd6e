"""The optax protocol: what `centralize`, `centralize_gradients` and `centralized` promise."""

import re

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from hypothesis import given

import gc_optax
from gc_optax import WeightAxes, centralize, centralize_gradients, centralized, out_first, out_last


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


PARAMS = {
    "conv": {"kernel": normal(0, 3, 3, 4, 8), "bias": normal(1, 8)},
    "head": {"kernel": normal(2, 16, 5), "bias": normal(3, 5)},
}
GRADIENTS = jax.tree.map(lambda p: p**2 + 0.5 * p, PARAMS)
FAN_IN = {"conv": {"kernel": (0, 1, 2), "bias": None}, "head": {"kernel": (0,), "bias": None}}


def expected(gradients=GRADIENTS, fan_in=FAN_IN):
    return jax.tree.map(
        lambda g, axes: np.asarray(g) if axes is None else oracle.centralize(g, axes).astype(g.dtype),
        gradients,
        fan_in,
        is_leaf=lambda leaf: leaf is None,
    )


def update(transformation, gradients, params=None):
    state = transformation.init(gradients if params is None else params)
    updates, state = transformation.update(gradients, state, params)
    assert isinstance(state, optax.EmptyState)
    return updates


def weight_sums(params):
    return {"conv": params["conv"]["kernel"].sum((0, 1, 2)), "head": params["head"]["kernel"].sum(0)}


# What is subtracted


@pytest.mark.parametrize("axes", [None, out_last, FAN_IN, lambda params: FAN_IN])
def test_subtracts_from_every_weight_vector_its_mean(axes):
    updates = update(centralize(axes), GRADIENTS)
    chex.assert_trees_all_close(updates, expected(), rtol=0, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, GRADIENTS)
    chex.assert_trees_all_close(centralize_gradients(GRADIENTS, axes), updates, rtol=0, atol=0)


def test_a_lone_array_is_a_tree():
    gradient = normal(0, 4, 3)
    updates = update(centralize(1), gradient)
    np.testing.assert_allclose(updates, oracle.centralize(gradient, (1,)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_dtypes_are_kept(dtype):
    gradient = normal(0, 6, 3).astype(dtype) * (1 + 1j if dtype == jnp.complex64 else 1)
    updates = update(centralize(), {"kernel": gradient.astype(dtype)})
    assert updates["kernel"].dtype == dtype
    np.testing.assert_allclose(
        np.asarray(updates["kernel"], np.complex64),
        oracle.centralize(gradient, (0,)),
        atol=4 * float(jnp.finfo(dtype).eps),
    )


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.arange(6).reshape(3, 2),
        jnp.array([[True, False], [False, False]]),
        np.zeros((3, 2), jax.dtypes.float0),
        jnp.zeros((0, 3)),
        jnp.zeros((3, 0)),
        normal(0, 1, 5),
        normal(0, 5),
        normal(0),
        1.5,
        jax.random.key(0),
    ],
    ids=lambda leaf: f"{getattr(leaf, 'dtype', 'float')}{getattr(leaf, 'shape', '')}",
)
def test_what_has_no_weight_vectors_is_the_same_object_afterwards(leaf):
    assert update(centralize(), {"kernel": leaf})["kernel"] is leaf


def test_a_fan_in_of_one_is_left_alone_and_not_zeroed():
    gradient = normal(0, 5, 1, 3)
    assert update(centralize(1), gradient) is gradient
    assert update(centralize(WeightAxes((1,), (2,))), gradient) is gradient


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()])
@pytest.mark.parametrize("axes", [None, FAN_IN])
def test_absent_leaves_and_subtrees_pass_through(absent, axes):
    gradients = {"conv": absent, "head": {"kernel": GRADIENTS["head"]["kernel"], "bias": absent}}
    updates = update(centralize(axes, mask={"conv": True, "head": {"kernel": True, "bias": True}}), gradients)
    assert updates["conv"] == absent
    assert updates["head"]["bias"] == absent
    np.testing.assert_allclose(updates["head"]["kernel"], expected()["head"]["kernel"], rtol=0, atol=1e-5)


def test_an_infinity_stays_in_its_weight_vector():
    spoiled = GRADIENTS["head"]["kernel"].at[3, 1].set(jnp.inf)
    updates = update(centralize(0), spoiled)
    others = [0, 2, 3, 4]
    np.testing.assert_allclose(updates[:, others], expected()["head"]["kernel"][:, others], rtol=0, atol=1e-5)
    assert not np.any(np.isfinite(updates[3, 1]))


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_out_first_is_optax_centralize_where_the_tree_has_no_names(shapes, seed):
    gradients = [normal(seed + i, *shape) for i, shape in enumerate(shapes)]
    ours = update(centralize(out_first), gradients)
    theirs = update(optax.centralize(), gradients)
    for gradient, our, their in zip(gradients, ours, theirs, strict=True):
        if gradient.size and gradient.ndim > 1 and gradient.size == gradient.shape[0]:  # fan-in 1
            np.testing.assert_array_equal(our, gradient)
            np.testing.assert_array_equal(their, 0)
        else:
            np.testing.assert_array_equal(our, their)


def test_out_first_differs_from_optax_where_optax_rounds_twice_or_makes_floats_of_integers():
    gradients = [normal(0, 64, 100, dtype=jnp.bfloat16) + 3, jnp.arange(6).reshape(2, 3)]
    half, integer = update(centralize(out_first), gradients)
    their_half, their_integer = update(optax.centralize(), gradients)
    exact = oracle.centralize(gradients[0], (1,))
    assert np.mean(abs(np.float64(half) - exact)) < np.mean(abs(np.float64(their_half) - exact))
    assert integer is gradients[1]
    assert their_integer.dtype == jnp.float32


# Masks, and the masks of optax around it


@pytest.mark.parametrize(
    "mask",
    [
        {"conv": False, "head": True},
        {"conv": {"kernel": False, "bias": True}, "head": {"kernel": True, "bias": False}},
        lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
    ],
)
def test_a_leaf_is_centralized_where_the_mask_says_so(mask):
    updates = update(centralize(mask=mask), GRADIENTS)
    assert updates["conv"]["kernel"] is GRADIENTS["conv"]["kernel"]
    np.testing.assert_allclose(updates["head"]["kernel"], expected()["head"]["kernel"], rtol=0, atol=1e-5)
    masked = optax.masked(centralize(), mask)
    same, _ = masked.update(GRADIENTS, masked.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, same, rtol=0, atol=0)


@pytest.mark.parametrize("axes", [None, FAN_IN, out_last(PARAMS)])
def test_works_inside_masked_and_partition_with_a_full_tree_of_axes(axes):
    masked = optax.masked(
        centralize(axes, mask=jax.tree.map(lambda _: True, PARAMS)), {"conv": False, "head": True}
    )
    updates, _ = masked.update(GRADIENTS, masked.init(PARAMS), PARAMS)
    assert updates["conv"]["kernel"] is GRADIENTS["conv"]["kernel"]
    np.testing.assert_allclose(updates["head"]["kernel"], expected()["head"]["kernel"], rtol=0, atol=1e-5)

    partitioned = optax.partition(
        {"gc": centralize(axes), "plain": optax.identity()}, {"conv": "gc", "head": "plain"}
    )
    updates, _ = partitioned.update(GRADIENTS, partitioned.init(PARAMS), PARAMS)
    assert updates["head"]["kernel"] is GRADIENTS["head"]["kernel"]
    np.testing.assert_allclose(updates["conv"]["kernel"], expected()["conv"]["kernel"], rtol=0, atol=1e-5)


# Where it runs


def run_eagerly(transformation):
    return transformation.update(GRADIENTS, optax.EmptyState())[0]


def run_with_params(transformation):
    return transformation.update(GRADIENTS, optax.EmptyState(), PARAMS)[0]


def run_in_jit(transformation):
    return jax.jit(transformation.update)(GRADIENTS, optax.EmptyState())[0]


def run_on_numpy(transformation):
    return transformation.update(jax.tree.map(np.asarray, GRADIENTS), optax.EmptyState())[0]


def run_in_vmap(transformation):
    stacked = jax.tree.map(lambda g: jnp.stack([0 * g, g, -g]), GRADIENTS)
    updates, _ = jax.vmap(transformation.update)(stacked, optax.EmptyState())
    return jax.tree.map(lambda g: g[1], updates)


def run_in_scan(transformation):
    def step(state, gradients):
        updates, state = transformation.update(gradients, state)
        return state, updates

    stacked = jax.tree.map(lambda g: jnp.stack([0 * g, g]), GRADIENTS)
    _, updates = jax.lax.scan(step, transformation.init(PARAMS), stacked)
    return jax.tree.map(lambda g: g[1], updates)


@pytest.mark.parametrize(
    "run", [run_eagerly, run_with_params, run_in_jit, run_on_numpy, run_in_vmap, run_in_scan]
)
@pytest.mark.parametrize("axes", [None, FAN_IN])
def test_gives_the_same_wherever_it_runs(run, axes):
    chex.assert_trees_all_close(run(centralize(axes)), expected(), rtol=0, atol=1e-5)


def test_its_own_gradient_is_itself():
    transformation = centralize()

    def inner_product(gradients, other):
        updates, _ = transformation.update(gradients, optax.EmptyState())
        return optax.tree.vdot(updates, other)

    other = jax.tree.map(jnp.cos, GRADIENTS)
    chex.assert_trees_all_close(jax.grad(inner_product)(GRADIENTS, other), expected(other), rtol=0, atol=1e-5)
    _, tangent = jax.jvp(lambda g: transformation.update(g, optax.EmptyState())[0], (PARAMS,), (GRADIENTS,))
    chex.assert_trees_all_close(tangent, expected(), rtol=0, atol=1e-5)


def test_shapes_alone_are_enough_for_init_and_eval_shape():
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    transformation = centralize(FAN_IN)
    state = transformation.init(shapes)
    updates, _ = jax.eval_shape(transformation.update, shapes, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, shapes)


def test_an_eager_update_does_not_run_op_by_op(caplog):
    gradient = {"kernel": normal(0, 11, 13, dtype=jnp.bfloat16)}  # a shape that no other test compiles
    with jax.log_compiles():
        update(centralize(), gradient)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert compiled == ["subtract_mean"]


def test_tree_map_params_goes_past_it():
    optimizer = optax.chain(
        centralize(FAN_IN, mask=lambda p: jax.tree.map(lambda _: True, p)), optax.adam(1e-3)
    )
    state = optimizer.init(PARAMS)
    doubled = optax.tree_map_params(optimizer, lambda moment: moment + 1, state)
    chex.assert_trees_all_equal(doubled[1][0].mu, jax.tree.map(jnp.ones_like, PARAMS))


# Errors: from init and from update, each with the place (test_resolve.py has every message)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"axes": {"conv": 0, "head": 0}},
            ValueError,
            "axes does not have the structure of the parameters: at ['conv']",
        ),
        (
            {"axes": {**FAN_IN, "head": {"kernel": 2, "bias": None}}},
            ValueError,
            "axes for ['head']['kernel'], shape (16, 5): axis 2 is out of range for rank 2",
        ),
        (
            {"axes": {**FAN_IN, "head": {"kernel": (0, 0), "bias": None}}},
            ValueError,
            "axes for ['head']['kernel'], shape (16, 5): an axis is repeated in fan_in (0, 0)",
        ),
        (
            {"axes": {**FAN_IN, "head": {"kernel": "0", "bias": None}}},
            TypeError,
            "axes for ['head']['kernel'], shape (16, 5) must be a WeightAxes, an int",
        ),
        (
            {"mask": {"conv": True}},
            ValueError,
            "mask does not have the structure of the parameters: at the root",
        ),
        (
            {"mask": {"conv": True, "head": "no"}},
            TypeError,
            "mask for ['head']['bias'], shape (5,) must be a bool",
        ),
    ],
)
def test_bad_axes_and_masks_are_refused_by_init_and_update(arguments, error, message):
    transformation = centralize(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        transformation.init(PARAMS)
    with pytest.raises(error, match=re.escape(message)):
        transformation.update(GRADIENTS, optax.EmptyState())
    with pytest.raises(error, match=re.escape(message)):
        centralize_gradients(GRADIENTS, **arguments)
    with pytest.raises(error, match=re.escape(message)):
        centralized(optax.sgd(0.1), transformation).init(PARAMS)


# Training


def quadratic(params):
    """A loss whose gradient has a large mean in every weight vector."""
    return optax.tree.norm(jax.tree.map(lambda p: p - 3.0, params), squared=True)


def train(optimizer, steps, params=PARAMS):
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(quadratic)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return params


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_sum_of_every_weight_vector_stays_put_under_sgd_with_momentum(nesterov):
    sgd = optax.sgd(1e-3, momentum=0.9, nesterov=nesterov)
    trained = train(optax.chain(centralize(), sgd), 200)
    chex.assert_trees_all_close(weight_sums(trained), weight_sums(PARAMS), rtol=0, atol=1e-3)

    moved = optax.tree.max(jax.tree.map(lambda a, b: jnp.max(abs(a - b)), trained, PARAMS))
    assert moved > 0.1, "the weights themselves must move"
    plain = weight_sums(train(sgd, 200))
    assert np.all(abs(plain["head"] - weight_sums(PARAMS)["head"]) > 1), "without GC the sums must move"


class Regression(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="head")(nn.relu(nn.Dense(64)(x)))


def train_head(centralization):
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(200, 4)), jnp.float32)
    y = jnp.sin(6 * x[:, :1] * x[:, 1:2]) + 4 * (x[:, 2:3] - 0.5) ** 2 + x[:, 3:]
    model = Regression()
    params = model.init(jax.random.key(0), x)
    optimizer = optax.chain(centralization, optax.adam(1e-2))
    before = params["params"]["head"]["kernel"]

    def loss(params):
        return jnp.mean((model.apply(params, x) - y) ** 2)

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
    return losses[-1], np.max(abs(params["params"]["head"]["kernel"] - before))


def test_a_regression_head_trains_here_and_is_frozen_by_optax():
    our_loss, our_distance = train_head(centralize())
    their_loss, their_distance = train_head(optax.centralize())
    assert their_distance == 0.0
    assert our_distance > 0.1
    assert our_loss < their_loss / 2


def test_on_a_standardized_weight_it_changes_nothing():
    x, weight = normal(0, 32, 8), normal(1, 8, 4)

    def loss(weight):
        standardized = (weight - weight.mean(0)) / weight.std(0)
        return jnp.sum(jnp.tanh(x @ standardized) ** 2)

    gradient = jax.grad(loss)(weight)
    assert np.max(abs(gradient)) > 1
    np.testing.assert_allclose(centralize_gradients(gradient), gradient, rtol=0, atol=1e-5)


# centralized


def test_centralized_gradients_are_a_chain_without_its_slot():
    inner = optax.adamw(1e-2)
    built_in, chained = centralized(inner), optax.chain(centralize(), inner)
    chex.assert_trees_all_close(train(built_in, 20), train(chained, 20), rtol=0, atol=0)


def test_for_sgd_with_momentum_it_is_the_same_before_and_after():
    sgd = optax.sgd(1e-3, momentum=0.9)
    before, after = (train(centralized(sgd, where=where), 20) for where in ("gradients", "updates"))
    chex.assert_trees_all_close(before, after, rtol=0, atol=1e-5)


def test_centralized_updates_keep_the_sums_whatever_the_optimizer_does():
    trained = train(centralized(optax.adamw(1e-2, weight_decay=0.1), where="updates"), 100)
    chex.assert_trees_all_close(weight_sums(trained), weight_sums(PARAMS), rtol=0, atol=1e-3)
    decayed = weight_sums(train(centralized(optax.adamw(1e-2, weight_decay=0.1), where="gradients"), 100))
    assert np.all(abs(decayed["head"] - weight_sums(PARAMS)["head"]) > 1e-2)


@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_centralized_takes_over_the_state_of_the_optimizer_and_gives_it_back(where):
    plain = optax.adam(1e-2)
    _, state = plain.update(GRADIENTS, plain.init(PARAMS), PARAMS)
    optimizer = centralized(plain, centralize(FAN_IN), where=where)
    chex.assert_trees_all_equal_structs(optimizer.init(PARAMS), state)
    _, state = optimizer.update(GRADIENTS, state, PARAMS)
    _, state = plain.update(GRADIENTS, state, PARAMS)
    assert state[0].count == 3


@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_centralized_warns_by_default_as_centralize_does(where):
    with pytest.warns(UserWarning, match=re.escape("['experts'], shape (2, 3, 4)")):
        centralized(optax.sgd(0.1), where=where).init({"experts": normal(0, 2, 3, 4)})


@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_centralized_passes_extra_arguments_on(where):
    optimizer = centralized(optax.polyak_sgd(), where=where)
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(GRADIENTS, state, PARAMS, value=2.0)
    larger, _ = optimizer.update(GRADIENTS, state, PARAMS, value=4.0)
    assert not np.allclose(updates["head"]["kernel"], larger["head"]["kernel"])
    with pytest.raises(TypeError, match="value"):
        optimizer.update(GRADIENTS, state, PARAMS)

    ignores_them = centralized(optax.sgd(0.1), where=where)
    ignores_them.update(GRADIENTS, ignores_them.init(PARAMS), PARAMS, value=2.0)


def test_centralized_uses_the_centralization_it_is_given():
    optimizer = centralized(optax.sgd(1.0), centralize(FAN_IN, mask={"conv": False, "head": True}))
    updates, _ = optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["conv"]["kernel"], -GRADIENTS["conv"]["kernel"])
    np.testing.assert_allclose(updates["head"]["kernel"], -expected()["head"]["kernel"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["update", "gradient", "", None])
def test_centralized_refuses_another_place(where):
    message = f'where must be "gradients" or "updates", got {where!r}'
    with pytest.raises(ValueError, match=re.escape(message)):
        centralized(optax.sgd(0.1), where=where)


def test_centralized_refuses_an_array_for_a_place_in_the_same_words():
    with pytest.raises(ValueError, match=r'where must be "gradients" or "updates", got an array of dtype'):
        centralized(optax.sgd(0.1), where=np.ones(2))


def test_centralized_refuses_what_is_no_transformation():
    with pytest.raises(
        TypeError, match=r"optimizer must be an optax\.GradientTransformation, got <function adam"
    ):
        centralized(optax.adam)
    with pytest.raises(
        TypeError, match=r"centralization must be an optax\.GradientTransformation, got <function"
    ):
        centralized(optax.adam(1e-3), out_last)


@pytest.mark.parametrize("stateful", [optax.trace(0.9), optax.masked(centralize(), True)])
def test_centralized_refuses_a_centralization_with_a_state(stateful):
    with pytest.raises(ValueError, match="centralization must be without state"):
        centralized(optax.adam(1e-3), stateful).init(PARAMS)


def test_the_version_is_that_of_the_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+", gc_optax.__version__)
