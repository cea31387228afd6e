"""The scripts that people run: they run, and what they print is what they measured."""

import contextlib
import io
import json
import pathlib
import re
import runpy
import struct
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.py"
FROZEN_HEAD = ROOT / "benchmarks" / "frozen_head.py"
TRACE = ROOT / "benchmarks" / "trace.py"


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    # As where Python is started with the script, it finds what lies beside it.
    monkeypatch.syspath_prepend(script.parent)
    # A terminal that is wide enough for the path of the picture.
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(
    "optimizer",
    ["adam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "adamw", "rmsprop"))],
)
def test_quickstart_trains_prints_a_table_and_saves_a_picture(optimizer, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "curves.png"
    run(monkeypatch, QUICKSTART, "--optimizer", optimizer, "--epochs", 2, "--seeds", 1, "--output", picture)
    printed = capsys.readouterr().out
    rows = re.findall(r"│ (\S.*?) +│ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │", printed)
    assert [row[0] for row in rows] == [f"{optimizer} alone", "gc_optax.centralize", "optax.centralize"]
    for _, loss, accuracy, _ in rows:
        assert 0 < float(loss) < 2.3, "better than ten equal guesses"
        assert 30 < float(accuracy) <= 100
    assert len({loss for _, loss, _, _ in rows}) == 3, "three different ways to train"
    assert str(picture) in printed
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert struct.unpack(">II", header[16:24]) > (1000, 400)


@pytest.mark.slow
def test_quickstart_reports_runs_that_diverge(monkeypatch, capsys, tmp_path):
    arguments = ["--optimizer", "sgd", "--learning-rate", 1e30, "--epochs", 1, "--seeds", 1]
    run(monkeypatch, QUICKSTART, *arguments, "--output", tmp_path / "curves.png")
    assert len(re.findall(r"│ +(?:nan|inf) │", capsys.readouterr().out)) == 3
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("script", "option", "value", "message"),
    [
        (QUICKSTART, "--epochs", "0", "must be at least 1, got 0"),
        (QUICKSTART, "--seeds", "many", "invalid positive_integer value: 'many'"),
        (QUICKSTART, "--learning-rate", "nan", "must be a positive number, got nan"),
        (QUICKSTART, "--batch-size", "2000", "there are only 1437 training images"),
        (QUICKSTART, "--optimizer", "adan", "invalid choice: 'adan'"),
        (QUICKSTART, "--output", "curves.txt", "curves.txt must end in one of"),
        (QUICKSTART, "--output", "folder.png", "folder.png is a folder"),
        (QUICKSTART, "--output", "no/such/folder/curves.png", "there is no folder"),
        (FROZEN_HEAD, "--seeds", "1", "a spread needs at least 2, got 1"),
        (FROZEN_HEAD, "--steps", "0", "must be at least 1, got 0"),
        (FROZEN_HEAD, "--json", "no/such/folder/runs.json", "there is no folder"),
    ],
)
def test_bad_arguments_are_refused_before_the_training(
    script, option, value, message, monkeypatch, capsys, tmp_path
):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, script, option, value)
    assert f"argument {option}: {message}" in capsys.readouterr().err


@pytest.mark.slow
def test_frozen_head_shows_a_head_that_only_optax_freezes(monkeypatch, capsys, tmp_path):
    run(monkeypatch, FROZEN_HEAD, "--steps", 20, "--seeds", 2, "--json", tmp_path / "runs.json")
    moved = dict(re.findall(r"│ (\S.*?) +│ .* │ +([\d.]+) ± [\d.]+ │", capsys.readouterr().out))
    assert moved.pop("optax.centralize + adam") == "0.0000"
    assert list(moved) == ["adam", "gc_optax.centralize + adam"]
    assert all(float(distance) > 0.1 for distance in moved.values())
    assert (tmp_path / "runs.json").read_text().count("head_moved") == 6


@pytest.mark.slow
def test_trace_measures_unrolled_scanned_and_narrow_models(tmp_path):
    numbers, picture = tmp_path / "runs.json", tmp_path / "trace.png"
    # It starts processes of its own, which have to find it as the main module.
    arguments = ["--layers", "1", "2", "--equations", "200", "300", "--repeats", "2"]
    command = [sys.executable, TRACE, *arguments, "--json", numbers, "--plot", picture]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (
        len(re.findall(r"unrolled +[12] +0\.\d+ B +\d+( +[\d.]+ s){3} +[\d.]+ +\d+ µs +\d+ MB", printed)) == 2
    )
    assert len(re.findall(r"narrow: .* the power of -?[\d.]+, reading alone to the power of", printed)) == 1
    runs = json.loads(numbers.read_text())
    of_each = [(run["layers"], run["blocks"]) for run in runs]
    kinds = ["unrolled", "unrolled", "scanned", "narrow", "narrow"]
    assert of_each == list(zip([1, 2, 2, 2, 4], kinds, strict=True))
    assert runs[0]["equations"] < runs[1]["equations"]
    assert runs[1]["parameters"] == runs[2]["parameters"]
    assert 200 <= runs[3]["equations"] < 300 <= runs[4]["equations"] < 400, "as many as were asked for"
    for run in runs:
        pairs = zip(run["seconds"], run["seconds_tracing"], strict=True)
        assert [0 < tracing < seconds for seconds, tracing in pairs] == [True, True]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_trace_refuses_nonsense():
    for arguments in (
        ["--layers", "0"],
        ["--equations", "0"],
        ["--repeats", "0"],
        ["--plot", "no/such/folder.png"],
    ):
        refused = subprocess.run([sys.executable, TRACE, *arguments], capture_output=True, text=True)
        assert refused.returncode == 2
        assert re.search(r"error: argument", refused.stderr)


@pytest.mark.parametrize("page", ["README.md", "docs/axes.md", "docs/start.md"])
def test_the_table_on_the_page_is_what_summarize_prints(page):
    text = (ROOT / page).read_text()
    before, found, _ = text.partition("```text\n")
    section = before[before.rindex("\n## Read them") :] if page == "docs/axes.md" else before
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)), {"__name__": "page"})
    assert found
    assert printed.getvalue() == text.partition("```text\n")[2].partition("```")[0]


def test_the_tests_that_the_pages_name_are_there():
    text = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    there = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) >= 8
    assert [name for name in named if f"def {name}(" not in there] == []
