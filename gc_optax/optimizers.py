"""Every optimizer that has a name in `optax` or `optax.contrib`, centralized, under the same name.

Each is `gc_optax.centralized` of optax's own, made from the factory in the installed optax: with its
signature, defaults and documentation, and with the keyword-only arguments `centralization` and `where`. A new
optimizer of optax is here without a line; the lines below are for type checkers. These see optax's parameters
and the two (mypy with `follow_untyped_imports` for `optax.*`), but in a call with one of the two only that.

What needs more than a learning rate is not here. To what wraps optimizers, as `schedule_free`, `mechanize`
and `sam` of `optax.contrib` do, give centralized ones; to `sam` as the adversary too. `optax.contrib.dpsgd`
takes a gradient for each example, with an axis in front, so that its updates alone can be centralized, by
`gc_optax.centralized`.

There are states that `where="updates"` does not reach. One is the averages of `schedule_free_sgd` and
`schedule_free_adamw`: their sums move, and stay where `schedule_free` wraps a centralized optimizer. Another
is the value and the gradient that the line search of `lbfgs` has found: compute them anew at the next
parameters, and do not take them from the state by `optax.value_and_grad_from_state`.

Examples:
    >>> import gc_optax
    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones((2,))}
    >>> optimizer = gc_optax.optimizers.adamw(1e-3, weight_decay=0.1, where="updates")
    >>> gradients = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones((2,))}
    >>> updates, state = optimizer.update(gradients, optimizer.init(params), params)
    >>> print(jnp.allclose(updates["kernel"].sum(axis=0), 0.0, atol=1e-8))
    True
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeAlias, cast, overload

import jax
import optax
import optax.contrib

from ._axes import WeightAxes
from ._centralize import Transformation, Where, centralized
from ._conventions import out_first, out_last

_P = ParamSpec("_P")
_Given: TypeAlias = Transformation | None
_Made: TypeAlias = optax.GradientTransformationExtraArgs

_ADDED_DOCUMENTATION = """
  centralization: What centralizes, `gc_optax.centralize()` by default.
  where: Centralize what goes into the optimizer, `"gradients"`, or what comes out of it, `"updates"`."""


class _Factory(Protocol[_P]):
    """A factory of optax with two more arguments, which typing cannot add to a `ParamSpec`."""

    @overload
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _Made: ...
    @overload
    def __call__(self, *args: Any, centralization: _Given, where: Where = ..., **kwargs: Any) -> _Made: ...
    @overload
    def __call__(self, *args: Any, where: Where, **kwargs: Any) -> _Made: ...


def _centralized(factory: Callable[_P, optax.GradientTransformation]) -> _Factory[_P]:
    def make(*args: Any, centralization: _Given = None, where: Where = "gradients", **kwargs: Any) -> _Made:
        for given in (*args, *kwargs.values()):
            if _is_for_centralize(given):
                raise TypeError(
                    f"{factory.__name__} got axes or a centralization as an argument of optax's own. Axes go "
                    "into what centralizes, and that has a name: "
                    f"{factory.__name__}(1e-3, centralization=gc_optax.centralize(axes)); for "
                    "Muon's dimension numbers there is WeightAxes.to_muon"
                )
        return centralized(factory(*args, **kwargs), centralization, where=where)

    ours, theirs = inspect.signature(make), inspect.signature(factory).parameters
    added = [ours.parameters["centralization"], ours.parameters["where"]]
    functools.update_wrapper(make, factory)
    vars(make)["__signature__"] = ours.replace(parameters=[*theirs.values(), *added])
    documentation = inspect.getdoc(factory) or ""
    make.__doc__ = documentation.replace("\n\nReturns:", f"{_ADDED_DOCUMENTATION}\n\nReturns:", 1)
    return cast(_Factory[_P], make)


def _is_for_centralize(given: Any) -> bool:
    """Whether an argument is axes, or what `centralize` makes of them, for which no optimizer has a use."""
    if isinstance(given, optax.GradientTransformation):
        return getattr(given.update, "__module__", "") == centralized.__module__
    is_convention = given is out_last or given is out_first
    return is_convention or any(isinstance(leaf, WeightAxes) for leaf in jax.tree.leaves(given))


def _is_optimizer(name: str, given: Any) -> bool:
    if name.startswith(("_", "scale_by_")) or not isinstance(given, FunctionType | functools.partial):
        return False
    parameters = inspect.signature(given).parameters.values()
    needed = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    return needed <= {"learning_rate"} and any(p.name.endswith("learning_rate") for p in parameters)


if TYPE_CHECKING:
    acprop = _centralized(optax.contrib.acprop)
    adabelief = _centralized(optax.adabelief)
    adadelta = _centralized(optax.adadelta)
    adafactor = _centralized(optax.adafactor)
    adagrad = _centralized(optax.adagrad)
    adam = _centralized(optax.adam)
    adamax = _centralized(optax.adamax)
    adamaxw = _centralized(optax.adamaxw)
    adamw = _centralized(optax.adamw)
    adan = _centralized(optax.adan)
    ademamix = _centralized(optax.contrib.ademamix)
    adopt = _centralized(optax.contrib.adopt)
    amsgrad = _centralized(optax.amsgrad)
    cocob = _centralized(optax.contrib.cocob)
    dadapt_adamw = _centralized(optax.contrib.dadapt_adamw)
    dog = _centralized(optax.contrib.dog)
    dowg = _centralized(optax.contrib.dowg)
    fromage = _centralized(optax.fromage)
    galore = _centralized(optax.contrib.galore)
    lamb = _centralized(optax.lamb)
    lars = _centralized(optax.lars)
    lbfgs = _centralized(optax.lbfgs)
    lion = _centralized(optax.lion)
    madgrad = _centralized(optax.contrib.madgrad)
    momo = _centralized(optax.contrib.momo)
    momo_adam = _centralized(optax.contrib.momo_adam)
    muon = _centralized(optax.contrib.muon)
    nadam = _centralized(optax.nadam)
    nadamw = _centralized(optax.nadamw)
    noisy_sgd = _centralized(optax.noisy_sgd)
    novograd = _centralized(optax.novograd)
    optimistic_adam = _centralized(optax.optimistic_adam)
    optimistic_adam_v2 = _centralized(optax.optimistic_adam_v2)
    optimistic_gradient_descent = _centralized(optax.optimistic_gradient_descent)
    polyak_sgd = _centralized(optax.polyak_sgd)
    prodigy = _centralized(optax.contrib.prodigy)
    radam = _centralized(optax.radam)
    rmsprop = _centralized(optax.rmsprop)
    rprop = _centralized(optax.rprop)
    schedule_free_adamw = _centralized(optax.contrib.schedule_free_adamw)
    schedule_free_sgd = _centralized(optax.contrib.schedule_free_sgd)
    sgd = _centralized(optax.sgd)
    sign_sgd = _centralized(optax.sign_sgd)
    signum = _centralized(optax.signum)
    simplified_ademamix = _centralized(optax.contrib.simplified_ademamix)
    sm3 = _centralized(optax.sm3)
    sophia = _centralized(optax.contrib.sophia)
    yogi = _centralized(optax.yogi)
else:

    @functools.cache  # Not in the module's globals: doctest would find optax's own examples there.
    def __getattr__(name):
        if name == "__all__":
            return __dir__()
        factory = vars(optax.contrib).get(name) or vars(optax).get(name)
        if not _is_optimizer(name, factory):
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}: optax {optax.__version__} has no optimizer "
                "of this name that needs a learning rate at most. gc_optax.centralized takes any other"
            )
        make = _centralized(factory)
        make.__module__, make.__name__, make.__qualname__ = __name__, name, name
        return make

    def __dir__():
        offered = vars(optax) | vars(optax.contrib)
        return [name for name in offered if _is_optimizer(name, offered[name])]
