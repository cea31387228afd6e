"""The table for people, and the share of the gradient that centralization removes."""

import functools
import subprocess
import sys

import equinox as eqx
import hypothesis
import hypothesis.extra.numpy as npst
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gc_optax
from gc_optax import (
    WeightAxes,
    centralize,
    centralize_gradients,
    infer_axes,
    removed_fraction,
    summarize,
)
from gc_optax._arithmetic import norm

# removed_fraction


@hypothesis.given(
    npst.arrays(
        np.float32,
        npst.array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=6),
        # XLA takes subnormal numbers for zero.
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    ),
    st.data(),
)
def test_removed_fraction_is_what_centralization_takes_away(gradient, data):
    axes = data.draw(st.lists(st.integers(0, gradient.ndim - 1), min_size=1, unique=True).map(tuple))
    wide = gradient.astype(np.float64)
    rest = wide - wide.mean(axes, keepdims=True)
    expected = 1 - (rest**2).sum() / (wide**2).sum() if wide.any() else 0.0
    fraction = removed_fraction(gradient, axes)
    assert fraction.dtype == jnp.float32
    assert fraction.shape == ()
    np.testing.assert_allclose(fraction, expected, atol=1e-5)
    assert 0 <= fraction <= 1


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_removed_fraction_does_not_depend_on_scale(scale, dtype):
    gradient = jnp.array([[1.0, 2.0], [1.0, 0.0]], dtype) * jnp.asarray(scale, dtype)
    np.testing.assert_allclose(removed_fraction(gradient, 0), 2 / 3, rtol=1e-2)


def test_removed_fraction_of_special_gradients():
    assert removed_fraction(jnp.ones((5, 3)), 0) == 1
    assert removed_fraction(jnp.zeros((5, 3)), 0) == 0
    for largest in (1e-37, 8.6e37, 3.4e38):
        assert removed_fraction(jnp.full((5, 3), largest), 0) == 1
        assert norm(jnp.array([largest, 0])) == np.float32(largest)
    assert removed_fraction(centralize_gradients(jnp.eye(5), 0), 0) < 1e-12
    np.testing.assert_allclose(removed_fraction(jnp.array([[1.0 + 1j], [1.0 - 1j]]), 0), 0.5, rtol=1e-6)
    assert jnp.isnan(removed_fraction(jnp.array([[jnp.nan], [1.0]]), 0))


def test_removed_fraction_of_what_is_left_alone_is_zero():
    gradients = {
        "kernel": jnp.ones((4, 3)),
        "bias": jnp.ones(3),
        "steps": jnp.arange(3),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    fractions = removed_fraction(gradients)
    assert jax.tree.structure(fractions) == jax.tree.structure(gradients)
    assert {name: float(fractions[name]) for name in ("kernel", "bias", "steps")} == {
        "kernel": 1,
        "bias": 0,
        "steps": 0,
    }
    assert (
        removed_fraction(gradients, mask={**dict.fromkeys(gradients, True), "kernel": False})["kernel"] == 0
    )


def test_removed_fraction_warns_of_kernels_that_it_guesses_at():
    with pytest.warns(UserWarning, match=r"shape \(2, 3, 4\)"):
        removed_fraction({"kernel": jnp.ones((2, 3, 4))})


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="optax has it since 0.2.7")
def test_removed_fraction_is_a_metric_in_a_chain_under_jit():
    axes = {"w": (0,), "b": None}
    removed = functools.partial(removed_fraction, axes=axes)
    optimizer = optax.chain(
        optax.monitor({"removed": removed, "smooth": optax.measure_with_ema(removed, decay=0.5)}),
        centralize(axes),
        optax.adam(1e-2),
    )
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    state = optimizer.init(params)
    gradients = {"w": jnp.arange(12.0).reshape(4, 3), "b": jnp.ones(3)}

    @jax.jit
    def update(gradients, state):
        return optimizer.update(gradients, state, params)

    for _ in range(2):
        _, state = update(gradients, state)
    expected = removed_fraction(gradients, axes)
    assert optax.tree.get(state, "removed") == expected
    np.testing.assert_allclose(optax.tree.get(state, "smooth")["w"], expected["w"], rtol=1e-5)
    assert expected["w"] > 0.5
    assert expected["b"] == 0


# summarize


def test_the_table_has_the_roles_where_they_are_known():
    params = {"layers": [jnp.ones((4, 4))] * 4, "bias": jnp.ones(4), "table": jnp.ones((9, 4))}

    def model(params, words):
        x = params["table"][words]
        for kernel in params["layers"]:
            x = jnp.tanh(x @ kernel) + params["bias"]
        return x

    axes = infer_axes(model, params, jnp.arange(5))
    table = [line.split() for line in summarize(params, axes).splitlines()]
    heading = table[0].index("role") - 1  # the words "mean over" head one column
    assert table[0][-2:] == ["role", "why"]
    tuples = [[words[0], *" ".join(words).partition(") ")[2].split()] for words in table[2:6]]
    assert [(words[0], words[heading - 1]) for words in tuples] == [
        ("bias", "-"),
        ("layers/{0..2}", "hidden"),
        ("layers/3", "output"),
        ("table", "lookup"),
    ]
    with_gradients = summarize(params, axes, gradients=params).splitlines()[0].split()
    assert with_gradients[-3:] == ["role", "why", "removed"]
    by_convention = summarize(params, gc_optax.out_last).splitlines()[0].split()
    assert "role" not in by_convention


