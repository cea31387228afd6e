"""What the conventions read off names and shapes, and what becomes of what a user gives."""

import re
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import ShapeDtypeStruct as Shape

import gc_optax
from gc_optax import WeightAxes, conv_only, out_first, out_last
from gc_optax._axes import settle


def leaf(*shape, dtype=jnp.float32):
    return Shape(shape, dtype)


def fan_in(tree):
    return jax.tree.map(lambda axes: axes.fan_in, tree)


def only(tree):
    (axes,) = jax.tree.leaves(tree)
    return axes


# WeightAxes


def test_weight_axes_are_one_leaf_and_compare_by_value():
    axes = WeightAxes((0,), (1,), "dot_general", "because")
    assert jax.tree.leaves({"a": axes}) == [axes]
    assert axes == WeightAxes((0,), (1,), "dot_general", "because")
    assert hash(axes) == hash(WeightAxes((0,), (1,), "dot_general", "because"))
    with pytest.raises(AttributeError):
        axes.fan_in = (1,)


@pytest.mark.parametrize("bad", [0, [0], ("0",), (0.0,), (True,), None])
def test_weight_axes_refuse_what_is_no_tuple_of_ints(bad):
    with pytest.raises(TypeError, match=r"WeightAxes\.fan_in must be a tuple of ints"):
        WeightAxes(bad)
    with pytest.raises(TypeError, match=r"WeightAxes\.fan_out must be a tuple of ints"):
        WeightAxes((0,), bad)


# The conventions


@pytest.mark.parametrize(
    ("name", "shape", "expected_fan_in", "expected_fan_out"),
    [
        ("kernel", (64, 10), (0,), (1,)),
        ("kernel", (3, 3, 16, 32), (0, 1, 2), (3,)),
        ("kernel", (5, 16, 32), (0, 1), (2,)),
        ("kernel", (3, 3, 3, 16, 32), (0, 1, 2, 3), (4,)),
        ("recurrent_kernel", (64, 64), (0,), (1,)),
        ("w", (64, 10), (0,), (1,)),
        ("anything_else", (64, 10), (0,), (1,)),
        ("query/kernel", (64, 4, 16), (0,), (1, 2)),
        ("key/kernel", (64, 4, 16), (0,), (1, 2)),
        ("value/kernel", (64, 4, 16), (0,), (1, 2)),
        ("out/kernel", (4, 16, 64), (0, 1), (2,)),
        ("attention_output/kernel", (4, 16, 64), (0, 1), (2,)),
        ("query/kernel", (64, 64), (0,), (1,)),
        ("query/kernel", (12, 64, 4, 16), (1,), (2, 3)),
        ("depthwise_kernel", (3, 3, 16, 2), (0, 1), (3,)),
        ("depthwise_conv2d/kernel", (3, 3, 16, 2), (0, 1), (3,)),
        ("depthwise/kernel", (3, 3, 1, 16), (0, 1, 2), (3,)),
        ("pointwise_kernel", (1, 1, 16, 32), (0, 1, 2), (3,)),
    ],
)
def test_out_last_reads_a_kernel(name, shape, expected_fan_in, expected_fan_out):
    axes = only(out_last({name: leaf(*shape)}))
    assert (axes.fan_in, axes.fan_out) == (expected_fan_in, expected_fan_out)


@pytest.mark.parametrize(
    "name",
    [
        "bias",
        "bias_ih_l0",
        "recurrent_bias",
        "relpos_bias",
        "b",
        "b1",
        "beta",
        "offset",
        "scale",
        "layer_scale",
        "layerscale",
        "kernel_scale",
        "Dense_0/kernel/scale",
        "gamma",
        "negative_slope",
        "alpha",
        "embedding",
        "embeddings",
        "pos_embedding",
        "posEmbedding",
        "pos_embs",
        "lora_embeddings_a",
        "moving_mean",
        "moving_variance",
        "var",
        "encoder/~/layer_norm/scale",
        "encoder.layer_norm.bias",
    ],
)
@pytest.mark.parametrize("convention", [out_last, out_first])
def test_a_name_that_is_no_weight_matrix_is_left_alone_at_any_rank(convention, name):
    axes = only(convention({"model": {name: leaf(12, 64)}}))
    assert axes.fan_in == ()
    assert axes.why.startswith("named as")


@pytest.mark.parametrize(
    "name", ["kernel", "w", "W", "w1", "lora_a", "lora_b", "B", "embed_kernel", "scale_weight", "w_h", "foo"]
)
def test_every_other_name_is_a_weight(name):
    assert only(out_last({"layer": {name: leaf(12, 64)}})).fan_in == (0,)
    assert only(out_first({"layer": {name: leaf(12, 64)}})).fan_in == (1,)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("norm1", "normalization"),
        ("ln_2", "normalization"),
        ("BatchNorm", "normalization"),
        ("embedding", "lookup"),
        ("embed_tokens", "lookup"),
        ("wte", "lookup"),
        ("query_proj", None),
        ("design", None),
    ],
)
def test_a_module_that_calls_its_array_weight_is_known_by_its_own_name(module, why):
    axes = only(out_first({"blocks": {module: {"weight": leaf(12, 64)}}}))
    if why is None:
        assert axes.fan_in == (1,)
    else:
        assert axes.fan_in == ()
        assert why in axes.why


