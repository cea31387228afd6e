"""What becomes of what a user gives: one `WeightAxes` a leaf, or an error that names the leaf."""

import collections
import copy
import dataclasses
import re

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Shape

import gc_optax
from gc_optax import WeightAxes, out_last
from gc_optax._resolve import Settler, settle


def leaf(*shape, dtype=jnp.float32):
    return Shape(shape, dtype)


# Axes


PARAMS = {"Dense_0": {"bias": leaf(4), "kernel": leaf(3, 4)}, "stack": leaf(2, 3, 4)}


def settled(axes, mask=None, params=PARAMS):
    return [entry.fan_in for entry in settle(params, axes, mask)]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (1, (1,)),
        (-1, (2,)),
        ((0, -2), (0, 1)),
        ((), ()),
        (None, ()),
        (np.int64(1), (1,)),
        (WeightAxes((-2,), (-1,)), (1,)),
        (optax.contrib.MuonDimensionNumbers(1, 2), (1,)),
        (optax.contrib.MuonDimensionNumbers((0, -2), (-1,)), (0, 1)),
        (optax.contrib.MuonDimensionNumbers([1], [2]), (1,)),
    ],
)
def test_every_kind_of_axes(entry, expected):
    axes = {"Dense_0": {"bias": None, "kernel": 0}, "stack": entry}
    assert settled(axes) == [(), (0,), expected]


def test_axes_as_a_function_see_the_parameters():
    def stacked(params):
        return jax.tree.map(lambda p: -2 if len(p.shape) > 1 else None, params)

    assert settled(stacked) == [(), (0,), (1,)]


def test_a_callable_module_of_axes_is_a_tree_and_not_a_function():
    mlp = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)), eqx.is_array)
    axes = jax.tree.map(lambda p: 1 if p.ndim == 2 else None, mlp)
    assert callable(axes)
    assert settled(axes, params=mlp)[:4] == [(1,), (), (1,), ()]
    mask = jax.tree.map(lambda p: p.shape == (4, 3), mlp)
    assert settled(axes, mask, params=mlp)[:4] == [(1,), (), (), ()]


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (3, ValueError, "['stack'], shape (2, 3, 4): axis 3 is out of range for rank 3"),
        (-4, ValueError, "['stack'], shape (2, 3, 4): axis -4 is out of range for rank 3"),
        (WeightAxes((0,), (7,)), ValueError, "['stack'], shape (2, 3, 4): axis 7 is out of range"),
        ((1, 1), ValueError, "['stack'], shape (2, 3, 4): an axis is repeated in fan_in (1, 1)"),
        ((1, -2), ValueError, "an axis is repeated in fan_in (1, -2)"),
        (WeightAxes((0,), (0, 1)), ValueError, "an axis is repeated in fan_in (0,), fan_out (0, 1)"),
        ("1", TypeError, "['stack'], shape (2, 3, 4) must be a WeightAxes, an int, a tuple of ints"),
        (("1",), TypeError, "['stack'], shape (2, 3, 4) must be ints, got ('1',)"),
        ((True,), TypeError, "must be ints, got (True,)"),
        (1.0, TypeError, "got 1.0"),
        ([0], TypeError, "got a list with [0]"),
        (optax.EmptyState(), TypeError, "got a EmptyState with nothing"),
        (optax.MaskedNode(), TypeError, "got MaskedNode()"),
        (collections.namedtuple("Pair", "first second")(0, 1), TypeError, "got a Pair with .first, .second"),
        (jnp.ones(3), TypeError, "got an array of dtype float32 and shape (3,)"),
        (True, TypeError, "got True; a tree of bools is a mask"),
        (optax.contrib.MuonDimensionNumbers("0", 1), TypeError, "must be ints, got '0'"),
    ],
)
def test_bad_axes_are_refused_with_the_place(entry, error, message):
    with pytest.raises(error, match=re.escape(message)):
        settled({"Dense_0": {"bias": None, "kernel": 0}, "stack": entry})


