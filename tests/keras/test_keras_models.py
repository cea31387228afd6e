"""The axes of every layer of Keras that has weights, and of whole models, against answers written by hand."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import applications, initializers, layers

from gc_optax._conventions import read_out_last
from gc_optax.keras import centralized, infer_axes

# What has no fan-in. All of it is left alone.
BIAS, SCALE, TABLE = "a bias", "a scale", "a table"


@pytest.fixture(autouse=True)
def zeros_for_random_numbers(monkeypatch):
    """No test computes anything from a variable, and XLA takes a second to compile a random kernel."""
    keras.utils.clear_session(free_memory=False)  # Keras counts the layers of one name in a process
    for drawn in (
        initializers.VarianceScaling,
        initializers.RandomUniform,
        initializers.RandomNormal,
        initializers.TruncatedNormal,
        initializers.Orthogonal,
    ):
        monkeypatch.setattr(drawn, "__call__", lambda self, shape, dtype=None, **_: np.zeros(shape, dtype))


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its inputs, and the fan-in of each variable by the end of its path, or why it has none.

    One end may stand for many paths, those of all kernels in the layer. Of two ends the longer counts.

    Args:
        by_name: what `out_last` takes for settled and is not so. It sees names and shapes, not the layer.
        warned: which variables `infer_axes` cannot read, and leaves alone with a warning.
        rank: of LoRA, which is enabled where it is not 0.
    """

    make: Callable[[], Any]
    inputs: tuple[Any, ...]
    truth: dict[str, Any]
    by_name: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    warned: tuple[str, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    rank: int = 0


class TiedLanguageModel(keras.Model):
    """Embeds, and projects back to the vocabulary."""

    def __init__(self, **kwargs):
        super().__init__()
        self.table = layers.ReversibleEmbedding(10, 4, **kwargs)

    def call(self, tokens):
        return self.table(keras.ops.tanh(self.table(tokens)), reverse=True)


def jax_layer():
    def call(params, inputs):
        return inputs @ params["matrix"].T + params["offset"]

    return layers.JaxLayer(call, params={"matrix": np.zeros((3, 5)), "offset": np.zeros(3)})


def einsum(equation, shape, inputs, fan_in, **kwargs):
    """(inputs, kernel -> outputs): the equation says all that there is to say."""
    return Case(
        lambda: layers.EinsumDense(equation, output_shape=shape),
        (floats(*inputs),),
        {"kernel": fan_in},
        **kwargs,
    )


def convolution(make, inputs, *fan_in):
    return Case(make, (inputs,), {"kernel": fan_in, "bias": BIAS})


def recurrent(make, inputs, window=0):
    """(*window, in, gates * units) and (*window, units, gates * units)."""
    kernel = tuple(range(window + 1))
    return Case(make, (inputs,), {"/kernel": kernel, "recurrent_kernel": kernel, "bias": BIAS})


def cell(make, *states):
    return Case(make, (floats(2, 5), *states), {"kernel": (0,), "recurrent_kernel": (0,), "bias": BIAS})


def attention(make, query=None, value=None, names=("query", "key", "value"), **kwargs):
    """Into heads, (embed, heads, dim), and out of them, (heads, dim, embed)."""
    into = {f"{name}/kernel": (0,) for name in names}
    truth = {**into, "attention_output/kernel": (0, 1), "bias": BIAS}
    return Case(make, (query or SEQUENCE, value or query or SEQUENCE), truth, kwargs=kwargs)


def normalization(make, inputs):
    return Case(make, (inputs,), {"gamma": SCALE, "beta": BIAS})


SEQUENCE, IMAGE, VIDEO = floats(2, 12, 4), floats(2, 12, 12, 4), floats(2, 6, 6, 6, 4)
STATE = floats(2, 3)

CASES = {
    # Dense layers. A stack of them, one for each expert or position, shares an axis with its data.
    "Dense": Case(lambda: layers.Dense(3), (floats(2, 5),), {"kernel": (0,), "bias": BIAS}),
    "Dense on a sequence": Case(lambda: layers.Dense(3, "gelu"), (SEQUENCE,), {"kernel": (0,), "bias": BIAS}),
    "einsum, dense": einsum("abc,cd->abd", (None, 6), (2, 12, 4), (0,)),
    "einsum, ellipsis": einsum("...x,xy->...y", (6,), (2, 12, 4), (0,)),
    "einsum, into heads": einsum("abc,cde->abde", (None, 2, 3), (2, 12, 4), (0,)),
    "einsum, out of heads": einsum("abde,dec->abc", (None, 4), (2, 12, 2, 3), (0, 1)),
    # Of rank 2, the names tell nothing of a kernel that is stored the other way round.
    "einsum, transposed": einsum("bi,oi->bo", (3,), (2, 5), (1,), by_name={"kernel": (0,)}),
    "einsum, into heads, transposed": einsum("btd,hkd->bthk", (None, 2, 3), (2, 12, 4), (2,)),
    "einsum, experts": einsum("bei,eio->beo", (3, 6), (2, 3, 4), (1,)),
    "einsum, experts in the last axis": einsum("bei,ioe->beo", (3, 6), (2, 3, 4), (0,)),
    "einsum, experts that see the same data": einsum("bi,eio->beo", (3, 6), (2, 4), (1,)),
    "einsum, a dense layer per position": einsum("btc,tcd->btd", (12, 6), (2, 12, 4), (1,)),
    "einsum, tokens are mixed": einsum("btc,ts->bsc", (5, 4), (2, 12, 4), (0,)),
    "einsum, tokens and channels": einsum("btc,tcd->bd", (6,), (2, 12, 4), (0, 1)),
    "einsum, entry by entry": einsum("bi,i->bi", (5,), (2, 5), SCALE),
    "einsum with a bias": Case(
        lambda: layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3), bias_axes="de"),
        (SEQUENCE,),
        {"kernel": (0,), "bias": BIAS},
    ),
    # Tables, and what embeds and projects back: (vocabulary, dim), and (dim, vocabulary) where it is untied.
    "Embedding": Case(lambda: layers.Embedding(10, 4), (integers(2, 5),), {"embeddings": TABLE}),
    "Embedding with a mask": Case(
        lambda: keras.Sequential([layers.Embedding(10, 4, mask_zero=True), layers.LSTM(3)]),
        (integers(2, 5),),
        {"embeddings": TABLE, "kernel": (0,), "bias": BIAS},
    ),
    "ReversibleEmbedding": Case(TiedLanguageModel, (integers(2, 5),), {"embeddings": TABLE}),
    "ReversibleEmbedding, untied": Case(
        lambda: TiedLanguageModel(tie_weights=False),
        (integers(2, 5),),
        {"/embeddings": TABLE, "/reverse_embeddings": (0,)},
    ),
    # Convolutions: (*window, in / groups, out).
    "Conv1D": convolution(lambda: layers.Conv1D(6, 3), SEQUENCE, 0, 1),
    "Conv1D, causal and dilated": convolution(
        lambda: layers.Conv1D(6, 3, padding="causal", dilation_rate=2), SEQUENCE, 0, 1
    ),
    "Conv1D, groups": convolution(lambda: layers.Conv1D(6, 3, groups=2), SEQUENCE, 0, 1),
    "Conv1D, many channels": convolution(lambda: layers.Conv1D(64, 3), floats(2, 12, 64), 0, 1),
    "Conv2D": convolution(lambda: layers.Conv2D(6, 3), IMAGE, 0, 1, 2),
    "Conv2D, strides": convolution(lambda: layers.Conv2D(6, (3, 2), 2, padding="same"), IMAGE, 0, 1, 2),
    "Conv2D, groups and dilation": convolution(
        lambda: layers.Conv2D(6, 3, groups=2, dilation_rate=(2, 1)), IMAGE, 0, 1, 2
    ),
    "Conv2D, a group per channel": convolution(lambda: layers.Conv2D(8, 3, groups=4), IMAGE, 0, 1, 2),
    "Conv2D, 1 x 1": convolution(lambda: layers.Conv2D(6, 1), IMAGE, 0, 1, 2),
    "Conv2D, channels first": convolution(
        lambda: layers.Conv2D(6, 3, data_format="channels_first"), IMAGE, 0, 1, 2
    ),
    "Conv3D": convolution(lambda: layers.Conv3D(6, (3, 2, 2)), VIDEO, 0, 1, 2, 3),
    # Depthwise: (*window, channels, multiplier), a window for each channel.
    "DepthwiseConv1D": convolution(lambda: layers.DepthwiseConv1D(3), SEQUENCE, 0),
    "DepthwiseConv2D": convolution(lambda: layers.DepthwiseConv2D(3), IMAGE, 0, 1),
    "DepthwiseConv2D, multiplier and strides": convolution(
        lambda: layers.DepthwiseConv2D((3, 2), 2, padding="same", depth_multiplier=3), IMAGE, 0, 1
    ),
    "DepthwiseConv2D, dilation": convolution(
        lambda: layers.DepthwiseConv2D(3, dilation_rate=2, depth_multiplier=2), IMAGE, 0, 1
    ),
    "SeparableConv1D": Case(
        lambda: layers.SeparableConv1D(6, 3, depth_multiplier=2),
        (SEQUENCE,),
        {"depthwise_kernel": (0,), "pointwise_kernel": (0, 1), "bias": BIAS},
    ),
    "SeparableConv2D": Case(
        lambda: layers.SeparableConv2D(6, 3, padding="same"),
        (IMAGE,),
        {"depthwise_kernel": (0, 1), "pointwise_kernel": (0, 1, 2), "bias": BIAS},
    ),
    # Transposed: (*window, out, in).
    "Conv1DTranspose": convolution(lambda: layers.Conv1DTranspose(6, 3), SEQUENCE, 0, 2),
    "Conv1DTranspose, strides": convolution(
        lambda: layers.Conv1DTranspose(6, 4, 2, padding="same"), SEQUENCE, 0, 2
    ),
    "Conv2DTranspose": convolution(lambda: layers.Conv2DTranspose(6, 3), IMAGE, 0, 1, 3),
    "Conv2DTranspose, strides": convolution(
        lambda: layers.Conv2DTranspose(6, (3, 4), (2, 1), padding="same"), IMAGE, 0, 1, 3
    ),
    "Conv3DTranspose": convolution(lambda: layers.Conv3DTranspose(6, (3, 2, 2), 2), VIDEO, 0, 1, 2, 4),
    # Recurrent layers. The kernels of all gates lie side by side; the bias of a GRU has two rows.
    "SimpleRNN": recurrent(lambda: layers.SimpleRNN(3), SEQUENCE),
    "LSTM": recurrent(lambda: layers.LSTM(3), SEQUENCE),
    "LSTM, all of it": recurrent(
        lambda: layers.LSTM(
            3, return_sequences=True, return_state=True, dropout=0.1, recurrent_dropout=0.1, seed=0
        ),
        SEQUENCE,
    ),
    "LSTM, unrolled": recurrent(lambda: layers.LSTM(3, unroll=True), SEQUENCE),
    "LSTM, backwards": recurrent(lambda: layers.LSTM(3, go_backwards=True), SEQUENCE),
    "GRU": recurrent(lambda: layers.GRU(3), SEQUENCE),
    "GRU, reset before": recurrent(lambda: layers.GRU(3, reset_after=False), SEQUENCE),
    "SimpleRNNCell": cell(lambda: layers.SimpleRNNCell(3), STATE),
    "GRUCell": cell(lambda: layers.GRUCell(3), STATE),
    "LSTMCell": cell(lambda: layers.LSTMCell(3), [STATE, STATE]),
    "RNN": recurrent(lambda: layers.RNN(layers.LSTMCell(3)), SEQUENCE),
    "StackedRNNCells": recurrent(
        lambda: layers.RNN(
            layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(4), layers.SimpleRNNCell(5)])
        ),
        SEQUENCE,
    ),
    "Bidirectional": recurrent(lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True)), SEQUENCE),
    "Bidirectional, summed": recurrent(
        lambda: layers.Bidirectional(layers.GRU(3), merge_mode="sum"), SEQUENCE
    ),
    "TimeDistributed dense": Case(
        lambda: layers.TimeDistributed(layers.Dense(3)), (SEQUENCE,), {"kernel": (0,), "bias": BIAS}
    ),
    "TimeDistributed convolution": convolution(
        lambda: layers.TimeDistributed(layers.Conv2D(6, 3)), VIDEO, 0, 1, 2
    ),
    "ConvLSTM1D": recurrent(lambda: layers.ConvLSTM1D(3, 2), floats(2, 3, 6, 4), window=1),
    "ConvLSTM2D": recurrent(lambda: layers.ConvLSTM2D(3, 2, return_sequences=True), VIDEO, window=2),
    "ConvLSTM3D": recurrent(lambda: layers.ConvLSTM3D(3, 2), floats(2, 3, 4, 4, 4, 4), window=3),
    # Attention.
    "MultiHeadAttention": attention(lambda: layers.MultiHeadAttention(2, 3)),
    "MultiHeadAttention across": attention(
        lambda: layers.MultiHeadAttention(2, 3, value_dim=5, output_shape=7, dropout=0.1),
        value=floats(2, 9, 6),
    ),
    "MultiHeadAttention over images": attention(
        lambda: layers.MultiHeadAttention(2, 3, attention_axes=(1, 2)), floats(2, 5, 6, 4)
    ),
    "MultiHeadAttention, causal": attention(lambda: layers.MultiHeadAttention(2, 3), use_causal_mask=True),
    "MultiHeadAttention, one head": attention(lambda: layers.MultiHeadAttention(1, 3)),
    "GroupQueryAttention": attention(lambda: layers.GroupQueryAttention(3, 4, 2)),
    "GroupQueryAttention across": attention(
        lambda: layers.GroupQueryAttention(3, 4, 1, dropout=0.1), value=floats(2, 9, 4)
    ),
    "Attention": Case(lambda: layers.Attention(use_scale=True), ([SEQUENCE, SEQUENCE],), {"scale": SCALE}),
    "Attention, concatenated": Case(
        lambda: layers.Attention(score_mode="concat", use_scale=True, dropout=0.1),
        ([SEQUENCE, SEQUENCE],),
        {"scale": SCALE, "concat_score_weight": SCALE},
    ),
    # What Keras calls a scale is the v of `v @ tanh(q + k)`. Of rank 1, it is none by its name.
    "AdditiveAttention": Case(
        lambda: layers.AdditiveAttention(), ([SEQUENCE, SEQUENCE],), {"scale": (0,)}, by_name={"scale": ()}
    ),
    # Normalizations and scales.
    "BatchNormalization": normalization(lambda: layers.BatchNormalization(), IMAGE),
    "BatchNormalization over an axis": normalization(lambda: layers.BatchNormalization(axis=1), IMAGE),
    "LayerNormalization": normalization(lambda: layers.LayerNormalization(), SEQUENCE),
    "LayerNormalization over axes": normalization(lambda: layers.LayerNormalization(axis=(1, 2)), SEQUENCE),
    "GroupNormalization": normalization(lambda: layers.GroupNormalization(2), IMAGE),
    "RMSNormalization": Case(lambda: layers.RMSNormalization(), (SEQUENCE,), {"scale": SCALE}),
    "SpectralNormalization": Case(
        lambda: layers.SpectralNormalization(layers.Dense(3)),
        (floats(2, 5),),
        {"kernel": (0,), "bias": BIAS},
    ),
    "SpectralNormalization of a convolution": convolution(
        lambda: layers.SpectralNormalization(layers.Conv2D(6, 3), power_iterations=2), IMAGE, 0, 1, 2
    ),
    "PReLU": Case(lambda: layers.PReLU(), (IMAGE,), {"alpha": SCALE}),
    "PReLU, shared": Case(lambda: layers.PReLU(shared_axes=[1, 2]), (IMAGE,), {"alpha": SCALE}),
    # What transforms a window is a convolution of one input: (width, 1, frequencies).
    "STFTSpectrogram": Case(
        lambda: layers.STFTSpectrogram(frame_length=8, frame_step=4, trainable=True),
        (floats(2, 64, 1),),
        {"real_kernel": (0, 1), "imag_kernel": (0, 1)},
    ),
    # A matrix without a name of its own, in the layout of PyTorch.
    "JaxLayer": Case(
        jax_layer, (floats(2, 5),), {"/variable": (1,), "/variable_1": BIAS}, by_name={"/variable": (0,)}
    ),
    "Pipeline": Case(
        lambda: layers.Pipeline([layers.Dense(3), layers.PReLU()]),
        (floats(2, 5),),
        {"kernel": (0,), "bias": BIAS, "alpha": SCALE},
    ),
    # LoRA: a has the inputs of the kernel, b its last axis, and the kernel is frozen.
    "Dense, LoRA": Case(
        lambda: layers.Dense(6), (floats(2, 5),), {"_a": (0,), "_b": (0,), "bias": BIAS}, rank=2
    ),
    "Conv2D, LoRA": Case(
        lambda: layers.Conv2D(6, 3), (IMAGE,), {"_a": (0, 1, 2), "_b": (0,), "bias": BIAS}, rank=2
    ),
    "einsum out of heads, LoRA": Case(
        lambda: layers.EinsumDense("abde,dec->abc", output_shape=(None, 4)),
        (floats(2, 12, 2, 3),),
        {"_a": (0, 1), "_b": (0,)},
        rank=2,
    ),
    "einsum, transposed, LoRA": Case(  # b is (rank, in), and a is (out, rank)
        lambda: layers.EinsumDense("bi,oi->bo", output_shape=(3,)),
        (floats(2, 5),),
        {"_a": (1,), "_b": (1,)},
        by_name={"_a": (0,), "_b": (0,)},
        rank=2,
    ),
    "einsum into heads, LoRA": Case(  # b is shared by the heads, and so in parts of what is contracted
        lambda: layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3)),
        (SEQUENCE,),
        {"_a": (0,), "_b": (0,)},
        warned=("_b",),
        rank=2,
    ),
    "Embedding, LoRA": Case(  # Keras looks up in the product of the two
        lambda: layers.Embedding(10, 4),
        (integers(2, 5),),
        {"_a": TABLE, "_b": (0,)},
        by_name={"_b": ()},
        warned=("_a", "_b"),
        rank=2,
    ),
}
if "use_gate" in inspect.signature(layers.MultiHeadAttention).parameters:
    CASES["MultiHeadAttention, gated"] = attention(
        lambda: layers.MultiHeadAttention(2, 3, use_gate=True), names=("query", "key", "value", "gate")
    )
    CASES["GroupQueryAttention, gated"] = attention(
        lambda: layers.GroupQueryAttention(3, 4, 2, use_gate=True), names=("query", "key", "value", "gate")
    )