def test_an_embedding_module_of_higher_rank_is_a_patch_embedding():
    assert only(out_first({"patch_embed": {"weight": leaf(64, 3, 16, 16)}})).fan_in == (1, 2, 3)


def test_boxes_prefixes_and_lists_do_not_hide_the_name():
    boxed = nn.Partitioned(jnp.ones((4, 8)), names=("a", "b"))
    params = {
        "boxed": {"bias": boxed, "kernel": boxed},
        "listed": {"scale": [jnp.ones((4, 8))] * 2},
        "value": jnp.ones((4, 8)),
        "mlp/~/linear_0": {"w": jnp.ones((4, 8)), "b": jnp.ones((4, 8))},
    }
    read = fan_in(out_last(params))
    assert read["boxed"]["bias"].value == ()
    assert read["boxed"]["kernel"].value == (0,)
    assert read["listed"]["scale"] == [(), ()]
    assert read["value"] == (0,)
    assert read["mlp/~/linear_0"] == {"w": (0,), "b": ()}


@pytest.mark.parametrize("convention", [out_last, out_first])
@pytest.mark.parametrize(
    ("array", "why"),
    [
        (leaf(), "rank 0"),
        (leaf(8), "rank 1"),
        (leaf(0, 3), "empty"),
        (leaf(4, 4, dtype=jnp.int32), "no array of floats"),
        (leaf(4, 4, dtype=jnp.bool_), "no array of floats"),
        (leaf(4, 4, dtype=jax.dtypes.float0), "no array of floats"),
        (jax.nn.relu, "no array of floats"),
        (1.0, "no array of floats"),
    ],
)
def test_what_cannot_be_a_weight_matrix_is_left_alone_with_a_reason(convention, array, why):
    axes = only(convention({"kernel": array}))
    assert axes.fan_in == ()
    assert why in axes.why


@pytest.mark.parametrize(("convention", "shape"), [(out_last, (1, 1, 1, 8)), (out_first, (8, 1))])
def test_a_fan_in_of_one_is_left_alone(convention, shape):
    axes = only(convention({"kernel": leaf(*shape)}))
    assert axes.fan_in == ()
    assert "fan-in 1" in axes.why


def test_conventions_keep_the_structure_and_pass_over_what_is_absent():
    params = {"a": None, "b": optax.MaskedNode(), "c": [leaf(3, 4)], "d": {}}
    read = fan_in(out_last(params))
    assert read == {"a": None, "b": optax.MaskedNode(), "c": [(0,)], "d": {}}


def test_the_default_is_right_or_warns_in_every_row_of_the_table_in_the_readme():
    rows = {
        "Dense_0/kernel": ((8, 16), (0,)),
        "Conv_0/kernel": ((3, 3, 8, 16), (0, 1, 2)),
        "ConvTranspose_0/kernel": ((3, 3, 16, 8), (0, 1, 3)),
        "query/kernel": ((8, 2, 4), (0,)),
        "out/kernel": ((2, 4, 8), (0, 1)),
        "scanned/Dense_0/kernel": ((12, 8, 16), (1,)),
        "scanned/LayerNorm_0/scale": ((12, 8), ()),
        "experts/kernel": ((4, 8, 16), (1,)),
        "Embed_0/embedding": ((100, 8), ()),
        "one_feature/kernel": ((1, 16), ()),
    }
    params = {path: leaf(*shape) for path, (shape, _) in rows.items()}
    wrong = {path for path, axes in out_last(params).items() if axes.fan_in != rows[path][1]}
    assert wrong == {"ConvTranspose_0/kernel", "scanned/Dense_0/kernel", "experts/kernel"}
    (message,) = warnings_of(params)
    assert set(re.findall(r"^  \['(.*)'\], shape", message, re.MULTILINE)) == wrong


# conv_only


@pytest.mark.parametrize(
    ("path", "shape", "kept"),
    [
        ("Conv_0/kernel", (3, 3, 8, 16), True),
        ("Conv_0/kernel", (3, 8, 16), True),
        ("conv1d/kernel", (3, 8, 16), True),
        ("convolution/kernel", (3, 8, 16), True),
        ("kernel", (3, 3, 3, 8, 16), True),
        ("Dense_0/kernel", (8, 16), False),
        ("Dense_0/kernel", (4, 8, 16), False),
        ("query/kernel", (12, 64, 4, 16), False),
    ],
)
def test_conv_only_keeps_convolutions_of_a_convention(path, shape, kept):
    module, _, name = path.rpartition("/")
    params = {module: {name: leaf(*shape)}}
    for read in (conv_only(out_last)(params), conv_only(out_last(params))):
        assert bool(only(read).fan_in) == kept
        assert kept or only(read).why == "no convolution"


