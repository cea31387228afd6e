"""The evidence: runs are paired and repeatable, settings are chosen fairly, and pages say what was run."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import gc_optax

ROOT = pathlib.Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "evidence_results"
QUICK = ("--task", "diabetes", "--steps", 4, "--seeds", 2, "--tuning-seeds", 1)


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark by its name."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def evidence(load):
    return load("evidence")


@pytest.fixture
def analysis(load):
    return load("evidence_analysis")


def call(script, *arguments):
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def lines_of(folder):
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


# Runs


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A folder with the runs of a task that trains for four steps, with two optimizers."""
    folder = tmp_path_factory.mktemp("quick")
    done = call("evidence.py", *QUICK, "--results", folder)
    assert done.returncode == 0, done.stderr
    assert f"All is there: {len(lines_of(folder))} runs" in done.stdout
    return folder


@pytest.mark.slow
def test_every_arm_is_tuned_and_tested_with_its_setting_and_with_that_of_no_gc(quick, evidence):
    lines = lines_of(quick)
    arms = {"none", "gradients", "updates", "optax", "random"}
    for optimizer in ("sgd", "adamw"):
        mine = [line for line in lines if line["optimizer"] == optimizer]
        best = {}
        for arm in arms:
            tuned = [line for line in mine if line["arm"] == arm and line["on"] == "validation"]
            assert {line["seed"] for line in tuned} == {evidence.FIRST_TUNING_SEED}
            assert len({line["rate"] for line in tuned}) >= 5
            chosen = min(tuned, key=lambda line: line["loss"][-1])
            best[arm] = chosen["rate"], chosen["decay"]
        tested = {
            (line["arm"], line["rate"], line["decay"], line["seed"]) for line in mine if line["on"] == "test"
        }
        expected = {(arm, *best[one], seed) for arm in arms for one in (arm, "none") for seed in (0, 1)}
        assert tested == expected | {("none", *best[arm], seed) for arm in arms for seed in (0, 1)}
    removed = [line for line in lines if "removed" in line]
    assert {(line["arm"], line["on"]) for line in removed} == {("none", "test")}
    for line in removed:
        before, after = line["removed"]
        paths = {f"Dense_{n}/{leaf}" for n in range(3) for leaf in ("kernel", "bias")}
        assert before.keys() == after.keys() == paths
        assert all(0 <= fraction <= 1 for fraction, _ in after.values())
        assert all((fraction > 0) == ("kernel" in path) for path, (fraction, _) in before.items())


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_comes_out_the_same_in_several_processes(quick, tmp_path):
    whole = (quick / "diabetes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "diabetes.jsonl").write_text("".join(whole[: len(whole) // 3]))
    done = call("evidence.py", *QUICK, "--results", tmp_path, "--processes", 2)
    assert done.returncode == 0, done.stderr
    resumed = (tmp_path / "diabetes.jsonl").read_text().splitlines(keepends=True)
    assert resumed[: len(whole) // 3] == whole[: len(whole) // 3], "nothing is run twice"
    assert sorted(resumed) == sorted(whole)


@pytest.mark.slow
def test_runs_that_are_kept_can_be_checked(quick, tmp_path):
    arguments = (
        "--task",
        "diabetes",
        "--optimizer",
        "sgd",
        "--arm",
        "random",
        "--again",
        "--results",
        tmp_path,
    )
    mine = [
        line
        for line in lines_of(quick)
        if (line["optimizer"], line["arm"], line["on"]) == ("sgd", "random", "test")
    ]
    (tmp_path / "diabetes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mine))
    done = call("evidence.py", *arguments)
    assert f"{len(mine)} of {len(mine)} runs gave the results that are kept." in done.stdout
    assert done.returncode == 0
    mine[-1]["loss"][-1] += 1e-3
    (tmp_path / "diabetes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mine))
    done = call("evidence.py", *arguments)
    assert f"{len(mine) - 1} of {len(mine)} runs gave" in done.stdout
    assert done.stdout.count("not the same") == 1
    assert done.returncode == 1


@pytest.mark.parametrize("arm", ["gradients", "updates", "optax", "random", "layer:Dense_1"])
def test_arms_have_the_same_weights_and_data(evidence, arm):
    def run(arm, rate):
        made = evidence.train(evidence.Run("diabetes", "sgd", arm, rate, 0.0, "validation", 3, 4))
        return made["loss"]

    assert run(arm, 0.0) == run("none", 0.0)
    assert run(arm, 0.1) != run("none", 0.1)


def test_a_run_that_diverges_says_so_and_is_the_worst(evidence, tmp_path):
    run = evidence.Run("diabetes", "sgd", "none", 1e30, 0.0, "validation", 0, 8)
    measured = evidence.train(run)
    assert measured["diverged"] <= 8
    results = evidence.Results(tmp_path)
    results.add(measured)
    assert results.final(run) == evidence.TASKS["diabetes"].nothing_learnt
    assert evidence.Results(tmp_path).lines == results.lines


# The control


@pytest.fixture
def weights():
    params = {"kernel": jnp.zeros((6, 4)), "conv": jnp.zeros((3, 2, 5)), "bias": jnp.zeros(4)}
    axes = gc_optax.out_last(params)
    key = jax.random.key(1)
    return optax.tree.random_like(key, params, jax.random.normal), axes


def test_the_control_projects_each_weight_vector_off_a_unit_vector_of_its_own(evidence, weights):
    gradients, axes = weights
    control = evidence.project_off_random(axes, 5)
    drawn = control.init(gradients)
    directions = jax.tree.map(lambda leaf: leaf / 6**0.5, drawn)
    assert jnp.allclose(jnp.sum(directions["kernel"] ** 2, 0), 1)
    assert jnp.allclose(jnp.sum(directions["conv"] ** 2, (0, 1)), 1)
    assert jnp.linalg.matrix_rank(directions["kernel"]) == 4
    updates, _ = control.update(gradients, drawn)
    along = jnp.sum(updates["kernel"] * directions["kernel"], 0)
    assert jnp.allclose(along, 0, atol=1e-6)
    moved = gradients["kernel"] - updates["kernel"]
    expected = directions["kernel"] * jnp.sum(gradients["kernel"] * directions["kernel"], 0)
    assert jnp.allclose(moved, expected, atol=1e-6)
    assert (updates["bias"] == gradients["bias"]).all()
    assert jnp.allclose(jnp.sum(updates["conv"] * directions["conv"], (0, 1)), 0, atol=1e-6)


def test_with_the_mean_direction_the_control_is_gradient_centralization(evidence, weights):
    gradients, axes = weights
    control = evidence.project_off_random(axes, 5)
    mean = {"kernel": jnp.ones((6, 4)), "conv": jnp.ones((3, 2, 5)), "bias": jnp.zeros(4)}
    updates, _ = control.update(gradients, mean)
    expected = gc_optax.centralize_gradients(gradients, axes)
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), updates, expected))


def test_other_seeds_have_other_directions(evidence, weights):
    gradients, axes = weights
    first, second = (evidence.project_off_random(axes, seed).init(gradients) for seed in (1, 2))
    assert not jnp.allclose(first["kernel"], second["kernel"])


def test_one_layer_alone_is_centralized(evidence):
    axes = {
        "Dense_1": {"kernel": gc_optax.WeightAxes((0,))},
        "Dense_10": {"kernel": gc_optax.WeightAxes((0,))},
    }
    gradients = {"Dense_1": {"kernel": jnp.eye(3)}, "Dense_10": {"kernel": jnp.eye(3)}}
    optimizer = evidence.find_arm("layer:Dense_1").wrap(optax.identity(), axes, 0)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients))
    assert jnp.allclose(updates["Dense_1"]["kernel"].sum(0), 0, atol=1e-6)
    assert (updates["Dense_10"]["kernel"] == jnp.eye(3)).all()


