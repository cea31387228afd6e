"""The fan-in of every parameter, read off what a model computes, from its end to its beginning."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import tree_util as jtu

from .._axes import PyTree, is_array_like
from ._origins import Made, Origin, big
from ._program import shape_of
from ._uses import OUTPUT
from ._verdict import verdict, warn_of_unclear_uses
from ._walk import read, read_back, settled


def infer_axes(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    r"""The fan-in of every parameter, read off what a model computes.

    In \(y = \sum_i x_i w_{io}\) the axis \(i\) of \(w\), which is summed over together with an axis of
    the data, is the fan-in. `fn` is traced on shapes alone, and every parameter is followed through the
    computation, whatever is done to it on the way (casts, transposes, reshapes, slices, masks,
    normalization, the loops over a stack of layers), to the operation in which it meets the data:

    - `dot_general`, `conv_general_dilated` and `ragged_dot_general` sum over its fan-in;
    - a lookup by indices that depend on the data, or a product with a one-hot array, makes it a table,
      unless what is picked is a matrix that is contracted next, that of an expert;
    - an operation entry by entry makes it a bias, a scale or a gate.

    Only the first is centralized. A parameter with several uses has the fan-in that all of them say;
    where they differ (embeddings that are tied to the output layer) it is left alone. It is left alone,
    with a warning, where the computation cannot be read with certainty. The `why` of each `WeightAxes`
    says which it was.

    Only what the gradient goes through counts as a use. Arrays that `fn` closes over count as data, and
    where there are none at all, so do the arrays that it makes itself. A weight that is contracted with
    data twice in a row, as in \(x^\top W y\), counts by the first contraction. If `fn` differentiates the
    model itself (a gradient penalty, an inner loop), give the forward pass of the model instead of the
    loss: the backward pass contracts each weight over its fan-out.

    Args:
        fn: any function of the parameters, a loss or a forward pass, which returns any tree with arrays.
        params: the parameters, a tree of arrays or of `jax.ShapeDtypeStruct`s. Other leaves (the
            functions in an Equinox module) are passed to `fn` as they are.
        *args: further arguments of `fn`: trees of arrays and of `jax.ShapeDtypeStruct`s, which are
            traced, and of anything else, which is passed as it is.
        **kwargs: the same, by name.

    Returns:
        A tree with the structure of `params` and a `WeightAxes` at each leaf.

    Raises:
        TypeError: if `fn` is not callable or returns no array; and whatever `fn` raises when it is traced.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gc_optax import infer_axes
        >>> def model(params, x):  # two experts, and a head in PyTorch's layout
        ...     h = jnp.einsum("ebi,eio->ebo", x, params["experts"]) + params["bias"]
        ...     return h @ params["head"].T
        >>> shapes = {"experts": (2, 8, 16), "bias": (16,), "head": (4, 16)}
        >>> params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        >>> axes = infer_axes(model, params, jnp.ones((2, 3, 8)))
        >>> axes["experts"].fan_in, axes["experts"].fan_out  # axis 0 is neither: a batch axis
        ((1,), (2,))
        >>> axes["head"].fan_in
        (1,)
        >>> axes["bias"].fan_in, axes["bias"].why
        ((), 'add: a bias, a scale or a gate')

    References:
        The primitives are those of https://docs.jax.dev/en/latest/jax.lax.html
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of the parameters, got {fn!r}")
    places, structure = jtu.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in places]
    others, others_structure = jax.tree.flatten((args, kwargs))
    given = leaves + others

    def of_arrays(arrays: list[Any]) -> list[Any]:
        rest = iter(arrays)
        filled = [next(rest) if _is_traced(leaf) else leaf for leaf in given]
        fn_args, fn_kwargs = jax.tree.unflatten(others_structure, filled[len(leaves) :])
        outputs = fn(jax.tree.unflatten(structure, filled[: len(leaves)]), *fn_args, **fn_kwargs)
        arrays = [output for output in jax.tree.leaves(outputs) if is_array_like(output)]
        if not arrays:
            raise TypeError(
                f"fn has to return what depends on the parameters, an array; it returned {outputs!r}"
            )
        return arrays

    closed = jax.make_jaxpr(of_arrays)([leaf for leaf in given if _is_traced(leaf)])
    numbers = [number for number, leaf in enumerate(given) if _is_traced(leaf)]
    ins = [
        settled(
            Origin(Made.PARAMS if number < len(leaves) else Made.RAW, big(shape_of(var))),
            var,
            "",
            True,
            False,
        )
        for number, var in zip(numbers, closed.jaxpr.invars, strict=True)
    ]
    has_data = any(origin.made == Made.RAW for origin in ins)
    tape = read(closed, ins, own=False, alone=not has_data)
    outputs = [frozenset({OUTPUT})] * len(tape.outs)
    found = dict(zip(numbers, read_back(tape, outputs), strict=True))
    verdicts = [verdict(found.get(number), leaf) for number, leaf in enumerate(leaves)]
    warn_of_unclear_uses(places, verdicts)
    return jax.tree.unflatten(structure, [axes for axes, _ in verdicts])


def _is_traced(leaf: Any) -> bool:
    # A number of NumPy may be what a Python number is: a rate, a count, a flag.
    return is_array_like(leaf) and not isinstance(leaf, np.generic)
