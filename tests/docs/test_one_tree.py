"""The page docs/one_tree.md: its list of what in optax goes by the shape of an array, or by the leaf."""

import functools
import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "one_tree.md").read_text()

pytestmark = [
    pytest.mark.skipif(
        not hasattr(optax.contrib, "galore"), reason="the page is about optax since 0.2.7, which has GaLore"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:optax"),
]

RATE = 0.1
LAYERS, FAN_IN, FAN_OUT = 5, 4, 6

# The forms that kernels (in, out) can be given in, and back.
FORMS = {
    "stack": (jnp.stack, list),
    "turned": (lambda kernels: [w.T for w in kernels], lambda kernels: [w.T for w in kernels]),
    "heads": (
        lambda kernels: [w.reshape(FAN_IN, 2, FAN_OUT // 2) for w in kernels],
        lambda kernels: [w.reshape(FAN_IN, FAN_OUT) for w in kernels],
    ),
    "window": (
        lambda kernels: [w.reshape(2, FAN_IN // 2, FAN_OUT) for w in kernels],
        lambda kernels: [w.reshape(FAN_IN, FAN_OUT) for w in kernels],
    ),
}

# What is to be given besides a learning rate, or instead of it.
ARGUMENTS = {
    "adafactor": {"learning_rate": RATE, "min_dim_size_to_factor": 2},
    "adaptive_grad_clip": {"clipping": 0.01},
    "add_decayed_weights": {"weight_decay": RATE},
    "clip": {"max_delta": RATE},
    "clip_by_block_rms": {"threshold": RATE},
    "clip_by_global_norm": {"max_norm": RATE},
    "contrib.galore": {"learning_rate": RATE, "rank": 2},
    "contrib.scale_by_galore": {"rank": 2},
    "ema": {"decay": 0.9},
    "scale": {"step_size": RATE},
    "scale_by_factored_rms": {"min_dim_size_to_factor": 2},
    "scale_by_schedule": {"step_size_fn": lambda count: RATE},
    "trace": {"decay": 0.9},
}
# Of what is called with more than gradients and parameters.
VALUE = {"value": jnp.array(2.0)}
EXTRA_ARGUMENTS = {
    "contrib.momo": VALUE,
    "contrib.momo_adam": VALUE,
    "contrib.reduce_on_plateau": VALUE,
    "contrib.sophia": {"obj_fn": lambda params: sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(params))},
    "polyak_sgd": VALUE,
    "scale_by_polyak": VALUE,
}
# Transformations that work on another one, or on what a user gives.
WRAPPERS = {
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(RATE), 3),
    "contrib.mechanize": lambda: optax.contrib.mechanize(optax.sgd(RATE)),
    "contrib.sam": lambda: optax.contrib.sam(
        optax.sgd(RATE), optax.chain(optax.contrib.normalize(), optax.sgd(RATE))
    ),
    "contrib.schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(RATE), RATE),
    "lbfgs": optax.scale_by_lbfgs,  # without its line search, which needs the loss
}
# What is no rule of its own: it hands on what is in it, or is a function of the user's.
LEFT_OUT = {
    *("chain", "named_chain", "conditionally_mask", "conditionally_transform", "inject_hyperparams"),
    *("inject_stateful_hyperparams", "with_extra_args_support", "lookahead", "multi_transform", "partition"),
    *("masked", "freeze", "selective_transform", "flatten", "contrib.split_real_and_imaginary"),
    *("measure_with_ema", "snapshot", "stateless", "stateless_with_tree_map"),
    # They add random numbers to every entry: in another form, others.
    *("add_noise", "noisy_sgd"),
    # A line search asks for the loss, at points that it chooses by norms of the whole tree.
    *("scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"),
    # Of gradients with an axis of examples, and one norm of the whole tree for each.
    *("contrib.differentially_private_aggregate", "contrib.dpsgd"),
    # It has no default for an array with another rank than 2, and none for a tree.
    "contrib.scale_by_muon",
}


def transformations():
    """Every function of optax that makes a transformation, by its name."""
    found = {}
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            returned = str(inspect.signature(function).return_annotation)
            # Three have no annotation.
            is_one = "GradientTransformation" in returned or name in ("dog", "dowg", "scale_by_factored_rms")
            if is_one and not name.startswith("_"):
                found[prefix + name] = function
    return found


def make(name, function):
    """One of the transformations of optax."""
    if name in WRAPPERS:
        return WRAPPERS[name]()
    takes_rate = "learning_rate" in inspect.signature(function).parameters
    return function(**ARGUMENTS.get(name, {"learning_rate": RATE} if takes_rate else {}))


@functools.cache
def kernels(seed):
    """Kernels, or gradients, of which each layer, row and column has another size."""
    random = np.random.default_rng(seed)
    sizes = (
        np.geomspace(9, 0.1, LAYERS)[:, None, None] * np.linspace(0.2, 2, FAN_IN * FAN_OUT).reshape(4, 6) ** 2
    )
    return list(random.normal(size=(LAYERS, FAN_IN, FAN_OUT)) * sizes)


def two_updates(transformation, given, extra_arguments, there, back):
    """What a transformation makes of two gradients, one after the other, in one of the forms."""
    params, *gradients = map(there, given)
    state, of_each = transformation.init(params), []
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, params, **extra_arguments)
        params = optax.apply_updates(params, updates)
        of_each.append(back(updates))
    return of_each


def crosses_of_the_page():
    """The forms that the page says make a difference, by the name of the transformation."""
    table = re.search(r"^\| transformation \|(.*?)\n\n", PAGE, re.M | re.S)[1]
    headings, _, *rows = (line.strip("| ").split("|") for line in table.splitlines())
    assert [heading.strip() for heading in headings[: len(FORMS)]] == list(FORMS)
    cells = ([cell.strip() for cell in row] for row in rows)
    return {
        name.strip("`"): {form for form, cell in zip(FORMS, of_forms, strict=False) if cell == "x"}
        for name, *of_forms in cells
    }


CROSSES = crosses_of_the_page()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CROSSES else pytest.mark.slow)
        for name in sorted({*transformations(), *WRAPPERS} - LEFT_OUT)
    ],
)
def test_the_page_says_which_forms_make_a_difference(name):
    transformation = make(name, transformations().get(name))
    forms = {"plain": (list, list), **FORMS}
    extra_arguments = EXTRA_ARGUMENTS.get(name, {})

    @jax.jit
    def of_forms(given):
        return {
            form: two_updates(transformation, given, extra_arguments, *ways) for form, ways in forms.items()
        }

    with jax.enable_x64(True):  # MoMo takes the difference of two large numbers
        updates = of_forms([kernels(seed) for seed in range(3)])
    plain = np.asarray(updates.pop("plain"))
    differing = {
        form
        for form, given in updates.items()
        if not np.allclose(given, plain, rtol=1e-4, atol=1e-6 * np.abs(plain).max())
    }
    assert differing == CROSSES.get(name, set())


