"""What a type checker and a reader are told of the public names is all there, and of today.

That mypy accepts the package, a user's program and nothing wrong is checked by `.ci/run`.
"""

import ast
import inspect
import pathlib
import tomllib

import pytest

import jepa_jax
from docs import make_api

ROOT = pathlib.Path(__file__).parents[1]
NAMES = [name for name in jepa_jax.__all__ if name != "__version__"]


def test_the_page_and_the_stub_are_those_of_the_names_as_they_are():
    hint = "python -m docs.make_api writes both anew"
    assert make_api.PAGE.read_text() == make_api.page(), hint
    assert make_api.STUB.read_text() == make_api.stub(), hint


def test_the_stub_has_the_names_that_the_package_looks_up():
    tree = ast.parse(make_api.STUB.read_text())
    homes = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == {name: f"jepa_jax.{home}" for name, home in jepa_jax._HOME_OF.items()}
    assert sorted(homes) == sorted(NAMES)


def test_mypy_looks_at_every_module_that_defines_a_public_name():
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    for name in NAMES:
        thing = getattr(jepa_jax, name)
        path = pathlib.Path(inspect.getsourcefile(getattr(thing, "func", thing)))
        path = path.relative_to(ROOT).as_posix()
        assert path in checked or path.rpartition("/")[0] in checked, f"{path} has {name}"


def functions_of(thing):
    """The function, or the methods that a class's own source makes public."""
    (node,) = ast.parse(inspect.getsource(thing)).body
    if isinstance(node, ast.FunctionDef):
        return [node]
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    return [
        part for part in methods if part.name in ("__init__", "__call__") or part.name[0] != "_"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_and_result_of_a_public_name_has_a_type(name):
    thing = getattr(jepa_jax, name)
    for node in functions_of(getattr(thing, "func", thing)):
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        untyped = [a.arg for a in filter(None, arguments) if not a.annotation and a.arg != "self"]
        assert not untyped, f"{name}: {node.name} has no types of {untyped}"
        assert node.returns or node.name == "__init__", f"{name}: {node.name} has no result's type"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_every_name_with_its_docstring(name):
    page = make_api.PAGE.read_text()
    entry = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
    first_line = inspect.getdoc(getattr(jepa_jax, name)).splitlines()[0]
    assert first_line in entry.replace("\\", "")
    assert f"](#{name.lower()})" in page.split("\n## ")[0]
    assert " at 0x" not in entry
