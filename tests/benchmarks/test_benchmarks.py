"""The benchmarks of speed: they run, they measure what they say, and they print what they measured."""

import importlib
import inspect
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import gc_optax

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def rows(console):
    lines = (line.strip() for line in console.file.getvalue().splitlines())
    return [re.split(r" {2,}", line) for line in lines]


def run(script, *arguments):
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_ways_take_turns_in_changing_orders(load):
    called = []
    ways = {name: lambda name=name: called.append(name) for name in "abc"}
    times = load("harness").take_turns(ways, rounds=20, least=0)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = ["".join(called[start : start + 3]) for start in range(6, len(called), 3)]
    assert len(rounds) == 20
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6, "every order"


def test_short_work_is_repeated_within_a_measurement(load, monkeypatch):
    harness = load("harness")
    now, called = [0.0], []

    def work():
        now[0] += 0.25
        called.append(now[0])

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    assert harness.take_turns({"a": work}, rounds=1, least=2.0) == {"a": [0.25]}
    assert len(called) == 2 + 8, "two calls to know how long it takes, and a measurement of two seconds"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_plain_step_copies_nothing(load, optimizer):
    overhead = load("overhead")
    case = overhead.tensor_case((1024, 1024), (0,), jnp.dtype("float32"))
    centralize = overhead.TRANSFORMATIONS["centralize"]
    run = overhead.measure(case, overhead.OPTIMIZERS[optimizer], centralize, rounds=1)
    assert run["temporary_bytes"]["plain"] < 2**20


@pytest.mark.parametrize(
    ("name", "leaves", "parameters"),
    [
        ("ResNet-50", 161, 25_557_032),
        ("ViT-B/16", 200, 86_567_656),
        ("GPT-2 124M", 196, 124_439_808),
        ("GPT-2 124M, scanned", 20, 124_439_808),
        ("LSTM, 2 x 1500", 27, 66_022_000),
    ],
)
def test_the_trees_are_those_of_the_models(load, name, leaves, parameters):
    case = load("overhead").model_case(name, jnp.dtype("bfloat16"))
    given = jax.tree.leaves(case.params)
    assert (len(given), sum(leaf.size for leaf in given)) == (leaves, parameters)
    assert {leaf.dtype for leaf in given} == {jnp.dtype("bfloat16")}
    weights = zip(given, jax.tree.leaves(case.axes), strict=True)
    assert 0.6 < sum(leaf.size for leaf, weight in weights if weight.fan_in) / parameters < 1


def test_all_ways_but_one_compute_what_they_should(load):
    overhead = load("overhead")
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    case = overhead.tensor_case((6, 4), (0,), jnp.dtype("float32"))
    expected = {
        "plain": gradient,
        "gc_optax": gradient - gradient.mean(0),
        "naive": gradient - gradient.mean(0),
        "optax.centralize": gradient - gradient.mean(1, keepdims=True),  # the other axes, which is the point
    }
    for name, way in overhead.TRANSFORMATIONS["centralize"].ways.items():
        updates, _ = way(case.axes).update({"w": gradient}, optax.EmptyState())
        np.testing.assert_allclose(updates["w"], expected.pop(name), rtol=0, atol=1e-6)
    assert not expected


def test_both_ways_to_clip_compute_the_same(load):
    overhead = load("overhead")
    gradient, weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)), jnp.float32)
    case = overhead.tensor_case((6, 4), (0,), jnp.dtype("float32"))
    ways = overhead.TRANSFORMATIONS["adaptive_grad_clip"].ways
    plain, ours, theirs = (
        way(case.axes).update({"w": gradient}, optax.EmptyState(), {"w": weights})[0]["w"]
        for way in ways.values()
    )
    np.testing.assert_array_equal(plain, gradient)
    np.testing.assert_array_equal(ours, theirs)
    assert np.all(ours != gradient)


@pytest.mark.parametrize(
    ("transformation", "optimizer", "streams", "read_again"),
    [
        ("centralize", "adamw", 7, 1),
        ("centralize", "sgd", 5, 1),
        ("centralize", "lion", 5, 1),
        ("adaptive_grad_clip", "adamw", 7, 2),
    ],
)
def test_the_floor_counts_every_stream_once(load, transformation, optimizer, streams, read_again):
    overhead = load("overhead")
    case = overhead.tensor_case((64, 32), (0,), jnp.dtype("float32"))
    measured = overhead.TRANSFORMATIONS[transformation]
    run = overhead.measure(case, overhead.OPTIMIZERS[optimizer], measured, rounds=1)
    assert run["floor"] == pytest.approx((streams + read_again) / streams, rel=1e-2)
    assert run["bytes"] == pytest.approx(streams * 4 * 64 * 32, rel=1e-2)
    assert set(run["seconds"]) == {*measured.ways, "plain again"}


