"""`gc_optax.optimizers`: none is missing, each looks as it does in optax, and the sums stay put."""

import ast
import doctest
import inspect
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from optimizer_cases import (
    AXES,
    GRADIENTS,
    NAMES,
    PARAMS,
    arguments,
    extra_arguments,
    extra_arguments_at_first,
    loss,
    theirs,
    weight_sums,
)

from gc_optax import centralize, centralized, infer_axes, optimizers

pytestmark = pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")


# Which there are

# What looks like an optimizer to the test below, and why it is none of ours.
LEFT_OUT = {
    "differentially_private_aggregate": "a part of dpsgd, which noises gradients and takes no step",
    "dpsgd": "takes per-example gradients: `centralized` in front of it would average over the examples",
    "hutchinson_estimator_diag_hessian": "a part of sophia: what comes out is a Hessian",
    "mechanize": "wraps an optimizer",
    "normalize": "a part of sam's adversarial optimizer, without a learning rate",
    "reduce_on_plateau": "scales what another optimizer makes",
    "sam": "wraps two optimizers",
    "schedule_free": "wraps an optimizer",
    "schedule_free_eval_params": "is about parameters",
    "split_real_and_imaginary": "wraps an optimizer",
}


def offered():
    """Every factory in optax's files of optimizers, without the rule by which `optimizers` finds them."""
    from_alias = {
        name
        for name, given in vars(optax).items()
        if getattr(getattr(given, "func", given), "__module__", "") == "optax._src.alias" and callable(given)
    }
    from_contrib = {
        name
        for name, given in vars(optax.contrib).items()
        if inspect.isfunction(given) and given.__module__.startswith("optax.contrib.")
    }
    return {name for name in from_alias | from_contrib if not name.startswith(("_", "scale_by_"))}


def test_every_optimizer_of_optax_is_there_or_left_out_for_a_reason():
    assert offered() == set(NAMES) | set(LEFT_OUT)
    assert not set(NAMES) & set(LEFT_OUT)


def test_type_checkers_are_told_of_each():
    tree = ast.parse(inspect.getsource(optimizers))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    told = {ast.unparse(line) for line in block.body}
    homes = {name: "optax.contrib" if name in vars(optax.contrib) else "optax" for name in NAMES}
    lines = {f"{name} = _centralized({home}.{name})" for name, home in homes.items()}
    assert lines <= told
    assert {line.split(" = ")[0] for line in told - lines} <= NEWER_THAN_THE_OLDEST_OPTAX


# For what an older optax lacks, type checkers are told all the same.
NEWER_THAN_THE_OLDEST_OPTAX = {"galore", "madgrad", "signum"}


@pytest.mark.parametrize("name", ["adamv", "scale_by_adam", "clip", "GradientTransformation", *LEFT_OUT])
def test_what_is_not_there_is_an_attribute_error_that_says_so(name):
    message = (
        f"module 'gc_optax.optimizers' has no attribute '{name}': optax {optax.__version__} has no optimizer"
    )
    with pytest.raises(AttributeError, match=re.escape(message)):
        getattr(optimizers, name)


def test_an_optax_without_an_optimizer_lacks_it_here_too(monkeypatch):
    monkeypatch.delattr(optax, "yogi")
    monkeypatch.setattr(optax, "brand_new", optax.sgd, raising=False)
    optimizers.__getattr__.cache_clear()
    assert not hasattr(optimizers, "yogi")
    assert "yogi" not in dir(optimizers)
    assert "brand_new" in dir(optimizers)
    assert optimizers.brand_new(1e-2, where="updates").init(PARAMS)


# What they look like


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_and_the_documentation_are_those_of_optax_and_two_arguments_more(name):
    ours, original = getattr(optimizers, name), theirs(name)
    *parameters, centralization, where = inspect.signature(ours).parameters.values()
    assert parameters == list(inspect.signature(original).parameters.values())
    assert (centralization.kind, centralization.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert (where.kind, where.default) == (inspect.Parameter.KEYWORD_ONLY, "gradients")
    assert inspect.signature(ours).return_annotation is optax.GradientTransformationExtraArgs

    documentation = inspect.getdoc(ours)
    before, after = re.split(r"\n  centralization: .*\n  where: .*", documentation)
    assert before + after == inspect.getdoc(original)
    assert after.startswith("\n\nReturns:")
    assert "\nArgs:\n" in before


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_function_of_the_module_that_pickles(name):
    ours = getattr(optimizers, name)
    assert (ours.__module__, ours.__qualname__, ours.__name__) == ("gc_optax.optimizers", name, name)
    assert inspect.unwrap(ours) is theirs(name)
    assert pickle.loads(pickle.dumps(ours)) is ours


def test_doctest_does_not_find_the_examples_of_optax():
    assert optimizers.adam.__doc__.count(">>>") > 5
    [found] = [test for test in doctest.DocTestFinder().find(optimizers) if test.examples]
    assert found.name == "gc_optax.optimizers"


def test_a_star_import_gives_the_optimizers():
    names = {}
    exec("from gc_optax.optimizers import *", names)
    assert names.keys() - {"__builtins__"} == set(NAMES)


@pytest.mark.slow
def test_people_who_let_mypy_ignore_that_optax_is_untyped_have_no_errors(tmp_path):
    api = pytest.importorskip("mypy.api", reason="mypy is for developers")
    (tmp_path / "mypy.ini").write_text("[mypy]\nignore_missing_imports = true\n")
    (tmp_path / "user.py").write_text(
        "from gc_optax.optimizers import adamw\n"
        'optimizer = adamw(1e-3, where="updates")\n'
        "state = optimizer.init({})\n"
    )
    flags = ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path / "cache")]
    printed, errors, code = api.run([*flags, "--follow-imports", "silent", str(tmp_path / "user.py")])
    assert (code, errors) == (0, ""), printed


