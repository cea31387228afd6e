"""The short examples: a table of patients with Flax, Friedman #1 with Equinox, digits with Haiku."""

import re
import runpy
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from test_examples import ROOT, run

import gc_optax

TABULAR, EQUINOX, HAIKU = (
    ROOT / "examples" / f"{name}.py"
    for name in ("tabular_regression", "equinox_regression", "haiku_classification")
)


@pytest.fixture
def names_of(monkeypatch):
    """What a script defines, by name; its training is not started."""

    def names(script):
        monkeypatch.syspath_prepend(script.parent)
        return runpy.run_path(str(script))

    return names


def measured(printed):
    """The rows of the table of results, without the deviations: its numbers by arm."""
    rows = re.findall(r"│ (\S.*?) +│ (.*) │", printed)
    return {arm: [float(cell.split()[0]) for cell in cells.split("│")] for arm, cells in rows}


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_tabular_regression_shows_a_head_that_only_optax_freezes(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "curves.png"
    run(monkeypatch, TABULAR, "--epochs", 3, "--seeds", 2, "--output", picture)
    printed = capsys.readouterr().out
    rows = measured(printed)
    assert list(rows) == ["adamw alone", "gc_optax.centralize", "optax.centralize"]
    moved = {arm: head for arm, (_, _, head) in rows.items()}
    assert moved.pop("optax.centralize") < 1e-3, "the weight decay alone"
    assert all(distance > 0.01 for distance in moved.values())
    for training, test, _ in rows.values():
        assert 0 < training < 0.4
        assert 0 < test < 0.4
    assert re.search(r"params/head/kernel +\(64, 1\) +0 +64 +1 +output", printed)
    linear = re.search(r"linear regression has a test loss of ([\d.]+) ± ", printed)
    assert 0.15 < float(linear[1]) < 0.35
    assert is_png(picture)


@pytest.mark.thorough
def test_equinox_regression_shows_both_readings_and_trains(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "curves.png"
    run(monkeypatch, EQUINOX, "--epochs", 3, "--seeds", 1, "--output", picture)
    printed = capsys.readouterr().out
    rows = measured(printed)
    assert list(rows) == ["adam alone", "exact axes", "axes of out_last"]
    for training, test in rows.values():
        assert 0 < training < 1, "better than the mean of the targets"
        assert 0 < test < 1
    assert len({training for training, _ in rows.values()}) == 3, "three different ways to train"
    assert re.search(r"layers/0/weight +\(64, 10\) +1 +10 .* dot_general over axis 1", printed)
    assert re.search(r"layers/0/weight +\(64, 10\) +0 +64 .* out_last", printed)
    assert is_png(picture)


@pytest.mark.thorough
def test_haiku_classification_reads_the_separable_convolution_and_trains(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "curves.png"
    run(monkeypatch, HAIKU, "--epochs", 2, "--seeds", 1, "--output", picture)
    printed = capsys.readouterr().out
    rows = measured(printed)
    assert list(rows) == ["adam alone", "gc_optax.centralize", "optax.centralize"]
    for training, accuracy in rows.values():
        assert 0 < training < 2.3, "better than ten equal guesses"
        assert 30 < accuracy <= 100
    assert len({training for training, _ in rows.values()}) == 3, "three different ways to train"
    assert re.search(r"depthwise/w +\(3, 3, 1, 16\) +0, 1, 2 +9 +16", printed)
    assert re.search(r"pointwise/w +\(1, 1, 16, 32\) +0, 1, 2 +16 +32", printed)
    assert is_png(picture)


def test_every_patient_is_trained_on_or_tested_with(names_of):
    load = names_of(TABULAR)["load"]
    train, test = load(0)
    assert (train.measurements.shape, test.measurements.shape) == ((331, 10), (111, 10))
    assert (train.progression.shape, test.progression.shape) == ((331,), (111,))
    together = np.concatenate([train.measurements, test.measurements])
    assert len(np.unique(together, axis=0)) == 442
    np.testing.assert_allclose(train.measurements.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.progression.std(), 1, rtol=1e-5)
    assert abs(test.progression.mean()) > 1e-3, "scaled by what the training patients show"
    assert not np.allclose(load(1)[0].measurements, train.measurements), "each seed has its own split"


def test_arms_of_the_tabular_regression_differ_in_their_optimizer_alone(names_of):
    names = names_of(TABULAR)
    train, test = names["load"](0)
    arguments = type("Arguments", (), {"epochs": 2, "batch_size": 100})
    runs = []
    for optimizer in (optax.adamw(1e-3), optax.chain(optax.identity(), optax.adamw(1e-3))):
        epoch = names["make_epoch"](optimizer)
        runs.append(list(names["train_epochs"](optimizer, epoch, 3, train, test, arguments)))
    for first, second in zip(*runs, strict=True):
        assert first == second, "the same weights, patients and dropped units"


def test_rows_of_friedman_are_standardized_by_those_to_train_on(names_of):
    x, y, test_x, test_y = names_of(EQUINOX)["load"]()
    assert (x.shape, y.shape, test_x.shape, test_y.shape) == ((500, 10), (500,), (500, 10), (500,))
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose([x.std(), y.std()], 1, rtol=1e-5)
    assert abs(test_y.mean()) > 1e-3


def test_centralize_alone_takes_the_axes_of_out_last_for_equinox_without_a_word(names_of):
    names = names_of(EQUINOX)
    params = eqx.filter(names["initialize"](0), eqx.is_inexact_array)
    gradients = jax.tree.map(lambda array: array**2, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = gc_optax.centralize_gradients(gradients)
    same = jax.tree.map(np.array_equal, alone, gc_optax.centralize_gradients(gradients, gc_optax.out_last))
    assert jax.tree.all(same)
    exact = gc_optax.infer_axes(names["loss"], names["initialize"](0), *names["load"]()[:2])
    assert [exact.layers[number].weight.fan_in for number in range(3)] == [(1,)] * 3


@pytest.mark.thorough
def test_ctrl_c_ends_in_one_line():
    code = "import comparison; raise KeyboardInterrupt"
    command = [sys.executable, "-c", code]
    stopped = subprocess.run(command, cwd=EQUINOX.parent, capture_output=True, text=True)
    assert stopped.returncode == 130
    assert (stopped.stdout, stopped.stderr) == ("", "\nStopped by Ctrl-C.\n")


@pytest.mark.thorough
def test_forty_columns_are_enough_for_the_results(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", [str(EQUINOX), "--epochs=1", "--seeds=2", f"--output={tmp_path}/curves.png"]
    )
    monkeypatch.syspath_prepend(EQUINOX.parent)
    monkeypatch.setenv("COLUMNS", "40")
    runpy.run_path(str(EQUINOX), run_name="__main__")
    printed = capsys.readouterr().out
    results = printed[printed.index("Equinox MLP") : printed.index("The picture is in")]
    assert len(re.findall(r"^  test loss: [\d.]+ ± [\d.]+$", results, re.MULTILINE)) == 3
    assert max(map(len, results.splitlines())) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("script", [TABULAR, EQUINOX, HAIKU])
def test_runs_that_diverge_are_reported(script, monkeypatch, capsys, tmp_path):
    arguments = ["--learning-rate", 1e30, "--epochs", 2, "--seeds", 2]
    run(monkeypatch, script, *arguments, "--output", tmp_path / "curves.png")
    printed = capsys.readouterr().out
    assert "nan" in printed
    assert is_png(tmp_path / "curves.png")


@pytest.mark.parametrize(
    ("script", "option", "value", "message"),
    [
        (TABULAR, "--batch-size", "332", "there are only 331 training patients"),
        (TABULAR, "--epochs", "0", "must be at least 1, got 0"),
        (TABULAR, "--learning-rate", "-1", "must be a positive number, got -1"),
        (EQUINOX, "--learning-rate", "inf", "must be a positive number, got inf"),
        (EQUINOX, "--seeds", "0", "must be at least 1, got 0"),
        (EQUINOX, "--output", "curves.txt", "curves.txt must end in one of"),
        (HAIKU, "--epochs", "-3", "must be at least 1, got -3"),
        (HAIKU, "--output", "no/such/folder/curves.png", "there is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_the_training(script, option, value, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, script, option, value)
    assert f"argument {option}: {message}" in capsys.readouterr().err
