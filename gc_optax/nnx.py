"""`infer_axes` for models of `flax.nnx`. The only module of gc_optax that imports Flax."""

from collections.abc import Callable
from typing import Any

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("gc_optax.nnx needs Flax: pip install flax") from error

from ._axes import PyTree
from ._infer import infer_axes as _infer_axes
from ._text import describe


def infer_axes(
    fn: Callable[..., Any],
    model: nnx.Module,
    *args: Any,
    wrt: Any = nnx.Param,
    **kwargs: Any,
) -> PyTree:
    """The fan-in of every parameter of an NNX model, read off what the model computes.

    This is `gc_optax.infer_axes` for a function of a model. Everything in the model but the variables
    that `wrt` selects (batch statistics, random streams, frozen parameters) counts as data. The model
    itself stays as it is, whatever `fn` does to it: dropout draws no key, batch norm sees no batch.

    Args:
        fn: a loss or a forward pass, `fn(model, *args, **kwargs)`, which returns any tree with arrays.
        model: the model. Its variables may hold `jax.ShapeDtypeStruct`s, as `nnx.eval_shape` makes them.
        *args: further arguments of `fn`, as for `gc_optax.infer_axes`.
        wrt: which variables are trained, any filter of NNX. The same as for `nnx.grad` and
            `nnx.Optimizer`.
        **kwargs: further arguments of `fn` by name.

    Returns:
        The axes in the structure of `nnx.state(model, wrt)`, which is that of the gradients and of what
        `nnx.Optimizer(model, tx, wrt=wrt)` gives to `tx`: an `nnx.State` with a `WeightAxes` in each
        variable.

    Raises:
        ValueError: if `wrt` selects nothing in the model.
        TypeError: as `gc_optax.infer_axes`.
        ImportError: when this module is imported without Flax.

    Examples:
        >>> import gc_optax.nnx
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> first, hidden, last = (nnx.Linear(*sizes, rngs=rngs) for sizes in ((8, 32), (32, 32), (32, 1)))
        >>> model = nnx.Sequential(first, nnx.relu, hidden, nnx.relu, last)
        >>> x, y = jnp.ones((4, 8)), jnp.ones((4, 1))
        >>> def loss(model, x, y):
        ...     return jnp.mean((model(x) - y) ** 2)
        >>> axes = gc_optax.nnx.infer_axes(loss, model, x, y)
        >>> axes["layers"][2]["kernel"].get_value().fan_in
        (0,)
        >>> tx = optax.chain(gc_optax.centralize(axes), optax.adam(1e-2))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> updates = optimizer.update(model, nnx.grad(loss)(model, x, y))

        For a table of them:

        >>> print(gc_optax.summarize(nnx.state(model, nnx.Param), axes).splitlines()[-1])
        3 of 6 parameters are centralized: 1,312 of 1,377 entries, in 65 weight vectors.

        Muon takes them without the variables around them, and is for what lies between the first weight and
        the last:

        >>> matrices = jax.tree.map(lambda a: a.to_muon() if a.role == "hidden" else None, nnx.as_pure(axes))
        >>> muon = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=matrices)
        >>> optimizer = nnx.Optimizer(model, muon, wrt=nnx.Param)
        >>> updates = optimizer.update(model, nnx.grad(loss)(model, x, y))

    References:
        https://flax.readthedocs.io/en/latest/guides/filters_guide.html
    """
    if not callable(fn):
        raise TypeError(
            f"fn must be a function of the model, got {describe(fn)}; "
            "it comes first: infer_axes(fn, model, batch)"
        )
    graphdef, *states = nnx.split(model, wrt, ...)
    params, rest = states
    if not params:
        raise ValueError(
            f"the model, a {type(model).__name__}, has no variables that wrt={describe(wrt)} selects"
        )

    def fn_of_params(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        return fn(nnx.merge(graphdef, params, rest), *args, **kwargs)

    return _infer_axes(fn_of_params, params, rest, args, kwargs)