def test_the_list_is_of_what_optax_has():
    assert {*CROSSES, *LEFT_OUT} <= set(transformations())


def test_the_page_names_all_that_take_a_mask_for_weight_decay_and_all_that_take_none():
    with_mask, without = set(), set()
    for name, function in transformations().items():
        parameters = inspect.signature(function).parameters
        decays = {"weight_decay", "weight_decay_rate"} & set(parameters)
        if decays and not name.startswith("scale_by"):
            takes_mask = {"mask", "weight_decay_mask"} & set(parameters)
            (with_mask if takes_mask else without).add(name.removeprefix("contrib."))
    text = PAGE[PAGE.index("**Masks.**") : PAGE.index("The decay inside Prodigy")]
    told, blocks = text.split("Those that have a\nweight decay and no mask")
    names = set(re.findall(r"`(?:contrib\.)?(\w+)`", told))
    assert names >= with_mask
    assert not names & without
    assert all(re.search(rf"\b{name}\b", blocks) for name in without)
    assert not any(re.search(rf"# .*\b{name}\b", blocks) for name in with_mask - {"muon"})


def test_sm3_holds_an_entry_of_a_stack_by_its_layer_where_another_layer_is_larger():
    gradient = jnp.arange(1.0, 25.0).reshape(4, 6)
    of_stack, of_matrix = (
        optax.scale_by_sm3(b1=0.0).update(given, optax.scale_by_sm3().init(given))[1]
        for given in (jnp.stack([1000 * gradient, gradient]), gradient)
    )
    held = functools.reduce(jnp.minimum, [of_stack.mu[0][1], of_stack.mu[1][0], of_stack.mu[2][0]])
    assert held == 24.0**2
    assert min(of_matrix.mu[0][0], of_matrix.mu[1][0]) == 6.0**2


