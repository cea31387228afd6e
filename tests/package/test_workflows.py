"""What GitHub reads: workflows that call `make` and nothing else, forms, and the citation."""

import itertools
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
ACTIONS = {
    "actions/checkout",
    "actions/setup-python",
    "actions/upload-artifact",
    "actions/download-artifact",
    "pypa/gh-action-pypi-publish",
}

pytestmark = pytest.mark.skipif(
    (ROOT / "PKG-INFO").exists(), reason="a source distribution has no workflows in it"
)


def read(name):
    return yaml.safe_load(WORKFLOWS[name].read_text())


def jobs():
    return [(name, job, content) for name in WORKFLOWS for job, content in read(name)["jobs"].items()]


def commands(job):
    """What a job runs, with each of the values of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    lines = [step["run"] for step in job["steps"] if "run" in step]
    for values in itertools.product(*matrix.values()):
        for line in lines:
            for key, value in zip(matrix, values, strict=True):
                line = line.replace(f"${{{{ matrix.{key} }}}}", value)
            yield line


def test_there_are_workflows():
    assert set(WORKFLOWS) == {"ci", "daily", "release"}


def test_a_step_is_a_known_action_or_one_target_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, _, job in jobs():
        for step in job["steps"]:
            assert "run" in step or step["uses"].partition("@")[0] in ACTIONS
        for command in commands(job):
            make, target, *variables = shlex.split(command)
            assert make == "make", command
            assert target in targets, command
            assert all(re.fullmatch(r"[A-Z]+=[\w.-]+", variable) for variable in variables), command


def test_ci_tests_the_oldest_and_the_newest_python_with_the_oldest_and_the_newest_dependencies():
    ci = read("ci")
    assert set(ci[True]) == {"push", "pull_request"}  # `on` is a bool of YAML
    every = {command for job in ci["jobs"].values() for command in commands(job)}
    for python in ("3.11", "3.13"):
        for dependencies in ("oldest", "newest"):
            assert f"make test-{dependencies} PYTHON=python{python}" in every
    assert PROJECT["requires-python"] == ">=3.11"
    assert {"make lint", "make test COVERAGE=--cov", "make docs", "make test-tpu"} < every


def test_jax_is_tried_every_day_before_it_is_released():
    daily = read("daily")
    [schedule] = daily[True]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", schedule["cron"])
    assert "make test-nightly" in {command for job in daily["jobs"].values() for command in commands(job)}


def test_what_is_released_is_tagged_with_its_version_and_tested_as_it_was_built():
    release = read("release")
    assert release[True] == {"push": {"tags": ["v*"]}}
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert list(commands(build)) == ["make check-tag", "make build", "make test-wheel"]
    assert (publish["needs"], publish["environment"]) == ("build", "pypi")
    assert list(commands(publish)) == []


@pytest.mark.parametrize("tag", ["", "0.1.0", "v99.0.0", "v{version}0"])
def test_another_tag_than_the_version_is_refused(tag):
    command = ["make", "--no-print-directory", "check-tag"]
    version = PROJECT["version"]
    subprocess.run([*command, f"TAG=v{version}"], cwd=ROOT, check=True)
    tag = tag.format(version=version)
    refused = subprocess.run([*command, f"TAG={tag}"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode != 0
    assert refused.stdout == f"the tag is '{tag}', and pyproject.toml has version {version}\n"


def test_only_what_publishes_may_do_more_than_read():
    for name in WORKFLOWS:
        assert read(name)["permissions"] == {"contents": "read"}
    more = {(name, job): content["permissions"] for name, job, content in jobs() if "permissions" in content}
    assert more == {("release", "publish"): {"id-token": "write"}}
    for _, _, job in jobs():
        assert 0 < job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}


SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "dependabot": ".github/dependabot.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "citation-file-format": "CITATION.cff",
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_file_fits_its_published_schema(schema):
    pytest.importorskip("check_jsonschema", reason="the schemas come with the extra dev")
    files = sorted(map(str, ROOT.glob(SCHEMAS[schema])))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *files]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_the_hooks_are_tools_of_the_environment_that_make_lint_makes():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert all(hook["entry"].startswith(".venv/bin/") and hook["language"] == "system" for hook in hooks)


def test_pre_commit_takes_the_hooks():
    pytest.importorskip("pre_commit", reason="pre-commit comes with the extra dev")
    subprocess.run(
        [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"],
        cwd=ROOT,
        check=True,
    )