# Choosing a setting


def search(evidence, folder, of_setting):
    """The setting that is chosen where a run with a rate and a decay ends as `of_setting` says."""
    results, grid = evidence.Results(folder), evidence.Grid("digits", "sgd", "none", 4, 2)
    rounds = 0
    while True:
        point, left = grid.choose(results)
        if point is not None:
            return grid, point, results
        rounds += 1
        assert rounds < 50
        for run in left:
            metric = of_setting(run.rate, run.decay)
            results.lines[run] = vars(run) | {"error": [metric]}


@pytest.mark.parametrize("best_rate", [0.1 * 2.0**power for power in (-5, -2, 0, 1, 2, 4)])
@pytest.mark.parametrize("best_decay", [0.0, 1e-4, 1e-3, 1e-2])
def test_the_search_ends_at_a_best_setting_that_is_within_the_grid(evidence, tmp_path, best_rate, best_decay):
    def metric(rate, decay):
        return abs(np.log2(rate / best_rate)) + abs(np.log10(decay + 1e-5) - np.log10(best_decay + 1e-5))

    grid, point, results = search(evidence, tmp_path, metric)
    run = grid.run(point, "test", 0)
    assert (run.rate, run.decay) == (best_rate, best_decay)
    rates = {run.rate for run in results.lines}
    assert min(rates) < best_rate < max(rates)
    assert len(rates) >= 5


