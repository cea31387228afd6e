"""The recipes of docs/variants.md against the published update rules, written out in float64 NumPy.

The recipes are read out of the page, so what is tested is what people copy. The rules below know nothing of
JAX: each takes one parameter, its gradient as a function of the weights and of the step, and the projection
that is the parameter's (the identity for what is not centralized), and yields the weights after every step.
"""

import functools
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from gc_optax import centralize, centralized, out_last

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "variants.md"

STEPS = range(1, 51)
RATE, RATE_DECAY, WEIGHT_DECAY, MOMENTUM = 0.05, 0.02, 0.1, 0.9
B1, B2 = 0.9, 0.99
ALPHA, K = 0.4, 6
# Large enough for a misplaced epsilon to show, and that of the authors' Adagrad.
EPS, ADAGRAD_EPS = 1e-3, 1e-10


# The rules


def sgd_gc(w, gradient, project, eps):
    momentum = 0.0
    for t in STEPS:
        momentum = MOMENTUM * momentum + project(gradient(w, t) + WEIGHT_DECAY * w)
        w = w - RATE * momentum
        yield w


def sgd_with_decay_outside(w, gradient, project, eps):
    """What people get who centralize first and let the optimizer add the decay."""
    momentum = 0.0
    for t in STEPS:
        momentum = MOMENTUM * momentum + project(gradient(w, t)) + WEIGHT_DECAY * w
        w = w - RATE * momentum
        yield w


def sgdw_gc(w, gradient, project, eps):
    momentum = 0.0
    for t in STEPS:
        momentum = MOMENTUM * momentum + project(gradient(w, t))
        w = w - RATE * momentum - RATE * WEIGHT_DECAY * w
        yield w


def moments(m, v, d):
    return B1 * m + (1 - B1) * d, B2 * v + (1 - B2) * d**2


def adam_direction(m, v, t, eps):
    """Algorithm 1 of Kingma and Ba, 2015."""
    return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + eps)


def adam_gc(w, gradient, project, eps):
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, project(gradient(w, t) + WEIGHT_DECAY * w))
        w = w - RATE * adam_direction(m, v, t, eps)
        yield w


def adam_with_decay_outside(w, gradient, project, eps):
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, project(gradient(w, t)) + WEIGHT_DECAY * w)
        w = w - RATE * adam_direction(m, v, t, eps)
        yield w


def adam_gc2(w, gradient, project, eps):
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, gradient(w, t) + WEIGHT_DECAY * w)
        w = w - RATE * project(adam_direction(m, v, t, eps))
        yield w


def adamw_gc(w, gradient, project, eps):
    """Algorithm 2 of Loshchilov and Hutter, 2019; the decay is times the learning rate, as in all code."""
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, project(gradient(w, t)))
        w = w - RATE * (adam_direction(m, v, t, eps) + WEIGHT_DECAY * w)
        yield w


def adamw_gc2(w, gradient, project, eps):
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, gradient(w, t))
        w = w - RATE * project(adam_direction(m, v, t, eps) + WEIGHT_DECAY * w)
        yield w


def adamw_with_only_its_direction_projected(w, gradient, project, eps):
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, gradient(w, t))
        w = w - RATE * (project(adam_direction(m, v, t, eps)) + WEIGHT_DECAY * w)
        yield w


def adamw_gc2_as_coded(w, gradient, project, eps):
    """The authors' AdamW_GCC2: one step size for the direction and for the decay."""
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, gradient(w, t))
        step_size = RATE * np.sqrt(1 - B2**t) / (1 - B1**t)
        w = w - project(step_size * (WEIGHT_DECAY * w + m / (np.sqrt(v) + eps)))
        yield w


def adagrad_gc(w, gradient, project, eps):
    total = 0.0
    for t in STEPS:
        d = project(gradient(w, t) + WEIGHT_DECAY * w)
        total = total + d**2
        w = w - RATE / (1 + (t - 1) * RATE_DECAY) * d / (np.sqrt(total) + eps)
        yield w


