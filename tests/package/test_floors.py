"""The check that the oldest versions are those under test."""

import subprocess
import sys
from importlib import metadata

import floors
import pytest
from packaging.version import Version

PROJECT = {
    "name": "ours",
    "dependencies": ["jax>=0.8", "optax>=0.2.6"],
    "optional-dependencies": {
        "flax": ["flax>=0.12,!=0.12.3"],
        "docs": ["ours[flax]", "flax>=0.12.8"],
        "test": ["ours[docs,flax]", "pytest>=8.3"],
        "no_floor": ["chex"],
    },
}


def test_the_highest_floor_of_a_package_counts_over_all_extras_within_an_extra():
    assert {name: str(floor) for name, floor in floors.floors(PROJECT, "test").items()} == {
        "jax": "0.8",
        "optax": "0.2.6",
        "flax": "0.12.8",
        "pytest": "8.3",
    }
    assert floors.floors(PROJECT, "flax")["flax"] == Version("0.12")


def test_a_requirement_without_a_floor_is_an_error():
    with pytest.raises(ValueError, match="not enough values"):
        floors.floors(PROJECT, "no_floor")


def test_a_version_above_the_floor_is_named():
    installed = metadata.version("pytest")
    assert floors.above({"pytest": Version(f"{installed}.0")}) == []
    expected = f"pytest {installed} is installed, the lowest version is 1.0"
    assert floors.above({"pytest": Version("1.0")}) == [expected]


def test_the_script_fails_exactly_where_it_names_a_version():
    run = subprocess.run([sys.executable, floors.__file__, "test"], capture_output=True, text=True)
    differences = run.stderr.splitlines()
    assert run.returncode == bool(differences)
    assert all(" is installed, the lowest version is " in line for line in differences)