def test_what_diverges_is_not_chosen(evidence, tmp_path):
    grid, point, _ = search(evidence, tmp_path, lambda rate, decay: float("inf") if rate > 0.1 else -rate)
    assert grid.run(point, "test", 0).rate == 0.1


@pytest.mark.parametrize(
    "name", ["digits", "mnist1d_cnn", "mnist1d_mlp", "diabetes", "friedman", "transformer"]
)
def test_what_settings_are_chosen_on_is_never_trained_on_or_tested(evidence, name):
    task = evidence.TASKS[name]
    splits = [task.split(seed, pathlib.Path("nowhere")) for seed in (0, 1)]
    as_rows = [[{x.tobytes() for x in part.inputs} for part in split] for split in splits]
    if name != "diabetes":  # its inputs are scaled by those that a seed trains on
        assert as_rows[0][1] == as_rows[1][1]
    assert as_rows[0][0] != as_rows[1][0]
    alike = 0.02 if name == "transformer" else 0  # other modules have some windows of the same text
    for train, validation, test in as_rows:
        assert len(train & test) <= alike * len(test)
        assert len(validation & (train | test)) <= alike * len(validation)
    assert len(splits[0].train.targets) >= task.batch


# Statistics


def test_pairs_are_compared_as_by_the_paired_t_test(analysis):
    values, others = np.random.default_rng(0).normal(size=(2, 12))
    result = analysis.pair(values, others)
    expected = stats.ttest_rel(values, others)
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert analysis.pair(values, values) == (0.0, 0.0, 0.0, 1.0)


def test_p_values_are_corrected_as_holm_says(analysis):
    # By hand: 0.01 * 4, max(that, 0.02 * 3), max(that, 0.03 * 2), max(that, 0.5 * 1).
    assert analysis.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert analysis.holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_correlation_is_of_ranks_and_its_interval_narrows_with_points(analysis):
    x = np.arange(12.0)
    y = np.where(np.arange(12) % 3, x, -x)
    few, many = analysis.correlate(x, y), analysis.correlate(np.tile(x, 9), np.tile(y, 9))
    assert few.rho == pytest.approx(many.rho) == pytest.approx(stats.spearmanr(x, np.exp(y)).statistic)
    assert few.low < many.low < few.rho < many.high < few.high
    assert analysis.correlate(x, x).rho == 1


def test_the_step_at_which_a_threshold_is_reached_lies_between_measurements(analysis):
    curve = analysis.Curve([10, 20, 30, 40], [4.0, 3.0, 1.0, 2.0])
    assert curve.steps_to(5.0) == 10
    assert curve.steps_to(2.0) == 25
    assert curve.steps_to(0.5) == 40, "never"


