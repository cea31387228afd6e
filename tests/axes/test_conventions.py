"""What the conventions read off names and shapes, and what they warn of."""

import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from jax import ShapeDtypeStruct as Shape

import gc_optax
from gc_optax import conv_only, out_first, out_last


def leaf(*shape, dtype=jnp.float32):
    return Shape(shape, dtype)


def fan_in(tree):
    return jax.tree.map(lambda axes: axes.fan_in, tree)


def only(tree):
    (axes,) = jax.tree.leaves(tree)
    return axes


def warnings_of(params, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc_optax.centralize(*args, **kwargs).init(params)
    return [str(warning.message) for warning in caught]


# Kernels, and what is left alone


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
        ("query/kernel", (1, 1, 64, 16), (0, 1, 2), (3,)),
        ("out/kernel", (3, 3, 64, 16), (0, 1, 2), (3,)),
        ("depthwise_kernel", (3, 3, 16, 2), (0, 1), (3,)),
        ("depthwise_conv2d/kernel", (3, 3, 16, 2), (0, 1), (3,)),
        ("depthwise_conv1d/kernel", (3, 16, 1), (0,), (2,)),
        ("depthwise_conv2d/kernel", (3, 3, 1, 16), (0, 1, 2), (3,)),
        ("depthwise/kernel", (3, 3, 1, 16), (0, 1, 2), (3,)),
        ("conv_dw_1/kernel", (3, 3, 16, 1), (0, 1), (3,)),
        ("block1a_dwconv/kernel", (3, 3, 16, 1), (0, 1), (3,)),
        ("conv2_d_transpose/w", (3, 3, 32, 16), (0, 1, 3), (2,)),
        ("conv_nd_transpose/w", (3, 3, 32, 16), (0, 1, 3), (2,)),
        ("conv1_d_transpose/w", (3, 32, 16), (0, 2), (1,)),
        ("conv3_d_transpose/w", (3, 3, 3, 32, 16), (0, 1, 2, 4), (3,)),
        ("conv2d_transpose/kernel", (3, 3, 32, 16), (0, 1, 3), (2,)),
        ("Conv2DTranspose/kernel", (3, 3, 32, 16), (0, 1, 3), (2,)),
        ("ConvTranspose_0/kernel", (3, 3, 16, 32), (0, 1, 2), (3,)),
        ("kernel", (2, 3, 3, 3, 16, 32), (0, 1, 2, 3, 4), (5,)),
        ("pointwise_kernel", (1, 1, 16, 32), (0, 1, 2), (3,)),
    ],
)
def test_out_last_reads_a_kernel(name, shape, expected_fan_in, expected_fan_out):
    axes = only(out_last({name: leaf(*shape)}))
    assert (axes.fan_in, axes.fan_out) == (expected_fan_in, expected_fan_out)


@pytest.mark.parametrize(
    ("name", "shape", "expected_fan_in", "expected_fan_out"),
    [
        ("weight", (10, 64), (1,), (0,)),
        ("conv/weight", (32, 16, 3, 3), (1, 2, 3), (0,)),
        ("weight", (12, 10, 64), (1, 2), (0,)),
    ],
)
def test_out_first_reads_a_kernel(name, shape, expected_fan_in, expected_fan_out):
    axes = only(out_first({name: leaf(*shape)}))
    assert (axes.fan_in, axes.fan_out) == (expected_fan_in, expected_fan_out)


ATTENTION = {
    "query": {"kernel": leaf(64, 4, 16), "bias": leaf(4, 16)},
    "key": {"kernel": leaf(64, 4, 16), "bias": leaf(4, 16)},
    "value": {"kernel": leaf(64, 4, 16), "bias": leaf(4, 16)},
    "out": {"kernel": leaf(4, 16, 64), "bias": leaf(64)},
}


def stacked(params, layers=12):
    return jax.tree.map(lambda p: leaf(layers, *p.shape), params)


def test_a_stack_of_attention_layers_is_known_by_how_its_kernels_fit():
    read = out_last({"layers": stacked(ATTENTION)})["layers"]
    for projection in ("query", "key", "value"):
        assert read[projection]["kernel"].fan_in == (1,)
        assert read[projection]["kernel"].fan_out == (2, 3)
        assert read[projection]["bias"].fan_in == ()
    assert (read["out"]["kernel"].fan_in, read["out"]["kernel"].fan_out) == ((1, 2), (3,))
    assert not any(axes.fan_in for axes in jax.tree.leaves(conv_only(read)))