def rectification(t):
    """Algorithm 2 of Liu et al., 2020, with the threshold of their code; None where it does without Adam."""
    rho_inf = 2 / (1 - B2) - 1
    rho = rho_inf - 2 * t * B2**t / (1 - B2**t)
    if rho < 5:
        return None
    return np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def radam_direction(m, v, t, eps):
    r = rectification(t)
    return m / (1 - B1**t) if r is None else r * adam_direction(m, v, t, eps)


def radam_gc(w, gradient, project, eps):
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, project(gradient(w, t)))
        w = w - RATE * (radam_direction(m, v, t, eps) + WEIGHT_DECAY * w)
        yield w


def radam_gc2(w, gradient, project, eps):
    m = v = 0.0
    for t in STEPS:
        m, v = moments(m, v, gradient(w, t))
        w = w - RATE * project(radam_direction(m, v, t, eps) + WEIGHT_DECAY * w)
        yield w


def published_radam(
    w, gradient, project, eps, *, gc_loc, alias, rate=RATE, decay=WEIGHT_DECAY, lookahead=False
):
    """The authors' RAdam, or with `lookahead` the fast weights of their Ranger.

    With `alias` the momentum takes up the decay and the projection as long as the step is not rectified.
    That is the code as published. Without, the step starts from a copy of the momentum.
    """
    m = v = 0.0
    slow = w
    for t in STEPS:
        g = gradient(w, t)
        m, v = moments(m, v, project(g) if gc_loc else g)
        r = rectification(t)
        step = decay * w + (m if r is None else m / (np.sqrt(v) + eps))
        if not gc_loc:
            step = project(step)
        if alias and r is None:
            m = step
        scale = 1.0 if r is None else r * np.sqrt(1 - B2**t)
        w = w - rate * scale / (1 - B1**t) * step
        if lookahead and t % K == 0:
            slow = slow + ALPHA * (w - slow)
            w = slow
        yield w


def ranger(w, gradient, project, eps):
    """RAdam inside Algorithm 1 of Zhang et al., 2019; yields the fast weights."""
    m = v = 0.0
    slow = w
    for t in STEPS:
        m, v = moments(m, v, project(gradient(w, t)))
        w = w - RATE * (radam_direction(m, v, t, eps) + WEIGHT_DECAY * w)
        if t % K == 0:
            slow = slow + ALPHA * (w - slow)
            w = slow
        yield w


def ranger2(w, gradient, project, eps):
    m = v = 0.0
    slow = w
    for t in STEPS:
        m, v = moments(m, v, gradient(w, t))
        w = w - RATE * project(radam_direction(m, v, t, eps) + WEIGHT_DECAY * w)
        if t % K == 0:
            slow = slow + ALPHA * (w - slow)
            w = slow
        yield w


RADAM_AS_MEANT, RADAM_AS_CODED = (
    {gc_loc: functools.partial(published_radam, gc_loc=gc_loc, alias=alias) for gc_loc in (True, False)}
    for alias in (False, True)
)
PLAIN_RADAM = functools.partial(published_radam, gc_loc=False, alias=True, rate=RATE**2)

RULES = (
    sgd_gc,
    sgd_with_decay_outside,
    sgdw_gc,
    adam_gc,
    adam_with_decay_outside,
    adam_gc2,
    adamw_gc,
    adamw_gc2,
    adamw_with_only_its_direction_projected,
    adamw_gc2_as_coded,
    adagrad_gc,
    radam_gc,
    radam_gc2,
    *RADAM_AS_MEANT.values(),
    *RADAM_AS_CODED.values(),
    PLAIN_RADAM,
    ranger,
    ranger2,
)


# What they are run on: a quadratic loss of its own curvature in every direction, and noise


FAN_IN = {("conv", "kernel"): (0, 1, 2), ("dense", "kernel"): (0,)}
CENTRALIZED = {"all": tuple(FAN_IN), "conv": (("conv", "kernel"),), "none": ()}
SHAPES = {
    "conv": {"kernel": (3, 3, 2, 4)},
    "dense": {"kernel": (12, 3), "bias": (3,)},
}