@pytest.fixture
def made(evidence, analysis, tmp_path):
    """Makes the case of digits with SGD from the errors that each arm ends with, seed by seed.

    Each arm is given by the power of two of its best rate, its errors with that setting and, where it has a
    second list, those with the rates of the others. `None` is a run that diverged.
    """

    def make(**arms):
        results = evidence.Results(tmp_path)
        for arm, (best, *errors) in arms.items():
            grid = evidence.Grid("digits", "sgd", arm, 4, 1)
            for rate in range(-3, 4):
                for decay in (1, 2, 3):
                    (run,) = grid.tuning(evidence.Point(rate, decay))
                    results.lines[run] = vars(run) | {"error": [abs(rate - best) + abs(decay - 2)]}
            for point in {other[0] for other in arms.values()}:
                for seed, error in enumerate(errors[0] if point == best else errors[-1]):
                    run = grid.run(evidence.Point(point, 2), "test", seed)
                    curve = {"at": [], "error": [], "diverged": 1}
                    if error is not None:
                        curve = {"at": [2, 4], "error": [9.0, error]}
                    results.lines[run] = vars(run) | curve
        return analysis.Case("digits", "sgd", results)

    return make


def test_runs_that_failed_are_counted_and_their_seeds_left_out(analysis, made):
    (row,) = analysis.all_rows([made(none=(0, [3.0, 2.0, 4.0, 3.0]), gradients=(0, [2.0, 92.0, 3.5, None]))])
    assert (row.arm, row.seeds, row.failed) == ("gradients", 2, (2, 0))
    assert (row.without, row.final.chosen.mean) == (3.5, -0.75)
    assert row.verdict == "no difference shown"


LOW, MIDDLE, HIGH = [1.0, 1.1, 0.9, 1.0], [2.0, 2.1, 2.0, 1.9], [3.0, 3.1, 2.9, 3.1]


@pytest.mark.parametrize(
    ("none", "gradients", "verdict"),
    [
        ((0, HIGH), (0, LOW), "better"),
        ((0, LOW), (0, HIGH), "worse"),
        ((0, HIGH, HIGH), (1, LOW, HIGH), "better"),
        ((0, HIGH, LOW), (1, LOW, HIGH), "better, not with the same setting"),
        ((0, LOW, HIGH), (1, HIGH, LOW), "worse, not with the same setting"),
        ((0, LOW, LOW), (1, HIGH, MIDDLE), "worse"),
        ((0, [*HIGH, 3.0]), (0, [*LOW, None]), "better, but more runs failed"),
        ((0, [2.0, 2.1, 2.0, 1.9]), (0, [2.1, 2.0, 1.9, 2.0]), "no difference shown"),
        ((0, [2.0, 2.0, 2.0, 2.0]), (0, [1.0, 1.7, 1.0, 1.4]), "better, not after correction"),
    ],
)
def test_a_verdict_holds_with_the_same_setting_and_after_correction(analysis, made, none, gradients, verdict):
    alike = (none[0], *(none[1:]))
    # Arms like "no GC" make the correction count: the last case has a p-value of 0.05 / 3 or more.
    rows = analysis.all_rows([made(none=none, gradients=gradients, updates=alike, optax=alike)])
    assert {row.arm: row.verdict for row in rows}["gradients"] == verdict
    assert {row.verdict for row in rows if row.arm != "gradients"} == {"no difference shown"}


def test_runs_are_paired_by_seed_and_what_is_incomplete_is_named(analysis, made, evidence):
    case = made(none=(0, [3.0, 2.0, 4.0]), gradients=(0, [2.0, 1.0, 3.5]), random=(0, [3.0, 2.0, 4.0]))
    lines = case.results.lines
    (gone,) = [run for run in lines if (run.arm, run.on, run.seed) == ("random", "test", 1)]
    del lines[gone]
    assert case.arms == ["gradients"]
    assert "digits, CNN, SGD: GC of the updates, optax.centralize, a random direction" in str(
        analysis.missing([case])
    )
    with_gc, without = case.paired("random")
    assert [curve.final for curve in with_gc] == [curve.final for curve in without] == [3.0, 4.0]


