"""A tree of axes survives a file, and a file that does not fit is refused by its name."""

import functools
import json
import pathlib
import re

import equinox as eqx
import flax
import haiku as hk
import hostile_trees
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import ShapeDtypeStruct as Shape
from jax import tree_util as jtu
from whole_models import SOME_OF_THE_MODELS

import gc_optax.nnx
from gc_optax import WeightAxes, centralize, infer_axes, load_axes, out_first, out_last, save_axes

f32 = jnp.float32


@pytest.fixture
def file(tmp_path):
    return tmp_path / "axes.json"


def by_path(tree):
    return {jtu.keystr(path): leaf for path, leaf in jtu.tree_flatten_with_path(tree)[0]}


def assert_same(loaded, axes):
    """Equal leaf by leaf, in the same structure, and with the same knowledge of the rank."""
    assert jax.tree.structure(loaded) == jax.tree.structure(axes)
    assert by_path(loaded) == by_path(axes)
    ranks = [leaf.rank for leaf in jax.tree.leaves(axes)]
    assert [leaf.rank for leaf in jax.tree.leaves(loaded)] == ranks


# What is written


def small_model(params, x):
    h = jnp.einsum("ebi,eio->ebo", x, params["experts"]) + params["bias"]
    return h @ params["head"].T


SMALL = {
    "bias": Shape((16,), f32),
    "experts": Shape((2, 8, 16), f32),
    "head": Shape((4, 16), f32),
    "step": Shape((), jnp.int32),
}
SMALL_AXES = {
    "bias": WeightAxes((), (), "add", "add: a bias, a scale or a gate"),
    "experts": WeightAxes((1,), (2,), "dot_general", "dot_general over 1", "input"),
    "head": WeightAxes((-1,), (-2,), "dot_general", "dot_general over 1", "output"),
    "step": None,
}
SMALL_FILE = """\
{"format": "gc_optax axes", "version": 1, "parameters": [
{"path": "['bias']", "shape": [16], "fan_in": [], "fan_out": [], "op": "add", "role": "", \
"why": "add: a bias, a scale or a gate"},
{"path": "['experts']", "shape": [2, 8, 16], "fan_in": [1], "fan_out": [2], "op": "dot_general", \
"role": "input", "why": "dot_general over 1"},
{"path": "['head']", "shape": [4, 16], "fan_in": [1], "fan_out": [0], "op": "dot_general", \
"role": "output", "why": "dot_general over 1"},
{"path": "['step']", "shape": [], "fan_in": [], "fan_out": [], "op": "", "role": "", \
"why": "no array of floats: an array of dtype int32 and shape ()"}
]}
"""


def test_the_file_of_a_small_model(file):
    save_axes(file, SMALL_AXES, SMALL)
    assert file.read_bytes() == SMALL_FILE.encode()
    loaded = load_axes(str(file), SMALL)
    assert loaded == SMALL_AXES | {
        "head": WeightAxes((1,), (0,), "dot_general", "dot_general over 1", "output"),
        "step": WeightAxes((), why="no array of floats: an array of dtype int32 and shape ()"),
    }


def test_what_changes_in_the_axes_changes_its_own_line(file):
    axes = infer_axes(small_model, SMALL, jnp.ones((2, 3, 8)))
    save_axes(str(file), axes, SMALL)
    before = file.read_text()
    save_axes(file, axes, SMALL)
    assert file.read_text() == before
    save_axes(file, axes | {"experts": 0}, SMALL)
    lines = zip(before.splitlines(), file.read_text().splitlines(), strict=True)
    assert [number for number, (old, new) in enumerate(lines) if old != new] == [2]
    assert len(before.splitlines()) == len(SMALL) + 2


@pytest.mark.parametrize(
    ("axes", "fan_in"),
    [
        (out_last, (0,)),
        (out_first, (1,)),
        (1, (1,)),
        ((-1, np.int64(0)), (1, 0)),
        (WeightAxes((np.int32(1),), (np.int64(0),)), (1,)),
        (optax.contrib.MuonDimensionNumbers(1, 0), (1,)),
        (lambda params: 0, (0,)),
        (None, (0,)),
    ],
)
def test_axes_may_be_whatever_centralize_takes(axes, fan_in, file):
    kernel = Shape((3, 4), f32)
    save_axes(file, axes, kernel)
    assert load_axes(file, kernel).fan_in == fan_in
    assert json.loads(file.read_text())["parameters"][0]["path"] == ""