def test_an_axis_of_thousands_of_digits_is_refused_with_the_place():
    with pytest.raises(ValueError, match=r"\['stack'\], shape .* axis .* is out of range for rank 3"):
        settled({"Dense_0": {"bias": None, "kernel": 0}, "stack": 10**5000})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"Dense_0": {"kernel": 0}, "stack": 0},
            "at ['Dense_0'] the parameters have a dict with ['bias'], ['kernel']",
        ),
        ({"Dense_0": {"kernel": 0}, "stack": 0}, "axes has a dict with ['kernel']"),
        (
            {"Dense_0": 0, "stack": 0},
            "at ['Dense_0'] the parameters have a dict with ['bias'], ['kernel'], axes has 0",
        ),
        ({"Dense_0": None, "stack": 0}, "axes has None"),
        (
            [0, 1],
            "at the root the parameters have a dict with ['Dense_0'], ['stack'], axes has a list",
        ),
        ({}, "axes has a dict with nothing"),
        (0, "at the root"),
        ("out_last", "axes has 'out_last'"),
    ],
)
def test_axes_of_another_structure_are_refused_with_the_place(axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        settled(axes)


def test_a_bool_for_a_single_array_is_still_told_that_it_is_a_mask():
    with pytest.raises(TypeError, match=r"for the root, shape .* got True; a tree of bools is a mask"):
        settled(True, params=jnp.ones((3, 2)))


# The mask, and what is absent


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [(), (0,), (0, 1)]),
        (True, [(), (0,), (0, 1)]),
        (False, [(), (), ()]),
        ({"Dense_0": True, "stack": False}, [(), (0,), ()]),
        ({"Dense_0": {"bias": True, "kernel": False}, "stack": True}, [(), (), (0, 1)]),
        ({"Dense_0": np.bool_(True), "stack": np.array(False)}, [(), (0,), ()]),
        (lambda params: jax.tree.map(lambda p: len(p.shape) == 2, params), [(), (0,), ()]),
        (lambda params: {"Dense_0": False, "stack": True}, [(), (), (0, 1)]),
    ],
)
def test_masks_are_those_of_optax(mask, expected):
    assert settled(out_last, mask) == expected


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"Dense_0": True}, ValueError, "mask does not have the structure of the parameters: at the root"),
        ({"Dense_0": {"kernel": True}, "stack": True}, ValueError, "at ['Dense_0']"),
        ({"Dense_0": None, "stack": True}, ValueError, "mask has None"),
        (
            {"Dense_0": True, "stack": "False"},
            TypeError,
            "mask for ['stack'], shape (2, 3, 4) must be a bool",
        ),
        ({"Dense_0": True, "stack": 1}, TypeError, "got 1"),
        ({"Dense_0": True, "stack": None}, TypeError, "got None"),
        ({"Dense_0": True, "stack": {"a": True}}, TypeError, "got a dict with ['a']"),
        ({"Dense_0": True, "stack": np.array([True])}, TypeError, "mask for ['stack']"),
        ({"Dense_0": True, "stack": Shape((), jnp.bool_)}, TypeError, "mask for ['stack'], shape (2, 3, 4)"),
    ],
)
def test_bad_masks_are_refused_with_the_place(mask, error, message):
    with pytest.raises(error, match=re.escape(message)):
        settled(out_last, mask)


def test_a_mask_that_is_only_known_at_run_time_is_refused():
    @jax.jit
    def traced(flag):
        settled(out_last, {"Dense_0": True, "stack": flag})

    with pytest.raises(
        TypeError, match=re.escape("mask for ['stack'], shape (2, 3, 4) must be a bool that is known")
    ):
        traced(True)


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()])
def test_full_trees_match_parameters_of_which_some_are_absent(absent):
    axes = {"Dense_0": {"bias": None, "kernel": 0}, "stack": 1}
    mask = {"Dense_0": {"bias": True, "kernel": True}, "stack": True}
    assert settled(axes, mask, {"Dense_0": absent, "stack": leaf(2, 3, 4)}) == [(), (1,)]
    without_kernel = {"Dense_0": {"bias": leaf(4), "kernel": absent}, "stack": absent}
    assert settled(axes, mask, without_kernel) == [(), (), ()]


def test_the_reason_says_who_left_a_parameter_alone():
    axes = {"Dense_0": {"bias": None, "kernel": 0}, "stack": 1}
    whys = [entry.why for entry in settle(PARAMS, axes, {"Dense_0": True, "stack": False})]
    assert whys == ["left alone by axes", "given by axes", "masked out"]


