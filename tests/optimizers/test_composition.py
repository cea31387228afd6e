"""Every optimizer of optax, centralized in three ways, inside everything that optax and Flax put around one.

A few steps each, op by op, so that an operation on one shape is compiled once for all. That they can be
traced, and their states then keep structure, shapes and dtypes, is all that `jit` asks for besides.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from optimizer_cases import (
    AXES,
    GRADIENTS,
    NAMES,
    PARAMS,
    arguments,
    extra_arguments_at_first,
    loss,
    theirs,
    weight_sums,
)

import gc_optax.nnx
from gc_optax import centralize, centralized, optimizers, out_last

pytestmark = pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")


# Ways to centralize. Each gives a factory that takes the arguments of optax's.


def in_a_chain(centralization, factory):
    @functools.wraps(factory)
    def make(*args, **kwargs):
        return optax.chain(centralization, factory(*args, **kwargs))

    return make


def drop_in(centralization, name, where):
    return functools.partial(getattr(optimizers, name), centralization=centralization, where=where)


def spied(factory, seen):
    """The optimizer, which leaves in `seen` the gradients that it is given."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        inner = optax.with_extra_args_support(factory(*args, **kwargs))

        def update(updates, state, params=None, **extra_args):
            if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(updates)):
                seen.append(updates)
            return inner.update(updates, state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return make


# What is put around an optimizer. Each makes a transformation of a factory and its arguments.


def around(wrap):
    return lambda factory, given: wrap(factory(**given))


# Arguments of optax's that `inject_hyperparams` makes arrays and schedules of, unless told not to.
STATIC = {
    "adafactor": "min_dim_size_to_factor",
    "adopt": "clip_value_fn",
    "galore": "rank",
    "lbfgs": "memory_size",
}


def inject_hyperparams(factory, given):
    static = set(STATIC.values()) & set(inspect.signature(factory).parameters)
    return optax.inject_hyperparams(factory, static_args=static)(**given)


def by_leaf(kernel, bias):
    return {"layer": {"kernel": kernel, "bias": bias}}


def sam(optimizer):
    adversary = optax.chain(centralize(AXES), optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optimizer, adversary)


WRAPPERS = {
    "plain": around(lambda optimizer: optimizer),
    "MultiSteps": around(lambda optimizer: optax.MultiSteps(optimizer, 2)),
    "skip_not_finite": around(
        lambda optimizer: optax.MultiSteps(optimizer, 1, should_skip_update_fn=optax.skip_not_finite)
    ),
    "apply_if_finite": around(lambda optimizer: optax.apply_if_finite(optimizer, 2)),
    "lookahead": around(lambda optimizer: optax.lookahead(optimizer, 2, 0.5)),
    "masked": around(lambda optimizer: optax.masked(optimizer, by_leaf(True, False))),
    "partition": around(
        lambda optimizer: optax.partition({"gc": optimizer, "plain": optax.sgd(1e-2)}, by_leaf("gc", "plain"))
    ),
    "inject_hyperparams": inject_hyperparams,
    "sam": around(sam),
    "schedule_free": around(lambda optimizer: optax.contrib.schedule_free(optimizer, 1e-2)),
    "mechanize": around(lambda optimizer: optax.contrib.mechanize(optimizer, s_init=1.0)),
    "reduce_on_plateau": around(lambda optimizer: optax.chain(optimizer, optax.contrib.reduce_on_plateau())),
    "clip before": around(lambda optimizer: optax.chain(optax.clip_by_global_norm(0.1), optimizer)),
    "clip after": around(lambda optimizer: optax.chain(optimizer, optax.clip_by_global_norm(0.1))),
    "named_chain": around(
        lambda optimizer: optax.named_chain(("optimizer", optimizer), ("half", optax.scale(0.5)))
    ),
    "freeze": around(lambda optimizer: optax.chain(optimizer, optax.freeze(by_leaf(False, True)))),
    "tree_map_params": around(lambda optimizer: optimizer),
    "nnx.Optimizer": around(lambda optimizer: optimizer),
    "TrainState": around(lambda optimizer: optimizer),
}


# How the steps are taken. Each gives the parameters afterwards.


def take_steps(transformation, extra, prepare=lambda transformation, state: state, steps=2):
    params, state = PARAMS, prepare(transformation, transformation.init(PARAMS))
    for _ in range(steps):
        updates, new_state = transformation.update(GRADIENTS, state, params, **extra)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        state = new_state
    with jax.disable_jit(False):
        traced = jax.eval_shape(lambda state: transformation.update(GRADIENTS, state, params, **extra), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(traced, (PARAMS, state))
    return params


def map_params(transformation, state):
    mapped = optax.tree_map_params(transformation, lambda leaf: leaf + 0, state)
    chex.assert_trees_all_equal_structs(mapped, state)
    return mapped


def take_steps_of_lookahead(transformation, extra):
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = transformation.init(params)
    for _ in range(2):
        updates, state = transformation.update(GRADIENTS, state, params, **extra)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(params.fast, params.slow, rtol=0, atol=1e-6)
    return params.fast


class Layer(nnx.Module):
    def __init__(self, params):
        self.kernel, self.bias = nnx.Param(params["kernel"]), nnx.Param(params["bias"])


class Model(nnx.Module):
    def __init__(self, params):
        self.layer = Layer(params["layer"])


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def take_steps_in_nnx(transformation, extra):
    model = Model(PARAMS)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    gradients = nnx.state(Model(GRADIENTS), nnx.Param)
    for _ in range(2):
        optimizer.update(model, gradients, **extra | ({"grad": gradients} if "grad" in extra else {}))
    return params_of(model)


def take_steps_in_a_train_state(transformation, extra):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=transformation)
    for _ in range(2):
        state = state.apply_gradients(grads=GRADIENTS, **extra)
    return state.params


STEPS = {
    # Every other step is one of the optimizer's, and the first step of some is zero.
    "MultiSteps": functools.partial(take_steps, steps=4),
    "sam": functools.partial(take_steps, steps=4),
    "lookahead": take_steps_of_lookahead,
    "tree_map_params": functools.partial(take_steps, prepare=map_params),
    "nnx.Optimizer": take_steps_in_nnx,
    "TrainState": take_steps_in_a_train_state,
}
VALUE = loss(PARAMS)


def run(wrapper, name, factory):
    extra = extra_arguments_at_first(name) | ({"value": VALUE} if wrapper == "reduce_on_plateau" else {})
    with jax.disable_jit():
        return STEPS.get(wrapper, take_steps)(WRAPPERS[wrapper](factory, arguments(name)), extra)


# What they cannot do with an optimizer, centralized or not, and the error that says so.
_NEED_EXTRA_ARGUMENTS = ["lbfgs", "momo", "momo_adam", "polyak_sgd", "sophia"]
_HAVE_A_BOOL = ["dog", "optimistic_adam", "optimistic_adam_v2", "optimistic_gradient_descent"]
_NOT_PASSED_ON = "passes no extra arguments on"
_MASKED = "masks the parameters, but not the function of all of them that is an extra argument"
_REASONS = [
    ("lookahead", _NEED_EXTRA_ARGUMENTS, _NOT_PASSED_ON, "unexpected keyword argument"),
    ("sam", _NEED_EXTRA_ARGUMENTS, _NOT_PASSED_ON, "unexpected keyword argument"),
    (
        "sam",
        ["noisy_sgd"],
        "chooses between states by multiplying them, also keys",
        "multiply does not accept",
    ),
    ("sam", _HAVE_A_BOOL, "chooses between states by multiplying them, also bools", r"types: int32 != bool"),
    (
        "TrainState",
        _NEED_EXTRA_ARGUMENTS,
        _NOT_PASSED_ON,
        "required keyword-only|obj_fn must be provided|pass the latest loss value",
    ),
    ("masked", ["lbfgs"], _MASKED, "pytree structure error|Expected named tuple"),
    ("masked", ["sophia"], _MASKED, "MaskedNode"),
    ("partition", ["lbfgs"], _MASKED, "pytree structure error|Expected named tuple"),
    ("partition", ["sophia"], _MASKED, "MaskedNode"),
    ("tree_map_params", ["lbfgs"], "its placeholder for parameters has no leaves", "list index out of range"),
]
UPSTREAM = {(wrapper, name): error for wrapper, names, _, error in _REASONS for name in names}


def combination(wrapper, name):
    """A pair to test. Those without a mark have every wrapper and every optimizer, not each with each."""
    if wrapper == "plain" or name in ("adamw", "sgd"):
        return pytest.param(wrapper, name)
    return pytest.param(wrapper, name, marks=pytest.mark.thorough if name == "lbfgs" else pytest.mark.slow)


COMBINATIONS = [
    combination(wrapper, name) for wrapper in WRAPPERS for name in NAMES if (wrapper, name) not in UPSTREAM
]


@functools.cache
def centralization_for(wrapper):
    """With a full tree of axes: for the parameters, or for those of the model."""
    if wrapper != "nnx.Optimizer":
        return centralize(AXES)
    return centralize(
        gc_optax.nnx.infer_axes(lambda model: loss(params_of(model)), Model(PARAMS), wrt=nnx.Param)
    )


@pytest.mark.parametrize(("wrapper", "name"), COMBINATIONS)
def test_composes(wrapper, name):
    centralization, seen = centralization_for(wrapper), []
    chained = run(wrapper, name, in_a_chain(centralization, spied(theirs(name), seen)))
    before = run(wrapper, name, drop_in(centralization, name, "gradients"))
    after = run(wrapper, name, drop_in(centralization, name, "updates"))

    for params in (chained, before, after):
        chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    chex.assert_trees_all_close(before, chained, rtol=0, atol=1e-6)

    assert seen
    for gradients in seen:
        np.testing.assert_allclose(weight_sums(gradients), 0, rtol=0, atol=1e-5)
    np.testing.assert_allclose(weight_sums(after), weight_sums(PARAMS), rtol=0, atol=1e-5)
    alone = run(wrapper, name, theirs(name))
    assert np.max(abs(weight_sums(alone) - weight_sums(PARAMS))) > 1e-5, "the optimizer alone moves the sums"


@pytest.mark.parametrize(("wrapper", "name"), UPSTREAM)
def test_what_does_not_compose_would_not_without_centralization(wrapper, name):
    errors = (AssertionError, IndexError, TypeError, ValueError)
    with pytest.raises(errors, match=UPSTREAM[wrapper, name]):
        run(wrapper, name, theirs(name))


# What a wrapper hides from us


@pytest.mark.parametrize("name", NAMES)
def test_flatten_around_a_tree_of_axes_is_refused(name):
    for make in (
        in_a_chain(centralize(AXES), theirs(name)),
        drop_in(centralize(AXES), name, "gradients"),
        drop_in(centralize(AXES), name, "updates"),
    ):
        with pytest.raises(TypeError, match=r"axes for the root, shape \(18,\).* If optax\.flatten made"):
            optax.flatten(make(**arguments(name))).init(PARAMS)


@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_flatten_around_the_default_warns_that_nothing_is_centralized(where):
    for make in (drop_in(None, "adam", where), in_a_chain(centralize(), optax.adam)):
        with pytest.warns(UserWarning, match=r"single vector.*optax\.flatten"):
            optax.flatten(make(1e-2)).init(PARAMS)


def test_a_model_that_is_one_vector_can_do_without_the_warning():
    optimizer = optimizers.sgd(1.0, centralization=centralize(out_last))
    updates, _ = optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)))
    np.testing.assert_array_equal(updates, -1)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("lbfgs", "sophia")])