def test_attention_layers_in_a_list_are_told_apart():
    dense = {name: {"kernel": leaf(3, 8, 8)} for name in ATTENTION}
    (message,) = warnings_of({"layers": [ATTENTION, dense, ATTENTION]})
    paths = re.findall(r"^  (.*)\['kernel'\], shape", message, re.MULTILINE)
    assert paths == [f"['layers'][1]['{name}']" for name in sorted(ATTENTION)]


def test_a_convolution_named_as_attention_is_one_and_is_warned_of():
    of_a_gan = {"query": {"kernel": leaf(1, 1, 16, 4)}}
    assert only(conv_only(out_last)(of_a_gan)).fan_in == (0, 1, 2)
    assert len(warnings_of(of_a_gan)) == 1


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
        "gain",
        "shift",
        "codebook",
        "register_tokens",
        "std",
        "stddev",
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
        "encoder.attention.bias",
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
        ("ln_f", "normalization"),
        ("bn1", "normalization"),
        ("gn", "normalization"),
        ("BatchNorm", "normalization"),
        ("layer_normalization", "normalization"),
        ("encoder.norm1", "normalization"),
        ("adaLN_modulation.1", None),
        ("adaLN_modulation", None),
        ("norm_proj", None),
        ("embedding", "lookup"),
        ("embed_tokens", "lookup"),
        ("wte", "lookup"),
        ("wpe", "lookup"),
        ("transformer.wpe", "lookup"),
        ("embed_out", None),
        ("time_embed.0", None),
        ("embedding_hidden_mapping_in", None),
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


def test_only_the_array_called_weight_is_known_by_its_module():
    assert only(out_last({"patch_embed": {"kernel": leaf(12, 64)}})).fan_in == (0,)
    assert only(out_last({"norm": {"w_h": leaf(12, 64)}})).fan_in == (0,)


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
        "attention/query/kernel": ((8, 2, 4), (0,)),
        "attention/key/kernel": ((8, 2, 4), (0,)),
        "attention/value/kernel": ((8, 2, 4), (0,)),
        "attention/out/kernel": ((2, 4, 8), (0, 1)),
        "scanned/Dense_0/kernel": ((12, 8, 16), (1,)),
        "scanned/LayerNorm_0/scale": ((12, 8), ()),
        "attn/kv_einsum/w": ((2, 4, 8, 16), (2,)),
        "experts/kernel": ((4, 8, 16), (1,)),
        "Embed_0/embedding": ((100, 8), ()),
        "one_feature/kernel": ((1, 16), ()),
    }
    params = {path: leaf(*shape) for path, (shape, _) in rows.items()}
    wrong = {path for path, axes in out_last(params).items() if axes.fan_in != rows[path][1]}
    assert wrong == {
        "ConvTranspose_0/kernel",
        "scanned/Dense_0/kernel",
        "attn/kv_einsum/w",
        "experts/kernel",
    }
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
        ("unnamed/kernel", (3, 3, 8, 16), False),
        ("unnamed/kernel", (1, 1, 8, 16), True),
        ("SpectralConv_0/kernel", (8, 8, 6, 6), False),
        ("GATConv_0/kernel", (64, 8, 16), False),
        ("triplane/features", (512, 512, 3, 32), False),
        ("patch_embed/kernel", (16, 16, 3, 768), True),
        ("patch_embed/kernel", (16, 16, 4, 768), True),  # with an alpha channel
        ("patch_embed/kernel", (16, 16, 5, 768), False),
        ("Conv_0/kernel", (12, 3, 3, 8, 16), True),
        ("downconv/kernel", (2, 2, 8, 16), True),
        ("attn/kv_einsum/kernel", (2, 4, 2304, 256), False),
        ("experts/kernel", (3, 3, 64, 64), False),
        ("kernel", (3, 3, 3, 8, 16), False),
        ("kernel", (2, 2, 8, 16), False),
        ("Dense_0/kernel", (8, 16), False),
        ("Dense_0/kernel", (4, 8, 16), False),
        ("query/kernel", (64, 4, 16), False),
    ],
)
def test_conv_only_keeps_convolutions_of_a_convention(path, shape, kept):
    module, _, name = path.rpartition("/")
    params = {module: {name: leaf(*shape)}}
    for read in (conv_only(out_last)(params), conv_only(out_last(params))):
        assert bool(only(read).fan_in) == kept
        assert kept or only(read).why in ("no convolution", "not known to be a convolution")


