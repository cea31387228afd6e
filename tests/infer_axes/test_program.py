"""How JAX writes down loops, functions, arrays and numbers, all of which depends on its version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import dense, f32, fan_in_of, square, x
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from gc_optax._infer import _program as program

flag = jax.ShapeDtypeStruct((), jnp.bool_)
layers = f32(5, 4, 4)


def equation(fn, *args, name):
    """The first equation with a name that `fn` is traced to, wherever it is."""
    waiting = [jax.make_jaxpr(fn)(*args)]
    while waiting:
        jaxpr = program.opened(waiting.pop(0))
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == name:
                return eqn
            waiting += program.bodies_of(eqn)
    raise AssertionError(f"no {name}")


def names_of(jaxpr):
    return [eqn.primitive.name for eqn in program.opened(jaxpr).eqns]


def shapes_of(atoms):
    return [program.shape_of(atom) for atom in atoms]


# Loops: how many arguments are not for the body, the same in each round, and carried.

SCANS = {
    "a state alone": (lambda x: lax.scan(lambda h, _: (jnp.tanh(h), None), x, length=3)[0], (x,), (0, 0, 1)),
    "a matrix that is the same": (
        lambda w, x: lax.scan(lambda h, _: (h @ w, None), x, length=3)[0],
        (square, x),
        (0, 1, 1),
    ),
    "through the layers": (
        lambda w, x: lax.scan(lambda h, w: (h @ w, None), x, w)[0],
        (layers, x),
        (0, 0, 1),
    ),
    "through the layers, in reverse": (
        lambda w, x: lax.scan(lambda h, w: (h @ w, None), x, w, reverse=True)[0],
        (layers, x),
        (0, 0, 1),
    ),
    "through the layers, unrolled in part": (
        lambda w, x: lax.scan(lambda h, w: (h @ w, None), x, w, unroll=2)[0],
        (layers, x),
        (0, 0, 1),
    ),
    "with what is stacked up": (
        lambda w, x: lax.scan(lambda h, w: (h @ w, h), x, w)[1],
        (layers, x),
        (0, 0, 1),
    ),
    "with all of these": (
        lambda w, b, x: lax.scan(lambda c, w: ((c[0] @ w + b, c[1] + 1), (c[0], c[1])), (x, 0.0), w),
        (layers, f32(4), x),
        (0, 1, 2),
    ),
    "lax.map": (lambda w: lax.map(jnp.tanh, w), (layers,), (0, 0, 0)),
    "lax.map with a matrix": (lambda w, x: lax.map(lambda w: x @ w, w), (layers, x), (0, 1, 0)),
    "vmap": (
        jax.vmap(lambda w, x: lax.scan(lambda h, w: (h @ w, None), x, w)[0], (0, None)),
        (f32(2, 5, 4, 4), x),
        (0, 0, 1),
    ),
    "fori_loop with a known number of rounds": (
        lambda w, x: lax.fori_loop(0, 5, lambda _, h: h @ w, x),
        (square, x),
        (0, 1, 2),
    ),
    "checkpoint": (
        lambda w, x: lax.scan(jax.checkpoint(lambda h, w: (h @ w, None)), x, w)[0],
        (layers, x),
        (0, 0, 1),
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_the_arguments_of_a_scan(name):
    fn, args, expected = SCANS[name]
    eqn = equation(fn, *args, name="scan")
    body, *counts = program.loop_of(eqn)
    assert tuple(counts) == expected
    first, fixed, carried = counts
    inside = program.opened(body)
    assert shapes_of(eqn.invars[: first + fixed + carried]) == shapes_of(inside.invars[: fixed + carried])
    assert [shape[1:] for shape in shapes_of(eqn.invars[first + fixed + carried :])] == shapes_of(
        inside.invars[fixed + carried :]
    )
    assert shapes_of(eqn.outvars[:carried]) == shapes_of(inside.outvars[:carried])
    assert [shape[1:] for shape in shapes_of(eqn.outvars[carried:])] == shapes_of(inside.outvars[carried:])


WHILES = {
    "until a number of rounds": (
        lambda w, x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1],
        (square, x),
        (0, 1, 2),
    ),
    "until the data say so": (
        lambda w, x: lax.while_loop(lambda h: h.sum() < 5, lambda h: h @ w, x),
        (square, x),
        (0, 1, 1),
    ),
    "until an argument says so": (
        lambda w, x, most: lax.while_loop(lambda h: h.sum() < most, lambda h: h @ w, x),
        (square, x, f32()),
        (1, 1, 1),
    ),
    "fori_loop with a number of rounds that is not known": (
        lambda w, x, rounds: lax.fori_loop(0, rounds, lambda i, h: h @ w[i], x),
        (layers, x, jnp.int32(3)),
        (0, 1, 3),
    ),
}


@pytest.mark.parametrize("name", WHILES)
def test_the_arguments_of_a_while_loop(name):
    fn, args, expected = WHILES[name]
    eqn = equation(fn, *args, name="while")
    body, *counts = program.loop_of(eqn)
    assert tuple(counts) == expected
    inside = program.opened(body)
    assert shapes_of(eqn.invars[counts[0] :]) == shapes_of(inside.invars)
    assert shapes_of(eqn.outvars) == shapes_of(inside.outvars) == shapes_of(eqn.invars[-counts[2] :])
    assert "dot_general" in names_of(body)


# Functions inside of functions.


@jax.custom_jvp
def with_tangent(w, x):
    return x @ w


with_tangent.defjvp(lambda primals, tangents: (with_tangent(*primals), tangents[1] @ primals[0]))


@jax.custom_vjp
def with_cotangent(w, x):
    return x @ w


with_cotangent.defvjp(lambda w, x: (with_cotangent(w, x), (w, x)), lambda wx, g: (wx[1].T @ g, g @ wx[0].T))


def product(w, x):
    return x @ w


mesh = AbstractMesh((4,), ("d",), axis_types=(AxisType.Auto,))
FUNCTIONS = {
    "jit": (jax.jit(product), ("jit", "pjit")),
    "checkpoint": (jax.checkpoint(product), ("remat2", "checkpoint")),
    "checkpoint with a policy": (
        jax.checkpoint(product, policy=jax.checkpoint_policies.dots_saveable),
        ("remat2", "checkpoint"),
    ),
    "custom_jvp": (with_tangent, ("custom_jvp_call",)),
    "custom_vjp": (with_cotangent, ("custom_vjp_call", "custom_vjp_call_jaxpr")),
    "shard_map": (
        jax.shard_map(product, mesh=mesh, in_specs=(P(None, "d"), P()), out_specs=P(None, "d")),
        ("shard_map",),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_body_of_a_function(name):
    fn, names = FUNCTIONS[name]
    (eqn,) = jax.make_jaxpr(fn)(f32(4, 8), x).eqns
    assert eqn.primitive.name in names
    (body,) = program.bodies_of(eqn)
    assert names_of(body)[-1] == "dot_general"
    inside = program.opened(body)
    assert (len(inside.invars), len(inside.outvars)) == (len(eqn.invars), len(eqn.outvars)) == (2, 1)


@pytest.mark.parametrize("branches", [2, 3])
def test_the_branches_of_cond_and_of_switch(branches):
    def fn(which, w, x):
        return lax.switch(which, [lambda: x @ w, lambda: jnp.tanh(x @ w), lambda: -x @ w][:branches])

    eqn = equation(fn, jnp.int32(1), dense, x, name="cond")
    bodies = program.bodies_of(eqn)
    assert len(bodies) == branches
    assert all("dot_general" in names_of(body) for body in bodies)
    # The first argument says which.
    assert all(len(program.opened(body).invars) == len(eqn.invars) - 1 for body in bodies)


def test_the_branches_of_cond_are_in_the_order_of_their_numbers():
    eqn = equation(lambda q, x: lax.cond(q, jnp.sin, jnp.cos, x), flag, x, name="cond")
    assert [names_of(body) for body in program.bodies_of(eqn)] == [["cos"], ["sin"]]


@pytest.mark.parametrize(
    "fn", [lambda w, x: x @ w, lambda w, x: jnp.tanh(x) + 1, lambda w, x: lax.reduce(x, 0.0, lax.add, [0])]
)
def test_what_calls_no_function_of_its_own_arguments_has_no_body(fn):
    assert all(program.bodies_of(eqn) == [] for eqn in jax.make_jaxpr(fn)(dense, x).eqns)


# Arrays of the surroundings.

matrix, permutation = np.ones((4, 6), np.float32), np.array([2, 0, 1])


@pytest.mark.parametrize("array", [matrix, jnp.asarray(matrix), permutation], ids=["numpy", "jax", "indices"])
def test_arrays_that_are_closed_over_come_with_their_values(array):
    closed = jax.make_jaxpr(lambda x: x + jnp.sum(array))(x)
    (eqn,) = [eqn for eqn in closed.eqns if any(program.shape_of(var) == array.shape for var in eqn.invars)]
    ((var, value),) = program.closed_over(closed)
    assert var in eqn.invars
    assert np.array_equal(value, array)


def test_an_open_jaxpr_has_the_same_variables_with_or_without_their_values():
    closed = jax.make_jaxpr(lambda x: x @ jnp.asarray(matrix))(x)
    ((var, value),) = program.closed_over(closed)
    ((inside, known),) = program.closed_over(program.opened(closed))
    assert inside is var
    assert known is None or known is value


def test_opening_an_open_jaxpr_changes_nothing():
    closed = jax.make_jaxpr(jnp.tanh)(x)
    assert program.opened(program.opened(closed)) is program.opened(closed)


# Numbers.


def test_numbers_in_an_equation_are_literals():
    (eqn,) = jax.make_jaxpr(lambda x: x * 2.0)(x).eqns
    assert [program.is_literal(atom) for atom in eqn.invars] == [False, True]
    assert shapes_of(eqn.invars) == [(3, 4), ()]


@pytest.mark.parametrize(
    "value",
    [
        np.array([1, 0, 2]),
        jnp.array([1, 0, 2]),
        np.array([[1], [2]], np.uint8),
        np.int32(3),
        3,
        True,
        np.array([True, False]),
        np.zeros((0,), int),
    ],
    ids=repr,
)
def test_whole_numbers_can_be_indices(value):
    found = program.indices(value)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, np.asarray(value))


@pytest.mark.parametrize(
    "value",
    [None, 1.5, np.ones(3), jnp.ones(3), jnp.ones(3, jnp.bfloat16), 1j, "1"],
    ids=repr,
)
def test_other_values_are_no_indices(value):
    assert program.indices(value) is None


def test_what_is_traced_is_no_index():
    seen = []
    jax.make_jaxpr(lambda i: seen.append(program.indices(i)) or i)(jnp.array([1, 2]))
    assert seen == [None]


INDICES = {
    "closed over": lambda: permutation,
    "an array of JAX": lambda: jnp.array(permutation),
    "made inside, of Python numbers": lambda: jnp.array([2, 0, 1]),
    "negative": lambda: np.array([-1, 0, -2]),
    "of another kind": lambda: permutation.astype(np.uint8),
    "counted up": lambda: jnp.arange(3),
    "counted down": lambda: 2 - jnp.arange(3),
    "counted and reshaped": lambda: jnp.arange(3)[None].reshape(3),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_are_known_when_a_program_is_read(name):
    assert fan_in_of(lambda w, x: x[:, :3] @ w[INDICES[name]()], f32(3, 6), x) == (0,)