def test_settled_axes_are_not_negative_and_keep_their_use_when_masked_out():
    axes = WeightAxes((-2,), (-1,), "dot_general")
    kept, masked = (settle(leaf(2, 3, 4), axes, mask)[0] for mask in (True, False))
    assert (kept.fan_in, kept.fan_out, kept.op) == ((1,), (2,), "dot_general")
    assert (masked.fan_in, masked.op) == ((), "dot_general")


@pytest.mark.parametrize(
    "read",
    [
        lambda params: gc_optax.infer_axes(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((5, 3))),
        gc_optax.out_last,
    ],
)
def test_axes_of_one_member_are_refused_for_a_stack_of_them(read):
    member = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf * k for k in range(4)]), member)
    axes = read(member)
    message = r"\['w'\], shape \(4, 3, 2\): they were read from a parameter of rank 2"
    with pytest.raises(ValueError, match=message):
        gc_optax.centralize(axes).init(stack)
    with pytest.raises(ValueError, match=message):
        gc_optax.centralize_gradients(stack, axes)
    each = jax.vmap(lambda gradients: gc_optax.centralize_gradients(gradients, axes))(stack)
    assert jnp.abs(each["w"].sum(1)).max() < 1e-6


def test_axes_of_ones_own_have_no_rank():
    stack = jnp.arange(24.0).reshape(4, 3, 2)
    centralized = gc_optax.centralize_gradients(stack, gc_optax.WeightAxes((1,)))
    assert jnp.abs(centralized.sum(1)).max() < 1e-6
    shifted = dataclasses.replace(out_last({"w": jnp.ones((3, 2))})["w"], fan_in=(1,), fan_out=(2,))
    np.testing.assert_array_equal(gc_optax.centralize_gradients(stack, shifted), centralized)
    assert copy.deepcopy(out_last([stack])[0]).rank == 3


def test_a_masked_parameter_may_have_any_axes():
    axes = {"w": out_last([jnp.ones((3, 2))])[0]}
    stack = {"w": jnp.ones((4, 3, 2))}
    assert gc_optax.centralize_gradients(stack, axes, mask={"w": False}) == stack


# What is kept from one update to the next


def test_an_update_settles_the_axes_of_the_same_shapes_once(monkeypatch):
    calls = []

    def counting(params, axes, mask, *, silent=False):
        calls.append(params["w"].shape)
        return settle(params, axes, mask, silent=silent)

    monkeypatch.setattr("gc_optax._resolve.settle", counting)
    transformation = gc_optax.centralize({"w": 0})
    for shape in ((3, 4), (3, 4), (5, 4), (3, 4)):
        updates, _ = transformation.update({"w": jnp.ones(shape)}, optax.EmptyState())
        np.testing.assert_array_equal(updates["w"], 0)
    assert calls == [(3, 4), (5, 4)]


def test_updates_of_one_shape_and_another_structure_are_told_apart():
    transformation = gc_optax.centralize(out_last)
    array = jnp.arange(6.0).reshape(2, 3)
    kernel, _ = transformation.update({"kernel": array}, optax.EmptyState())
    bias, _ = transformation.update({"bias": array}, optax.EmptyState())
    np.testing.assert_array_equal(kernel["kernel"], [[-1.5] * 3, [1.5] * 3])
    assert bias["bias"] is array


@pytest.mark.parametrize("role", ["axes", "mask"])
def test_a_function_of_the_user_is_called_at_every_update(role):
    calls = []

    def counting(params):
        calls.append(params)
        return {"w": 0 if role == "axes" else len(calls) < 3}

    transformation = gc_optax.centralize(**{"axes": {"w": 0}} | {role: counting})
    gradients = {"w": jnp.ones((3, 4))}
    given = [transformation.update(gradients, optax.EmptyState())[0]["w"] for _ in range(4)]
    assert len(calls) == 4
    assert calls[0]["w"] is gradients["w"]
    left_alone = [updates is gradients["w"] for updates in given]
    assert left_alone == ([False] * 4 if role == "axes" else [False, False, True, True])


