"""The example for many devices: it trains, it survives a crash bit by bit, and hosts can share the work."""

import argparse
import gc
import io
import os
import pathlib
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

pytestmark = pytest.mark.slow

MAKEFILE = pathlib.Path(__file__).parents[2] / "Makefile"
SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "pod_training.py"
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


def load():
    """What the script defines, without running it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return runpy.run_path(str(SCRIPT))


def advice(folder):
    """What is said where the last checkpoint is damaged and the one before it is not."""
    return (
        f"argument --resume: the checkpoint of step {STEPS} in {folder} is damaged; that of step "
        f"{STEPS - EVERY} is whole: go on from it with --resume-step {STEPS - EVERY}"
    )


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


def start_two(texts, *arguments, devices, steps=STEPS):
    """Two processes that find each other on this machine."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    return [
        start(
            text,
            *("--coordinator", coordinator, "--processes", 2, "--process-id", number),
            *("--output", f"{number}.png", *arguments),
            steps=steps,
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
    (unigram,) = re.findall(r"│ unigram model +│ +- │ +([\d.]+) │", printed)
    (bigram,) = re.findall(r"│ bigram model +│ +- │ +([\d.]+) │", printed)
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


def test_a_run_that_is_killed_and_resumed_reaches_the_same_bits(
    text, uninterrupted, script, tmp_path, capsys
):
    functions, parse = script
    checkpoints = tmp_path / "checkpoints"
    arguments = ("--checkpoints", checkpoints, "--output", tmp_path / "curves.png")
    killed = start(text, *arguments)
    try:
        while killed.poll() is None and not (checkpoints / str(EVERY)).exists():
            time.sleep(0.005)
        killed.send_signal(signal.SIGSTOP)
        for others in (("--checkpoints", checkpoints), ("--checkpoints", checkpoints, "--resume")):
            with pytest.raises(SystemExit, match="2"):
                functions["lock_checkpoints"](*parse(*others), Console())
            assert f"argument --checkpoints: another run is using {checkpoints}\n" in capsys.readouterr().err
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


@pytest.fixture(scope="module")
def two_processes(text, tmp_path_factory):
    """What each of two processes of one run printed, and their folder."""
    folder = tmp_path_factory.mktemp("two_processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = succeed(*start_two((text, text), "--checkpoints", "checkpoints", devices=4))
    return printed, folder


def test_two_processes_train_as_one_does(uninterrupted, two_processes):
    (printed, nothing), folder = two_processes
    assert "devices: 8 cpu, processes: 2, mesh: fsdp 4 x tp 2" in printed
    # The threads of Gloo write at once, and so cut up each other's lines.
    gloo = (
        r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d|\s"
    )
    assert re.sub(gloo, "", nothing) == ""
    assert (folder / "0.png").exists()
    assert not (folder / "1.png").exists()
    _, measurements = read(folder / "checkpoints", STEPS)
    _, expected = read(uninterrupted[1] / "checkpoints", STEPS)
    np.testing.assert_allclose(measurements, expected, rtol=1e-3)


def test_all_processes_refuse_what_one_of_them_cannot_read(text, two_processes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(two_processes[1] / "checkpoints", "checkpoints")
    for file in pathlib.Path("checkpoints", str(STEPS), "state", "ocdbt.process_1", "d").iterdir():
        file.write_bytes(b"")
    arguments = ("--checkpoints", "checkpoints", "--resume", "--steps", STEPS + EVERY)
    finished = finish(*start_two((text, text), *arguments, devices=4))
    reasons = ("another process cannot read it", "while reading array index")
    for (code, _, errors), reason in zip(finished, reasons, strict=True):
        assert code == 2, errors
        assert f"{advice(tmp_path / 'checkpoints')}\n" in errors
        assert reason in errors
        assert "Traceback" not in errors


def wait_for(folder, *processes):
    """Waits for a folder that one of the processes makes."""
    while not folder.exists():
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.005)


def test_ctrl_c_shows_what_was_measured_and_the_run_can_go_on(text, tmp_path):
    checkpoints, picture = tmp_path / "checkpoints", tmp_path / "curves.png"
    arguments = ("--checkpoints", checkpoints, "--output", picture)
    stopped = start(text, *arguments, steps=100_000)
    try:
        wait_for(checkpoints / str(EVERY), stopped)
        stopped.send_signal(signal.SIGINT)
    finally:
        ((code, printed, errors),) = finish(stopped)
    assert code == 130, errors
    assert "Traceback" not in errors
    of_table = printed.partition("Stopped by Ctrl-C. What was measured until then:\n")[2]
    measured = [int(step.replace(",", "")) for step in re.findall(r"│ ([\d,]+) steps +│", of_table)]
    assert measured[:2] == [0, EVERY]
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    *_, last = sorted(int(folder.name) for folder in checkpoints.iterdir() if folder.name.isdecimal())
    assert last in measured, "the one that was being saved is whole, or the one before it is the last"
    (printed,) = succeed(start(text, *arguments, "--resume", steps=last + EVERY))
    assert f"{last + EVERY}/{last + EVERY} steps" in printed
    assert picture.exists()


def test_ctrl_c_before_the_training_is_one_line(text, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    stopped = start(text, "--checkpoints", checkpoints, "--output", tmp_path / "curves.png")
    try:
        wait_for(checkpoints / "lock", stopped)
        stopped.send_signal(signal.SIGINT)
    finally:
        ((code, _, errors),) = finish(stopped)
    assert code == 130
    assert errors == "\nStopped by Ctrl-C.\n"
    assert list(tmp_path.iterdir()) == [checkpoints]


def test_ctrl_c_waits_for_the_end_of_a_save_and_another_one_does_not(script):
    ctrl_c_waits = script[0]["ctrl_c_waits"]
    usual, done = signal.getsignal(signal.SIGINT), []

    def press(times):
        with ctrl_c_waits():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            done.append(times)

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            press(times)
        assert signal.getsignal(signal.SIGINT) is usual
    assert done == [1]


def test_ctrl_c_in_all_processes_is_told_by_the_first(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    processes = start_two((text, text), "--checkpoints", "checkpoints", devices=1, steps=100_000)
    try:
        wait_for(pathlib.Path("checkpoints", str(EVERY)), *processes)
        for process in processes:
            process.send_signal(signal.SIGINT)
    finally:
        finished = finish(*processes)
    assert [code for code, _, _ in finished] == [130, 130], finished
    assert "Stopped by Ctrl-C. What was measured until then:\n" in finished[0][1]
    assert f"│ {EVERY} steps " in finished[0][1]
    assert "Stopped" not in finished[1][1] + finished[1][2]
    assert [path.name for path in pathlib.Path().glob("*.png")] == ["0.png"]


def test_processes_with_different_texts_do_not_train_together(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("pass\n" * 1000)
    for code, output, errors in finish(*start_two((text, tmp_path), devices=1)):
        assert code != 0
        assert "the processes have different texts or options" in errors
        assert "text:" not in output


def test_a_checkpoint_goes_to_other_devices_and_to_centralization(text, tmp_path):
    arguments = ("--checkpoints", tmp_path / "checkpoints", "--output", tmp_path / "curves.png")
    (printed,) = succeed(start(text, *arguments, "--no-centralization", steps=EVERY))
    assert "kernel" not in printed
    assert "AdamW without gradient centralization" in printed
    (printed,) = succeed(start(text, *arguments, "--resume", steps=2 * EVERY, devices=None))
    assert "devices: 1 cpu, processes: 1, mesh: fsdp 1 x tp 1" in printed
    assert "blocks/attention/out/kernel" in printed
    assert "no centralization: False, while the checkpoint was made with True\n" in printed
    assert "mesh: fsdp 1 x tp 1, while the checkpoint was made with fsdp 4 x tp 2\n" in printed
    assert re.findall(r"│ ([\d,]+) steps +│", printed) == ["0", str(EVERY), str(2 * EVERY)]


@pytest.fixture
def script(monkeypatch):
    """The functions of the script, and a way to call one of them with a command line."""
    functions = load()

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
        (("--output", "no/such/folder/curves.png"), "argument --output: there is no folder"),
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
        (checkpoints, ("--resume", "--steps", STEPS), "--steps: the checkpoint is that of step 30 already"),
        (checkpoints, ("--resume-step", 15), "--resume-step: {} has no step 15, but 20, 30"),
        (tmp_path / "empty", ("--resume",), "--resume: there are no checkpoints in {}"),
        (tmp_path / "missing", ("--resume",), "--resume: there are no checkpoints in {}"),
    ):
        settled, parser = parse(*SMALL, "--checkpoints", folder, *arguments)
        with pytest.raises(SystemExit, match="2"):
            functions["open_checkpoints"](settled, parser)
        assert f"argument {message.format(folder)}" in capsys.readouterr().err
    functions["lock_checkpoints"](*parse("--checkpoints", tmp_path / "missing", "--resume"), Console())
    assert not (tmp_path / "missing").exists()


def test_a_folder_that_orbax_cannot_open_is_refused(script, checkpoints, capsys):
    functions, parse = script
    (checkpoints / str(STEPS) / "_CHECKPOINT_METADATA").write_text("[1]")
    with pytest.raises(SystemExit, match="2"):
        functions["open_checkpoints"](*parse("--checkpoints", checkpoints, "--resume"))
    assert (
        f"argument --checkpoints: Orbax cannot open {checkpoints}\n(ValueError: " in capsys.readouterr().err
    )


def test_a_folder_that_cannot_be_made_is_refused(script, tmp_path, capsys):
    functions, parse = script
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        functions["lock_checkpoints"](*parse("--checkpoints", tmp_path / "file"), Console())
    assert f"argument --checkpoints: {tmp_path / 'file'}: File exists" in capsys.readouterr().err


@pytest.fixture(scope="module")
def resume(text):
    """Goes on from a folder of checkpoints, up to the first step: the state, and what is printed."""
    functions = load()

    def resume(folder, *arguments):
        flags = [
            *SMALL,
            "--save-every",
            EVERY,
            "--text",
            text,
            "--checkpoints",
            folder,
            "--resume",
            *arguments,
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
            parser = argparse.ArgumentParser()
            settled = functions["parse_arguments"](parser)
        mesh = functions["make_mesh"](settled, parser)
        settings = functions["describe_run"](
            settled, mesh, functions["read_text"](text, settled.length, parser)
        )
        split = NamedSharding(mesh, PartitionSpec("fsdp"))
        model = functions["Decoder"](settled.layers, settled.embed, settled.heads, split)
        optimizer = optax.adamw(optax.warmup_constant_schedule(0.0, 0.01, 20))
        description = functions["describe_state"](model, optimizer, mesh, settled)
        console = Console(file=io.StringIO(), width=200)
        with functions["open_checkpoints"](settled, parser) as manager:
            state, _ = functions["resume"](manager, description, settings, settled, parser, console)
        return state, console.file.getvalue()

    return resume


@pytest.fixture(scope="module")
def whole_state(resume, uninterrupted):
    """The state that a run on eight devices saved last."""
    state, _ = resume(uninterrupted[1] / "checkpoints")
    return state


@pytest.fixture
def checkpoints(uninterrupted, tmp_path):
    """A copy of the checkpoints of a run on eight devices."""
    yield shutil.copytree(uninterrupted[1] / "checkpoints", tmp_path / "checkpoints")
    # Where Orbax cannot read something, it leaves other reads behind, which raise when they are collected.
    gc.collect()


# What they raise is nobody's to catch.
leaves_reads_behind = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "missing": None,
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "one bit": flip_a_bit,
}
# The files of a checkpoint that cannot be damaged without a difference.
NEEDED = ("record/metadata", "state/manifest.ocdbt", "state/d/*")
# For these it depends on the damage: they have copies, or parts that no array is in.
OTHERS = (
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/*",
    "state/ocdbt.process_0/manifest.ocdbt",
    "state/ocdbt.process_0/d/*",
)


@leaves_reads_behind
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("files", NEEDED + OTHERS)
def test_a_damaged_checkpoint_is_refused_and_a_whole_one_named(
    files, damage, resume, whole_state, checkpoints, capsys
):
    damaged = list((checkpoints / str(STEPS)).glob(files))
    if not damaged:
        pytest.skip(f"this version of Orbax writes no {files}")
    for file in damaged:
        content = file.read_bytes()
        file.unlink()
        if DAMAGES[damage] is not None:
            file.write_bytes(DAMAGES[damage](content))
    before = {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()}
    try:
        state, _ = resume(checkpoints)
    except SystemExit:
        assert f"{advice(checkpoints)}\n" in capsys.readouterr().err
    else:
        assert files in OTHERS
        jax.tree.map(np.testing.assert_array_equal, state, whole_state)
    assert {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()} == before


def test_a_bit_that_only_the_checksums_show_is_found(resume, checkpoints, capsys):
    state, _ = resume(checkpoints)
    kernel = state.params["blocks"]["up"]["kernel"]
    bits = np.array(kernel).view(np.uint32)
    bits[1, 2, 3] ^= 1
    state.params["blocks"]["up"]["kernel"] = jax.device_put(bits.view(np.float32), kernel.sharding)
    # What Orbax reads from it is well formed.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoints / str(STEPS) / "state", state, force=True)
    with pytest.raises(SystemExit, match="2"):
        resume(checkpoints)
    message = f"{advice(checkpoints)}\n(params/blocks/up/kernel is not what was saved)\n"
    assert message in capsys.readouterr().err


@leaves_reads_behind
def test_where_no_checkpoint_is_whole_it_is_said(resume, checkpoints, capsys):
    for step in (STEPS - EVERY, STEPS):
        shutil.rmtree(checkpoints / str(step) / "state")
    with pytest.raises(SystemExit, match="2"):
        resume(checkpoints)
    message = f"step {STEPS} in {checkpoints} is damaged; no other checkpoint there is whole\n"
    assert message in capsys.readouterr().err


def test_a_run_that_goes_on_from_an_earlier_step_loses_nothing(text, uninterrupted, checkpoints, tmp_path):
    damaged = checkpoints / str(STEPS) / "record" / "metadata"
    damaged.write_text("{")
    arguments = ("--checkpoints", checkpoints, "--output", tmp_path / "curves.png")
    (printed,) = succeed(start(text, *arguments, "--resume-step", STEPS - EVERY))
    assert f"The later checkpoints are now in {checkpoints / 'set_aside_1'}\n" in printed
    assert (checkpoints / "set_aside_1" / str(STEPS) / "record" / "metadata").read_text() == "{"
    leaves, measurements = read(checkpoints, STEPS)
    expected_leaves, expected_measurements = read(uninterrupted[1] / "checkpoints", STEPS)
    for path, leaf in leaves.items():
        assert leaf.tobytes() == expected_leaves[path].tobytes(), path
    np.testing.assert_array_equal(measurements, expected_measurements)


def test_what_is_set_aside_stays(resume, checkpoints):
    for number in (1, 2):
        _, printed = resume(checkpoints, "--resume-step", STEPS - EVERY)
        assert f"The later checkpoints are now in {checkpoints / f'set_aside_{number}'}\n" in printed
        assert [path.name for path in (checkpoints / f"set_aside_{number}").iterdir()] == [str(STEPS)]
        shutil.copytree(checkpoints / "set_aside_1" / str(STEPS), checkpoints / str(STEPS))


def test_changed_settings_are_told_and_others_refused(resume, checkpoints, capsys):
    assert resume(checkpoints)[1] == ""
    _, printed = resume(checkpoints, "--learning-rate", 0.02, "--no-centralization", "--save-every", 5)
    assert printed.splitlines() == [
        "learning rate: 0.02, while the checkpoint was made with 0.01",
        "no centralization: True, while the checkpoint was made with False",
        "save every: 5, while the checkpoint was made with 10",
    ]
    with pytest.raises(SystemExit, match="2"):
        resume(checkpoints, "--embed", 32)
    assert "argument --embed: the checkpoints were made with 16, not 32" in capsys.readouterr().err


def test_the_checksum_is_of_the_bits_and_their_places_however_they_are_split(script):
    checksum = script[0]["checksum"]
    array = np.arange(32, dtype=np.float32).reshape(4, 8)
    changed = [array, array[::-1], np.zeros_like(array), np.zeros((4, 9), np.float32)]
    for bit in range(32):
        bits = array.view(np.uint32).copy()
        bits[2, 3] ^= np.uint32(1) << np.uint32(bit)
        changed.append(bits.view(np.float32))
    assert len({int(checksum(other)) for other in changed}) == len(changed)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"))
    shards = jax.device_put(array, NamedSharding(mesh, PartitionSpec("fsdp", "tp")))
    assert int(checksum(shards)) == int(checksum(array))
    assert "all-gather" not in checksum.lower(shards).compile().as_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_deletes_no_folder_of_checkpoints(tmp_path):
    shutil.copy(MAKEFILE, tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "examples.installed").touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nfor last; do :; done; echo "$last" >> folders; touch "$last/checkpoint"\n')
    python.chmod(0o755)
    mine = tmp_path / "pod_training" / "mine"
    mine.parent.mkdir()
    mine.touch()
    for target in ("demo-pod", "demo-pod", "clean"):
        subprocess.run(
            ["make", target], cwd=tmp_path, env=ENVIRONMENT | {"TMPDIR": str(tmp_path)}, check=True
        )
    assert mine.exists()
    folders = (tmp_path / "folders").read_text().splitlines()
    assert len(set(folders)) == 2
    for folder in folders:
        assert [path.name for path in pathlib.Path(folder).iterdir()] == ["checkpoint"]