def test_the_default_convention_warns_as_centralize_does(file):
    with pytest.warns(UserWarning, match=r"\['kernel'\], shape \(2, 3, 4\)") as caught:
        save_axes(file, None, {"kernel": Shape((2, 3, 4), f32)})
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({"a": 0, "b": 2}, ValueError, r"axes for \['b'\], shape \(3, 4\): axis 2 is out of range"),
        ({"a": 0, "b": "0"}, TypeError, r"axes for \['b'\], shape \(3, 4\) must be"),
        ({"a": 0}, ValueError, "axes does not have the structure of the parameters: at the root"),
    ],
)
def test_wrong_axes_are_refused_by_the_leaf_and_an_older_file_stays(axes, error, message, file):
    params = {"a": Shape((3, 4), f32), "b": Shape((3, 4), f32)}
    save_axes(file, out_last, params)
    before = file.read_bytes()
    with pytest.raises(error, match=message):
        save_axes(file, axes, params)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_file_that_cannot_be_completed_leaves_the_older_one_and_nothing_else(step, file, monkeypatch):
    save_axes(file, out_last, SMALL)
    before = file.read_bytes()
    real = getattr(pathlib.Path, step)

    def interrupted(path, given):
        if step == "write_bytes":
            real(path, given[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(pathlib.Path, step, interrupted)
    with pytest.raises(OSError, match="no space left"):
        save_axes(file, out_first, SMALL)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


# What comes back


@pytest.mark.parametrize("build", SOME_OF_THE_MODELS, ids=lambda build: build.__name__)
def test_the_axes_of_whole_models_survive(build, file):
    with jax.default_prng_impl("rbg"):
        case = build()
    axes = infer_axes(case.loss, case.params, *case.args)
    save_axes(file, axes, case.params)
    shapes = jax.tree.map(
        lambda leaf: Shape(leaf.shape, leaf.dtype) if eqx.is_array(leaf) else leaf, case.params
    )
    assert_same(load_axes(file, shapes), axes)
    arrays = sum(map(eqx.is_array, jax.tree.leaves(case.params)))
    assert len(file.read_text().splitlines()) == arrays + 2


def nnx_model():
    rngs = nnx.Rngs(0)
    layers = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
    return nnx.Sequential(*layers)


def test_a_model_of_nnx_with_and_without_boxes(file):
    model = nnx_model()
    axes = gc_optax.nnx.infer_axes(lambda model, x: model(x), model, jnp.ones((2, 5, 5, 3)))
    boxed = nnx.state(model, nnx.Param)
    bare = jax.tree.map(
        lambda box: jax.tree.leaves(box)[0], boxed, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    save_axes(file, axes, boxed)
    assert "value" not in file.read_text()
    assert_same(load_axes(file, boxed), axes)
    assert list(by_path(load_axes(file, bare)).values()) == jax.tree.leaves(axes)
    before = file.read_bytes()
    save_axes(file, axes, bare)
    assert file.read_bytes() == before


def test_functions_in_a_module_of_equinox_have_no_line(file):
    model = eqx.nn.MLP(3, 2, 4, 1, activation=jax.nn.gelu, key=jax.random.key(0))
    axes = infer_axes(lambda model, x: jax.vmap(model)(x), model, jnp.ones((5, 3)))
    save_axes(file, axes, model)
    assert "0x" not in file.read_text(), "the address of a function differs from run to run"
    assert_same(load_axes(file, model), axes)
    # The same model without its functions has the same arrays.
    arrays = eqx.filter(model, eqx.is_array)
    assert by_path(load_axes(file, arrays)).items() <= by_path(axes).items()
    assert load_axes(file, arrays).layers[0].weight.fan_in == (1,)


def test_parameters_of_haiku(file):
    forward = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2], name="mlp")(x)))
    params = forward.init(jax.random.key(0), jnp.ones((2, 3)))
    axes = infer_axes(forward.apply, params, jnp.ones((2, 3)))
    save_axes(file, axes, params)
    assert [record["path"] for record in json.loads(file.read_text())["parameters"]] == [
        "['mlp/~/linear_0']['b']",
        "['mlp/~/linear_0']['w']",
        "['mlp/~/linear_1']['b']",
        "['mlp/~/linear_1']['w']",
    ]
    assert_same(load_axes(file, params), axes)


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()])
def test_absent_parameters_have_no_line_and_stay_absent(absent, file):
    params = {"frozen": absent, "kernel": Shape((3, 4), f32)}
    save_axes(file, out_last, params)
    loaded = load_axes(file, params)
    assert loaded["frozen"] == absent
    assert loaded["kernel"].fan_in == (0,)
    assert "frozen" not in file.read_text()


