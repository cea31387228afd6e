"""The tables of docs/numerics.md: every cell is a test, which takes what it asserts from the cell."""

import functools
import hashlib
import json
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gc_optax import centralize, centralize_gradients, centralized, infer_axes, out_last, removed_fraction

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "numerics.md"


def table_under(first_column):
    """The header and the rows of the page's table with this first column, as lists of cells."""
    blocks = PAGE.read_text().split("\n\n")
    (table,) = (block for block in blocks if block.startswith(f"| {first_column} |"))
    header, _, *rows = table.splitlines()
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in (header, *rows)]


COLUMNS, *ROWS = table_under("dtype")
DTYPES = [
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float4_e2m1fn",
    "complex64",
    "complex128",
]


# What a cell is measured on, and how


def normal(dtype, shape, mean=1.0, deviation=1.0):
    random = np.random.default_rng(0)
    numbers = random.standard_normal(shape)
    numbers *= deviation
    numbers += mean
    if np.issubdtype(dtype, np.complexfloating):
        numbers = numbers + 1j * (random.standard_normal(shape) * deviation + mean)
    return numbers.astype(dtype)


def widest(values):
    """`values` in more bits than any dtype of the table has, where the machine has such a type."""
    return values.astype(np.clongdouble if np.iscomplexobj(values) else np.longdouble)


def exactly_centralized(gradient):
    """`gradient` less the mean over axis 0, in as many bits as there are."""
    wide = widest(gradient)
    # NumPy adds up pairwise where the entries lie next to each other.
    return wide - np.ascontiguousarray(wide.T).mean(1)


def error_beyond_one_rounding(gradient, repeats=1):
    """How much farther from the exact result the worst entry is than the exact result rounded once.

    A gradient that is repeated along the fan-in has the same mean, and each of its copies the same result.
    """
    exact = exactly_centralized(gradient)
    rounded_once = widest(exact.astype(gradient.dtype))
    repeated = np.tile(gradient, (repeats, 1))
    result = widest(np.asarray(centralize_gradients(repeated, 0))[: len(gradient)])
    return np.max(abs(result - exact) - abs(rounded_once - exact))


def assert_bound(error, bound):
    assert float(bound) / 10 <= error <= float(bound)


def same_bits(one, other):
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()


# The columns


def check_one_rounding(dtype, cell):
    assert_bound(error_beyond_one_rounding(normal(dtype, (5000, 16))), cell)


def check_large_fan_in(dtype, cell):
    assert_bound(error_beyond_one_rounding(normal(dtype, (10**5, 2)), repeats=100), cell)


def check_offset(dtype, cell):
    offset, bound = cell.split(": ")
    assert_bound(error_beyond_one_rounding(normal(dtype, (5000, 16), mean=float(offset))), bound)


def check_not_finite(dtype, cell):
    gradient = normal(dtype, (64, 35))
    clean = np.asarray(centralize_gradients(gradient, 0))
    held = {
        "NaN": [value for value in map(dtype.type, [np.nan]) if np.isnan(value)],
        "Inf": [value for value in map(dtype.type, [np.inf, -np.inf]) if np.isinf(value)],
    }
    assert cell == (", ".join(name for name in held if held[name]) or "has neither")
    for value in held["NaN"] + held["Inf"]:
        spoiled = gradient.copy()
        spoiled[3, 9] = value
        result = np.asarray(centralize_gradients(spoiled, 0))
        assert not np.any(np.isfinite(result[:, 9]))
        assert same_bits(np.delete(result, 9, 1), np.delete(clean, 9, 1))


def check_loss_scale(dtype, cell):
    scale = 2.0 ** int(cell.removeprefix("2^"))

    def scaled(values):
        return (widest(values) * scale).astype(dtype)

    limits = jnp.finfo(dtype)
    gradient = normal(dtype, (5000, 16), mean=0, deviation=min(1, float(limits.max) / scale / 6))
    centralized_last = np.asarray(centralize_gradients(scaled(gradient), 0))
    scaled_last = scaled(np.asarray(centralize_gradients(gradient, 0)))
    # Below, there is an underflow: the smallest numbers have fewer bits.
    normal_numbers = abs(exactly_centralized(gradient)) >= float(limits.smallest_normal)
    assert np.mean(normal_numbers) > 0.01
    assert same_bits(centralized_last[normal_numbers], scaled_last[normal_numbers])