def test_overhead_prints_medians_of_ratios_within_a_round(load, console):
    run = {
        "optimizer": "adamw",
        "case": "ResNet-50",
        "parameters": 25_000_000,
        "bytes": 700_000_000,
        "floor": 8 / 7,
        "seconds": {
            "plain": [0.1, 0.2, 0.4],
            "gc_optax": [0.11, 0.2, 0.4],
            "optax.centralize": [0.1, 0.3, 0.8],
            "naive": [0.2, 0.4, 0.8],
            "plain again": [0.1, 0.2, 0.2],
        },
        "temporary_bytes": {
            "plain": 2**20,
            "gc_optax": 2**20,
            "optax.centralize": 3 * 2**20,
            "naive": 0,
        },
    }
    load("overhead").report([run], bandwidth=8e9, console=console)
    ratios = ["1.00 (1.00-1.05)", "1.50 (1.25-1.75)", "2.00 (2.00-2.00)", "1.00 (0.75-1.00)"]
    assert ["ResNet-50", "25.0 M", "200.0 ms", "50%", "1.14", *ratios] in rows(console)
    assert ["ResNet-50", "1.0", "+0.0", "+2.0", "-1.0"] in rows(console)
    assert ["adamw: the largest ratio of gc_optax on a model tree is 1.00, on ResNet-50"] in rows(console)


