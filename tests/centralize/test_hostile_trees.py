"""Whatever a user hands over, there are two ways out: the right numbers, or an error that names the place."""

import collections
import warnings

import hostile_trees
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hostile_trees import Case, by_convention, draw, effective, is_absent, is_float, like, places
from jax import tree_util as jtu

import gc_optax
from gc_optax import centralize, centralize_gradients, centralized

# More cases, or others: raise the one, change the other. `check(draw(SEED, number))` repeats a case.
SEED = 0
CASES = 2400
EMPTY = optax.EmptyState()


def run(case):
    """What the call of a case returns."""
    given = {"axes": case.axes, "mask": case.mask}
    params = case.params
    if case.call == "init":
        return centralize(**given).init(params)
    if case.call == "update":
        return centralize(**given).update(params, EMPTY)[0]
    if case.call == "update twice":
        transformation = centralize(**given)
        transformation.update(params, EMPTY)
        return transformation.update(params, EMPTY, params)[0]
    if case.call == "centralize_gradients":
        return centralize_gradients(params, **given)
    if case.call == "removed_fraction":
        return gc_optax.removed_fraction(params, **given)
    if case.call == "summarize":
        return gc_optax.summarize(params, **given)
    if case.call == "summarize with gradients":
        return gc_optax.summarize(params, **given, gradients=params)
    if case.call.startswith("centralized"):
        where = "updates" if "updates" in case.call else "gradients"
        optimizer = centralized(inner_optimizer(params), centralize(**given), where=where)
        return optimizer.update(params, optimizer.init(params), params)[0]
    if case.call == "update in jit":
        return in_jit(lambda params: centralize(**given).update(params, EMPTY)[0], params)
    if case.call == "centralize_gradients in jit":
        return in_jit(lambda params: centralize_gradients(params, **given), params)
    if case.call == "convention":
        return case.axes(params)
    if case.call.startswith("traced"):
        role = case.call.split()[1]

        def refusing(entry):
            whole = like(params, [entry] * len(places(params)))
            centralize_gradients(params, **({"axes": gc_optax.out_last} | {role: whole}))

        return jax.jit(refusing)(True if role == "mask" else 0)
    return hostile_trees.BAD_ARGUMENTS[case.call](params)


def inner_optimizer(params):
    """SGD where it can take each leaf."""
    usual = {np.dtype(dtype) for dtype in (jnp.float32, *hostile_trees.FLOATS)}
    leaves = jax.tree.leaves(params)
    is_usual = all(isinstance(leaf, jax.Array) and leaf.dtype in usual for leaf in leaves)
    return optax.sgd(0.1) if is_usual else optax.identity()


def in_jit(function, params):
    """`function` of a tree whose arrays of JAX are traced."""
    leaves = [leaf for _, leaf in places(params)]
    rest = {}

    def program(arrays):
        arrays = iter(arrays)
        traced = [next(arrays) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        result = function(like(params, traced))
        rest["leaves"] = [leaf for _, leaf in places(result)]
        rest["structure"] = jtu.tree_structure(result, is_leaf=is_absent)
        return [leaf for leaf in rest["leaves"] if isinstance(leaf, jax.Array)]

    arrays = iter(jax.jit(program)([leaf for leaf in leaves if isinstance(leaf, jax.Array)]))
    filled = [next(arrays) if isinstance(leaf, jax.Array) else leaf for leaf in rest["leaves"]]
    return jtu.tree_unflatten(rest["structure"], filled)


# The oracle


def largest(array):
    return float(np.max(np.abs(array), initial=0.0))


def precision(dtype):
    return float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).smallest_subnormal)


def assert_centralized(result, value, fan_in, scale=1.0):
    """The oracle's numbers, from a sum in the accumulator's dtype and one rounding for each operation."""
    assert isinstance(result, jax.Array)
    assert result.shape == value.shape
    assert result.dtype == jax.dtypes.canonicalize_dtype(value.dtype)
    wide = np.complex128 if jnp.issubdtype(result.dtype, jnp.complexfloating) else np.float64
    exact = oracle.centralize(np.asarray(value, wide), fan_in) * scale
    inputs = np.prod([value.shape[axis] for axis in fan_in])
    eps, smallest = precision(result.dtype)
    accumulated = min(eps, float(jnp.finfo(jnp.float32).eps))
    most = largest(np.asarray(value, wide))
    bound = 4 * inputs * accumulated * most + eps / 2 * np.abs(exact) * (1 + eps) + smallest
    if scale != 1:  # rounded before the mean is subtracted, or after
        bound = bound + eps * abs(scale) * most
    assert np.all(np.abs(np.asarray(result, wide) - exact) <= bound)


def assert_untouched(result, value, *, traced):
    if not (traced and isinstance(value, jax.Array)):
        assert result is value
        return
    assert (result.dtype, result.shape, result.aval.weak_type) == (
        value.dtype,
        value.shape,
        value.aval.weak_type,
    )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        result, value = jax.random.key_data(result), jax.random.key_data(value)
    assert np.asarray(result).tobytes() == np.asarray(value).tobytes()


