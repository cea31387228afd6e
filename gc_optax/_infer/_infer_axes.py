"""What a user calls, and the way from the uses of a parameter to its axes, or to a warning."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import tree_util as jtu

from .._axes import PyTree, Role, WeightAxes, is_array_like, left_alone, read_from
from .._text import describe, joined_lines, place, stacklevel_of_the_user
from ._origins import Made, Origin, big
from ._program import shape_of
from ._uses import FOLLOWED, OUT, OUTPUT, Use, Uses, common_role, listed
from ._walk import LOOP, read, read_back, settled


def infer_axes(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
    r"""The fan-in of every parameter, read off what a model computes.

    In \(y = \sum_i x_i w_{io}\) the axis \(i\) of \(w\), which is summed over together with an axis of the
    data, is the fan-in. `fn` is traced on shapes alone, and every parameter is followed through the
    computation, whatever is done to it on the way (casts, reshapes, slices that are stacked again, masks,
    normalization, the loops over a stack of layers), to the operation in which it meets the data:

    - a product that sums (`dot_general`, `conv_general_dilated`, `ragged_dot_general`, a product entry by
      entry and a sum) sums over its fan-in;
    - a lookup by indices that depend on the data, or a product with a one-hot array, makes it a table, unless
      what is picked is a matrix that is contracted next, that of an expert;
    - an operation entry by entry makes it a bias, a scale or a gate.

    Only the first is centralized. A parameter with several uses has the fan-in that all of them say; where
    they differ (embeddings that are tied to the output layer) it is left alone. It is left alone, with a
    warning, where the computation cannot be read with certainty. The `why` of each `WeightAxes` says which it
    was.

    The `role` of each `WeightAxes` says where in the model a weight stands. It is an `"input"` if the data
    that it is contracted with have met no weight and no lookup table before, an `"output"` if what comes out
    of it meets none afterwards, on any way to what `fn` returns, and `"hidden"` otherwise. The only layer of
    a model is an output. Biases, scales and positions are no weights: the data have met nothing in them. A
    weight with several uses is an input or an output if it is one in all of them; layers that share an
    array, as under `nn.scan`, are hidden together. A table, also one that is tied to the output layer, is a
    `"lookup"`. What is a bias or a scale besides has no role. Only what the gradient goes through counts:
    frozen weights and computed indices are data like others, and what lies behind a `stop_gradient` does not
    follow. `docs/one_tree.md` has examples.

    Only what the gradient goes through counts as a use. Arrays that `fn` closes over may be data or
    constants: as far as that matters and cannot be told, a warning says so, so give the batch as an argument.
    A weight that is contracted with data twice in a row, as in \(x^\top W y\), counts by the first
    contraction. If `fn` differentiates the model itself (a gradient penalty, an inner loop), give the forward
    pass of the model: the backward pass contracts each weight over its fan-out. `docs/inference.md` has more
    of what cannot be told (Pallas kernels, attention pooling, interpolated tables), and what to do then.

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
        TypeError: if `fn` is not callable, returns no array, or needs the numbers of an array, which JAX
            cannot trace; and whatever `fn` raises when it is traced.
        NameError: if `fn` uses the name of a mesh axis or of a `pmap`, as `jax.lax.pmean` does.

    Examples:
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
        >>> axes["experts"].role, axes["head"].role, axes["bias"].role
        ('input', 'output', '')

    References:
        The primitives are those of https://docs.jax.dev/en/latest/jax.lax.html
    """
    if not callable(fn):
        raise TypeError(
            f"fn must be a function of the parameters, got {describe(fn)}; "
            "it comes first: infer_axes(fn, params, batch)"
        )
    places, structure = jtu.tree_flatten_with_path(params)
    others, others_structure = jax.tree.flatten((args, kwargs))
    given = [leaf for _, leaf in places] + others

    def of_arrays(arrays: list[Any]) -> list[Any]:
        rest = iter(arrays)
        filled = [next(rest) if _is_traced(leaf) else leaf for leaf in given]
        fn_args, fn_kwargs = jax.tree.unflatten(others_structure, filled[len(places) :])
        outputs = fn(jax.tree.unflatten(structure, filled[: len(places)]), *fn_args, **fn_kwargs)
        arrays = [output for output in jax.tree.leaves(outputs) if is_array_like(output)]
        if not arrays:
            raise TypeError(
                f"fn has to return what depends on the parameters, an array; it returned {describe(outputs)}"
            )
        return arrays

    closed = _traced(of_arrays, [leaf for leaf in given if _is_traced(leaf)])
    numbers = [number for number, leaf in enumerate(given) if _is_traced(leaf)]
    made = [Made.PARAMS if number < len(places) else Made.RAW for number in numbers]
    ins = [
        settled(Origin(of_one, big(shape_of(var))), var, "", own=True, alone=False)
        for of_one, var in zip(made, closed.jaxpr.invars, strict=True)
    ]
    tape = read(closed, ins, own=False, alone=not any(origin.made == Made.RAW for origin in ins))
    found = dict(zip(numbers, read_back(tape, [frozenset({OUTPUT})] * len(tape.outs)), strict=True))
    verdicts = [_verdict(found.get(number), leaf) for number, (_, leaf) in enumerate(places)]
    _warn_of_unclear_uses(places, verdicts)
    return jax.tree.unflatten(structure, [axes for axes, _ in verdicts])


def _is_traced(leaf: Any) -> bool:
    # A number of NumPy may be what a Python number is: a rate, a count, a flag.
    return is_array_like(leaf) and not isinstance(leaf, np.generic)


def _traced(of_arrays: Callable[[list[Any]], list[Any]], arrays: list[Any]) -> Any:
    """The program of a function, or an error in our words where it is no program that JAX could trace."""
    try:
        return jax.make_jaxpr(of_arrays)(arrays)
    except jax.errors.JAXTypeError as error:
        raise TypeError(
            "infer_axes traces fn on shapes, as jax.jit does, and fn needs the numbers of an array: it calls "
            "float() or int() on one, or decides by one in `if`. Return arrays, and use jnp.where or lax.cond"
        ) from error
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise NameError(
            "infer_axes traces fn outside of pmap, vmap and shard_map, and fn uses the name of one of their "
            f"axes ({error}). Give it the loss of one device, without psum or pmean"
        ) from error


def _judged(use: Use) -> Use:
    """The use of a parameter, with what its labels say."""
    if use.how != "kernel":
        return use._replace(how="other") if use.how == "term" else use
    if use.doubt:
        return use._replace(how="unclear", why=f"{use.op}: {use.doubt}", dims=())
    if use.is_scale or not use.fan_in:
        why = "a bias or a scale of another array" if use.is_scale else "none of its axes is summed over"
        return use._replace(how="other", why=f"{use.op}: {why}")
    return use


def _verdict(uses: Uses | None, leaf: Any) -> tuple[WeightAxes, bool]:
    """What all uses of a parameter say, and whether they are clear."""
    if uses is None:
        return left_alone("no array"), True
    judged = sorted(map(_judged, uses - {FOLLOWED}), key=lambda use: (use.why, use.fan_in))
    if any(use.how in ("kernel", "unclear") and not use.weak for use in judged):
        judged = [use for use in judged if not use.weak]
    kernels, others = ([use for use in judged if use.how == how] for how in ("kernel", "other"))
    # In the first step of a recurrence `w` meets a state of zeros, which tells nothing. The later steps say
    # how `w` is used, and their answer stands.
    known = {use.fan_in for use in kernels}
    unclear = [use for use in judged if use.how == "unclear" and use.fan_in not in known]
    unclear += [use for use in others if kernels and use.op == LOOP]
    telling = unclear or others or [use for use in judged if use.how == "statistic" and use.why]
    if unclear or (telling and not kernels):
        axes = left_alone(telling[0].why, telling[0].op)
    elif not kernels:
        never = "it never meets the data, or only a statistic of it does"
        axes = left_alone(never if judged else "no gradient comes back to it")
    else:
        ways = list(dict.fromkeys(f"{use.op} over {listed(use.fan_in)}" for use in kernels))
        fan_out = [dim for dim in range(len(leaf.shape)) if all(use.labels(dim) >= OUT for use in kernels)]
        axes = WeightAxes(kernels[0].fan_in, tuple(fan_out), kernels[0].op, ways[0])
        if others or len(known) > 1:
            ways += dict.fromkeys(use.why for use in others)
            axes = left_alone("used in more than one way: " + "; ".join(ways))
    role = "" if unclear else _role(kernels, others)
    return read_from(leaf, dataclasses.replace(axes, role=role)), not unclear


def _role(kernels: list[Use], others: list[Use]) -> Role:
    """Where in the model a parameter stands. A table that is tied to the output layer is a table."""
    if any(use.role == "lookup" for use in others):
        return "lookup"
    # What is a bias or a scale too may be no weight at all: a mean of `x * scale` is a contraction.
    return common_role(use.role for use in kernels) if kernels and not others else ""


def _warn_of_unclear_uses(places: Sequence[Any], verdicts: Sequence[tuple[WeightAxes, bool]]) -> None:
    """Warns, once for all of them, of the parameters whose uses are not clear."""
    pairs = zip(places, verdicts, strict=True)
    lines = [f"  {place(*leaf)}: {axes.why}" for leaf, (axes, is_clear) in pairs if not is_clear]
    if lines:
        warnings.warn(
            "infer_axes leaves these parameters alone, because it cannot read with certainty what the "
            "computation does with them:\n" + joined_lines(lines, most=100) + "\n"
            "To centralize one of them, replace its leaf in the tree by axes of your own, or, if it is "
            "multiplied by a batch that the function closes over, pass the batch as an argument.",
            UserWarning,
            stacklevel=stacklevel_of_the_user(),
        )