def transformer(layers):
    block = {
        "attention": {name: {"kernel": jnp.ones((8, 2, 4))} for name in ("query", "key", "value")},
        "norm_0": {"scale": jnp.ones(8)},
        "norm_1": {"scale": jnp.ones(8)},
    }
    return {"embedding": jnp.ones((11, 8))} | {f"block_{layer}": block for layer in range(layers)}


def test_summarize_has_a_row_for_every_parameter():
    params = {
        "dense": {"kernel": jnp.ones((64, 10)), "bias": jnp.ones(10)},
        "none": None,
    }
    axes = {"dense": {"kernel": WeightAxes((0,), why="because"), "bias": None}, "none": None}
    assert summarize(params, axes).splitlines() == [
        "parameter     shape     mean over  fan-in  vectors  why",
        "─" * 70,
        "dense/bias    (10,)             -       -        -  left alone by axes",
        "dense/kernel  (64, 10)          0      64       10  because",
        "",
        "1 of 2 parameters are centralized: 640 of 650 entries, in 10 weight vectors.",
    ]


def test_summarize_is_short_for_a_transformer_of_twelve_layers():
    lines = summarize(transformer(12), gc_optax.out_last).splitlines()
    rows = [line.split("  ")[0] for line in lines[2:-2]]
    assert rows == [
        "block_{0..11}/attention/key/kernel",
        "block_{0..11}/attention/query/kernel",
        "block_{0..11}/attention/value/kernel",
        "block_{0..11}/norm_{0,1}/scale",
        "embedding",
    ]
    assert lines[2].split()[:8] == [rows[0], "(8,", "2,", "4)", "0", "8", "96", "out_last:"]
    assert lines[-1] == (
        "36 of 61 parameters are centralized: 2,304 of 2,584 entries, in 288 weight vectors."
    )


def test_summarize_keeps_apart_what_differs_in_more_than_an_index():
    params = {f"layer_{n}": jnp.ones((4, width)) for n, width in enumerate([8, 8, 16, 8])}
    rows = [line.split("  ")[0] for line in summarize(params).splitlines()[2:-2]]
    assert rows == ["layer_{0,1,3}", "layer_2"]
    params = {"a_0/b_0": jnp.ones((4, 8)), "a_1/b_1": jnp.ones((4, 8))}
    rows = [line.split("  ")[0] for line in summarize(params).splitlines()[2:-2]]
    assert rows == ["a_0/b_0", "a_1/b_1"]


def test_summarize_takes_numbers_at_the_end_of_a_name_for_indices():
    params = {name: jnp.ones((4, 3)) for name in ("conv1d", "conv2d", "w1", "w2", "w3", "b_01", "b_1")}
    rows = [line.split("  ")[0] for line in summarize(params).splitlines()[2:-2]]
    assert rows == ["b_{01,1}", "conv1d", "conv2d", "w{1..3}"]


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        (range(2), "{0,1}"),
        (range(12), "{0..11}"),
        (range(1, 24, 2), "{1,3..23}"),
        ([0, 1, 2, 5, 6, 7, 9], "{0..2,5..7,9}"),
        ([3, 10], "{3,10}"),
        ([0, 2, 4], "{0,2,4}"),
    ],
)
def test_summarize_counts_indices_as_a_reader_does(numbers, shown):
    table = summarize({f"l_{number}": jnp.ones((4, 3)) for number in numbers})
    assert table.splitlines()[2].split("  ")[0] == f"l_{shown}"