def test_layers_are_compared_with_no_gc_at_the_same_setting(analysis, made, evidence):
    case = made(none=(0, HIGH), gradients=(1, LOW))
    grid = case.grid("layer:Conv_0")
    for seed, error in enumerate(MIDDLE):
        run = grid.run(evidence.Point(0, 2), "test", seed)
        case.results.lines[run] = vars(run) | {"at": [2, 4], "error": [9.0, error]}
    shares = [
        {"Conv_0/kernel": [share, 1.0], "Conv_0/bias": [0.0, 1.0], "Dense_0/kernel": [0.1, 9.0]}
        for share in (0.5, 0.3)
    ]
    for seed in range(4):
        case.tested("none")[seed]["removed"] = shares
    whole = made(none=(0, HIGH), gradients=(1, LOW))
    assert analysis.gains_of_layers([whole], 0) == [], "no layer was run"
    conv, everything = analysis.gains_of_layers([analysis.Case("digits", "sgd", case.results)], 0)
    assert conv.model == "digits, CNN, Conv_0"
    assert conv.removed == pytest.approx((0.5, 0.3))
    assert conv.change.mean == pytest.approx(100 * (2.0 - 3.025) / 3.025)
    assert everything.removed == pytest.approx((0.3, 0.2)), "the mean over the weights"
    assert everything.change.mean == pytest.approx(100 * (1.0 - 3.025) / 3.025)
    assert analysis.gains_of_layers([analysis.Case("digits", "sgd", case.results)], -2) == [], "not run yet"


def test_several_optimizers_on_a_model_are_one_point_of_a_correlation(analysis):
    def gain(model, optimizer, removed, mean):
        return analysis.Gain(model, optimizer, (removed, 2 * removed), analysis.Paired(mean, mean, mean, 1.0))

    gains = [gain(str(n), optimizer, n / 10, n * n) for n in range(5) for optimizer in ("sgd", "adamw")]
    once = analysis.correlate([0, 1, 2, 3, 4], [0, 1, 4, 9, 16])
    assert analysis.correlate_gains(gains, 0) == once
    table = analysis.correlation_table({"tasks": [*gains, gain("5", "sgd", 0.5, -1.0)]})
    assert table.splitlines()[2].startswith("| tasks | 6 | +0.14 (")


# Pages


def test_blocks_are_replaced_and_all_else_is_kept(analysis):
    page = "a\n<!-- evidence: one -->\nold\n<!-- end -->\nb\n<!-- evidence: two -->\n<!-- end -->\n"
    page = analysis.replace_blocks(page, {"one": "1", "two": "2", "three": "3"})
    expected = (
        "a\n<!-- evidence: one -->\n\n1\n\n<!-- end -->\nb\n<!-- evidence: two -->\n\n2\n\n<!-- end -->\n"
    )
    assert page == expected
    assert analysis.replace_blocks(page, {"one": "1", "two": "2"}) == expected