def assert_updates(result, case):
    structure = jtu.tree_structure(case.params, is_leaf=is_absent)
    assert jtu.tree_structure(result, is_leaf=is_absent) == structure
    traced = "jit" in case.call
    in_sgd = case.call.startswith("centralized") and inner_optimizer(case.params).init(case.params) != EMPTY
    for (_, value), (_, got), fan_in in zip(places(case.params), places(result), case.fan_in, strict=True):
        if fan_in:
            assert_centralized(got, value, fan_in, scale=-0.1 if in_sgd else 1.0)
        elif in_sgd and is_absent(value):
            assert type(got) is type(value)
        elif in_sgd:
            np.testing.assert_array_equal(got, optax.sgd(0.1).update(value, (EMPTY, EMPTY))[0])
        else:
            assert_untouched(got, value, traced=traced)


def share(value, fan_in):
    """What part of the squared norm is in the means."""
    wide = np.asarray(value, np.complex128)
    removed = wide - oracle.centralize(wide, fan_in)
    return np.sum(np.abs(removed) ** 2) / max(np.sum(np.abs(wide) ** 2), 1e-300)


def assert_shares(result, case):
    for (_, value), (_, got), fan_in in zip(places(case.params), places(result), case.fan_in, strict=True):
        if is_absent(value):
            assert got is value
            continue
        assert (got.dtype, got.shape) == (jnp.float32, ())
        np.testing.assert_allclose(got, share(value, fan_in) if fan_in else 0, rtol=0, atol=1e-5)


def assert_table(result, case):
    *table, totals = result.split("\n")
    assert all(len(line) <= 140 for line in table)
    assert all(letter.isprintable() for line in table for letter in line)
    arrays = [
        (value.shape, fan_in)
        for (_, value), fan_in in zip(places(case.params), case.fan_in, strict=True)
        if hostile_trees.is_array_like(value)
    ]
    sizes = [int(np.prod(shape)) for shape, _ in arrays]
    taken = [size for size, (_, fan_in) in zip(sizes, arrays, strict=True) if fan_in]
    vectors = [
        int(np.prod(shape)) // int(np.prod([shape[axis] for axis in fan_in]))
        for shape, fan_in in arrays
        if fan_in
    ]
    assert totals.startswith(
        f"{len(taken):,} of {len(arrays):,} parameters are centralized: {sum(taken):,} of {sum(sizes):,} "
        f"entries, in {sum(vectors):,} weight vectors."
    )


def assert_result(result, case):
    if case.call == "init":
        assert result == EMPTY
    elif case.call == "removed_fraction":
        assert_shares(result, case)
    elif case.call.startswith("summarize"):
        assert_table(result, case)
    elif case.call == "convention":
        assert jtu.tree_structure(result) == jtu.tree_structure(case.params)
        settled = iter(jax.tree.leaves(result))
        for (_, value), fan_in in zip(places(case.params), case.fan_in, strict=True):
            assert is_absent(value) or next(settled).fan_in == fan_in
    else:
        assert_updates(result, case)


# The two ways out


def is_named(path, message):
    """Whether a message names a path, or, of a very long one, its beginning and its end."""
    if isinstance(path, str):
        return path in message
    without_boxes = tuple(key for key in path if key != jtu.GetAttrKey("value"))
    texts = {jtu.keystr(path), jtu.keystr(without_boxes)}
    return any(
        (text or "the root") in message
        or (len(text) > 400 and text[:150] in message and text[-150:] in message)
        for text in texts
    )


def assert_refusal(error, case):
    message = str(error)
    assert len(message) < 2000, f"{len(message)} letters"
    assert any(is_named(path, message) for path in case.refused), (
        "a refusal that was not due, or without its place"
    )


def assert_warnings(caught, case):
    """There is one warning, of what the default convention guesses at, and it is bounded."""
    for warning in caught:
        text = str(warning.message)
        assert case.axes is None, text
        assert warning.category is UserWarning
        assert text.startswith(("by default gc_optax reads", "the parameters are a single vector")), text
        assert len(text) < 10_000
        assert any(is_float(value) for _, value in places(case.params))
    assert len(caught) <= 1


def check(case):
    """Runs a case, and returns which way out it took."""
    with jax.enable_x64(case.x64), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = run(case)
        except hostile_trees.TheirsError:
            assert case.theirs
            return "the user's own error"
        except (TypeError, ValueError) as error:
            assert_refusal(error, case)
            return "refused"
    assert_warnings(caught, case)
    assert not case.refused, "nothing was refused"
    assert not case.theirs, "the user's error is lost"
    with jax.enable_x64(case.x64):
        assert_result(result, case)
    return "computed"


def described(case):
    structure = ascii(str(jtu.tree_structure(case.params)))[:300]
    return f"{case.call} {'in x64 ' if case.x64 else ''}({case.fault or 'no fault'}) of {structure}"