def test_what_is_kept_is_bounded():
    settler = Settler({"w": 0}, None)
    for size in range(2, 40):
        (axes,) = settler({"w": jnp.ones((size, 2))})
        assert axes.fan_in == (0,)
    assert len(settler._kept) <= 8


@pytest.mark.parametrize("axes", [out_last, gc_optax.conv_only(out_last), {"w": WeightAxes((0,))}])
def test_a_transformation_can_be_sent_to_another_process_before_and_after_an_update(axes):
    optimizer = optax.chain(gc_optax.centralize(axes), optax.sgd(0.1))
    gradients = {"w": jnp.arange(12.0).reshape(3, 4)}
    state = optimizer.init(gradients)
    expected, _ = optimizer.update(gradients, state)
    sent = cloudpickle.loads(cloudpickle.dumps(optimizer))
    received, _ = sent.update(gradients, state)
    np.testing.assert_array_equal(received["w"], expected["w"])


def test_a_tree_that_is_changed_afterwards_has_no_effect():
    axes, mask = {"w": 0}, {"w": True}
    transformation = gc_optax.centralize(axes, mask=mask)
    gradients = {"w": jnp.arange(6.0).reshape(3, 2)}
    axes["w"], mask["w"] = 7, 7
    transformation.init(gradients)
    updates, _ = transformation.update(gradients, optax.EmptyState())
    np.testing.assert_array_equal(updates["w"], [[-2, -2], [0, 0], [2, 2]])


def test_keys_that_are_equal_to_python_have_one_meaning():
    transformation = gc_optax.centralize(out_last)
    for key in (True, 1):
        gradients = {"bias": {key: jnp.ones((3, 4))}}
        updates, _ = transformation.update(gradients, optax.EmptyState())
        assert updates["bias"][key] is gradients["bias"][key]


def test_a_tree_without_a_hash_or_with_other_leaves_than_arrays_is_settled_every_time():
    @jax.tree_util.register_pytree_node_class
    class Unhashable:
        def __init__(self, array):
            self.array = array

        def tree_flatten(self):
            return (self.array,), ["a list"]

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    transformation = gc_optax.centralize(out_last)
    updates, _ = transformation.update([Unhashable(jnp.ones((3, 4)))], optax.EmptyState())
    np.testing.assert_array_equal(updates[0].array, 0)
    updates, _ = transformation.update([jax.nn.relu, jnp.ones((3, 4))], optax.EmptyState())
    assert updates[0] is jax.nn.relu
    np.testing.assert_array_equal(updates[1], 0)


# What to write instead