def check_eager_is_jit(dtype, cell):
    for shape, axes in SHAPES.items():
        gradient = normal(dtype, shape)
        compiled = jax.jit(functools.partial(centralize_gradients, axes=axes))
        same = same_bits(centralize_gradients(gradient, axes), compiled(gradient))
        assert cell == ("yes" if same else "no")


def check_in_a_chain(dtype, cell):
    """The gradients below float32 are cast to float32 for the optimizer, as for parameters in float32."""
    errors = []
    for shape, axes in SHAPES.items():
        gradient = jnp.asarray(normal(dtype, shape))
        params = jnp.zeros(shape, jnp.float32 if dtype.itemsize < 4 else dtype)
        cast = optax.stateless(lambda updates, params: updates.astype(params.dtype))
        optimizer = optax.chain(cast, optax.adamw(1e-3))
        chain = optax.chain(centralize(axes), optimizer)
        together, _ = jax.jit(chain.update)(gradient, chain.init(params), params)
        centralized = centralize_gradients(gradient, axes)
        apart, _ = jax.jit(optimizer.update)(centralized, optimizer.init(params), params)
        together, apart = widest(np.asarray(together)), widest(np.asarray(apart))
        errors.append(np.max(abs(together - apart)) / np.max(abs(apart)))
    assert max(errors) <= float(cell)  # more than nothing only where there is a fused multiply-add


def check_other_process(dtype, cell):
    assert cell == ("yes" if digest(dtype) == digests_of_another_process()[dtype.name] else "no")


def check_equal_entries(dtype, cell):
    entry = dtype.type(1.7 + 1.7j if np.issubdtype(dtype, np.complexfloating) else 1.7)
    left = [
        np.max(abs(widest(np.asarray(centralize_gradients(np.full((fan_in, 3), entry), 0)))))
        for fan_in in (3, 7, 41, 100, 4097, 10**5)
    ]
    assert_bound(max(left) / abs(widest(entry)), cell)


# XLA compiles a sum otherwise where there are thousands of weight vectors.
SHAPES = {(64, 4096): 0, (3, 3, 64, 128): (0, 1, 2)}


def digest(dtype):
    results = [np.asarray(centralize_gradients(normal(dtype, shape), axes)) for shape, axes in SHAPES.items()]
    return hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest()


def digests():
    return {name: with_its_bits(name, digest) for name in DTYPES}


@functools.cache
def digests_of_another_process():
    # It has one device, and this one has eight.
    code = "import json, test_numerics; print(json.dumps(test_numerics.digests()))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parent,
    )
    return json.loads(run.stdout)


def with_its_bits(dtype, function, *arguments):
    """Calls the function with the dtype where JAX has it: those of 64 bits are off by default."""
    with jax.enable_x64(dtype in ("float64", "complex128")):
        return function(jnp.dtype(dtype), *arguments)


CHECKS = {
    "one rounding": check_one_rounding,
    "fan-in of 10^7": check_large_fan_in,
    "offset": check_offset,
    "NaN, Inf": check_not_finite,
    "loss scale": check_loss_scale,
    "eager = jit": check_eager_is_jit,
    "in a chain": check_in_a_chain,
    "other process": check_other_process,
    "equal entries": check_equal_entries,
}


def test_the_table_has_every_dtype_and_property():
    assert ["dtype", *CHECKS] == COLUMNS
    assert [dtype for dtype, *_ in ROWS] == DTYPES


CELLS = [
    pytest.param(
        dtype,
        column,
        cell,
        id=f"{column}-{dtype}",
        marks=() if dtype in ("float32", "bfloat16", "float8_e4m3fn") else pytest.mark.thorough,
    )
    for dtype, *cells in ROWS
    for column, cell in zip(COLUMNS[1:], cells, strict=True)
]


@pytest.mark.parametrize(("dtype", "column", "cell"), CELLS)
def test_cell(dtype, column, cell):
    if (dtype, column) == ("float64", "equal entries") and jax.__version_info__ < (0, 9, 1):
        pytest.skip("XLA sums in blocks of 32 first, and a float64 mean has an error of 1.5e-15")
    with_its_bits(dtype, CHECKS[column], cell)