def test_conv_only_keeps_convolutions_in_the_layout_of_pytorch():
    params = {
        "conv": {"weight": leaf(16, 8, 3)},
        "conv1": {"weight": leaf(16, 8, 3, 3)},
        "other": {"weight": leaf(16, 8, 3, 3)},
        "patches": {"weight": leaf(64, 3, 16, 16)},
        "experts": {"weight": leaf(4, 8, 3, 3)},
        "fused": {"weight": leaf(3, 8, 16, 64)},
        "head": {"weight": leaf(10, 16)},
    }
    assert fan_in(conv_only(out_first)(params)) == {
        "conv": {"weight": (1, 2)},
        "conv1": {"weight": (1, 2, 3)},
        "other": {"weight": ()},
        "patches": {"weight": (1, 2, 3)},
        "experts": {"weight": ()},
        "fused": {"weight": ()},
        "head": {"weight": ()},
    }


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


# How sure that is: the warning of the default


DOUBTFUL = {
    "stacked": {"kernel": leaf(4, 8, 16), "bias": leaf(4, 16)},
    "fused": {"kernel": leaf(8, 3, 4, 4, 2)},
    "six": {"kernel": leaf(2, 8, 3, 4, 4, 2)},
    "ConvTranspose_0": {"kernel": leaf(3, 3, 8, 16)},
    "transposed": {"kernel": leaf(3, 3, 8, 16)},
    "ConvLocal_0": {"kernel": leaf(5, 5, 8, 16)},
    "ensemble": {"value": {"kernel": leaf(10, 32, 2)}},
    "scanned_attention": stacked(ATTENTION),
    "scanned_dense": {name: {"kernel": leaf(3, 8, 8)} for name in ATTENTION},
    "self_attention_gan": {"query": {"kernel": leaf(1, 1, 16, 4)}},
}
SETTLED = {
    "Dense_0": {"kernel": leaf(8, 16), "bias": leaf(16)},
    "Conv_0": {"kernel": leaf(3, 3, 8, 16)},
    "attention": ATTENTION,
    "grouped_query": {
        "query": {"kernel": leaf(64, 8, 16)},
        "key": {"kernel": leaf(64, 2, 16)},
        "value": {"kernel": leaf(64, 2, 12)},
        "attention_output": {"kernel": leaf(8, 12, 64)},
    },
    "dense_attention": {name: {"kernel": leaf(8, 8)} for name in ATTENTION},
    "unet": {"conv_out": {"kernel": leaf(3, 3, 8, 2)}},
    "pos_embedding": leaf(1, 10, 8),
    "separable": {"depthwise_kernel": leaf(3, 3, 8, 2)},
    "conv2_d_transpose": {"w": leaf(3, 3, 8, 16)},
}


def test_the_default_warns_once_and_names_each_kernel_that_a_convention_cannot_settle():
    (message,) = warnings_of(DOUBTFUL | {"settled": SETTLED})
    named = re.findall(r"^  (.*)\['kernel'\], shape (.*): mean over axes (.*)$", message, re.MULTILINE)
    assert named == [
        ("['ConvLocal_0']", "(5, 5, 8, 16)", "(0, 1, 2)"),
        ("['ConvTranspose_0']", "(3, 3, 8, 16)", "(0, 1, 2)"),
        ("['ensemble']['value']", "(10, 32, 2)", "(0,)"),
        ("['fused']", "(8, 3, 4, 4, 2)", "(0, 1, 2, 3)"),
        ("['scanned_attention']['key']", "(12, 64, 4, 16)", "(1,)"),
        ("['scanned_attention']['out']", "(12, 4, 16, 64)", "(1, 2)"),
        ("['scanned_attention']['query']", "(12, 64, 4, 16)", "(1,)"),
        ("['scanned_attention']['value']", "(12, 64, 4, 16)", "(1,)"),
        ("['scanned_dense']['key']", "(3, 8, 8)", "(0,)"),
        ("['scanned_dense']['out']", "(3, 8, 8)", "(0, 1)"),
        ("['scanned_dense']['query']", "(3, 8, 8)", "(0,)"),
        ("['scanned_dense']['value']", "(3, 8, 8)", "(0,)"),
        ("['self_attention_gan']['query']", "(1, 1, 16, 4)", "(0, 1, 2)"),
        ("['six']", "(2, 8, 3, 4, 4, 2)", "(0, 1, 2, 3, 4)"),
        ("['stacked']", "(4, 8, 16)", "(0, 1)"),
        ("['transposed']", "(3, 3, 8, 16)", "(0, 1, 2)"),
    ]
    assert "centralize(gc_optax.infer_axes(loss, params, batch))" in message
    assert "a tree of axes of your own" in message
    assert "centralize(gc_optax.out_last)" in message