@pytest.mark.parametrize(
    ("axes", "params", "message"),
    [
        ("out_last", PARAMS, "A convention is a function: gc_optax.out_last"),
        ("out_first", leaf(3, 4), "A convention is a function: gc_optax.out_first"),
        ({"params": PARAMS}, PARAMS, "Below ['params'] of the axes the two fit: give both with it, or both"),
        (PARAMS, {"params": PARAMS}, "Below ['params'] of the parameters the two fit: give both with it"),
    ],
)
def test_a_tree_that_does_not_fit_is_answered_with_the_mend(axes, params, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        gc_optax.centralize(axes).init(params)


@pytest.mark.parametrize(
    ("axes", "params"),
    [
        ({"encoder": None}, {"encoder": {"kernel": leaf(3, 4), "bias": None}}),
        ({"encoder": {}}, {"encoder": {"drop": {}, "dense": {"kernel": leaf(3, 4)}}}),
        ((0, 1), [(leaf(3, 4), leaf(4)), (leaf(4, 3), leaf(3))]),
        ("sideways", PARAMS),
        ({"w": 0}, {"v": leaf(3, 4)}),
    ],
)
def test_no_mend_is_made_up(axes, params):
    with pytest.raises(ValueError, match="does not have the structure of the parameters") as caught:
        gc_optax.centralize(axes).init(params)
    assert "fit" not in str(caught.value)
    assert "convention" not in str(caught.value)


class Tagged:
    """A node with something beside its leaf."""

    def __init__(self, kernel, tag):
        self.kernel, self.tag = kernel, tag


jax.tree_util.register_pytree_with_keys(
    Tagged,
    lambda node: (((jax.tree_util.GetAttrKey("kernel"), node.kernel),), node.tag),
    lambda tag, children: Tagged(*children, tag),
)


@pytest.mark.parametrize("tags", [("a", "b"), (np.arange(2), np.arange(2))])
def test_nodes_with_other_static_fields_are_told_apart_in_words(tags):
    params, axes = Tagged(leaf(3, 4), tags[0]), Tagged(0, tags[1])
    message = "at ['model'] the parameters have a Tagged with .kernel, axes has a Tagged with .kernel"
    with pytest.raises(ValueError, match=re.escape(message) + ". They are not equal in what they keep"):
        settled({"model": axes}, params={"model": params})


def test_a_very_long_name_of_a_type_is_shortened():
    long = type("Long" * 2000, (Shape,), {})
    with pytest.raises(TypeError) as caught:
        gc_optax.centralize_gradients({"w": long((3, 4), jnp.float32)})
    assert len(str(caught.value)) < 200


def test_axes_of_the_general_function_are_refused_for_an_nnx_optimizer_with_the_name_of_its_own():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    axes = gc_optax.infer_axes(lambda model, x: jnp.sum(model(x)), model, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=re.escape("gc_optax.nnx.infer_axes gives them")):
        nnx.Optimizer(model, gc_optax.centralize(axes), wrt=nnx.Param)


# Leaves that hold no numbers, or none that can be subtracted


def test_a_class_among_the_leaves_is_no_array():
    tree = {"dtype": np.float32, "kernel": jnp.ones((3, 4))}
    assert settled(None, params=tree) == [(), (0,)]
    assert gc_optax.centralize_gradients(tree)["dtype"] is np.float32


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (Shape((3, 4), jnp.float32), "the gradient of ['a']['w'] must be an array, got a ShapeDtypeStruct"),
        (
            np.ones((3, 4), np.longdouble),
            f"['a']['w'], shape (3, 4), is of dtype {np.dtype(np.longdouble)}, which JAX",
        ),
        (
            np.ones((3, 4), np.clongdouble),
            f"['a']['w'], shape (3, 4), is of dtype {np.dtype(np.clongdouble)}, which JAX",
        ),
        (np.ones((3, 4), ">f4"), "['a']['w'], shape (3, 4), is of dtype >f4, which JAX does not have"),
        (np.ma.ones((3, 4)), "the gradient of ['a']['w'] must be an array, got a MaskedArray"),
    ],
)
def test_what_jax_cannot_compute_with_is_refused_by_name(leaf, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        gc_optax.centralize_gradients({"a": {"w": leaf}})
    with pytest.raises(TypeError, match=re.escape(message)):
        gc_optax.centralize().update({"a": {"w": leaf}}, optax.EmptyState())
    with pytest.raises(TypeError, match=re.escape(message)):
        gc_optax.removed_fraction({"a": {"w": leaf}})
    masked = gc_optax.centralize_gradients({"a": {"w": leaf}}, mask=False)
    assert masked["a"]["w"] is leaf


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 4), "torch.float32"), ((3, 4), object()), ([3, 4], np.dtype("f4")), (None, None)],
)
def test_an_array_of_another_library_is_left_alone_with_the_reason(shape, dtype):
    foreign = type("Tensor", (), {"shape": shape, "dtype": dtype, "__repr__": lambda _: "a tensor"})()
    assert settle({"w": foreign}, None, None)[0].why.startswith("no array of floats: a")
    assert gc_optax.centralize_gradients({"w": foreign})["w"] is foreign


def test_a_leaf_that_numpy_cannot_read_is_left_alone():
    class Closed:
        def __array__(self, *args, **kwargs):
            raise RuntimeError

    closed = Closed()
    assert gc_optax.centralize_gradients({"w": closed})["w"] is closed
    assert gc_optax.centralize_gradients(range(3)) == range(3), "without a word of a single vector"


def test_a_dtype_without_a_sign_is_left_alone_with_the_reason():
    scales = jnp.ones((3, 4), jnp.float8_e8m0fnu)
    (axes,) = settle({"w": scales}, {"w": 0}, None)
    assert (axes.fan_in, axes.why) == ((), "float8_e8m0fnu has no sign, so it holds no difference")
    assert gc_optax.centralize_gradients({"w": scales}, {"w": 0})["w"] is scales