def test_summarize_keeps_apart_what_is_centralized_in_another_way():
    params = {f"w_{n}": jnp.ones((4, 3)) for n in range(3)}
    lines = summarize(params, {"w_0": 0, "w_1": 0, "w_2": None}).splitlines()
    assert [line.split("  ")[0] for line in lines[2:-2]] == ["w_{0,1}", "w_2"]
    # An incomplete grid: three of the four.
    grid = {f"a_{a}/b_{b}": jnp.ones((4, 3)) for a, b in ((0, 0), (0, 1), (1, 0))}
    lines = summarize(grid).splitlines()
    assert [line.split("  ")[0] for line in lines[2:-2]] == ["a_{0,1}/b_0", "a_0/b_1"]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_summarize_and_removed_fraction_agree_at_every_scale(scale):
    gradient = jnp.array([[1.0, 2.0], [1.0, 0.0]]) * scale
    table = summarize({"w": jnp.zeros((2, 2))}, {"w": 0}, gradients={"w": gradient})
    assert table.count("66.7%") == 2
    np.testing.assert_allclose(removed_fraction(gradient, 0), 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("setting", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_summarize_is_plain_text_everywhere(setting, monkeypatch):
    params = {"w": jnp.ones((4, 3))}
    plain = summarize(params)
    monkeypatch.setenv(setting, "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert summarize(params) == plain
    assert "\x1b" not in plain
    assert "parameter" in plain


def test_summarize_warns_of_kernels_that_it_guesses_at():
    with pytest.warns(UserWarning, match=r"shape \(2, 3, 4\)"):
        summarize({"kernel": jnp.ones((2, 3, 4))})


def test_summarize_counts_every_centralized_vector_of_the_rows_that_it_joins():
    params = [jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.ones((2, 3, 4))]
    lines = summarize(params, [0, 0, (1, 2)]).splitlines()
    assert [line.split("  ")[0] for line in lines[2:4]] == ["{0,1}", "2"]
    assert lines[-1] == "3 of 3 parameters are centralized: 88 of 88 entries, in 18 weight vectors."


def test_summarize_says_what_gc_removes():
    params = {"w_0": jnp.zeros((4, 3)), "w_1": jnp.zeros((4, 3)), "b": jnp.zeros(2)}
    gradients = {"w_0": jnp.ones((4, 3)), "w_1": centralize_gradients(jnp.eye(4, 3), 0), "b": jnp.ones(2)}
    axes = {"w_0": 0, "w_1": 0, "b": None}
    lines = summarize(params, axes, gradients=gradients).splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == ["-", "84.2%"]
    # 12 of 12 are removed, 0 of 2.25, and 2 are left alone.
    assert lines[-1].endswith("That removes 73.8% of the squared norm of the gradient.")


def test_summarize_works_on_shapes_and_with_a_mask():
    params = {"w": jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32)}
    assert "masked out" in summarize(params, {"w": 0}, mask={"w": False})
    assert "1,048,576" in summarize(params, {"w": 0})
    last = WeightAxes((0,), (1,), role="output")
    assert "  output  masked out" in summarize(params, {"w": last}, mask={"w": False})


def test_summarize_of_one_array_of_nothing_and_of_brackets():
    assert "(root)" in summarize(jnp.ones((4, 3)), 0)
    assert summarize({}).endswith("0 of 0 parameters are centralized: 0 of 0 entries, in 0 weight vectors.")
    assert "[bold]w[/bold]" in summarize({"[bold]w[/bold]": jnp.ones((4, 3))})


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"w": jnp.ones((4, 3))}, "gradients does not have the structure of the parameters: at the root"),
        ({"w": jnp.ones((3, 4)), "b": jnp.ones(3)}, r"the gradient of \['w'\], shape \(4, 3\), is"),
        ({"w": jax.ShapeDtypeStruct((4, 3), jnp.float32), "b": jnp.ones(3)}, "is an array of dtype float32"),
        ({"w": None, "b": jnp.ones(3)}, r"the gradient of \['w'\], shape \(4, 3\), is None"),
    ],
)
def test_summarize_refuses_gradients_of_something_else(gradients, message):
    with pytest.raises(ValueError, match=message):
        summarize({"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, gradients=gradients)


@pytest.mark.parametrize("dtype", [np.int32, np.longdouble, ">f4"])
def test_summarize_refuses_gradients_that_hold_no_floats_of_jax(dtype):
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=r"the gradient of \['w'\], shape \(3, 4\), is an array of dtype"):
        summarize(params, gc_optax.out_last, gradients={"w": np.ones((3, 4), dtype)})


def test_summarize_takes_a_number_of_numpy_for_a_gradient():
    shown = summarize({"scale": np.float32(1)}, gc_optax.out_last, gradients={"scale": np.float32(2)})
    assert "That removes 0.0% of the squared norm" in shown


def test_summarize_takes_names_of_thousands_of_digits():
    shown = summarize({"1" * 5000: jnp.ones((3, 4)), "2" * 5000: jnp.ones((3, 4))}, gc_optax.out_last)
    assert shown.endswith("2 of 2 parameters are centralized: 24 of 24 entries, in 8 weight vectors.")


def test_summarize_takes_the_gradients_of_an_equinox_module():
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    gradients = eqx.filter_grad(lambda model: model(jnp.ones(2)).sum())(model)
    table = summarize(model, gc_optax.out_first, gradients=gradients)
    assert table.splitlines()[-1].startswith("2 of 4 parameters are centralized")


def test_rich_is_needed_for_summarize_only():
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "import gc_optax, jax.numpy as jnp\n"
        "try:\n    gc_optax.summarize({'w': jnp.ones((4, 3))})\n"
        "except ImportError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "summarize needs Rich: pip install rich\n"


def test_a_name_with_an_escape_code_or_markup_is_shown_as_it_is_spelled():
    table = summarize({"a\x1b[31mred": jnp.ones((3, 4)), "[bold]b[/foo]": jnp.ones((3, 4))})
    assert "\x1b" not in table
    assert "a\\x1b[31mred" in table
    assert "[bold]b[/foo]" in table


def test_axes_are_no_parameters():
    with pytest.raises(TypeError, match=r"summarize\(params, axes\)"):
        summarize({"kernel": WeightAxes((0,))})