@pytest.mark.slow
def test_the_analysis_makes_pages_and_pictures_of_quick_runs(quick, tmp_path):
    page = tmp_path / "evidence.md"
    page.write_text("<!-- evidence: short -->\n<!-- end -->\n<!-- evidence: full -->\n<!-- end -->\n")
    done = call("evidence_analysis.py", "--results", quick, "--docs", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| diabetes, MLP, SGD | 2 |" in page.read_text()
    assert page.read_text().count("| a random direction |") == 2
    assert (tmp_path / "evidence" / "forest.png").stat().st_size > 5000


def test_the_page_says_what_the_runs_that_are_kept_show(analysis):
    blocks = analysis.make_blocks(*analysis.analyse(RESULTS))
    page = (ROOT / "docs" / "evidence.md").read_text()
    assert "<!-- evidence: " in page
    assert analysis.replace_blocks(page, blocks) == page, "make evidence changes it"


def test_the_sentences_of_the_readme_are_those_of_the_tables(analysis):
    cases, rows, sets = analysis.analyse(RESULTS)
    section = (ROOT / "README.md").read_text().partition("## Does it help?")[2].partition("\n## ")[0]
    text = " ".join(section.split())

    def counts(arm):
        mine = [row for row in rows if row.arm == arm]
        verdicts, speeds = [row.verdict for row in mine], [row.speed for row in mine]
        return [*map(verdicts.count, ("better", "worse")), *map(speeds.count, ("faster", "slower"))]

    better, worse, faster, slower = counts("gradients")
    assert f"On {len(cases)} pairs of" in text
    assert f"ended better in {better} and worse in {worse}, " in text
    assert f"reached halfway faster in {faster} and slower in {slower}, " in text
    better, worse, faster, slower = counts("random")
    assert f"ended better in {better} and worse in {worse}, and was faster in {faster}." in text
    assert slower == 0, "the sentence does not tell"
    gains = sets["tasks"]
    correlation = analysis.correlate_gains(gains, 1)
    assert f"over {len({gain.model for gain in gains})} tasks the rank correlation is {correlation}." in text
    assert correlation.low < 0 < correlation.high, "not shown"


def test_half_as_many_tuning_seeds_choose_as_the_page_tells(analysis, evidence):
    case = analysis.Case("digits", "sgd", evidence.Results(RESULTS))
    rates, points = {}, {}
    for arm in ("none", "gradients"):
        for seeds in (8, 16):
            grid = evidence.Grid("digits", "sgd", arm, case.task.steps, seeds)
            point, _ = grid.choose(case.results)
            rates[arm, seeds], points[arm, seeds] = grid.run(point, "test", 0).rate, point
    assert rates == {("none", 8): 0.1, ("none", 16): 0.2, ("gradients", 8): 0.2, ("gradients", 16): 0.2}
    apart = analysis.final_difference(*case.paired("gradients", points["gradients", 8], points["none", 8]))
    assert apart.told(2).startswith("-0.36 ")
    assert apart.p < 1e-5


def test_no_best_rate_lies_at_the_edge_of_its_grid(analysis):
    cases, _, _ = analysis.analyse(RESULTS)
    assert cases
    for case in cases:
        for arm in ("none", *case.arms):
            tuned = [run for run in case.runs if run.arm == arm and run.on == "validation"]
            rates = {run.rate for run in tuned}
            grid = case.grid(arm)
            best = grid.run(case.best[arm], "test", 0)
            assert len(rates) >= 5, (case.title, arm)
            assert min(rates) < best.rate < max(rates), (case.title, arm)
            assert len(grid.decays) == 1 or best.decay < grid.decays[-1], (case.title, arm)
            assert {run.seed for run in tuned}.isdisjoint(case.tested(arm))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "4"], "needs a folder of its own"),
        (["--steps", "1", "--results", "new"], "--steps: must be at least 2"),
        (["--task", "lstm", "--optimizer", "lion"], "lstm is not run with lion"),
        (["--task", "digits", "--seeds", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(evidence, monkeypatch, capsys, arguments, told):
    monkeypatch.setattr(sys, "argv", ["evidence.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        evidence.main()
    assert told in capsys.readouterr().err


def test_an_analysis_of_nothing_says_so(tmp_path):
    done = call("evidence_analysis.py", "--results", tmp_path, "--docs", tmp_path)
    assert done.returncode == 1
    assert "has no arm yet that was tuned and tested" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_is_named_before_anything_is_trained(tmp_path):
    done = call("evidence.py", "--task", "fashion_bn", "--data-dir", tmp_path, "--results", tmp_path / "new")
    assert done.returncode == 2
    assert "fashion_bn needs Fashion-MNIST" in done.stderr
    assert str(tmp_path) in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_line_that_was_cut_off_is_named(evidence, tmp_path):
    (tmp_path / "digits.jsonl").write_text('{"task": "dig')
    with pytest.raises(SystemExit, match=r"last line of .*digits\.jsonl was cut off"):
        evidence.Results(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_keeps_what_was_run(tmp_path, processes):
    arguments = [*QUICK, "--steps", 40, "--results", tmp_path, "--processes", processes]
    command = [sys.executable, BENCHMARKS / "evidence.py", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for _ in range(6000):
            if (tmp_path / "diabetes.jsonl").exists():
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode == 130
    assert told.strip().splitlines()[-1].startswith("Stopped by Ctrl-C;")
    assert "Traceback" not in told
    assert lines_of(tmp_path)
