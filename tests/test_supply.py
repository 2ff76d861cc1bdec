"""The versions that are claimed: bounds, and the two sets of constraints that are tested."""

import importlib.metadata
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]


def pinned(name):
    """Package, in the index's spelling, to version."""
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(package): Version(version) for package, version in pairs}


def normal(package):
    return re.sub(r"[-_.]+", "-", package).lower()


def requirements():
    """What the package and its tests need, in the index's spelling."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return {normal(r.name): r for r in map(Requirement, lines)}


def lower_bound(requirement):
    (bound,) = [s.version for s in requirement.specifier if s.operator == ">="]
    return Version(bound)


def test_the_oldest_set_is_the_lower_bounds():
    oldest, needed = pinned("constraints-oldest.txt"), requirements()
    assert oldest.keys() == needed.keys()
    for name, requirement in needed.items():
        bound = lower_bound(requirement)
        assert oldest[name] in requirement.specifier
        # The bound's first release: 24.3 is met by 24.3.6, and not by 24.12.
        assert oldest[name].release[: len(bound.release)] == bound.release, name


def test_the_newest_set_is_within_the_bounds():
    newest, needed = pinned("constraints.txt"), requirements()
    assert needed.keys() <= newest.keys()
    for name, requirement in needed.items():
        assert newest[name] in requirement.specifier, name


@pytest.mark.parametrize("name", sorted(requirements()))
def test_what_is_installed_is_within_the_bounds(name):
    version = Version(importlib.metadata.version(name))
    assert version in requirements()[name].specifier