WITHOUT_A_CASE = {
    "FlaxLayer": "a JaxLayer that needs TensorFlow",
    "Normalization": "has statistics, which are not trained",
    "Wrapper": "the base of wrappers",
}


# Layers


def named(path, truth):
    """The longest end of a path that there is an entry for."""
    return max((end for end in truth if path.endswith(end)), key=len)


def built(case):
    layer = case.make()
    layer(*jax.tree.map(lambda x: keras.KerasTensor(x.shape, x.dtype.name), case.inputs), **case.kwargs)
    if case.rank:
        layer.enable_lora(case.rank)
    return layer


@pytest.mark.parametrize("name", CASES)
def test_the_axes_of_every_layer(name):
    case = CASES[name]
    layer = built(case)
    modes = [{}]
    if "training" in inspect.signature(layer.call).parameters:
        modes += [{"training": True}]
    for mode in modes:
        if case.warned:
            with pytest.warns(UserWarning, match="infer_axes leaves these parameters alone") as caught:
                axes = infer_axes(layer, *case.inputs, **case.kwargs, **mode)
            text = str(caught[0].message)
        else:
            axes = infer_axes(layer, *case.inputs, **case.kwargs, **mode)
            text = ""
        ends = {path: named(path, case.truth) for path in axes}
        assert {*ends.values()} == {*case.truth}
        for path, weight in axes.items():
            wanted = case.truth[ends[path]]
            assert (f"[{path!r}]" in text) == (ends[path] in case.warned)
            if ends[path] in case.warned:
                assert weight.fan_in == ()
            elif isinstance(wanted, str):
                assert weight.fan_in == (), f"{path} is {wanted}"
                assert weight.role == ("lookup" if wanted == TABLE else "")
            else:
                assert weight.fan_in == wanted, path
                assert weight.role in ("input", "hidden", "output")