def test_flatten_inside_works(name):
    optimizer = centralized(optax.flatten(theirs(name)(**arguments(name))), centralize(AXES), where="updates")
    with jax.disable_jit():
        params = take_steps(optimizer, extra_arguments_at_first(name))
    np.testing.assert_allclose(weight_sums(params), weight_sums(PARAMS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lbfgs", "sophia"])
def test_flatten_alone_hides_the_parameters_from_a_function_of_them(name):
    with jax.disable_jit(), pytest.raises((IndexError, TypeError, ValueError)):
        take_steps(optax.flatten(theirs(name)(**arguments(name))), extra_arguments_at_first(name))


@pytest.mark.filterwarnings('ignore:"seed" is deprecated:DeprecationWarning')  # optax's own call
def test_the_updates_of_dpsgd_can_be_centralized():
    dpsgd = optax.contrib.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.1, seed=0)
    optimizer = centralized(dpsgd, centralize(AXES), where="updates")
    of_examples = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), GRADIENTS)
    updates, _ = optimizer.update(of_examples, optimizer.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    np.testing.assert_allclose(weight_sums(updates), 0, rtol=0, atol=1e-6)


# inject_hyperparams


@pytest.mark.parametrize("where", ["gradients", "updates"])
def test_injected_hyperparameters_are_those_of_optax(where):
    plain = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)
    ours = optax.inject_hyperparams(optimizers.adamw)(
        learning_rate=1e-2, centralization=centralize(AXES), where=where
    )
    state = ours.init(PARAMS)
    chex.assert_trees_all_equal(state, plain.init(PARAMS))
    updates, _ = ours.update(GRADIENTS, state, PARAMS)
    state.hyperparams["learning_rate"] *= 2
    doubled, _ = ours.update(GRADIENTS, state, PARAMS)
    chex.assert_trees_all_close(doubled, jax.tree.map(lambda u: 2 * u, updates), rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(STATIC) & set(NAMES)))
def test_static_arguments_are_needed_without_centralization_too(name):
    optimizer = optax.inject_hyperparams(theirs(name))(**arguments(name))

    def step():
        return optimizer.update(GRADIENTS, optimizer.init(PARAMS), PARAMS, **extra_arguments_at_first(name))

    with pytest.raises((TypeError, jax.errors.TracerBoolConversionError)):
        jax.eval_shape(step)


def test_a_schedule_can_be_injected_with_the_default_centralization():
    schedule = optax.linear_schedule(1.0, 0.0, 1)
    optimizer = optax.inject_hyperparams(optimizers.sgd)(learning_rate=schedule)
    state = optimizer.init(PARAMS)
    first, state = optimizer.update(GRADIENTS, state, PARAMS)
    expected = -GRADIENTS["layer"]["kernel"] + GRADIENTS["layer"]["kernel"].mean(0)
    np.testing.assert_allclose(first["layer"]["kernel"], expected, rtol=0, atol=1e-6)
    second, _ = optimizer.update(GRADIENTS, state, PARAMS)
    np.testing.assert_array_equal(second["layer"]["kernel"], 0)