# The kernels of rank 3 and more in models as they are published, with their shapes, their true fan-in and
# whether the default is to be silent about them.
PUBLISHED = {
    # Flax's Gemma example; Gemma with as many keys as queries; its mixture of experts in Tunix.
    "layer_0/attn/q_einsum/w": ((8, 2304, 256), (1,), False),
    "layer_0/attn/kv_einsum/w": ((2, 4, 2304, 256), (2,), False),
    "layer_0/attn/kv_einsum/kernel": ((2, 4, 2304, 256), (2,), False),
    "layer_0/attn/attn_vec_einsum/w": ((8, 256, 2304), (0, 1), False),
    "layer_0/mlp/gating_einsum": ((2, 2304, 9216), (1,), False),
    "layer_0/attn/qkv_einsum/w": ((3, 3, 2304, 256), (2,), False),
    "layers/0/moe/gating_einsum": ((128, 2, 704, 2816), (3,), False),
    # MaxText, scanned over the layers in axis 1, and its mixture of experts; fused query, key and value.
    "decoder/layers/self_attention/query/kernel": ((4096, 32, 32, 128), (0,), False),
    "decoder/layers/self_attention/out/kernel": ((32, 32, 128, 4096), (0, 2), False),
    "decoder/layers/mlp/wi_0/kernel": ((4096, 32, 14336), (0,), False),
    "decoder/layers/MoeBlock_0/wi_0": ((8, 32, 4096, 14336), (2,), False),
    "decoder/moe_layers/MoeBlock_0/wo": ((8, 8, 14336, 4096), (2,), False),
    "decoder/layers/self_attention/qkv_proj/kernel": ((4096, 3, 32, 128), (0,), False),
    "vmapped/q_proj/kernel": ((12, 768, 12, 64), (1,), False),
    "scanned/experts/kernel": ((12, 8, 768, 3072), (2,), False),
    "layer_0/kv_einsum/lora/a": ((2, 2, 4, 16), (2,), False),
    # Convolutions of Flax: a ResNet, an Inception's 1 x 7, a ViT's patches, a stack of twelve of each kind.
    "ResNetBlock_0/Conv_0/kernel": ((3, 3, 64, 64), (0, 1, 2), True),
    "ResNetBlock_0/conv_proj/kernel": ((1, 1, 64, 128), (0, 1, 2), True),
    "conv_init/kernel": ((7, 7, 3, 64), (0, 1, 2), True),
    "embedding/kernel": ((16, 16, 3, 768), (0, 1, 2), True),
    "stem/proj/kernel": ((4, 4, 3, 96), (0, 1, 2), True),
    "downsample/kernel": ((1, 1, 64, 128), (0, 1, 2), True),
    "InceptionBlock_0/Conv_0/kernel": ((1, 7, 64, 64), (0, 1, 2), False),
    "layers/Conv1D_0/Conv_0/kernel": ((12, 3, 64, 64), (1, 2), False),
    "layers/Conv_0/kernel": ((12, 3, 3, 64, 64), (1, 2, 3), False),
    "Conv3D_0/Conv_0/kernel": ((3, 3, 3, 16, 32), (0, 1, 2, 3), False),
    # Keras.
    "conv1d/kernel": ((5, 64, 32), (0, 1), True),
    "conv1d_1/kernel": ((5, 16, 32), (0, 1), False),
    "conv2d_7/kernel": ((1, 7, 64, 64), (0, 1, 2), True),
    "conv3d/kernel": ((3, 3, 3, 16, 32), (0, 1, 2, 3), True),
    "conv_dw_1/kernel": ((3, 3, 32, 1), (0, 1), True),
    "block6k_se_reduce/kernel": ((1, 1, 1536, 64), (0, 1, 2), True),
    "layers/conv_1d/w": ((6, 4, 8), (1,), False),
    "block3d_expand_conv/kernel": ((3, 3, 64, 256), (0, 1, 2), True),
    "conv2d_transpose/kernel": ((4, 4, 64, 128), (0, 1, 3), False),
    "up1/kernel": ((3, 3, 64, 128), (0, 1, 3), False),
    # Haiku.
    "res_net50/~/initial_conv/w": ((7, 7, 3, 64), (0, 1, 2), True),
    "conv3_d/w": ((3, 3, 3, 16, 32), (0, 1, 2, 3), True),
    "conv2_d_transpose/w": ((4, 4, 64, 128), (0, 1, 3), True),
    "layer_stack/conv2_d/w": ((6, 3, 3, 64, 64), (1, 2, 3), False),
    # Stacks of stacks, as many of the one as of the other; as many convolutions as they are wide.
    "critics/Dense_1/kernel": ((5, 5, 17, 64), (2,), False),
    "trunk/Dense_0/kernel": ((3, 3, 16, 16), (2,), False),
    "twins/Dense_1/kernel": ((2, 2, 4, 64), (2,), False),
    "layers/MoE_0/w_in": ((3, 3, 8, 16), (2,), False),
    "layers/LSTMCell_0/hi/kernel": ((3, 3, 64, 64), (2,), False),
    "ensemble/Conv_0/kernel": ((5, 5, 4, 8), (1, 2), False),
    "ScanConv_0/kernel": ((3, 3, 64, 64), (1, 2), False),
    # A Fourier neural operator, whose axes are (in, out, modes, modes).
    "SpectralConv2d_0/weights1": ((8, 8, 6, 6), (0,), False),
    "SpectralConv1d_0/weights": ((64, 64, 16), (0,), False),
    # Transposed convolutions under other names than Flax gives.
    "tconv1/kernel": ((3, 3, 64, 32), (0, 1, 3), False),
    "convtranspose/kernel": ((3, 3, 64, 32), (0, 1, 3), False),
    "conv2dtranspose/kernel": ((3, 3, 64, 32), (0, 1, 3), False),
    "upscale/conv/kernel": ((3, 3, 64, 32), (0, 1, 2), True),
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_the_default_is_silent_about_a_kernel_of_a_published_model_only_where_it_is_right(path):
    shape, true_fan_in, is_settled = PUBLISHED[path]
    *modules, name = path.split("/")
    params = {"/".join(modules): {name: leaf(*shape)}}
    assert (warnings_of(params) == []) == is_settled
    axes = only(out_last(params))
    assert not is_settled or axes.fan_in == true_fan_in
    is_convolution = re.search("conv|embedding|stem|downsample|se_reduce", path.lower())
    assert axes.op != "conv_general_dilated" or is_convolution


def test_the_warning_of_very_many_kernels_names_the_first():
    (message,) = warnings_of([leaf(4, 8, 16)] * 500)
    assert len(re.findall(r"^  \[", message, re.MULTILINE)) == 20
    assert "\n  and 480 more\n" in message


def test_the_default_is_silent_where_every_kernel_is_settled():
    assert warnings_of(SETTLED) == []


def test_absent_parameters_do_not_confuse_the_warning():
    params = {"first": None, "second": leaf(2, 3, 4), "third": optax.MaskedNode(), "zeroth": leaf(3, 4)}
    (message,) = warnings_of(params)
    assert re.findall(r"^  (.*), shape", message, re.MULTILINE) == ["['second']"]


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


def test_conv_only_of_a_convention_takes_any_tree():
    assert conv_only(out_last)(None) is None
    assert gc_optax.centralize_gradients(None, conv_only(out_last)) is None
    assert gc_optax.centralize_gradients({}, conv_only(out_last)) == {}