def draw(seed, shapes, distribution):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: distribution(generator, shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


PARAMS = draw(0, SHAPES, lambda generator, shape: generator.normal(size=shape))
CURVATURE = draw(1, SHAPES, lambda generator, shape: generator.uniform(0.2, 2.0, size=shape))
# Off center, so that there is a mean to remove.
TARGET = draw(2, SHAPES, lambda generator, shape: generator.normal(1.0, size=shape))
NOISE = draw(3, SHAPES, lambda generator, shape: generator.normal(0.2, 0.5, size=(len(STEPS), *shape)))


@functools.cache
def reference(rule, scope, eps):
    """The trajectory of every parameter: the first axis is the step."""

    def one(module, name):
        curvature, target, noise = (tree[module][name] for tree in (CURVATURE, TARGET, NOISE))
        project = functools.partial(oracle.centralize, fan_in=FAN_IN.get((module, name)))
        weights = rule(
            PARAMS[module][name],
            lambda w, t: curvature * (w - target) + noise[t - 1],
            project if (module, name) in CENTRALIZED[scope] else lambda d: d,
            eps,
        )
        return np.stack([*weights])

    return {module: {name: one(module, name) for name in shapes} for module, shapes in SHAPES.items()}


def loss(params, noise):
    terms = jax.tree.map(
        lambda w, curvature, target, tilt: jnp.sum(curvature * (w - target) ** 2 / 2 + tilt * w),
        params,
        *(jax.tree.map(lambda leaf, w: leaf.astype(w.dtype), tree, params) for tree in (CURVATURE, TARGET)),
        noise,
    )
    return sum(jax.tree.leaves(terms))


def trajectory(optimizer, dtype=np.float64, params=PARAMS):
    """As `reference`, by JAX. With Lookahead the parameters are a pair, and so is what is returned."""
    params, noise = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, NOISE))

    def step(carry, noise):
        params, state = carry
        gradients = jax.grad(loss)(fast(params), noise)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, taken = jax.jit(functools.partial(jax.lax.scan, step))((params, optimizer.init(params)), noise)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(taken))
    return jax.tree.map(np.asarray, taken)


def fast(params):
    return getattr(params, "fast", params)


def distance(one, other):
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, other)
    return max(jax.tree.leaves(differences))


# The recipes