# What they do


@pytest.mark.parametrize("where", ["gradients", "updates"])
@pytest.mark.parametrize("name", ["adamw", "nadam", "noisy_sgd"])
def test_each_is_centralized_of_optax_and_keeps_its_state(name, where):
    ours = getattr(optimizers, name)(**arguments(name), centralization=centralize(AXES), where=where)
    same = centralized(theirs(name)(**arguments(name)), centralize(AXES), where=where)
    chex.assert_trees_all_equal_structs(ours.init(PARAMS), theirs(name)(**arguments(name)).init(PARAMS))
    updates, expected = (tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)[0] for tx in (ours, same))
    chex.assert_trees_all_equal(updates, expected)


def test_the_defaults_are_those_of_centralized():
    ours, same = optimizers.sgd(0.1), centralized(optax.sgd(0.1))
    updates, expected = (tx.update(GRADIENTS, tx.init(PARAMS), PARAMS)[0] for tx in (ours, same))
    chex.assert_trees_all_equal(updates, expected)
    with pytest.raises(ValueError, match='where must be "gradients" or "updates"'):
        optimizers.sgd(0.1, where="update")
    with pytest.raises(TypeError, match="unexpected keyword argument 'lr'"):
        optimizers.sgd(0.1, lr=0.2)


def train(optimizer, name, steps):
    """The parameters afterwards, and the largest sum of magnitudes that any weight vector had on the way."""

    def step(carry, _):
        params, state = carry
        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params, **extra_arguments(name, params))
        params = optax.apply_updates(params, updates)
        return (params, state), weight_sums(jax.tree.map(abs, params))

    (params, _), sizes = jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), length=steps)
    return params, jnp.max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_sum_of_every_weight_vector_stays_put_for_100_steps_of_centralized_updates(name):
    optimizer = getattr(optimizers, name)(**arguments(name), centralization=centralize(AXES), where="updates")
    steps = 100
    fast_to_compile = {"xla_backend_optimization_level": 0}
    params, size = jax.jit(train, static_argnums=(0, 1, 2), compiler_options=fast_to_compile)(
        optimizer, name, steps
    )
    # Each step may round each weight once.
    rounding = steps * np.finfo(np.float32).eps * size
    np.testing.assert_allclose(weight_sums(params), weight_sums(PARAMS), rtol=0, atol=rounding)

    # It is not that nothing moved, or that the optimizer would have kept the sums by itself.
    distances = jax.tree.map(lambda after, before: np.max(abs(after - before)), params, PARAMS)
    assert optax.tree.max(distances) > 1e-2
    plain, params = theirs(name)(**arguments(name)), PARAMS
    state = plain.init(params)
    with jax.disable_jit():  # Op by op, each is compiled once for all optimizers.
        for _ in range(2):  # The first update of some is zero.
            updates, state = plain.update(GRADIENTS, state, params, **extra_arguments_at_first(name))
            params = optax.apply_updates(params, updates)
    sums, sizes = weight_sums(updates), weight_sums(jax.tree.map(abs, updates))
    assert np.max(abs(sums) / sizes) > 0.1


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_averages_of_schedule_free_keep_their_sums_where_it_wraps_a_centralized_optimizer(base):
    def eval_sums(optimizer):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), length=100)
        return weight_sums(params), weight_sums(optax.contrib.schedule_free_eval_params(state, params))

    projection = centralize(AXES)
    inner = getattr(optimizers, base)(0.1, centralization=projection, where="updates")
    inside = jax.jit(lambda: eval_sums(optax.contrib.schedule_free(inner, 0.1)))()
    for sums in inside:
        np.testing.assert_allclose(sums, weight_sums(PARAMS), rtol=0, atol=1e-4)

    outside = getattr(optimizers, f"schedule_free_{base}")(0.1, centralization=projection, where="updates")
    sums, averages = jax.jit(lambda: eval_sums(outside))()
    np.testing.assert_allclose(sums, weight_sums(PARAMS), rtol=0, atol=1e-4)
    assert np.max(abs(averages - weight_sums(PARAMS))) > 0.1


@pytest.mark.parametrize(
    "given", [{"args": (1e-3,)}, {"args": (1e-3, 0.9)}, {"args": (1e-3,), "mask": True}], ids=str
)
def test_axes_among_the_arguments_of_optax_are_refused(given):
    axes = infer_axes(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((4, 3)))
    keywords = {"mask": {"kernel": axes}} if "mask" in given else {}
    arguments = given["args"] if keywords else (*given["args"], {"kernel": axes})
    with pytest.raises(TypeError, match=re.escape("adamw(1e-3, centralization=gc_optax.centralize(axes))")):
        optimizers.adamw(*arguments, **keywords)


@pytest.mark.parametrize("arguments", [{"b1": centralize(AXES)}, {"nesterov": centralize()}], ids=list)
def test_a_centralization_among_the_arguments_of_optax_is_refused(arguments):
    with pytest.raises(TypeError, match=re.escape("that has a name: adamw(1e-3, centralization=")):
        optimizers.adamw(1e-3, **arguments)


def test_a_transformation_that_optax_has_a_use_for_is_passed_on():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)
    optimizer = optimizers.lbfgs(1e-3, linesearch=search)
    state = optimizer.init({"kernel": jnp.ones((3, 2))})
    assert optax.tree.get(state, "ScaleByBacktrackingLinesearchState") is not None