def test_conv_only_keeps_the_reason_of_what_was_left_alone_before():
    params = {"bias": leaf(8), "kernel": leaf(8, 8)}
    assert conv_only(out_last)(params)["bias"].why == out_last(params)["bias"].why


@pytest.mark.parametrize("bad", [{"a": 0}, {"a": (0, 1)}, 0, "out_last"])
def test_conv_only_refuses_axes_without_a_use(bad):
    with pytest.raises(TypeError, match="conv_only needs a WeightAxes at every leaf"):
        conv_only(bad)


def test_conv_only_refuses_none():
    with pytest.raises(TypeError, match=re.escape("such as out_last, got None")):
        conv_only(None)


# settle: axes


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
        ([0], TypeError, "got [0]"),
        (True, TypeError, "got True; a tree of bools is a mask"),
        (optax.contrib.MuonDimensionNumbers("0", 1), TypeError, "must be ints, got '0'"),
    ],
)
def test_bad_axes_are_refused_with_the_place(entry, error, message):
    with pytest.raises(error, match=re.escape(message)):
        settled({"Dense_0": {"bias": None, "kernel": 0}, "stack": entry})


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


# settle: mask, and what is absent


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
        ({"Dense_0": True, "stack": {"a": True}}, TypeError, "got {'a': True}"),
        ({"Dense_0": True, "stack": np.array([True])}, TypeError, "mask for ['stack']"),
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


# The warning


def warnings_of(params, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc_optax.centralize(*args, **kwargs).init(params)
    return [str(warning.message) for warning in caught]


DOUBTFUL = {
    "stacked": {"kernel": leaf(4, 8, 16), "bias": leaf(4, 16)},
    "fused": {"kernel": leaf(8, 3, 4, 4, 2)},
    "ConvTranspose_0": {"kernel": leaf(3, 3, 8, 16)},
    "ConvLocal_0": {"kernel": leaf(5, 5, 8, 16)},
    "query": {"kernel": leaf(12, 64, 4, 16)},
    "out": {"kernel": leaf(12, 4, 16, 64)},
}
SETTLED = {
    "Dense_0": {"kernel": leaf(8, 16), "bias": leaf(16)},
    "Conv_0": {"kernel": leaf(3, 3, 8, 16)},
    "query": {"kernel": leaf(64, 4, 16)},
    "attention": {"out": {"kernel": leaf(4, 16, 64)}},
    "pos_embedding": leaf(1, 10, 8),
    "separable": {"depthwise_kernel": leaf(3, 3, 8, 2)},
}


def test_the_default_warns_once_and_names_each_kernel_that_a_convention_cannot_settle():
    (message,) = warnings_of(DOUBTFUL | {"settled": SETTLED})
    named = re.findall(r"^  (.*), shape (.*): mean over axes (.*)$", message, re.MULTILINE)
    assert named == [
        ("['ConvLocal_0']['kernel']", "(5, 5, 8, 16)", "(0, 1, 2)"),
        ("['ConvTranspose_0']['kernel']", "(3, 3, 8, 16)", "(0, 1, 2)"),
        ("['fused']['kernel']", "(8, 3, 4, 4, 2)", "(0, 1, 2, 3)"),
        ("['out']['kernel']", "(12, 4, 16, 64)", "(0, 1, 2)"),
        ("['query']['kernel']", "(12, 64, 4, 16)", "(1,)"),
        ("['stacked']['kernel']", "(4, 8, 16)", "(0, 1)"),
    ]
    assert "centralize(gc_optax.infer_axes(loss, params, batch))" in message
    assert "centralize(gc_optax.out_last)" in message


def test_the_default_is_silent_where_every_kernel_is_settled():
    assert warnings_of(SETTLED) == []


@pytest.mark.parametrize("axes", [out_last, out_first, conv_only(out_last), out_last(DOUBTFUL)])
def test_explicit_axes_are_silent(axes):
    assert warnings_of(DOUBTFUL, axes) == []


def test_kernels_that_are_masked_out_are_not_warned_of():
    (message,) = warnings_of({"a": leaf(2, 3, 4), "b": leaf(2, 3, 4)}, mask={"a": True, "b": False})
    assert "['a']" in message
    assert "['b']" not in message
    assert warnings_of({"a": leaf(2, 3, 4)}, mask=False) == []


def test_the_pure_function_warns_too():
    with pytest.warns(UserWarning, match=re.escape("the root, shape (2, 3, 4)")):
        gc_optax.centralize_gradients(jnp.ones((2, 3, 4)))