@functools.cache
def recipes():
    """What the Python blocks of the page define."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), namespace)
    return SimpleNamespace(**namespace)


SGD = {"learning_rate": RATE, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
ADAM = {"learning_rate": RATE, "b1": B1, "b2": B2, "eps": EPS, "weight_decay": WEIGHT_DECAY}
ADAGRAD = {"learning_rate": RATE, "lr_decay": RATE_DECAY, "weight_decay": WEIGHT_DECAY}
RANGER = {**ADAM, "alpha": ALPHA, "k": K}

IN_THE_TABLE = {
    "SGD_GC": ("sgd_gc", SGD, sgd_gc, "all"),
    "SGD_GCC": ("sgd_gcc", SGD, sgd_gc, "conv"),
    "SGDW_GCC": ("sgdw_gcc", SGD, sgdw_gc, "conv"),
    "Adam_GC": ("adam_gc", ADAM, adam_gc, "all"),
    "Adam_GCC": ("adam_gcc", ADAM, adam_gc, "conv"),
    "Adam_GCC2": ("adam_gcc2", ADAM, adam_gc2, "conv"),
    "AdamW_GCC": ("adamw_gcc", ADAM, adamw_gc, "conv"),
    "AdamW_GCC2": ("adamw_gcc2", ADAM, adamw_gc2, "conv"),
    "Adagrad_GCC": ("adagrad_gcc", ADAGRAD, adagrad_gc, "conv"),
    "RAdam, gc_loc=True": ("radam_gc", {**ADAM, "gc_loc": True}, radam_gc, "all"),
    "RAdam, gc_loc=False": ("radam_gc", {**ADAM, "gc_loc": False}, radam_gc2, "all"),
    "Ranger, gc_loc=True": ("ranger", {**RANGER, "gc_loc": True}, ranger, "all"),
    "Ranger, gc_loc=False": ("ranger", {**RANGER, "gc_loc": False}, ranger2, "all"),
}
AS_PUBLISHED = {
    "AdamW_GCC2 as coded": ("adamw_gcc2_as_coded", ADAM, adamw_gc2_as_coded, "conv"),
    "RAdam as meant, gc_loc=True": (
        "radam_gc_as_meant",
        {**ADAM, "gc_loc": True},
        RADAM_AS_MEANT[True],
        "all",
    ),
    "RAdam as meant, gc_loc=False": (
        "radam_gc_as_meant",
        {**ADAM, "gc_loc": False},
        RADAM_AS_MEANT[False],
        "all",
    ),
    "RAdam as coded, gc_loc=True": (
        "radam_gc_as_coded",
        {**ADAM, "gc_loc": True},
        RADAM_AS_CODED[True],
        "all",
    ),
    "RAdam as coded, gc_loc=False": (
        "radam_gc_as_coded",
        {**ADAM, "gc_loc": False},
        RADAM_AS_CODED[False],
        "all",
    ),
    "PlainRAdam as coded": ("radam_gc_as_coded", {**ADAM, "learning_rate": RATE**2}, PLAIN_RADAM, "all"),
}
VARIANTS = IN_THE_TABLE | AS_PUBLISHED
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def run(variant, dtype):
    recipe, arguments, *_ = VARIANTS[variant]
    params = optax.LookaheadParams.init_synced(PARAMS) if recipe == "ranger" else PARAMS
    with jax.enable_x64(dtype == np.float64):
        return trajectory(getattr(recipes(), recipe)(**arguments), dtype, params)


@pytest.mark.slow
@every_variant
def test_takes_the_steps_of_its_rule(variant):
    _, arguments, rule, scope = VARIANTS[variant]
    expected = reference(rule, scope, arguments.get("eps", 0.0))
    assert distance(fast(run(variant, np.float64)), expected) < 1e-12
    assert distance(fast(run(variant, np.float32)), expected) < 1e-4


def test_adagrad_is_as_near_to_the_authors_as_their_epsilon_lets_it():
    taken = run("Adagrad_GCC", np.float64)
    assert 1e-12 < distance(taken, reference(adagrad_gc, "conv", ADAGRAD_EPS)) < 1e-7


@pytest.mark.thorough
@every_variant
def test_takes_the_steps_of_no_other_rule(variant):
    """Neither without GC, nor with GC on other weights or in another place."""
    _, arguments, own_rule, own_scope = VARIANTS[variant]
    taken = fast(run(variant, np.float64))
    distances = {
        (rule, scope): distance(taken, reference(rule, scope, arguments.get("eps", EPS)))
        for rule in RULES
        for scope in CENTRALIZED
        if (rule, scope) != (own_rule, own_scope)
    }
    assert len(distances) == 3 * len(RULES) - 1
    nearest = min(distances, key=distances.get)
    assert distances[nearest] > 0.05, nearest


@pytest.mark.parametrize("gc_loc", [True, False])
@pytest.mark.parametrize(("recipe", "alias"), [("radam_gc_as_meant", False), ("radam_gc_as_coded", True)])
def test_lookahead_makes_the_authors_ranger_of_their_radam(recipe, alias, gc_loc):
    with jax.enable_x64(True):
        fast_optimizer = getattr(recipes(), recipe)(**ADAM, gc_loc=gc_loc)
        ranger = optax.lookahead(fast_optimizer, sync_period=K, slow_step_size=ALPHA)
        taken = trajectory(ranger, params=optax.LookaheadParams.init_synced(PARAMS))
    rule = functools.partial(published_radam, gc_loc=gc_loc, alias=alias, lookahead=True)
    assert distance(taken.fast, reference(rule, "all", EPS)) < 1e-12


@functools.cache
def alias_table():
    """The percentages on the page, by optimizer, weight decay and `gc_loc`."""
    rows = re.findall(
        r"^\| (RAdam|Ranger) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.MULTILINE
    )
    return {
        (optimizer, float(decay), gc_loc): percent
        for optimizer, decay, *percents in rows
        for gc_loc, percent in zip((True, False), percents, strict=True)
    }


@pytest.mark.parametrize("gc_loc", [True, False])
@pytest.mark.parametrize("decay", [0.1, 0.005, 0.0])
@pytest.mark.parametrize("optimizer", ["RAdam", "Ranger"])
def test_the_alias_in_the_authors_code_leads_as_far_as_the_page_says(optimizer, decay, gc_loc):
    rule = functools.partial(published_radam, gc_loc=gc_loc, decay=decay, lookahead=optimizer == "Ranger")
    as_meant, as_coded = (
        reference(functools.partial(rule, alias=alias), "all", EPS) for alias in (False, True)
    )
    percent = 100 * distance(as_meant, as_coded) / distance(as_coded, PARAMS)
    assert alias_table()[optimizer, decay, gc_loc] == f"{percent:.1f}"


@pytest.mark.parametrize("variant", ["Ranger, gc_loc=True", "Ranger, gc_loc=False"])
def test_slow_weights_are_those_of_the_last_synchronization(variant):
    params = run(variant, np.float64)
    after = np.arange(K, len(STEPS) + 1)
    slow = jax.tree.map(lambda leaf: leaf[after - 1], params.slow)
    synchronized = jax.tree.map(lambda leaf: leaf[after // K * K - 1], params.fast)
    assert distance(slow, synchronized) < 1e-12


# What the page says besides


def sums(weights, module):
    """The sum of every weight vector, by step, the start included."""
    kernels = np.concatenate([PARAMS[module]["kernel"][None], fast(weights)[module]["kernel"]])
    return kernels.sum(tuple(range(1, kernels.ndim - 1)))


@functools.cache
def table():
    """The first table of the page: for each variant the kernels, and what becomes of their sums."""
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| .+? \| .+? \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    return {name.replace("`", ""): (kernels, fate) for name, kernels, fate in rows}


def test_the_table_has_every_variant():
    assert list(table()) == list(IN_THE_TABLE)


@pytest.mark.parametrize("variant", IN_THE_TABLE)
def test_sums_of_weight_vectors_do_what_the_table_says(variant):
    kernels, fate = table()[variant]
    scope = VARIANTS[variant][3]
    assert kernels == {"all": "all kernels", "conv": "convolutions"}[scope]
    for module, _ in CENTRALIZED[scope]:
        along = sums(run(variant, np.float64), module)
        change = np.abs(along - along[0]).max()
        if fate == "stays":
            assert change < 1e-10
        elif fate.startswith("shrinks"):
            shrunk = along[0] * (1 - RATE * WEIGHT_DECAY) ** np.arange(len(along))[:, None]
            np.testing.assert_allclose(along, shrunk, rtol=0, atol=1e-10)
        else:
            assert fate.startswith("drifts")
            assert change > 0.1


def test_sgd_takes_the_same_steps_with_the_projection_behind_the_momentum():
    sgd = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(RATE, MOMENTUM))
    with jax.enable_x64(True):
        behind = trajectory(centralized(sgd, centralize(out_last), where="updates"))
    assert distance(behind, run("SGD_GC", np.float64)) < 1e-10


def first_rectified_step(b2):
    """Until RAdam rectifies, its direction is the gradient where that is constant."""
    radam = optax.scale_by_radam(b2=b2)
    gradient = jnp.asarray([2.0])
    state = radam.init(gradient)
    for t in STEPS:
        direction, state = radam.update(gradient, state)
        if not np.allclose(direction, gradient):
            return t
    raise AssertionError("never")


def test_float32_lets_radam_rectify_early_only_with_a_large_b2():
    with jax.enable_x64(True):
        assert [first_rectified_step(b2) for b2 in (0.9, 0.999, 0.9999)] == [6, 6, 6]
    assert first_rectified_step(0.999) == 6
    assert first_rectified_step(0.9999) < 6