def test_other_nodes_with_the_same_paths_take_the_same_file(file):
    kernel = Shape((3, 4), f32)
    save_axes(file, [0, {"a": 1}], [kernel, {"a": kernel}])
    loaded = load_axes(file, (kernel, flax.core.FrozenDict({"a": kernel})))
    assert loaded == (
        WeightAxes((0,), why="given by axes"),
        flax.core.FrozenDict({"a": WeightAxes((1,), why="given by axes")}),
    )


def test_the_order_of_the_lines_and_their_layout_do_not_matter(file):
    save_axes(file, SMALL_AXES, SMALL)
    expected = load_axes(file, SMALL)
    document = json.loads(file.read_text())
    document["parameters"].reverse()
    file.write_text(json.dumps(document, indent=2, sort_keys=True))
    assert load_axes(file, SMALL) == expected


ODD_KEYS = [
    *("['a']['b']", '"', "'", "\n", "\x1b[31m", "\u2028", "\ud800", "重み", "🦙", "\\", "a.b", "", " ", "1"),
    *("x" * 5000, "x" * 4999 + "y", "the root", ".value"),
]


def test_each_of_many_odd_keys_has_its_own_axes(file):
    params = {key: Shape((2,) * rank, f32) for rank, key in enumerate(ODD_KEYS, 2)}
    params |= {"a": {"b": Shape((2, 3), f32)}, "value": {"value": Shape((3, 2), f32)}}
    tree = [params, {1: Shape((4, 3), f32), 10: Shape((4, 3), f32)}, {"1": Shape((4, 3), f32)}]
    # The last axis alone: of each rank another.
    axes = jax.tree.map(lambda leaf: WeightAxes((len(leaf.shape) - 1,), why=f"one of {leaf.shape}\n"), tree)
    save_axes(file, axes, tree)
    assert load_axes(file, tree) == axes
    assert len(file.read_bytes().splitlines()) == len(jax.tree.leaves(tree)) + 2


@pytest.mark.parametrize("seed", range(4))
def test_trees_of_every_kind(seed, file):
    """Those of `test_hostile_trees.py`, with keys, nodes and leaves of every kind, whose truth is known."""
    rng = np.random.default_rng(seed)
    survived, refusals = 0, []
    for _ in range(100):
        params = hostile_trees.tree(rng, x64=False)
        leaves = hostile_trees.places(params)
        chosen = hostile_trees.good_axes(rng, [leaf for _, leaf in leaves])
        axes = hostile_trees.like(params, [entry for _, entry in chosen])
        try:
            save_axes(file, (lambda params, axes=axes: axes), params)
        except (TypeError, ValueError) as error:
            refusals.append(str(error))
            continue
        loaded = jax.tree.leaves(load_axes(file, params))
        present = [
            (leaf, fan_in)
            for (_, leaf), (fan_in, _) in zip(leaves, chosen, strict=True)
            if not hostile_trees.is_absent(leaf)
        ]
        expected = [hostile_trees.effective(leaf, fan_in) for leaf, fan_in in present]
        assert [axes.fan_in for axes in loaded] == expected
        survived += any(expected)
    # JAX has no such dtype, or nobody can say whether two of these nodes are equal.
    known = re.compile("which JAX does not have|in what they keep beside that")
    assert [refusal for refusal in refusals if not known.search(refusal)] == []
    assert survived > 20


class Twins:
    """A node whose two children have keys that print alike."""

    def __init__(self, *children):
        self.children = children


jtu.register_pytree_with_keys(
    Twins,
    lambda node: (tuple((jtu.GetAttrKey("twin"), child) for child in node.children), None),
    lambda _, children: Twins(*children),
)


def test_parameters_whose_paths_print_alike_are_refused(file):
    one = {"inner": Twins(Shape((3, 4), f32))}
    save_axes(file, out_last, one)
    two = {"inner": Twins(Shape((3, 4), f32), Shape((3, 4), f32))}
    for call in (lambda: save_axes(file, out_last, two), lambda: load_axes(file, two)):
        with pytest.raises(ValueError, match=r"two parameters have the path \['inner'\]\.twin"):
            call()
    # What has no line may share a path.
    shared = {"inner": Twins(Shape((3, 4), f32), len, jax.nn.relu)}
    assert load_axes(file, shared)["inner"].children[0] == load_axes(file, one)["inner"].children[0]