def by_convention(variables):
    """What `out_last` makes of each variable of a model: its fan-in, and whether that is settled."""
    places = [((jax.tree_util.DictKey(variable.path),), variable.value) for variable in variables]
    return {
        variable.path: (reading.axes.fan_in, reading.settled)
        for variable, reading in zip(variables, read_out_last(places, of_keras=True), strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_the_default_is_right_for_every_layer_or_warns(name):
    case = CASES[name]
    variables = built(case).trainable_variables
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        centralized("sgd").build(variables)
    text = "".join(str(warning.message) for warning in caught)
    for path, (fan_in, settled) in by_convention(variables).items():
        assert (f"[{path!r}]" in text) == (not settled)
        if settled:
            end = named(path, case.truth)
            wanted = case.by_name.get(end, case.truth[end])
            assert fan_in == (() if isinstance(wanted, str) else wanted), path


@functools.cache
def makes_weights(kind):
    """Whether a class of layers adds weights, makes layers that do, or is made for layers that do."""
    above = kind.__mro__[: kind.__mro__.index(keras.Layer)]
    if layers.Wrapper in above:
        return True
    for each in above:
        module = inspect.getmodule(each)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(each)))):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            made = getattr(module, called, None)
            is_layer = inspect.isclass(made) and issubclass(made, keras.Layer) and made not in above
            if called == "add_weight" or (is_layer and makes_weights(made)):
                return True
    return False


