"""examples/gradient_distribution.py: what it prints and draws, also of runs that diverge or are stopped."""

import pathlib
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_examples import run

from gc_optax import centralize_gradients, removed_fraction

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "gradient_distribution.py"
LAYERS = ["conv_0", "conv_1", "dense", "head"]
ROW = r"│ (\w+) +│ +(\d+) │ +(\S+)% │ +(\S+)% │ +(\S+)% │ +(\S+) │ +(\S+) │"


def rows_of_layers(printed):
    """By layer: fan-in, the shares at first, at the end without and with GC, and the distances moved."""
    return {name: list(map(float, cells)) for name, *cells in re.findall(ROW, printed)}


def assert_picture(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) > (1000, 1000)


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_means_of_weight_vectors_stay_with_sgd_and_move_with_adam(optimizer, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "picture.png"
    run(monkeypatch, SCRIPT, "--optimizer", optimizer, "--epochs", 1, "--seeds", 1, "--output", picture)
    printed = capsys.readouterr().out
    assert [arm for arm, _ in re.findall(r"│ (with\w* GC) +│ +([\d.]+) │", printed)] == [
        "without GC",
        "with GC",
    ]
    layers = rows_of_layers(printed)
    assert list(layers) == LAYERS
    assert [row[0] for row in layers.values()] == [9, 144, 512, 64]
    for fan_in, first, last, last_with, moved, moved_with in layers.values():
        assert all(100 / fan_in < share < 100 for share in (first, last, last_with))
        assert moved > 1e-4
        assert moved_with < 1e-6 if optimizer == "sgd" else moved_with > 1e-4
    assert str(picture) in printed
    assert_picture(picture)


@pytest.mark.slow
def test_runs_that_diverge_are_shown(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "picture.png"
    run(monkeypatch, SCRIPT, "--learning-rate", 1e30, "--epochs", 1, "--seeds", 1, "--output", picture)
    layers = rows_of_layers(capsys.readouterr().out)
    assert all(np.isnan(row[-2:]).all() for row in layers.values())
    assert_picture(picture)


@pytest.mark.parametrize(
    ("measured", "last_cell"),
    [
        pytest.param(1, "-", marks=pytest.mark.slow),  # nothing yet of the second arm
        (3, r"\d\.\de[+-]\d\d"),
    ],
)
def test_what_was_measured_before_ctrl_c_is_shown(measured, last_cell, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import comparison

    add, calls = comparison.Comparison.add, []

    def add_and_stop(*arguments):
        add(*arguments)
        calls.append(arguments)
        if len(calls) == measured:
            raise KeyboardInterrupt

    monkeypatch.setattr(comparison.Comparison, "add", add_and_stop)
    picture = tmp_path / "picture.png"
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, SCRIPT, "--epochs", 2, "--seeds", 1, "--output", picture)
    printed = capsys.readouterr().out
    assert "Stopped by Ctrl-C. What was measured until then:" in printed
    assert re.findall(rf"│ (\w+) +│ .* │ +{last_cell} │", printed) == LAYERS
    assert_picture(picture)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--optimizer", "lion", "invalid choice: 'lion'"),
        ("--learning-rate", "-1", "must be a positive number, got -1"),
        ("--epochs", "0", "must be at least 1, got 0"),
        ("--seeds", "0", "must be at least 1, got 0"),
        ("--batch-size", "1438", "there are only 1437 training images"),
        ("--output", "no/such/folder/picture.png", "there is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_the_training(option, value, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, SCRIPT, option, value)
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_what_goes_is_what_the_mean_of_the_inputs_contributes():
    """As the docstring of the example has it, of a dense layer."""
    inputs, upstream = jax.random.normal(jax.random.key(0), (2, 32, 16))

    def gradient(x):
        return jax.grad(lambda weights: jnp.sum((x @ weights) * upstream))(jnp.zeros((16, 16)))

    behind_relu = jax.nn.relu(inputs)
    centered = behind_relu - behind_relu.mean(axis=1, keepdims=True)
    removed = centralize_gradients(gradient(behind_relu), 0)
    np.testing.assert_allclose(removed, centered.T @ upstream, rtol=1e-4, atol=1e-5)
    behind_layer_norm = jax.nn.standardize(inputs, axis=1)
    assert removed_fraction(gradient(behind_layer_norm), 0) < 1e-10
    assert removed_fraction(gradient(behind_relu), 0) > 0.1