def test_loaded_axes_know_their_rank(file):
    params = {"kernel": Shape((3, 4), f32)}
    save_axes(file, {"kernel": WeightAxes((0,))}, params)
    loaded = load_axes(file, params)
    centralize(loaded).init(params)
    with pytest.raises(ValueError, match="read from a parameter of rank 2"):
        centralize(loaded).init({"kernel": Shape((5, 3, 4), f32)})


# What people edit


def edited(file, **fields):
    """The file of `SMALL` with other fields in the line of the experts."""
    save_axes(file, SMALL_AXES, SMALL)
    document = json.loads(file.read_text())
    document["parameters"][1].update(fields)
    file.write_text(json.dumps(document))
    return file


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"fan_in": [0, 1]}, WeightAxes((0, 1), (2,), "dot_general", "dot_general over 1", "input")),
        ({"fan_in": [-2]}, SMALL_AXES["experts"]),
        ({"fan_in": [], "fan_out": []}, WeightAxes((), (), "dot_general", "dot_general over 1", "input")),
        (
            {"fan_in": [2], "fan_out": [-2], "op": "", "why": "ours", "role": "hidden"},
            WeightAxes((2,), (1,), "", "ours", "hidden"),
        ),
    ],
)
def test_what_is_edited_by_hand_counts(fields, expected, file):
    assert load_axes(edited(file, **fields), SMALL)["experts"] == expected


def test_axes_over_which_there_is_nothing_to_average_are_left_alone(file):
    params = {"kernel": Shape((1, 4), f32)}
    save_axes(file, {"kernel": None}, params)
    file.write_text(file.read_text().replace('"fan_in": []', '"fan_in": [0]'))
    assert load_axes(file, params)["kernel"] == WeightAxes(
        (), why="fan-in 1: nothing would be left of the gradient", role="weight"
    )


# What is refused

PLACE = r"\['experts'\], shape \(2, 8, 16\): "


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [2, 8]}, PLACE + r"its shape in the file is \[2, 8\]"),
        ({"shape": [2, 16, 8]}, PLACE + r"its shape in the file is \[2, 16, 8\]"),
        ({"shape": [2, 8, 16.0]}, PLACE + r"shape must be a list of ints, got \[2, 8, 16.0\]"),
        ({"fan_in": [3]}, f"axes for {PLACE}axis 3 is out of range for rank 3"),
        ({"fan_in": [-4]}, f"axes for {PLACE}axis -4 is out of range for rank 3"),
        ({"fan_out": [10**50]}, f"axes for {PLACE}axis 1000"),
        ({"fan_in": [1, -2]}, f"axes for {PLACE}an axis is repeated in fan_in"),
        ({"fan_in": [2]}, f"axes for {PLACE}an axis is repeated in fan_in"),
        ({"fan_in": [True]}, PLACE + r"fan_in must be a list of ints, got \[True\]"),
        ({"fan_in": [1.0]}, PLACE + r"fan_in must be a list of ints, got \[1.0\]"),
        ({"fan_in": 1}, PLACE + "fan_in must be a list of ints, got 1"),
        ({"fan_in": None}, PLACE + "fan_in must be a list of ints, got None"),
        ({"fan_in": {}}, PLACE + "fan_in must be a list of ints, got {}"),
        ({"fan_in": "1"}, PLACE + "fan_in must be a list of ints, got '1'"),
        ({"fan_out": ["2"]}, PLACE + "fan_out must be a list of ints"),
        ({"role": "head"}, PLACE + r"WeightAxes.role must be one of .*, got 'head'"),
        ({"role": None}, PLACE + "role must be text, got None"),
        ({"role": ["input"]}, PLACE + "role must be text"),
        ({"why": 0}, PLACE + "why must be text, got 0"),
        ({"op": ["dot_general"]}, PLACE + "op must be text"),
        ({"fanin": [1]}, PLACE + "its fields in the file are .*, why, fanin; they must be path, .*, why"),
        ({"path": None}, r"parameter 2 of the file has no path: {'fan_in': \[1\], .*'path': None, \.\.\.}"),
        ({"path": "['expert']"}, r"\['expert'\]: the parameters have no such array"),
        ({"path": "['bias']"}, r"\['bias'\]: it is in the file twice"),
        ({"path": ""}, "the root: the parameters have no such array"),
    ],
)
def test_a_wrong_line_is_refused_by_the_file_and_the_parameter(fields, message, file):
    with pytest.raises(
        ValueError, match=f"(?s)axes.json does not fit the parameters:\n  {message}"
    ) as raised:
        load_axes(edited(file, **fields), SMALL)
    is_missing = "['experts'], shape (2, 8, 16): it is not in the file" in str(raised.value)
    assert is_missing == ("path" in fields)
    assert len(str(raised.value)) < 2000


