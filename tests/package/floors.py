"""Fails unless what is installed are the lowest versions that pyproject.toml allows for an extra.

Usage: python tests/package/floors.py test
"""

import pathlib
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version


def floors(project: dict[str, Any], extra: str) -> dict[str, Version]:
    """The lowest version of each package that the project and one of its extras allow together."""
    lowest: dict[str, Version] = {}
    for requirement in [*map(Requirement, project["dependencies"]), *requirements(project, extra)]:
        [floor] = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        lowest[requirement.name] = max(floor, lowest.get(requirement.name, floor))
    return lowest


def requirements(project: dict[str, Any], extra: str) -> Iterator[Requirement]:
    """What an extra asks for, with what the extras in it ask for."""
    for requirement in map(Requirement, project["optional-dependencies"][extra]):
        if requirement.name == project["name"]:
            for other in requirement.extras:
                yield from requirements(project, other)
        else:
            yield requirement


def above(lowest: dict[str, Version]) -> list[str]:
    """What is installed in another version than the lowest."""
    installed = {name: Version(metadata.version(name)) for name in lowest}
    return [
        f"{name} {installed[name]} is installed, the lowest version is {floor}"
        for name, floor in lowest.items()
        if installed[name] != floor
    ]


if __name__ == "__main__":
    pyproject = pathlib.Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    sys.exit("\n".join(above(floors(project, sys.argv[1]))) or 0)
