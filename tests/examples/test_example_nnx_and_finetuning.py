"""The language model in NNX, and fine-tuning with LoRA: what they print, what they refuse, what they do."""

import argparse
import importlib
import pathlib
import re
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from test_examples import ROOT, run

import gc_optax

LANGUAGE_MODEL = ROOT / "examples" / "nnx_language_model.py"
FINETUNING = ROOT / "examples" / "finetuning.py"


def names_in(script):
    """What the script defines, without running it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(script.parent)
        return argparse.Namespace(**runpy.run_path(str(script)))


@pytest.fixture(scope="module")
def language_model():
    return names_in(LANGUAGE_MODEL)


@pytest.fixture(scope="module")
def finetuning():
    return names_in(FINETUNING)


@pytest.fixture(scope="module")
def kept(finetuning, tmp_path_factory):
    """A folder with a checkpoint of the first parameters."""
    folder = tmp_path_factory.mktemp("kept")
    finetuning.save(folder, finetuning.initialize(1))
    return folder


def rows(printed):
    """The cells of the table of results, by the name in front of them."""
    lines = re.findall(r"^│ (.*) │$", printed, re.MULTILINE)
    cells = [re.split(r" +│ +", line) for line in lines]
    return {name.strip(): [cell.strip() for cell in others] for name, *others in cells}


def number(cell):
    return float(cell.split(" ± ")[0].replace(",", ""))


# The language model


@pytest.mark.thorough
def test_the_language_model_learns_prints_a_table_and_writes(monkeypatch, capsys, tmp_path):
    text, picture = tmp_path / "text.py", tmp_path / "curves.png"
    text.write_bytes(b"".join(file.read_bytes() for file in sorted((ROOT / "tests").rglob("*.py"))))
    sizes = ["--layers", 1, "--width", 16, "--length", 16, "--batch-size", 8]
    training = ["--steps", 25, "--measure-every", 10, "--seeds", 2]
    run(monkeypatch, LANGUAGE_MODEL, "--text", text, *sizes, *training, "--output", picture)
    printed = capsys.readouterr().out
    table = rows(printed)
    assert list(table) == ["AdamW alone", "AdamW with GC"]
    pairs = float(re.search(r"Counting pairs of bytes gives a held-out perplexity of ([\d.]+)\.", printed)[1])
    assert 1 < pairs < 30
    for training_perplexity, held_out_perplexity in table.values():
        assert pairs < number(training_perplexity) < 256, "so few steps do not suffice"
        assert pairs < number(held_out_perplexity) < 256
    assert table["AdamW alone"] != table["AdamW with GC"]
    assert re.search(r"^embed/embedding .* - .* lookup ", printed, re.MULTILINE)
    assert "mean ± standard deviation of 2 seeds, after 25 steps" in printed
    written = printed.partition("the last model (AdamW with GC) writes:\n\n")[2].rpartition(
        "\n\nThe picture"
    )[0]
    assert len(written) == 300
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_library_is_split_by_files(language_model):
    text = language_model.read_library()
    assert 0.02 < len(text.held_out) / len(text.train) < 0.3
    library = text.train.tobytes(), text.held_out.tobytes()
    for module in (argparse, shutil):
        source = pathlib.Path(module.__file__).read_bytes()
        assert [part.count(source) for part in library] in ([1, 0], [0, 1]), "whole, and in one part only"
    assert np.array_equal(language_model.read_library().train, text.train)


def test_a_file_is_split_at_its_last_tenth(language_model, tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(100)))
    train, held_out = language_model.read_file(tmp_path / "text")
    assert train.tobytes() == bytes(range(90))
    assert held_out.tobytes() == bytes(range(90, 100))


def test_windows_end_with_the_byte_after_them_and_reach_both_ends(language_model):
    text = language_model.Text(np.zeros(0, np.uint8), np.arange(100, dtype=np.uint8))
    windows = language_model.cut_held_out(text, 8)
    assert windows.shape == (256, 9)
    assert (np.diff(windows, axis=1) == 1).all()
    assert (windows.min(), windows.max()) == (0, 99)


def test_the_perplexity_of_pairs_is_that_of_counting_them(language_model):
    text = language_model.Text(np.frombuffer(b"abacab", np.uint8), np.frombuffer(b"abc", np.uint8))
    windows = np.array([[ord("a"), ord("b"), ord("c")]])
    # After an a came b, c and b, and after a b came an a: and each of the 256 bytes counts once more.
    after_a, after_b = (2 + 1) / (3 + 256), 1 / (1 + 256)
    expected = (after_a * after_b) ** -0.5
    np.testing.assert_allclose(language_model.bigram_perplexity(text, windows), expected)


def test_the_decoder_does_not_see_what_comes_later(language_model):
    sizes = argparse.Namespace(layers=1, width=8, length=6)
    model, _ = language_model.make_start(optax.sgd(0.1), sizes)(jax.random.key(0))
    text = np.arange(6)[None]
    predict = nnx.jit(lambda model, text: model(text))
    changed = predict(model, np.where(text == 3, 77, text)) != predict(model, text)
    assert changed.any(-1)[0].tolist() == [False, False, False, True, True, True]


def test_what_is_written_shows_on_any_terminal(language_model):
    assert language_model.as_shown(np.array([104, 105, 10, 27, 0, 200, 127, 126])) == "hi\n....~"


# Fine-tuning


@pytest.mark.thorough
def test_finetuning_prints_a_table_and_keeps_its_checkpoint(finetuning, monkeypatch, capsys, tmp_path):
    folder, picture = tmp_path / "network", tmp_path / "curves.png"
    sizes = ["--seeds", 2, "--epochs", 2, "--rank", 2]
    run(monkeypatch, FINETUNING, *sizes, "--output", picture, "--checkpoint", folder)
    printed = capsys.readouterr().out
    table = rows(printed)
    assert list(table) == ["full", "full with GC", "LoRA", "LoRA with GC"]
    full, lora = 64 * 128 + 128 * 128 + 128 * 5 + 128 + 128 + 5, 2 * (64 + 128 + 128 + 128 + 128 + 5)
    assert [number(trained) for trained, *_ in table.values()] == [full, full, lora, lora]
    for _, loss, accuracy in table.values():
        assert 0 < number(loss) < 4
        assert 5 < number(accuracy) <= 100
    assert len({loss for _, loss, _ in table.values()}) == 4, "four different ways to train"
    assert number(table["full"][2]) > 50, "better than five equal guesses"
    assert "accuracy, %, against LoRA, seed by seed:\n  LoRA with GC: " in printed
    assert re.search(r"^hidden_0/B +\(2, 128\) +0 +2 +128 ", printed, re.MULTILINE)
    (knows,) = re.findall(r"It knows [\d.]+ % of the test images of the old digits\.", printed)
    assert float(knows.split()[2]) > 95
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "read from" not in printed
    finetuning.pretrained(folder, argparse.ArgumentParser(), finetuning.Console())
    assert capsys.readouterr().out == f"The pretrained network is read from {folder}\n{knows}\n"


@pytest.mark.thorough
def test_a_run_that_is_stopped_in_its_first_arm_shows_what_it_measured(
    finetuning, kept, monkeypatch, capsys, tmp_path
):
    monkeypatch.syspath_prepend(FINETUNING.parent)
    comparison = importlib.import_module("comparison")
    add = comparison.Comparison.add

    def add_and_stop(self, *arguments):
        add(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison.Comparison, "add", add_and_stop)
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, FINETUNING, "--checkpoint", kept, "--output", tmp_path / "curves.png")
    printed = capsys.readouterr().out
    assert "Stopped by Ctrl-C. What was measured until then:" in printed
    assert [cells[:2] for cells in rows(printed).values()] == [
        ["25,477", "1 of 30"],
        ["25,477", "0 of 30"],
        ["2,324", "0 of 30"],
        ["2,324", "0 of 30"],
    ]


def test_the_tasks_share_no_digit_and_their_parts_no_image(finetuning):
    old, new = finetuning.load(0), finetuning.load(5)
    assert len(old.train.labels) + len(old.test.labels) + len(new.train.labels) + len(new.test.labels) == 1797
    for task in (old, new):
        assert set(np.unique(task.train.labels)) == set(np.unique(task.test.labels)) == set(range(5))
        train, test = ({image.tobytes() for image in np.asarray(part.images)} for part in task)
        assert not train & test


def test_the_few_images_are_of_each_digit_and_the_seeds_own(finetuning):
    train = finetuning.load(5).train
    first, again, other = (finetuning.draw_shots(train, 3, seed) for seed in (0, 0, 1))
    assert np.bincount(first.labels).tolist() == [3] * 5
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)
    assert len(np.unique(first.images, axis=0)) == 15


def test_adapters_add_a_product_and_their_axes_are_read_exactly(finetuning):
    base, adapters = finetuning.initialize(0), finetuning.make_adapters(finetuning.initialize(0), 4, seed=0)
    jax.tree.map(np.testing.assert_array_equal, finetuning.with_adapters(adapters, base), base)
    moved = jax.tree.map(lambda leaf: leaf + 1, adapters)
    merged = finetuning.with_adapters(moved, base)
    for name, layer in base.items():
        expected = layer["kernel"] + 8 / 4 * (moved[name]["A"] @ moved[name]["B"])
        np.testing.assert_allclose(merged[name]["kernel"], expected, rtol=1e-5)
        np.testing.assert_array_equal(merged[name]["bias"], layer["bias"])
    batch = finetuning.load(5).train
    axes = gc_optax.infer_axes(finetuning.make_loss(finetuning.with_adapters), adapters, base, batch)
    assert {leaf.fan_in for leaf in jax.tree.leaves(axes)} == {(0,)}


def test_what_is_frozen_stays_and_the_step_takes_the_arms_optimizer(finetuning):
    base, batch = finetuning.initialize(0), finetuning.load(5).train
    adapters = finetuning.make_adapters(base, 4, seed=0)
    arm = finetuning.make_arm(finetuning.with_adapters, optax.sgd(0.1))
    (merged,) = finetuning.train_epochs(arm, adapters, base, batch, seed=0, epochs=1, batch_size=64)
    for name, layer in base.items():
        np.testing.assert_array_equal(merged[name]["bias"], layer["bias"])
        assert np.linalg.matrix_rank(merged[name]["kernel"] - layer["kernel"], tol=1e-4) <= 4
        assert not np.array_equal(merged[name]["kernel"], layer["kernel"])


def test_a_checkpoint_is_restored_to_the_same_bits(finetuning, kept):
    jax.tree.map(np.testing.assert_array_equal, finetuning.restore(kept), finetuning.initialize(1))


@pytest.mark.parametrize("damage", ["one bit", "half of a file", "a file less"])
def test_a_damaged_checkpoint_is_refused(damage, finetuning, kept, tmp_path):
    for number, file in enumerate(sorted((kept / "pretrained").rglob("*"))):
        if not file.is_file() or not file.stat().st_size:
            continue
        folder = shutil.copytree(kept, tmp_path / str(number))
        damaged = folder / file.relative_to(kept)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "one bit":
            damaged.write_bytes(content)
        elif damage == "half of a file":
            damaged.write_bytes(content[: len(content) // 2])
        else:
            damaged.unlink()
        with pytest.raises(ValueError, match="pretrained is damaged: its files are not what was saved"):
            finetuning.restore(folder)


@pytest.mark.parametrize("record", ["", "[]", "3", '{"network": {}}', "\xff"])
def test_a_record_that_is_none_is_refused(record, finetuning, kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "folder")
    (folder / "pretrained.json").write_text(record)
    with pytest.raises(ValueError, match=r"pretrained\.json is not a record of this example"):
        finetuning.restore(folder)


def test_another_network_is_refused_in_one_line(finetuning, monkeypatch, capsys, tmp_path):
    narrow = jax.tree.map(lambda leaf: leaf[..., :3], finetuning.initialize(0))
    finetuning.save(tmp_path, narrow)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, FINETUNING, "--checkpoint", tmp_path)
    printed = capsys.readouterr().err
    assert printed.endswith(f"error: argument --checkpoint: {tmp_path}/pretrained holds another network\n")


# What is refused before the training


def test_another_programs_checkpoint_is_refused(monkeypatch, capsys, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "pretrained", {"kernel": jnp.ones(3)})
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, FINETUNING, "--checkpoint", tmp_path)
    message = f"argument --checkpoint: {tmp_path} holds something else than the network of this example"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "option", "value", "message"),
    [
        (LANGUAGE_MODEL, "--text", "missing.txt", "missing.txt cannot be read: No such file or directory"),
        (LANGUAGE_MODEL, "--text", "folder", "folder cannot be read: Is a directory"),
        (LANGUAGE_MODEL, "--text", "empty.txt", "0 bytes to train on and 0 held out are too few for windows"),
        (LANGUAGE_MODEL, "--text", "short.txt", "180 bytes to train on and 20 held out are too few"),
        (LANGUAGE_MODEL, "--width", "30", "30 is no multiple of the 4 attention heads"),
        (LANGUAGE_MODEL, "--steps", "0", "must be at least 1, got 0"),
        (LANGUAGE_MODEL, "--learning-rate", "-1", "must be a positive number, got -1"),
        (LANGUAGE_MODEL, "--output", "curves.txt", "curves.txt must end in one of"),
        (FINETUNING, "--checkpoint", "short.txt", "there is no folder short.txt"),
        (FINETUNING, "--checkpoint", "no/such/folder", "there is no folder"),
        (FINETUNING, "--shots", "1000", "there are only 87 images of a digit"),
        (FINETUNING, "--batch-size", "101", "there are only 100 images to train on"),
        (FINETUNING, "--rank", "129", "the network is only 128 wide"),
        (FINETUNING, "--rank", "0", "must be at least 1, got 0"),
        (FINETUNING, "--output", "folder.png", "folder.png is a folder"),
    ],
)
def test_bad_arguments_are_refused_before_the_training(
    script, option, value, message, monkeypatch, capsys, tmp_path
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a" * 200)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, script, option, value)
    assert f"argument {option}: {message}" in capsys.readouterr().err