def test_every_layer_of_keras_that_has_weights_has_a_case():
    every = {
        kind for kind in vars(layers).values() if inspect.isclass(kind) and issubclass(kind, keras.Layer)
    }
    with_weights = {kind for kind in every if makes_weights(kind)}
    assert {layers.Dense, layers.SimpleRNN, layers.ConvLSTM2D, layers.MultiHeadAttention} <= with_weights
    assert not {layers.ReLU, layers.MaxPooling2D, layers.Concatenate, layers.UnitNormalization} & with_weights
    models = [built(case) for case in CASES.values()]
    tested = {type(layer) for model in models for layer in model._flatten_layers()}
    missing = {kind.__name__ for kind in with_weights - tested}
    assert missing == {name for name in WITHOUT_A_CASE if hasattr(layers, name)}


# Applications

# By the class of the layer and the name of the variable. A layer scale of ConvNeXt has one without a name.
NORMALIZATION = {"gamma": (), "beta": ()}
LAYOUTS = {
    "Conv2D": {"kernel": (0, 1, 2), "bias": ()},
    "DepthwiseConv2D": {"kernel": (0, 1), "bias": ()},
    "Dense": {"kernel": (0,), "bias": ()},
    "BatchNormalization": NORMALIZATION,
    "LayerNormalization": NORMALIZATION,
    "LayerScale": {"variable": ()},
}
WEIGHTS = {
    "MobileNetV2": 2 + 16 * 3 + 1 + 2,  # the first of 17 blocks does not expand
    "ResNet50V2": 1 + 16 * 3 + 4 + 1,  # four blocks have a shortcut
    "DenseNet121": 1 + (6 + 12 + 24 + 16) * 2 + 3 + 1,
    "EfficientNetB0": 1 + 4 + 15 * 5 + 1 + 1,  # of 16 blocks, the first does not expand
    "ConvNeXtTiny": 4 + (3 + 3 + 9 + 3) * 3 + 1,
}