def test_muon_turned_has_the_same_directions_and_another_scale():
    gradient, muon = jax.random.normal(jax.random.key(0), (4, 8)), optax.contrib.muon(1.0)
    one, other = (muon.update(g, muon.init(g), g)[0] for g in (gradient, gradient.T))
    np.testing.assert_allclose(one, np.sqrt(8 / 4) * other.T, rtol=1e-4)


def test_adaptive_muon_has_one_factor_for_a_stack():
    numbers = optax.contrib.MuonDimensionNumbers((1,), (2,))
    gradient = jax.random.normal(jax.random.key(0), (4, 8))
    alone, stacked = (
        optax.contrib.muon(1.0, adaptive=True, muon_weight_dimension_numbers=of)
        for of in (optax.contrib.MuonDimensionNumbers(), numbers)
    )
    stack = jnp.stack([gradient, 100 * gradient])
    update = stacked.update(stack, stacked.init(stack), stack)[0]
    np.testing.assert_allclose(
        update[0], 101 * alone.update(gradient, alone.init(gradient), gradient)[0], rtol=0.05
    )


def test_clipping_takes_a_kernel_with_a_fan_in_of_one_for_one_vector():
    norms = optax.transforms.unitwise_norm(jnp.array([[3.0, 4.0]]))
    assert norms.tolist() == [[5.0, 5.0]]
    with pytest.raises(ValueError, match="axis parameter"):
        optax.transforms.unitwise_norm(jnp.ones((2,) * 6))


def test_flattened_clipping_has_one_unit():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    gradients = {"a": jnp.full((2, 2), 100.0), "b": jnp.full(3, 1e-6)}
    clip = optax.flatten(optax.adaptive_grad_clip(0.01))
    updates, _ = clip.update(gradients, clip.init(params), params)
    assert updates["b"].max() < 1e-9


def test_a_norm_of_a_complex_leaf_is_that_of_its_parts():
    params, gradients = jnp.array([1 + 1j, 1 + 1j]), jnp.array([3 + 0.1j, 4 + 0.2j])
    split = optax.contrib.split_real_and_imaginary(optax.scale_by_trust_ratio())
    updates, _ = split.update(gradients, split.init(params), params)
    for part in (jnp.real, jnp.imag):
        norms = jnp.linalg.norm(part(params)) / jnp.linalg.norm(part(gradients))
        np.testing.assert_allclose(part(updates), part(gradients) * norms, rtol=1e-6)


def test_projections_are_those_of_the_whole_tree():
    stack, layers = jnp.stack(kernels(0)), kernels(0)
    for project in (optax.projections.projection_l1_ball, optax.projections.projection_l2_ball):
        np.testing.assert_allclose(project(stack), jnp.stack(project(layers)), rtol=1e-4, atol=1e-6)


def test_galore_takes_one_specification_for_all_that_have_two_axes_or_more():
    galore = optax.contrib.galore(RATE, 2, weight_dimension_numbers=optax.contrib.GaLoreDimensionNumbers())
    with pytest.raises(ValueError, match="All axes must be specified"):
        galore.init({"query": jnp.ones((4, 2, 3))})


def test_what_has_no_mask_decays_weights_alone_by_the_recipes_of_the_page():
    params = {"kernel": jnp.full((4, 6), 3.0), "bias": jnp.full(6, 3.0)}
    gradients = {"kernel": jnp.asarray(kernels(1)[0], jnp.float32), "bias": jnp.ones(6)}
    recipes = re.search(r"^without_mask = \[.*?^\]", PAGE, re.M | re.S)[0]

    def two_steps(decay):
        given = {"optax": optax, "rate": RATE, "decay": decay, "mask": {"kernel": True, "bias": False}}
        exec(recipes, given)
        of_each = []
        for optimizer in given["without_mask"]:
            now, state = params, optimizer.init(params)
            for _ in range(2):
                updates, state = optimizer.update(gradients, state, now)
                now = optax.apply_updates(now, updates)
            of_each.append(now)
        return of_each

    for plain, decayed in zip(two_steps(0.0), two_steps(0.5), strict=True):
        assert np.abs(plain["kernel"] - decayed["kernel"]).max() > 0
        np.testing.assert_allclose(plain["bias"], decayed["bias"], rtol=1e-6)