def test_what_the_file_and_the_model_have_each_alone_is_named(file):
    save_axes(file, SMALL_AXES, SMALL)
    params = {name: leaf for name, leaf in SMALL.items() if name != "head"} | {"tail": SMALL["head"]}
    with pytest.raises(ValueError, match="does not fit") as raised:
        load_axes(file, params)
    assert str(raised.value) == (
        f"{file} does not fit the parameters:\n"
        "  ['head']: the parameters have no such array\n"
        "  ['tail'], shape (4, 16): it is not in the file"
    )


def test_of_very_many_problems_the_first_are_named(file):
    layers = {f"layer_{number}": Shape((3, 4), f32) for number in range(1000)}
    save_axes(file, out_last, layers)
    with pytest.raises(ValueError, match=r"no such array\n  and 990 more\n  \['params'\]") as raised:
        load_axes(file, {"params": layers})
    assert str(raised.value).endswith("  and 990 more")
    assert len(str(raised.value)) < 2000


def without(key):
    def edit(document):
        del document[key]

    return edit


def putting(key, value):
    def edit(document):
        document[key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("format"), "was not written by gc_optax.save_axes"),
        (putting("format", "another"), "was not written by gc_optax.save_axes"),
        (without("version"), "has version None of the format, and this gc_optax reads version 1"),
        (putting("version", 2), "has version 2 of the format, and this gc_optax reads version 1"),
        (putting("version", "1"), "has version '1' of the format"),
        (putting("version", True), "has version True of the format"),
        (without("parameters"), "must hold a format, a version and a list of parameters, and nothing else"),
        (putting("parameters", {}), "must hold a format, a version and a list"),
        (putting("more", 1), "must hold a format, a version and a list"),
        (lambda document: document["parameters"].append(3), r"parameter 5 of the file has no path: 3"),
        (lambda document: document["parameters"].append([[]]), r"parameter 5 of the file has no path"),
        (lambda document: document["parameters"].append({}), r"parameter 5 of the file has no path: {}"),
        (
            lambda document: document["parameters"].append(document["parameters"][0]),
            r"\['bias'\]: it is in the file twice",
        ),
        (lambda document: document["parameters"].clear(), r"\['step'\], shape \(\): it is not in the file"),
        (lambda document: document["parameters"][3].pop("why"), r"\['step'\], shape \(\): its fields in the"),
    ],
)
def test_another_document_is_refused_by_the_file(edit, message, file):
    document = json.loads(SMALL_FILE)
    edit(document)
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"(?s)axes.json .*{message}"):
        load_axes(file, SMALL)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", b"null", b"1", b"[]", b"{}", b'"gc_optax axes"', b"\xff\xfe", b"\x00" * 100, b"NaN"),
        *(b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"PK\x03\x04" + b"\x93" * 99),
        SMALL_FILE.replace("[1]", "<<<<<<< ours\n[1]\n=======\n[0]\n>>>>>>> theirs", 1).encode(),
        SMALL_FILE.replace('"fan_in": [1]', '"fan_in": [1], "fan_in": [0]', 1).encode(),
        SMALL_FILE.encode("utf-16") + b"\x00",
        (SMALL_FILE * 2).encode(),
    ],
    ids=range(18),
)
def test_what_is_no_such_file_is_refused_by_its_name(content, file):
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"axes\.json (is not the JSON that|was not written by) gc_optax"
    ) as raised:
        load_axes(file, SMALL)
    assert len(str(raised.value)) < 1000


def test_a_repeated_field_is_named(file):
    file.write_text(SMALL_FILE.replace('"fan_in": [1]', '"fan_in": [1], "fan_in": [0]', 1))
    with pytest.raises(ValueError, match="a field is repeated among path, shape, fan_in, fan_in, fan_out"):
        load_axes(file, SMALL)


