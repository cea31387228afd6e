"""The example for many devices: it trains, it survives a crash bit by bit, and hosts can share the work."""

import argparse
import os
import pathlib
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "pod_training.py"
SMALL = ["--layers=2", "--embed=16", "--heads=2", "--length=16", "--batch-size=8", "--learning-rate=0.01"]
STEPS = 30
EVERY = 10
# The number of devices is what the command line says.
ENVIRONMENT = {name: os.environ[name] for name in os.environ.keys() - {"XLA_FLAGS", "JAX_NUM_CPU_DEVICES"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of small files, in which every line is easy to learn."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.py").write_text(f"def add_{number}(x):\n    return x + {number}\n\n" * 20)
    return folder


def start(text, *arguments, steps=STEPS, devices=8):
    simulated = ["--simulated-devices", devices] if devices else []
    command = [sys.executable, SCRIPT, *SMALL, "--text", text, "--steps", steps, "--save-every", EVERY]
    return subprocess.Popen(
        [*map(str, command), *map(str, simulated), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Most of the time goes into compiling, which is faster where the program need not be.
        env=ENVIRONMENT | {"COLUMNS": "200", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )


def finish(*processes):
    """The exit code, stdout and stderr of each; none of them is left running."""
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *streams) for process, streams in zip(processes, printed, strict=True)]


def succeed(*processes):
    """What each of them printed, but for what JAX's library for collectives does."""
    finished = finish(*processes)
    for code, _, errors in finished:
        assert code == 0, errors
    # Its threads write at once: the ends of two lines may come together.
    return [re.sub(r"\[Gloo\].*\n+", "", output) for _, output, errors in finished]


def start_two(texts, *arguments, devices):
    """Two processes that find each other on this machine."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    return [
        start(
            text,
            *("--coordinator", coordinator, "--processes", 2, "--process-id", number),
            *("--output", f"{number}.png", *arguments),
            devices=devices,
        )
        for number, text in enumerate(texts)
    ]


def read(folder, step):
    """Every leaf of a checkpoint's state by its path, and the measurements beside it."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = folder / str(step) / "state"
        kinds = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), checkpointer.metadata(path).item_metadata.tree
        )
        state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=kinds))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        record = checkpointer.restore(folder / str(step) / "record")
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return leaves, np.array(record["measurements"])


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """What a run on eight devices printed, and its folder of checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (printed,) = succeed(
        start(text, "--checkpoints", folder / "checkpoints", "--output", folder / "curves.png")
    )
    return printed, folder


def test_it_trains_prints_a_table_and_saves_a_picture(uninterrupted):
    printed, folder = uninterrupted
    assert "devices: 8 cpu, processes: 1, mesh: fsdp 4 x tp 2" in printed
    assert re.search(r"blocks/attention/out/kernel +\(2, 2, 8, 16\) +1, 2 ", printed)
    assert f"{STEPS}/{STEPS} steps" in printed
    rows = re.findall(r"│ ([\d,]+) steps +│ +([\d.]+) │ +([\d.]+) │", printed)
    assert [int(row[0]) for row in rows] == list(range(0, STEPS + 1, EVERY))
    (unigram,) = re.findall(r"│ unigram model +│ +│ +([\d.]+) │", printed)
    (bigram,) = re.findall(r"│ bigram model +│ +│ +([\d.]+) │", printed)
    for first, last in ((rows[0][1], rows[-1][1]), (rows[0][2], rows[-1][2])):
        assert 5 < float(first) < 7, "about that of 256 equal guesses"
        assert float(last) < float(unigram)
    assert float(bigram) < float(unigram)
    picture = folder / "curves.png"
    assert str(picture) in printed
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) > (1000, 600)


def test_the_state_is_saved_in_shards(uninterrupted):
    _, folder = uninterrupted
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        state = checkpointer.metadata(folder / "checkpoints" / str(STEPS) / "state").item_metadata.tree
    adam = state["optimizer"][0]
    for tree in (state["params"], adam["mu"], adam["nu"]):
        kernel = tree["blocks"]["up"]["kernel"]
        assert kernel.sharding.partition_spec == (None, "fsdp", "tp")
        assert kernel.shape == (2, 16, 64)
        assert kernel.storage.chunk_shape == (2, 4, 32)


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_reaches_the_same_bits(text, uninterrupted, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    arguments = ("--checkpoints", checkpoints, "--output", tmp_path / "curves.png")
    killed = start(text, *arguments)
    try:
        while killed.poll() is None and not (checkpoints / str(EVERY)).exists():
            time.sleep(0.005)
    finally:
        killed.kill()
        _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert not (checkpoints / str(STEPS)).exists()
    (printed,) = succeed(start(text, *arguments, "--resume"))
    assert f"{STEPS}/{STEPS} steps" in printed

    leaves, measurements = read(checkpoints, STEPS)
    expected_leaves, expected_measurements = read(uninterrupted[1] / "checkpoints", STEPS)
    assert leaves.keys() == expected_leaves.keys()
    assert {path.split("'")[1] for path in leaves} == {"params", "optimizer"}
    for path, leaf in leaves.items():
        assert leaf.tobytes() == expected_leaves[path].tobytes(), path
    np.testing.assert_array_equal(measurements, expected_measurements)


@pytest.mark.slow
def test_two_processes_train_as_one_does(text, uninterrupted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed, nothing = succeed(*start_two((text, text), "--checkpoints", "checkpoints", devices=4))
    assert "devices: 8 cpu, processes: 2, mesh: fsdp 4 x tp 2" in printed
    assert nothing == ""
    assert pathlib.Path("0.png").exists()
    assert not pathlib.Path("1.png").exists()
    _, measurements = read(tmp_path / "checkpoints", STEPS)
    _, expected = read(uninterrupted[1] / "checkpoints", STEPS)
    np.testing.assert_allclose(measurements, expected, rtol=1e-3)


@pytest.mark.slow
def test_processes_with_different_texts_do_not_train_together(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("pass\n" * 1000)
    for code, output, errors in finish(*start_two((text, tmp_path), devices=1)):
        assert code != 0
        assert "the processes have different texts or options" in errors
        assert "text:" not in output


@pytest.mark.slow
def test_a_checkpoint_goes_to_other_devices_and_to_centralization(text, tmp_path):
    arguments = ("--checkpoints", tmp_path / "checkpoints", "--output", tmp_path / "curves.png")
    (printed,) = succeed(start(text, *arguments, "--no-centralization", steps=EVERY))
    assert "kernel" not in printed
    assert "AdamW without gradient centralization" in printed
    (printed,) = succeed(start(text, *arguments, "--resume", steps=2 * EVERY, devices=None))
    assert "devices: 1 cpu, processes: 1, mesh: fsdp 1 x tp 1" in printed
    assert "blocks/attention/out/kernel" in printed
    assert re.findall(r"│ ([\d,]+) steps +│", printed) == ["0", str(EVERY), str(2 * EVERY)]


@pytest.fixture
def script(monkeypatch):
    """The functions of the script, and a way to call one of them with a command line."""
    functions = runpy.run_path(str(SCRIPT))

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        parser = argparse.ArgumentParser()
        return functions["parse_arguments"](parser), parser

    return functions, parse


def test_the_text_is_that_of_the_standard_library(script):
    functions, parse = script
    arguments, parser = parse()
    text = functions["read_text"](arguments.text, arguments.length, parser)
    assert len(text.train) > 5_000_000
    assert 0.01 < len(text.held_out) / len(text.train) < 0.2
    assert "def " in text.held_out.tobytes().decode(errors="replace")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "argument --steps: must be at least 1, got 0"),
        (("--seed", -1), "argument --seed: must be at least 0, got -1"),
        (("--learning-rate", "inf"), "argument --learning-rate: must be a positive number, got inf"),
        (("--output", "curves.txt"), "argument --output: curves.txt must end in one of"),
        (("--heads", 3), "argument --heads: 3 does not divide --embed 128"),
        (("--resume",), "argument --resume: --checkpoints must name the folder to resume from"),
        (("--processes", 2), "argument --coordinator: goes together with --processes and --process-id"),
    ],
)
def test_bad_arguments_are_refused(script, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        script[1](*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tensor-parallel", 3), "argument --tensor-parallel: 3 does not divide the 8 devices"),
        (("--heads", 1), "argument --heads: 1 is no multiple of the 2 devices of axis tp"),
        (("--batch-size", 6), "argument --batch-size: 6 is no multiple of the 4 devices of axis fsdp"),
        (("--embed", 20, "--tensor-parallel", 1), "argument --embed: 20 is no multiple of the 8 devices"),
    ],
)
def test_sizes_that_the_mesh_does_not_divide_are_refused(script, arguments, message, monkeypatch, capsys):
    functions, parse = script
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(SystemExit, match="2"):
        functions["make_mesh"](*parse(*arguments))
    assert message in capsys.readouterr().err


def test_text_that_is_missing_or_too_short_is_refused(script, tmp_path, capsys):
    functions, parse = script
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_text("short" * 30)
    for name, message in (
        ("missing", "No such file or directory"),
        ("empty", "0 bytes to train on and 0 held out are too few for windows of 129 bytes"),
        ("short", "142 bytes to train on and 8 held out are too few for windows of 129 bytes"),
    ):
        arguments, parser = parse("--text", tmp_path / name)
        with pytest.raises(SystemExit, match="2"):
            functions["read_text"](arguments.text, arguments.length, parser)
        error = capsys.readouterr().err
        assert "argument --text: " in error
        assert message in error


def test_checkpoints_are_neither_overwritten_nor_mixed(script, uninterrupted, tmp_path, capsys):
    functions, parse = script
    checkpoints = uninterrupted[1] / "checkpoints"
    (tmp_path / "empty").mkdir()
    for folder, arguments, message in (
        (checkpoints, (), "--checkpoints: {} has some; go on from them with --resume"),
        (
            checkpoints,
            ("--resume", "--steps", STEPS),
            "--steps: the last checkpoint is that of step 30 already",
        ),
        (checkpoints, ("--resume", "--embed", 32), "--embed: the checkpoints were made with 16, not 32"),
        (tmp_path / "empty", ("--resume",), "--resume: there are no checkpoints in {}"),
        (tmp_path / "missing", ("--resume",), "--resume: there are no checkpoints in {}"),
    ):
        settled, parser = parse(*SMALL, "--checkpoints", folder, *arguments)
        settings = {name: getattr(settled, name) for name in functions["SETTINGS"]} | {"text": ""}
        with pytest.raises(SystemExit, match="2"):
            functions["open_checkpoints"](settled, settings, parser)
        assert f"argument {message.format(folder)}" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()