@pytest.mark.parametrize(
    "name", ["MobileNetV2", *(pytest.param(name, marks=pytest.mark.thorough) for name in [*WEIGHTS][1:])]
)
def test_the_axes_of_whole_models(name):
    model = getattr(applications, name)(weights=None, input_shape=(64, 64, 3), classes=10)
    truth = {
        id(variable): LAYOUTS[type(layer).__name__][variable.name.rstrip("_0123456789")]
        for layer in model._flatten_layers(include_self=False)
        if not isinstance(layer, keras.Sequential)
        for variable in layer.trainable_variables
    }
    axes = infer_axes(model, floats(2, 64, 64, 3))
    wanted = {variable.path: truth[id(variable)] for variable in model.trainable_variables}
    assert {path: weight.fan_in for path, weight in axes.items()} == wanted
    roles = [weight.role for weight in axes.values() if weight.role]
    assert (roles.count("input"), roles.count("output")) == (1, 1)
    assert (roles[0], roles[-1]) == ("input", "output")
    assert roles.count("hidden") == len(roles) - 2
    assert len(roles) == sum(map(bool, wanted.values())) == WEIGHTS[name]
    # Right, though not settled: the names of these layers are no longer those that Keras gives.
    by_name = by_convention(model.trainable_variables)
    assert {path: fan_in for path, (fan_in, _) in by_name.items()} == wanted
    assert infer_axes(model, floats(2, 64, 64, 3), training=True) == axes