def test_a_file_that_is_not_there_is_an_error_of_the_system(file):
    with pytest.raises(FileNotFoundError, match=r"axes\.json"):
        load_axes(file, SMALL)
    with pytest.raises(FileNotFoundError):
        save_axes(file.parent / "nowhere" / "axes.json", out_last, SMALL)


# Damage: what loads is what the file says, read here without a line of gc_optax.

FEW = {"bias": Shape((6,), f32), "kernel": Shape((4, 6), f32), "act": jax.nn.relu}
FEW_AXES = {
    "bias": WeightAxes(()),
    "kernel": WeightAxes((0,), (1,), "dot_general", "over 0", "hidden"),
    "act": (),
}
FIELDS = {"path", "shape", "fan_in", "fan_out", "op", "role", "why"}
REFUSED = object()


@functools.cache
def few_file(folder):
    save_axes(folder / "few.json", FEW_AXES, FEW)
    return (folder / "few.json").read_bytes()


def told(content):
    """The axes that a file has for each path, where it has the shapes of `FEW`."""
    document = json.loads(content)
    assert document.keys() == {"format", "version", "parameters"}
    assert (document["format"], document["version"]) == ("gc_optax axes", 1)
    assert all(record.keys() == FIELDS for record in document["parameters"])
    assert {record["path"]: record["shape"] for record in document["parameters"]} == {
        "['bias']": [6],
        "['kernel']": [4, 6],
    }

    def counted(record, field):
        return tuple(axis + len(record["shape"]) * (axis < 0) for axis in record[field])

    return {
        record["path"]: WeightAxes(
            counted(record, "fan_in"), counted(record, "fan_out"), record["op"], record["why"], record["role"]
        )
        for record in document["parameters"]
    }


def loads(content, file):
    """Whether the file loads, as what it says; otherwise its name is in the error."""
    file.write_bytes(content)
    refusal = None
    try:
        loaded = load_axes(file, FEW)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith(f"{file} "), refusal
        return False
    assert loaded.pop("act") == WeightAxes((), why="no array")
    assert by_path(loaded) == told(content)
    centralize(loaded).init({name: FEW[name] for name in loaded})
    return True


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path):
    content = few_file(tmp_path)
    cut = [length for length in range(len(content)) if loads(content[:length], tmp_path / "cut.json")]
    assert cut == [len(content) - 1], "only the last line break may go"


def test_of_a_file_without_one_of_its_bytes_what_loads_is_what_it_says(tmp_path):
    content = few_file(tmp_path)
    pieces = [content[:n] + content[n + 1 :] for n in range(len(content))]
    outcomes = [loads(piece, tmp_path / "damaged.json") for piece in pieces]
    assert 20 < sum(outcomes) < len(content) / 3, "spaces and letters of `why` and `op` may go"


@settings(max_examples=600)
@given(data=st.data())
def test_of_a_file_with_a_changed_byte_what_loads_is_what_it_says(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    content = few_file(folder)
    where = data.draw(st.integers(0, len(content)))
    byte = data.draw(st.one_of(st.sampled_from(b' 0123456789-.,:[]{}"eEtn\\'), st.integers(0, 255)))
    end = where + data.draw(st.integers(0, 1))
    loads(content[:where] + bytes([byte]) + content[end:], folder / "damaged.json")


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 7),
        st.floats(),
        st.sampled_from(["", "0", "['bias']", "['kernel']", "hidden", "gc_optax axes", "fan_in", "path"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(sorted(FIELDS)), inner)
    ),
    max_leaves=4,
)


def nodes(document):
    """Each place in a document of JSON, as its container and its key."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in pairs:
        yield document, key
        if isinstance(value, dict | list):
            yield from nodes(value)


@settings(max_examples=500)
@given(data=st.data())
def test_of_a_file_of_another_structure_what_loads_is_what_it_says(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    document = json.loads(few_file(folder))
    for _ in range(data.draw(st.integers(1, 2))):
        places = list(nodes(document))
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        change = data.draw(st.sampled_from(["put", "drop", "add"]))
        if change == "drop":
            del container[key]
        elif change == "put":
            container[key] = data.draw(JSON)
        elif isinstance(container, list):
            container.append(data.draw(JSON))
        else:
            container[data.draw(st.sampled_from(["more", *sorted(FIELDS)]))] = data.draw(JSON)
    loads(json.dumps(document).encode(), folder / "damaged.json")
