"""`infer_axes` on whole models, each against a truth table that was written by hand, and training with it."""

import jax
import numpy as np
import optax
import pytest
from whole_models import MODELS, by_path, gpt

from gc_optax import centralize, infer_axes


@pytest.fixture(scope="module", params=MODELS, ids=lambda build: build.__name__)
def case(request):
    # A generator of random numbers that takes less time to compile than the default one.
    with jax.default_prng_impl("rbg"):
        return request.param()


@pytest.fixture(scope="module")
def gradient(case):
    """The loss and its gradient, compiled once for all tests of a model."""

    def loss(params, *args):
        result = case.loss(params, *args)
        return result[0] if isinstance(result, tuple) else result

    return jax.jit(jax.value_and_grad(loss))


def weights(case, params):
    """The parameters that are to be centralized, in the precision in which to compare them."""
    params = by_path(params)
    return {path: np.asarray(params[path], np.float64) for path in case.fan_in}


def train(case, gradient, optimizer, steps=3):
    """The parameters after some steps on one batch, and the loss before each and after the last."""

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, losses = case.params, []
    state = optimizer.init(params)
    for _ in range(steps):
        value, gradients = gradient(params, *case.args)
        params, state = update(params, state, gradients)
        losses.append(value)
    value, _ = gradient(params, *case.args)
    return params, [*losses, value]


def has_moved(before, after):
    return not np.allclose(after, before, rtol=1e-6, atol=0)


def drift(before, after, fan_in):
    """How far the sum of any weight vector has gone, relative to the largest sum of absolute values."""
    largest = max(np.abs(before).sum(fan_in).max(), np.abs(after).sum(fan_in).max())
    return np.abs((after - before).sum(fan_in)).max() / largest


def test_the_axes_are_the_true_ones(case):
    axes = by_path(infer_axes(case.loss, case.params, *case.args))
    assert axes.keys() == by_path(case.params).keys()
    assert {path: leaf.fan_in for path, leaf in axes.items() if leaf.fan_in} == case.fan_in


def test_the_roles_are_the_true_ones(case):
    axes = by_path(infer_axes(case.loss, case.params, *case.args))
    truth = dict.fromkeys(case.fan_in, "hidden") | case.roles
    assert {path: leaf.role for path, leaf in axes.items() if leaf.role} == truth


@pytest.mark.slow
def test_centralized_adamw_trains_every_weight(case, gradient):
    axes = infer_axes(case.loss, case.params, *case.args)
    trained, losses = train(case, gradient, optax.chain(centralize(axes), optax.adamw(1e-3)))
    assert np.all(np.isfinite(losses))
    before, after = weights(case, case.params), weights(case, trained)
    assert [path for path in case.fan_in if not has_moved(before[path], after[path])] == []


@pytest.mark.slow
def test_sums_of_weight_vectors_stay_under_centralized_sgd_alone(case, gradient):
    axes = infer_axes(case.loss, case.params, *case.args)
    centralized, _ = train(case, gradient, optax.chain(centralize(axes), optax.sgd(0.1)))
    plain, _ = train(case, gradient, optax.sgd(0.1))
    before = weights(case, case.params)
    after, after_plain = weights(case, centralized), weights(case, plain)
    for path, fan_in in case.fan_in.items():
        assert has_moved(before[path], after[path]), path
        assert drift(before[path], after[path], fan_in) < 1e-6, path
    assert max(drift(before[path], after_plain[path], case.fan_in[path]) for path in before) > 1e-3


@pytest.mark.parametrize("case", [gpt], indirect=True)
def test_tied_embeddings_are_left_alone_for_both_of_their_uses(case):
    axes = infer_axes(case.loss, case.params, *case.args)["embedding"]["embedding"]
    assert axes.fan_in == ()
    assert "gather" in axes.why
    assert "dot_general" in axes.why