# Models of one's own


def fan_ins(axes):
    return {path: weight.fan_in for path, weight in axes.items() if weight.fan_in}


class Autoencoder(keras.Model):
    """All layers have the name of the model, and each has a layout of its own."""

    def __init__(self):
        super().__init__(name="it")
        self.down = layers.Conv2D(6, 3, name="it")
        self.across = layers.DepthwiseConv2D(3, padding="same", name="it")
        self.dropout = layers.Dropout(0.5, name="it")
        self.slope = layers.PReLU(name="it")
        self.up = layers.Conv2DTranspose(4, 3, name="it")

    def call(self, images, training=False):
        return self.up(self.slope(self.dropout(self.across(self.down(images)), training=training)))


def test_layers_of_one_name_in_a_subclassed_model_are_kept_apart():
    model = Autoencoder()
    model(keras.KerasTensor(IMAGE.shape))
    assert len({variable.path for variable in model.trainable_variables}) == 3
    for training in (False, True):
        axes = infer_axes(model, IMAGE, training=training)
        assert list(axes) == [
            "it/it/kernel/0",
            "it/it/bias/0",
            "it/it/kernel/1",
            "it/it/bias/1",
            "it/it/alpha",
            "it/it/kernel/2",
            "it/it/bias/2",
        ]
        assert fan_ins(axes) == {
            "it/it/kernel/0": (0, 1, 2),
            "it/it/kernel/1": (0, 1),
            "it/it/kernel/2": (0, 1, 3),
        }


