"""What each of optax's optimizers has to be given, for the tests that go through all of them."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from gc_optax import optimizers

NAMES = sorted(dir(optimizers))


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"layer": {"kernel": _normal(0, 5, 3), "bias": _normal(1, 3)}}
AXES = {"layer": {"kernel": 0, "bias": None}}
_INPUTS = _normal(2, 8, 5)


def loss(params):
    """A regression whose target is far away, so that the gradient of a weight vector has a large mean."""
    outputs = jnp.tanh(_INPUTS @ params["layer"]["kernel"]) + params["layer"]["bias"]
    return jnp.mean((outputs.sum(axis=1) - 5.0) ** 2)


GRADIENTS = jax.jit(jax.grad(loss))(PARAMS)


def theirs(name):
    return getattr(optax.contrib, name, None) or getattr(optax, name)


# Those that learn their rate start small by default, and would not get far in the steps of a test.
_ARGUMENTS = {
    "adadelta": {"learning_rate": 1.0},
    "cocob": {},
    "dadapt_adamw": {"estim_lr0": 1e-3},
    "dog": {"init_step": ("learning_rate", 1e-2)},
    "dowg": {"init_estim_sq_dist": 1e-4},
    "lbfgs": {"linesearch": optax.scale_by_backtracking_linesearch(3)},
    "noisy_sgd": {"learning_rate": 1e-2, "key": jax.random.key(0)},
    "polyak_sgd": {},
    "prodigy": {"estim_lr0": 1e-3},
}


@functools.cache
def arguments(name):
    """What the optimizer is made with: as little as it takes, and weight decay where it has any."""
    parameters = inspect.signature(getattr(optimizers, name)).parameters
    decay = {
        parameter: 0.1
        for parameter in parameters
        if parameter in ("weight_decay", "weight_decay_rate", "adam_weight_decay")
    }
    return _ARGUMENTS.get(name, {"learning_rate": 1e-2}) | decay


def extra_arguments(name, params):
    """What the optimizer's `update` has to be given."""
    if name == "lbfgs":
        return {"value": loss(params), "grad": jax.grad(loss)(params), "value_fn": loss}
    if name in ("momo", "momo_adam", "polyak_sgd"):
        return {"value": loss(params)}
    return {"obj_fn": loss} if name == "sophia" else {}


@functools.cache
def extra_arguments_at_first(name):
    return extra_arguments(name, PARAMS)


def weight_sums(params):
    return params["layer"]["kernel"].sum(0)