def failures_and_outcomes(seed, numbers):
    failures, outcomes = [], collections.Counter()
    for number in numbers:
        case = draw(seed, number)
        try:
            outcomes[check(case)] += 1
        except Exception as error:
            text = ascii(f"{type(error).__name__}: {error}")[:300]
            failures.append(f"check(draw({seed}, {number})): {described(case)}\n    {text}")
    return failures, outcomes


@pytest.mark.thorough
def test_every_call_computes_or_refuses_by_name():
    failures, outcomes = failures_and_outcomes(SEED, range(CASES))
    assert not failures, f"{len(failures)} of {CASES}\n" + "\n".join(failures[:10])
    assert outcomes["computed"] >= CASES * 0.5
    assert outcomes["refused"] >= CASES * 0.25
    assert outcomes["the user's own error"] > 0


# Very large trees


def wide():
    """Ten thousand leaves, of which half are kernels that the default warns of."""
    array = jnp.arange(12.0).reshape(2, 3, 2)
    return {f"block_{number}": {"kernel": array, "bias": array} for number in range(5000)}


def deep(make):
    """A leaf below as many nodes as Python's recursion limit just allows for."""
    params = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}
    for _ in range(900):
        params = make(params)
    return params


LARGE = {
    "wide": wide,
    "deep dicts": lambda: deep(lambda node: {"a": node}),
    "deep lists": lambda: deep(lambda node: [node]),
}


@pytest.mark.thorough
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("call", ["init", "update", "removed_fraction", "summarize"])
def test_large_trees_are_computed(make, call):
    params = make()
    fan_in = [by_convention(path, value, False) for path, value in places(params)]
    assert check(Case(call, params, fan_in=fan_in)) == "computed"
    axes = like(params, fan_in)
    assert check(Case("init", params, axes, lambda params: True)) == "computed"


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_large_trees_are_refused(make):
    params = make()
    leaves = places(params)
    entries = [None] * len(leaves)
    entries[-1] = 7
    assert check(Case("init", params, like(params, entries), refused=[leaves[-1][0]])) == "refused"
    entries[-1] = {"other": None}
    assert check(Case("update", params, like(params, entries), refused=[leaves[-1][0]])) == "refused"
    assert check(Case("update", params, {"params": like(params, entries)}, refused=[()])) == "refused"


# One transformation, and trees that change from one update to the next


def varied(rng, value):
    """Another array of the same rank in the place of one."""
    if not (isinstance(value, jax.Array) and is_float(value)):
        return value
    shapes = [shape for shape in hostile_trees.SHAPES if len(shape) == value.ndim]
    shape, dtype = hostile_trees.pick(rng, shapes), hostile_trees.pick(rng, [jnp.float32, jnp.bfloat16])
    return jnp.asarray(hostile_trees.numbers(rng, shape, dtype))


def variants(rng, params):
    """Trees of one structure, of which each has its own shapes and dtypes."""
    leaves = [value for _, value in places(params)]
    return [params] + [like(params, [varied(rng, value) for value in leaves]) for _ in range(3)]


def assert_updated(transformation, case):
    case.refused = hostile_trees.uncomputable(case, places(case.params))
    try:
        result, _ = transformation.update(case.params, EMPTY)
    except TypeError as error:
        assert_refusal(error, case)
        return
    assert not case.refused
    assert_updates(result, case)


@pytest.mark.parametrize("number", range(60))
def test_what_is_kept_of_one_tree_is_not_taken_for_another(number):
    rng = np.random.default_rng([SEED, number])
    first = bool(rng.integers(2))
    by_names = centralize(gc_optax.out_first if first else gc_optax.out_last)
    trees = [variant for _ in range(3) for variant in variants(rng, hostile_trees.tree(rng, False))]
    kernel = jnp.arange(6.0).reshape(3, 2)
    # To a dict, and to JAX, these keys are the same. So are the static fields.
    trees += [{"bias": {key: kernel}, "k": {key: kernel}} for key in (1, True, 1.0)]
    trees += [hostile_trees.Registered(kernel, kernel, static=static) for static in (1, True)]
    for index in rng.integers(len(trees), size=3 * len(trees)):
        leaves = places(trees[index])
        fan_in = [by_convention(path, value, first) for path, value in leaves]
        assert_updated(by_names, Case("update", trees[index], fan_in=fan_in))

    trees = variants(rng, hostile_trees.tree(rng, False))
    chosen = hostile_trees.good_axes(rng, [value for _, value in places(trees[0])])
    by_axes = centralize(like(trees[0], [entry for _, entry in chosen]))
    for index in rng.integers(len(trees), size=12):
        values = [value for _, value in places(trees[index])]
        fan_in = [effective(value, axes) for value, (axes, _) in zip(values, chosen, strict=True)]
        assert_updated(by_axes, Case("update", trees[index], fan_in=fan_in))