# The other tables and the code of the page


@functools.cache
def code():
    """What the Python blocks of the page define."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), namespace)
    return SimpleNamespace(**namespace)


@pytest.mark.parametrize(
    ("weights", "forward_pass", "centralized_bound", "plain_bound"), table_under("weights")[1:]
)
def test_sums_change_by_the_rounding_of_the_weights(weights, forward_pass, centralized_bound, plain_bound):
    adamw, change_of_sums = code().adamw, code().change_of_sums
    of_centralized = change_of_sums(centralized(adamw, where="updates"), weights, forward_pass)
    assert_bound(of_centralized, centralized_bound)
    assert_bound(change_of_sums(adamw, weights, forward_pass), plain_bound)


@pytest.mark.parametrize(("optimizer", "before", "after"), table_under("optimizer")[1:])
def test_what_an_optimizer_makes_of_equal_entries(optimizer, before, after):
    def largest_step(where, dtype):
        gradients = jax.tree.map(lambda leaf: leaf.astype(dtype), code().gradients)
        params = jax.tree.map(jnp.zeros_like, gradients)
        rule = centralized(eval(optimizer.strip("`"), {"optax": optax}), where=where)
        updates, _ = rule.update(gradients, rule.init(params), params)
        return float(jnp.max(abs(updates["kernel"])))

    assert_bound(largest_step("gradients", jnp.float32), before)
    assert_bound(largest_step("updates", jnp.float32), after)
    assert largest_step("gradients", jnp.bfloat16) == 0


@pytest.mark.parametrize(("eps", "step"), [(1e-8, np.nan), (1e-4, 0)])
def test_adam_in_float16_needs_an_epsilon_that_float16_holds(eps, step):
    gradient, adam = jnp.zeros(3, jnp.float16), optax.adam(1.0, eps=eps)
    updates, _ = adam.update(gradient, adam.init(gradient))
    np.testing.assert_array_equal(updates, np.full(3, step))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_second_factor_of_lora_has_a_fan_in_of_its_rank(rank):
    kernel, x = jnp.ones((8, 16)), jnp.ones((2, 8))
    params = {"lora_a": jnp.ones((8, rank)), "lora_b": jnp.zeros((rank, 16))}

    def added_to_the_kernel(params, x):
        return jnp.sum((x @ (kernel + params["lora_a"] @ params["lora_b"])) ** 2)

    gradients = jax.tree.map(lambda leaf: jnp.asarray(normal(jnp.float32, leaf.shape, mean=0)), params)
    for axes in (
        out_last(params),
        infer_axes(code().loss, params, x),
        infer_axes(added_to_the_kernel, params, x),
    ):
        assert axes["lora_a"].fan_in == (0,)
        assert axes["lora_b"].fan_in == (() if rank == 1 else (0,))
        left = centralize_gradients(gradients, axes)["lora_b"]
        assert same_bits(left, gradients["lora_b"]) == (rank == 1)

    nothing_in_common = jnp.asarray(normal(jnp.float32, (rank, 10**5), mean=0))
    removed = removed_fraction(nothing_in_common, out_last)
    np.testing.assert_allclose(removed, 0 if rank == 1 else 1 / rank, atol=0.01)


@pytest.mark.parametrize("x64", [False, True])
def test_numpy_in_float64_comes_back_as_jax_has_it(x64):
    with jax.enable_x64(x64):
        result = centralize_gradients(np.arange(3.0), 0)
    assert result.dtype == (jnp.float64 if x64 else jnp.float32)


@pytest.mark.parametrize(
    ("dtype", "beyond"), [("float16", np.inf), ("float8_e4m3fn", np.nan), ("float4_e2m1fn", 6)]
)
def test_a_centralized_gradient_may_leave_the_range(dtype, beyond):
    gradient = np.array([1, -1, -1]) * float(jnp.finfo(dtype).max)

    def largest(gradient):
        return float(centralize_gradients(gradient.astype(dtype), 0)[0])

    np.testing.assert_equal(largest(gradient), beyond)
    assert np.isfinite(largest(gradient / 2))
