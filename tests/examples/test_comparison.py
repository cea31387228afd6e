"""examples/comparison.py: what the examples share."""

import runpy

import pytest
from rich.console import Console
from test_examples import QUICKSTART, run

HERE = QUICKSTART.parent / "comparison.py"


@pytest.fixture(scope="module")
def shared():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.excepthook", None)  # which it replaces
        return runpy.run_path(str(HERE))


class Interrupted:
    """A number that is computed while somebody presses Ctrl-C."""

    def __float__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("measured", [1, 3])
def test_ctrl_c_while_a_number_is_computed_leaves_whole_measurements(
    shared, measured, metric, capsys, tmp_path
):
    runs = shared["Comparison"]("title", ["a", "b"], seeds=1, points=range(1, 3))
    console = Console(markup=False, width=80)
    with runs.measuring(console):
        for number in range(measured):
            runs.add("ab"[number // 2], 0, {"loss": 0.5, "accuracy": 70 + number})
        runs.add("ab"[measured // 2], 0, {"loss": 0.25, "accuracy": 80} | {metric: Interrupted()})
    assert runs.stopped
    runs.report(console, {"loss": 2, "accuracy": 1}, compare=["accuracy"])
    runs.draw(["loss"], tmp_path / "picture.png")
    printed = capsys.readouterr().out
    assert "│ a   │ 1 of 2 │ 0.50 │" in printed if measured == 1 else "│ b   │ 1 of 2 │ 0.50 │" in printed
    assert "No seed is finished in every arm" in printed
    with pytest.raises(SystemExit, match="130"):
        runs.finish(console, tmp_path / "picture.png")


def test_every_metric_is_compared_and_brackets_are_kept(shared, capsys):
    runs = shared["Comparison"]("a [title]", ["a", "b [wd=0]"], seeds=3, points=[1])
    console = Console(markup=False, width=100)
    with runs.measuring(console):
        for seed, (one, other) in enumerate([(1.0, 2.0), (1.0, 2.1), (1.0, 1.9)]):
            runs.add("a", seed, {"loss": one, "accuracy": 50 + seed})
            runs.add("b [wd=0]", seed, {"loss": other, "accuracy": 51 - seed})
    runs.report(console, {"loss": 2, "accuracy": 1}, compare=["loss", "accuracy"])
    printed = capsys.readouterr().out
    assert "a [title]\n" in printed
    assert "│ b [wd=0] │ 2.00 ± 0.10 │" in printed
    assert "loss, against a, seed by seed:\n  b [wd=0]: +1.00 (95 % interval +0.75 to +1.25)\n" in printed
    assert "  b [wd=0]: -1.0 (95 % interval -6.0 to +4.0; it holds 0: no difference shown)\n" in printed
    assert "Intervals are over seeds" in printed


def test_an_interval_that_is_rounded_to_0_holds_it(shared):
    assert shared["difference"]([1.0, 1.001], [1.0, 1.0], 1) == (
        "+0.0 (95 % interval +0.0 to +0.0; it holds 0: no difference shown)"
    )
    assert shared["difference"]([float("inf"), 1.0], [1.0, 1.0], 1) == "no comparison, a run has diverged"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x" * 300 + ".png", "cannot be written: File name too long"),
        ("picture.pgf", "picture.pgf must end in one of .png"),
        ("folder.png", "folder.png is a folder"),
    ],
)
def test_a_picture_that_cannot_be_saved_is_refused_at_once(value, message, monkeypatch, capsys, tmp_path):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, QUICKSTART, "--output", value)
    assert message in capsys.readouterr().err


def test_a_link_that_leads_nowhere_yet_is_kept(shared, tmp_path):
    link = tmp_path / "link.PNG"
    link.symlink_to(tmp_path / "target.png")
    assert shared["picture_path"](str(link)) == link
    assert link.is_symlink()
    new = tmp_path / "new.png"
    shared["picture_path"](str(new))
    assert not new.exists()