def two_towers():
    """A layer that both inputs go through, in a structure of inputs that is nested."""
    inputs = {
        "left": keras.Input((5,), name="left"),
        "others": {
            "right": keras.Input((5,), name="right"),
            "ids": keras.Input((), dtype="int32", name="ids"),
        },
    }
    shared = layers.Dense(4, "relu", name="shared")
    table = layers.Embedding(10, 3, name="table")
    left = layers.Dropout(0.2)(shared(inputs["left"]))
    right = layers.BatchNormalization(name="norm")(shared(inputs["others"]["right"]))
    joined = layers.Concatenate()([left, right, table(inputs["others"]["ids"])])
    outputs = {"class": layers.Dense(3, name="class")(joined), "score": layers.Dense(1, name="score")(joined)}
    return keras.Model(inputs, outputs)


TOWER_INPUTS = {"left": floats(2, 5), "others": {"right": floats(2, 5), "ids": integers(2)}}


def test_a_shared_layer_and_nested_inputs_and_outputs():
    model = two_towers()
    for training in (False, True):
        axes = infer_axes(model, TOWER_INPUTS, training=training)
        assert fan_ins(axes) == {"shared/kernel": (0,), "class/kernel": (0,), "score/kernel": (0,)}
        assert {path: weight.role for path, weight in axes.items() if weight.role} == {
            "shared/kernel": "input",
            "table/embeddings": "lookup",
            "class/kernel": "output",
            "score/kernel": "output",
        }


def test_reading_the_axes_leaves_seeds_and_statistics_as_they_are():
    model = two_towers()
    before = [np.asarray(variable) for variable in model.variables]
    state = [np.asarray(variable) for variable in model.non_trainable_variables]
    infer_axes(model, TOWER_INPUTS, training=True)
    assert len(state) == 3  # two statistics and a seed
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), old)


