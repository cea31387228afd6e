"""examples/keras_fit.py: what it prints and draws, also when it is stopped; and what every example does."""

import os
import pathlib
import pty
import re
import runpy
import select
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_examples import ROOT, run

SCRIPT = ROOT / "examples" / "keras_fit.py"
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "comparison.py"]


@pytest.fixture
def quick_compiler():
    """Most of the time of a small run goes into compiling, which is faster where the program need not be."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def keras_fit():
    """What the script defines, without running it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return runpy.run_path(str(SCRIPT))


def assert_picture(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) > (1000, 400)


# The example with Keras


@pytest.mark.thorough
@pytest.mark.usefixtures("quick_compiler")
def test_it_trains_prints_a_table_and_goes_on_from_the_saved_model(monkeypatch, capsys, tmp_path):
    picture = tmp_path / "curves.png"
    run(monkeypatch, SCRIPT, "--epochs", 1, "--seeds", 1, "--output", picture)
    printed = capsys.readouterr().out
    assert re.search(r"^cnn/conv_1/kernel +\(3, 3, 16, 32\) +0, 1, 2 +144 +32 ", printed, re.MULTILINE)
    assert "4 of 10 parameters are centralized" in printed
    rows = re.findall(r"│ (\S.*?) +│ +([\d.]+) │ +([\d.]+) │", printed)
    assert [arm for arm, _, _ in rows] == ["Adam", "Adam with GC"]
    for _, loss, accuracy in rows:
        assert 0 < float(loss) < 2.3, "better than ten equal guesses"
        assert 20 < float(accuracy) <= 100
    assert rows[0][1] != rows[1][1]
    steps = 1437 // 64
    went_on = rf"CentralizedAdam after {steps} steps, the same predictions; trained on to step {2 * steps}\."
    assert re.search(f"Saved and loaded: {went_on}", printed)
    assert f"The picture is in {picture}\n" in printed
    assert_picture(picture)


def arguments_of(keras_fit, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    return keras_fit["parse_arguments"](1437)


@pytest.mark.usefixtures("quick_compiler")
def test_all_that_differs_between_the_arms_is_the_optimizer(keras_fit, monkeypatch):
    """Of two arms with the same one, all measured numbers are the same to the bit, and so are the weights."""

    class Runs:
        def __init__(self):
            self.measured = []

        def add(self, arm, seed, measured):
            self.measured.append(measured)

    arguments = arguments_of(keras_fit, monkeypatch, "--epochs", 2)
    train, test = (keras_fit["whole_batches"](digits, 64) for digits in keras_fit["load"]())
    few = keras_fit["Digits"](train.images[:192], train.labels[:192])
    ends = []
    for seed in (0, 0, 1):
        runs = Runs()
        model = keras_fit["fit"]("Adam", seed, few, test, runs, arguments)
        ends.append((runs.measured, model.get_weights()))
    (first, weights), (again, same_weights), (other, _) = ends
    assert len(first) == 2
    assert first == again != other
    for mine, theirs in zip(weights, same_weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_whole_batches_are_those_in_front(keras_fit):
    digits = keras_fit["load"]()[0]
    for batch_size, count in ((64, 1408), (1437, 1437), (1000, 1000)):
        whole = keras_fit["whole_batches"](digits, batch_size)
        np.testing.assert_array_equal(whole.images, digits.images[:count])
        np.testing.assert_array_equal(whole.labels, digits.labels[:count])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--learning-rate", "0", "must be a positive number, got 0"),
        ("--epochs", "0", "must be at least 1, got 0"),
        ("--seeds", "none", "invalid positive_integer value: 'none'"),
        ("--batch-size", "1438", "there are only 1437 training images"),
        ("--output", "no/such/folder/picture.png", "there is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_the_training(option, value, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, SCRIPT, option, value)
    assert f"argument {option}: {message}" in capsys.readouterr().err


@pytest.mark.slow
def test_another_backend_is_refused_in_one_line(tmp_path):
    environment = os.environ | {"KERAS_BACKEND": "numpy", "KERAS_HOME": str(tmp_path)}
    refused = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith("gc_optax.keras needs Keras on JAX, and here it runs on numpy: ")
    assert "KERAS_BACKEND" in line


def stop(script, arguments, when, columns):
    """Runs a script on a terminal, with Ctrl-C once `when` is shown: its exit code, and what it shows."""
    # The size of the terminal is what the environment says.
    environment = os.environ | {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    terminal, theirs = pty.openpty()
    command = [sys.executable, script, *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    shown, stopped, deadline = "", False, time.monotonic() + 300
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                content = os.read(terminal, 65536)
            except OSError:  # nobody has the other end any more
                break
            shown += content.decode(errors="replace")
            if not stopped and re.search(when, shown):
                process.send_signal(signal.SIGINT)
                stopped = True
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    # What remains of a terminal's control sequences is of no length.
    return process.returncode, re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)


@pytest.mark.slow
def test_ctrl_c_on_a_narrow_terminal_shows_what_was_measured(tmp_path):
    picture = tmp_path / "curves.png"
    arguments = ["--epochs", "200", "--seeds", "2", "--output", str(picture)]
    code, shown = stop(SCRIPT, arguments, r"[1-9]\d*/800", 40)
    assert code == 130, shown
    assert "Traceback" not in shown
    stopped = shown.partition("Stopped by Ctrl-C.")[2].replace("\r", "")
    assert re.search(r"^Adam\n  epochs: [1-9]\d* of 200$", stopped, re.MULTILINE), shown
    assert re.search(r"^Adam with GC\n  epochs: 0 of 200$", stopped, re.MULTILINE), shown
    assert "Saved and loaded" not in shown
    lines = [line for line in re.split(r"[\r\n]+", shown) if not line.startswith("The picture is in ")]
    assert max(map(len, lines)) <= 40
    assert_picture(picture)


@pytest.mark.slow
def test_ctrl_c_before_anything_is_measured_ends_in_one_line(tmp_path):
    arguments = ["--output", str(tmp_path / "curves.png")]
    code, shown = stop(SCRIPT, arguments, r"0/200", 100)
    assert code != 0
    assert "Traceback" not in shown
    assert shown.rstrip().endswith("\nStopped by Ctrl-C.")
    assert not (tmp_path / "curves.png").exists()


# Every example


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_help_a_picture_and_tests(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, script, "--help")
    assert not ended.value.code
    usage = capsys.readouterr().out
    assert "--output" in usage
    assert f"(default: {script.stem}.png)" in usage
    assert list(tmp_path.iterdir()) == []
    pictures = list((ROOT / "docs").rglob(f"{script.stem}.png"))
    assert len(pictures) == 1
    assert pictures[0].stat().st_size < 150_000
    assert_picture(pictures[0])
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert re.search(rf'"{script.stem}(\.py)?"', tests), "a test takes it by its name"


# Not even root can create a file there.
NOWHERE = pathlib.Path("/proc/picture.png")


@pytest.mark.skipif(not NOWHERE.parent.is_dir(), reason="here is no /proc, in which nobody can create a file")
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_refuses_a_picture_that_cannot_be_written(script, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, script, "--output", NOWHERE)
    printed = capsys.readouterr()
    assert f"argument --output: {NOWHERE} cannot be written: " in printed.err
    assert printed.out == "", "it has not begun"