@pytest.mark.slow
def test_overhead_runs_and_writes_what_it_measured(tmp_path):
    numbers, picture = tmp_path / "runs.json", tmp_path / "overhead.png"
    case = "(768, 12, 64)"
    arguments = ["--optimizers", "sgd", "adamw", "--cases", case, "--rounds", 2, "--peers", "keras"]
    finished = run("overhead.py", *arguments, "--json", numbers, "--plot", picture)
    assert finished.returncode == 0, finished.stderr
    for optimizer in ("sgd", "adamw"):
        assert re.search(
            rf"{optimizer}: the largest ratio of gc_optax on a single tensor is", finished.stdout
        )
    assert re.search(r"Keras [\d.]+, jax", finished.stdout)
    written = json.loads(numbers.read_text())
    assert [(run["optimizer"], run["case"]) for run in written["runs"]] == [("sgd", case), ("adamw", case)]
    assert [len(peer["seconds"]["centralized"]) for peer in written["peers"]] == [2]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "option", "value", "message"),
    [
        ("overhead.py", "--cases", "ResNet-51", "invalid choice"),
        ("overhead.py", "--rounds", "0", "must be at least 1, got 0"),
        ("overhead.py", "--json", "no/such/folder/runs.json", "there is no folder"),
        ("train_step.py", "--rounds", "none", "invalid positive value"),
        ("train_step.py", "--json", "no/such/folder/runs.json", "there is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_the_work(load, monkeypatch, capsys, script, option, value, message):
    monkeypatch.setattr(sys, "argv", [script, option, value])
    with pytest.raises(SystemExit, match="2"):
        load(script.removesuffix(".py")).main()
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_refused(load, monkeypatch, capsys):
    overhead = load("overhead")
    monkeypatch.setattr(overhead.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--peers", "torch"])
    with pytest.raises(SystemExit, match="2"):
        overhead.main()
    assert "there is no torch here; pip install '.[peers]'" in capsys.readouterr().err


@pytest.mark.slow
def test_every_way_to_train_takes_whole_steps(load):
    train_step = load("train_step")
    model, batch = train_step.models()["quickstart, batch 32"]
    variables = model.init(jax.random.key(0), batch[0])
    before = jax.tree.map(np.asarray, variables["params"])
    for way in train_step.training_step(model, variables, batch).values():
        after = jax.tree.map(np.asarray, way())
        moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), after, before)
        assert min(jax.tree.leaves(moved)) > 0
        before = after


@pytest.mark.slow
def test_train_step_measures_steps_and_compilations(load, monkeypatch, capsys, tmp_path):
    train_step = load("train_step")
    few = {name: params[:2] for name, params in train_step.trees().items()}
    models = {"quickstart, batch 32": train_step.models()["quickstart, batch 32"]}
    numbers = tmp_path / "runs.json"
    arguments = ["--rounds", "2", "--compilations", "1", "--json", str(numbers)]
    monkeypatch.setattr(train_step, "trees", lambda: few)
    monkeypatch.setattr(train_step, "models", lambda: models)
    monkeypatch.setattr(sys, "argv", ["train_step.py", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    train_step.main()
    printed = capsys.readouterr().out
    assert re.search(r"quickstart, batch 32 +[\d.]+ ms( +[\d.]+ \([\d.]+-[\d.]+\)){3}", printed)
    assert re.search(r"1,000 kernels +[\d.,]+ ms( +[\d.]+ \([\d.]+-[\d.]+\)){3}", printed)
    written = json.loads(numbers.read_text())
    assert {len(seconds) for seconds in written["steps"]["quickstart, batch 32"].values()} == {2}
    assert {len(seconds) for seconds in written["compilations"]["1,000 kernels"].values()} == {1}


def test_the_trees_to_compile_have_a_thousand_leaves(load):
    trees = load("train_step").trees()
    assert [len(jax.tree.leaves(params)) for params in trees.values()] == [1000, 1000]


def test_outside_jit_measures_imports_and_updates(load, monkeypatch, capsys, tmp_path):
    outside_jit = load("outside_jit")
    numbers = tmp_path / "runs.json"
    monkeypatch.setattr(outside_jit, "KERNELS", 3)
    monkeypatch.setattr(sys, "argv", ["outside_jit.py", "--rounds", "1", "--json", str(numbers)])
    monkeypatch.setenv("COLUMNS", "200")
    outside_jit.main()
    printed = capsys.readouterr().out
    for heading in ("import", "1 shape ", "10 shapes", "100 shapes", "1,000 shapes", "by a tree of axes"):
        assert heading in printed
    written = json.loads(numbers.read_text())
    assert {len(seconds) for seconds in written["imports"]["import"].values()} == {1}
    assert min(written["imports"]["import"]["optax"]) > 0
    for update in outside_jit.updates(2).values():
        updates, _ = update()
        assert len(updates) == 3
        assert all(abs(layer["kernel"]).max() == 0 for layer in updates.values())


needs_galore = pytest.mark.skipif(not hasattr(optax.contrib, "galore"), reason="optax has it since 0.2.7")


@needs_galore
@pytest.mark.parametrize("scanned", [False, True])
def test_what_is_inferred_of_the_model_of_the_rank_rules_is_what_is_written_by_hand(load, scanned):
    on = load("rank_rules").model(scanned=scanned)
    assert len(jax.tree.leaves(on.params)) == 20
    said = jax.tree.map(lambda axes: (axes.fan_in, axes.fan_out, axes.role), on.inferred)
    assert said == jax.tree.map(lambda axes: (axes.fan_in, axes.fan_out, axes.role), on.truth)


@needs_galore
def test_each_matrix_and_what_is_no_matrix_come_back_in_their_places(load):
    rank_rules = load("rank_rules")
    axes = {"kernel": gc_optax.WeightAxes((3,), (0, 2)), "bias": gc_optax.WeightAxes(())}
    params = {"kernel": jnp.arange(120.0).reshape(2, 3, 4, 5), "bias": jnp.arange(3.0)}
    shapes = []

    def update(updates, state, params):
        shapes.append(jax.tree.map(jnp.shape, updates, is_leaf=lambda leaf: isinstance(leaf, jax.Array)))
        scaled = {"kernel": [n * w for n, w in enumerate(updates["kernel"])], "bias": -params["bias"]}
        return scaled, state

    each = rank_rules.each_matrix(optax.GradientTransformation(lambda params: (), update), axes)
    updates, _ = each.update(params, each.init(params), params)
    assert shapes == [{"kernel": [(5, 8)] * 3, "bias": (3,)}]
    np.testing.assert_array_equal(updates["kernel"], params["kernel"] * np.arange(3)[:, None, None])
    np.testing.assert_array_equal(updates["bias"], -params["bias"])


@needs_galore
def test_the_page_has_the_code_of_each_matrix_that_is_measured(load):
    page = (BENCHMARKS.parent / "docs" / "one_tree.md").read_text()
    assert inspect.getsource(load("rank_rules").each_matrix) in page


@needs_galore
def test_rank_rules_counts_what_is_wrong_and_names_it(load, monkeypatch, console):
    rank_rules = load("rank_rules")
    few = ("centralize", "adaptive_grad_clip", "decay mask, ndim > 1")
    monkeypatch.setattr(rank_rules, "RULES", {name: rank_rules.RULES[name] for name in few})
    rank_rules.report(rank_rules.measure(), console)
    printed = rows(console)
    assert ["centralize", "13 of 20", "0 of 20", "18 of 20", "0 of 20"] in printed
    assert ["adaptive_grad_clip", "2 of 8", "0 of 8", "7 of 8", "0 of 8"] in printed
    assert ["decay mask, ndim > 1", "5 of 20", "0 of 20", "10 of 20", "0 of 20"] in printed
    assert ["layers/attention/out/kernel", "ps", "ps"] in printed
    assert ["layers/attention/out/bias", "s", "s"] in printed
    assert "divided by 24.0 (optax), 1.0 (gc_optax)" in console.file.getvalue()


@needs_galore
@pytest.mark.slow
def test_the_page_has_the_counts_of_rank_rules(tmp_path):
    numbers = tmp_path / "wrong.json"
    finished = run("rank_rules.py", "--json", numbers)
    assert finished.returncode == 0, finished.stderr
    by_rule = json.loads(numbers.read_text())["rules"]
    page = (BENCHMARKS.parent / "docs" / "one_tree.md").read_text()
    table = re.search(r"^\| rule in optax \|(.*?)\n\n", page, re.M | re.S)[1].splitlines()[2:]
    counts = [[int(cell.split()[0]) for cell in line.strip("| ").split(" | ")[1:]] for line in table]
    assert counts == [
        [len(of[ours]) for of in by_kind.values() for ours in ("optax", "gc_optax")]
        for by_kind in by_rule.values()
    ]
    assert "head/kernel" in by_rule["muon, hidden weights"]["plain"]["optax"]