def test_frozen_layers_are_data():
    model = two_towers()
    model.get_layer("shared").trainable = False
    model.get_layer("norm").trainable = False
    axes = infer_axes(model, TOWER_INPUTS, training=True)
    assert list(axes) == ["table/embeddings", "class/kernel", "class/bias", "score/kernel", "score/bias"]
    assert fan_ins(axes) == {"class/kernel": (0,), "score/kernel": (0,)}
    model.get_layer("table").trainable = False
    axes = infer_axes(model, TOWER_INPUTS)
    assert list(axes) == ["class/kernel", "class/bias", "score/kernel", "score/bias"]
    assert fan_ins(axes) == {"class/kernel": (0,), "score/kernel": (0,)}


class Masked(keras.Model):
    """Takes a mask of the tokens, of which each layer makes its own."""

    def __init__(self):
        super().__init__(name="masked")
        self.supports_masking = True
        self.embedding = layers.Embedding(10, 4, name="embedding")
        self.attention = layers.MultiHeadAttention(2, 3, dropout=0.1, name="attention")
        self.norm = layers.BatchNormalization(name="norm")
        self.recurrent = layers.GRU(5, name="recurrent")
        self.additive = layers.AdditiveAttention(use_scale=False)
        self.head = layers.Dense(10, name="head")

    def call(self, tokens, mask=None, attention_mask=None, training=False):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, attention_mask=attention_mask, query_mask=mask, training=training)
        x = self.norm(x, mask=mask, training=training)
        x = self.additive([x, x], mask=[mask, mask], training=training)
        return self.head(self.recurrent(x, mask=mask, training=training))


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_takes_masks(training):
    model = Masked()
    masks = {
        "mask": jax.ShapeDtypeStruct((2, 7), jnp.bool_),
        "attention_mask": jax.ShapeDtypeStruct((2, 7, 7), jnp.bool_),
    }
    model(
        keras.KerasTensor((2, 7), "int32"),
        **{name: keras.KerasTensor(mask.shape, "bool") for name, mask in masks.items()},
    )
    axes = infer_axes(model, integers(2, 7), **masks, training=training)
    assert fan_ins(axes) == {
        "masked/attention/query/kernel": (0,),
        "masked/attention/key/kernel": (0,),
        "masked/attention/value/kernel": (0,),
        "masked/attention/attention_output/kernel": (0, 1),
        "masked/recurrent/gru_cell/kernel": (0,),
        "masked/recurrent/gru_cell/recurrent_kernel": (0,),
        "masked/head/kernel": (0,),
    }
    assert axes["masked/head/kernel"].role == "output"


def test_lora_in_a_model_leaves_the_other_layers_trained():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Dense(6, "relu", name="body")(inputs)))
    model.get_layer("body").enable_lora(2)
    for training in (False, True):
        axes = infer_axes(model, floats(2, 5), training=training)
        assert fan_ins(axes) == {
            "body/lora_kernel_a": (0,),
            "body/lora_kernel_b": (0,),
            "head/kernel": (0,),
        }
    model.get_layer("head").trainable = False
    assert fan_ins(infer_axes(model, floats(2, 5))) == {
        "body/lora_kernel_a": (0,),
        "body/lora_kernel_b": (0,),
    }


def test_lora_on_a_quantized_layer():
    layer = layers.Dense(6, name="dense")
    layer.build((2, 5))
    layer.quantize("int8")
    layer.enable_lora(2)
    assert fan_ins(infer_axes(layer, floats(2, 5))) == {
        "dense/lora_kernel_a": (0,),
        "dense/lora_kernel_b": (0,),
    }


def test_a_mixed_policy_and_rematerialization_change_nothing():
    with keras.RematScope(mode="full"):
        layer = layers.Conv2D(6, 3, dtype="mixed_bfloat16", name="conv")
    layer.build(IMAGE.shape)
    assert fan_ins(infer_axes(layer, IMAGE)) == {"conv/kernel": (0, 1, 2)}
