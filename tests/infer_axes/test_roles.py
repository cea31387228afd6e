"""The role of a weight: what the data have met before it, and what they meet behind it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from gc_optax import WeightAxes, infer_axes


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X = jnp.linspace(0.0, 1.0, 24).reshape(4, 6)
SQUARE = f32(6, 6)


def roles(fn, params, *args):
    axes = infer_axes(fn, params, *args)
    return {name: leaf.role for name, leaf in axes.items()}


# Each function has the roles of its parameters, all of shape (6, 6), as its default arguments.
CASES = {}


def case(**truth):
    def register(fn):
        CASES[fn.__name__] = fn, truth
        return fn

    return register


@case(a="input", b="hidden", c="output")
def three_layers(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


@case(a="output")
def a_single_layer_is_an_output(p, x):
    return x @ p["a"]


@case(a="input", b="output", bias="", scale="")
def biases_and_scales_are_no_weights(p, x):
    h = x * p["scale"][0] + p["bias"][0]
    return jnp.tanh(h @ p["a"] * p["scale"][1]) @ p["b"] * p["scale"][2] + p["bias"][1]


@case(a="input", b="hidden", c="hidden", d="output")
def a_residual_stream(p, x):
    x = x @ p["a"]
    x = x + jnp.tanh(x @ p["b"]) @ p["c"]
    return (x / jnp.linalg.norm(x)) @ p["d"]


@case(a="input", b="input", c="output")
def two_inputs(p, x):
    return jnp.tanh(x @ p["a"] + (x + 1) @ p["b"]) @ p["c"]


@case(a="input", b="output", c="output")
def two_outputs(p, x):
    h = jnp.tanh(x @ p["a"])
    return h @ p["b"], h @ p["c"]


@case(a="input", b="output", c="hidden", d="output")
def an_auxiliary_head(p, x):
    h = jnp.tanh(x @ p["a"])
    return jnp.sum(h @ p["b"]) + jnp.sum(jnp.tanh(h @ p["c"]) @ p["d"])


@case(a="input", b="hidden", c="output")
def a_skip_of_the_input(p, x):
    h = jnp.tanh(x @ p["a"])
    return (h + jnp.sin(x)) @ p["b"] @ p["c"]


@case(a="hidden", b="output")
def one_weight_twice(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["a"]) @ p["b"]


@case(a="input", b="output")
def two_towers_with_one_weight(p, x):
    one, other = jnp.tanh(x @ p["a"]), jnp.tanh((x - 1) @ p["a"])
    return (one * other) @ p["b"]


@case(a="hidden", b="hidden")
def tied_weights_of_an_autoencoder(p, x):
    return jnp.tanh(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["b"].T) @ p["a"].T


@case(table="lookup", a="output")
def behind_a_lookup(p, x):
    return jnp.tanh(p["table"][jnp.argmax(x, axis=1)]) @ p["a"]


@case(table="lookup", a="hidden")
def tied_embeddings(p, x):
    h = p["table"][jnp.argmax(x, axis=1)]
    return (h + jnp.tanh(h @ p["a"])) @ p["table"].T


@case(table="lookup", a="output")
def a_lookup_by_a_one_hot_array(p, x):
    return jax.nn.one_hot(jnp.argmax(x, axis=1), 6) @ p["table"] @ p["a"]


@case(table="lookup", a="input", b="output")
def codes_that_a_weight_chooses(p, x):
    h = x @ p["a"]
    return jnp.tanh(h + p["table"][jnp.argmin(h, axis=1)]) @ p["b"]


@case(a="input", b="output")
def what_the_loss_does_with_targets_is_no_weight(p, x):
    h = jnp.tanh(x @ p["a"]) @ p["b"]
    return jnp.mean((h @ h.T - x @ x.T) ** 2)


@case(a="input", b="output")
def a_penalty_is_no_use(p, x):
    return jnp.mean(jnp.tanh(x @ p["a"]) @ p["b"]) + 1e-3 * sum(jnp.sum(w**2) for w in p.values())


@case(a="input", b="hidden", c="output")
def on_the_way_to_the_data(p, x):
    a = p["a"].T / jnp.linalg.norm(p["a"])
    b = jnp.stack([p["b"][0], *p["b"][1:]]).astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.tanh(jnp.tanh(x @ a) @ b) @ p["c"].reshape(3, 2, 6).reshape(6, 6)


@case(a="input", b="hidden", c="output")
def in_functions_with_derivatives_of_their_own(p, x):
    @jax.custom_vjp
    def clipped(h):
        return jnp.clip(h, -1, 1)

    clipped.defvjp(lambda h: (clipped(h), None), lambda _, g: (g,))
    layer = jax.checkpoint(lambda w, h: jnp.tanh(h @ w))
    return jax.jit(clipped)(layer(p["b"], clipped(layer(p["a"], x)))) @ p["c"]


@case(a="input", b="hidden", c="output")
def a_recurrence(p, x):
    def step(h, xt):
        h = jnp.tanh(xt @ p["a"] + h @ p["b"])
        return h, h @ p["c"]

    return jax.lax.scan(step, jnp.zeros(6), x)[1]


@case(a="input", b="hidden")
def a_recurrence_is_followed_by_itself(p, x):
    return jax.lax.scan(lambda h, xt: (jnp.tanh(xt @ p["a"] + h @ p["b"]), None), jnp.zeros(6), x)[0]


@case(a="hidden", b="output")
def a_loop_that_stops_by_itself(p, x):
    def body(state):
        return state[0] + 1, jnp.tanh(state[1] @ p["a"])

    return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1] @ p["b"]


@case(a="input", b="hidden", c="hidden", d="output")
def branches(p, x):
    h = jnp.tanh(x @ p["a"])
    h = jax.lax.cond(x[0, 0] > 0, lambda h: h @ p["b"], lambda h: jnp.tanh(h @ p["c"]), h)
    return h @ p["d"]


@case(a="input", b="hidden", c="hidden", d="output")
def products_entry_by_entry(p, x):
    h = jnp.sum(x[:, :, None] * p["a"], axis=1)
    h = jnp.sum(jnp.tanh(h)[:, :, None] * p["b"], axis=1)
    return taps(p["c"], jnp.tanh(h)) @ p["d"]


@case(style="input", a="input", b="hidden", c="output")
def a_weight_that_data_modulate(p, x):
    style = jnp.tanh(x[0] @ p["style"])
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ (p["b"] * style[:, None])) @ p["c"]


@case(style="input", a="output")
def what_modulates_a_weight_is_followed_by_it(p, x):
    return x @ (p["a"] * jnp.tanh(x[0] @ p["style"])[:, None])


@case(style="input", head="hidden", a="input", b="output")
def a_number_of_data_that_scales_a_weight(p, x):
    style = jax.nn.sigmoid(jnp.tanh(x[0] @ p["style"]) @ p["head"])[0]
    return jnp.tanh(x @ (p["a"] * style)) @ p["b"]


@case(style="input", a="output")
def a_norm_of_data_that_divides_a_weight(p, x):
    return x @ (p["a"] / jnp.linalg.norm(x @ p["style"]))


@case(a="input", scale="", b="output")
def a_scale_that_a_mean_is_taken_with(p, x):
    h = jnp.tanh(x @ p["a"]) * p["scale"][0]
    return (h - jnp.mean(h, axis=1, keepdims=True)) @ p["b"]


@case(a="output", b="")
def a_weight_that_is_a_bias_too(p, x):
    return x @ p["a"] + (x[:1] @ p["b"]) + p["b"][0]


@case(a="input", b="output", c="")
def what_no_gradient_comes_back_to(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"] + jax.lax.stop_gradient(x @ p["c"])


@case(query="input", key="input", value="input", out="output", positions="")
def an_attention(p, x):
    x = x + p["positions"][:4]
    query, key, value = (x @ p[name] for name in ("query", "key", "value"))
    return jax.nn.softmax(query @ key.T) @ value @ p["out"]


@case(gate="output", up="input", down="output")
def a_gate_that_weighs_experts(p, x):
    gates = jax.nn.softmax(x @ p["gate"])
    return gates[:, :1] * (jnp.tanh(x @ p["up"]) @ p["down"])


@pytest.mark.parametrize(("fn", "truth"), CASES.values(), ids=CASES)
def test_the_role_of_every_weight(fn, truth):
    assert roles(fn, dict.fromkeys(truth, SQUARE), X) == truth


def taps(w, h):
    h = jnp.pad(h, ((0, 5), (0, 0)))
    return sum(h[start : start + 4] * w[start] for start in range(6))


def test_to_its_neighbours_a_convolution_tap_by_tap_is_no_weight():
    def between(p, x):
        return taps(p["b"], jnp.tanh(taps(p["a"], x) @ p["c"]))

    assert roles(between, dict.fromkeys("abc", SQUARE), X) == {"a": "input", "b": "output", "c": "output"}


@pytest.mark.parametrize("states", [2, 15, 16, 40])
def test_a_line_of_delays_hands_the_role_through_all_of_it(states):
    def delays(p, x):
        def step(state, xt):
            return (jnp.tanh(xt @ p["a"]), *state[:-1]), state[-1] @ p["b"]

        return jax.lax.scan(step, (jnp.zeros(6),) * states, x)

    assert roles(delays, dict.fromkeys("ab", SQUARE), X) == {"a": "input", "b": "output"}


def test_a_line_of_stages_is_read_in_full():
    stages = 24

    def pipeline(p, x):
        def step(state, xt):
            first = jnp.tanh(xt @ p["a"] + state[0] * p["gates"][0])
            rest = [jnp.tanh(state[n - 1] + state[n] * p["gates"][n]) for n in range(1, stages)]
            return [first, *rest], rest[-1] @ p["b"]

        return jax.lax.scan(step, [p["start"][n] for n in range(stages)], x)

    params = {"a": SQUARE, "b": SQUARE, "gates": f32(stages, 6), "start": f32(stages, 6)}
    assert roles(pipeline, params, X) == {"a": "input", "b": "output", "gates": "", "start": ""}


def test_experts_have_one_role_however_they_are_chosen():
    def picked(p, x, chosen):
        return jnp.einsum("bd,bdf->bf", x, p["experts"][chosen])

    def dispatched(p, x, chosen):
        masked = jnp.einsum("be,bd->ebd", jax.nn.one_hot(chosen, 3), x)
        return jnp.einsum("ebd,edf->bf", masked, p["experts"])

    def sorted_by_expert(p, x, chosen):
        return jax.lax.ragged_dot(x[jnp.argsort(chosen)], p["experts"], jnp.bincount(chosen, length=3))

    for experts in (picked, dispatched, sorted_by_expert):

        def model(p, x, experts=experts):
            chosen = jnp.argmax(x @ p["router"], axis=1)
            return jnp.tanh(experts(p, x, chosen)) @ p["b"]

        params = {"router": f32(6, 3), "experts": f32(3, 6, 6), "b": SQUARE}
        assert roles(model, params, X) == {"router": "", "experts": "input", "b": "output"}, experts


# The same where the function closes over its batch.
CLOSING = ["three_layers", "a_residual_stream", "two_inputs", "two_outputs", "an_auxiliary_head"]


@pytest.mark.parametrize("name", CLOSING)
def test_a_batch_that_is_closed_over_is_data(name):
    fn, truth = CASES[name]
    assert roles(functools.partial(fn, x=X), dict.fromkeys(truth, SQUARE)) == truth


def stacked(p, x):
    h = jnp.tanh(x @ p["a"])
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, p["layers"])
    return h @ p["c"]


def unrolled(p, x):
    h = jnp.tanh(x @ p["a"])
    for layer in p["layers"]:
        h = h + jnp.tanh(h @ layer)
    return h @ p["c"]


@pytest.mark.parametrize("fn", [stacked, unrolled])
def test_layers_in_one_array_lie_between(fn):
    params = {"a": SQUARE, "layers": f32(3, 6, 6), "c": SQUARE}
    assert roles(fn, params, X) == {"a": "input", "layers": "hidden", "c": "output"}


@pytest.mark.parametrize("fn", [stacked, unrolled])
def test_all_layers_in_one_array_are_hidden_also_the_first_and_the_last(fn):
    def whole(p, x):
        return fn({"a": p["layers"][0], "layers": p["layers"][1:-1], "c": p["layers"][-1]}, x)

    axes = infer_axes(whole, {"layers": f32(5, 6, 6)}, X)["layers"]
    assert (axes.fan_in, axes.fan_out, axes.role) == ((1,), (2,), "hidden")


def test_members_of_an_ensemble_have_the_roles_of_one():
    fn, truth = CASES["three_layers"]
    members = jax.vmap(fn, in_axes=(0, None))
    assert roles(members, dict.fromkeys(truth, f32(3, 6, 6)), X) == truth


def test_a_weight_with_a_single_input_has_a_role_and_no_fan_in():
    def model(p, x):
        return jnp.tanh(x[:, :1] @ p["a"]) @ p["b"]

    axes = infer_axes(model, {"a": f32(1, 6), "b": f32(6, 2)}, X)
    assert (axes["a"].fan_in, axes["a"].role, axes["a"].is_weight) == ((), "input", True)
    assert axes["b"].role == "output"


def test_a_product_of_parameters_is_one_weight():
    def model(p, x, start):
        h = jnp.tanh(x @ (start + p["a"] @ p["b"]))
        return jnp.tanh(h @ (start + p["c"] @ p["d"])) @ p["e"]

    thin, flat = f32(6, 2), f32(2, 6)
    found = roles(model, {"a": thin, "b": flat, "c": thin, "d": flat, "e": SQUARE}, X, SQUARE)
    assert found == {"a": "input", "b": "input", "c": "hidden", "d": "hidden", "e": "output"}


def test_what_cannot_be_read_has_no_role():
    def model(p, x):
        return jnp.tanh(x @ p["a"]) @ jnp.linalg.qr(p["b"])[0] @ p["c"]

    with pytest.warns(UserWarning, match="cannot read"):
        axes = infer_axes(model, dict.fromkeys("abc", SQUARE), X)
    assert {name: leaf.role for name, leaf in axes.items()} == {"a": "input", "b": "", "c": "output"}
    assert not axes["b"].is_weight


def test_a_role_of_another_name_is_refused():
    with pytest.raises(ValueError, match=r"WeightAxes\.role must be one of .*'hidden'.*, got 'head'"):
        WeightAxes((0,), (1,), role="head")
