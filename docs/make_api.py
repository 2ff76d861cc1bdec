"""Writes what follows from the list of public names: docs/api.md and the package's type stub.

    python -m docs.make_api

The page has every name's signature and docstring. The stub, `jepa_jax/__init__.pyi`, tells a type
checker and an editor where the names come from, which the package itself looks up on first use.
"""

import ast
import functools
import inspect
import pathlib
import re
import textwrap
from collections.abc import Iterator

import jepa_jax

ROOT = pathlib.Path(__file__).parents[1]
PAGE, STUB = ROOT / "docs" / "api.md", ROOT / "jepa_jax" / "__init__.pyi"
_LONGEST_LINE = 100

_HEAD = """\
# Public names

Every name of `jepa_jax.__all__`: `from jepa_jax import ...`. They are loaded on first use, so that
importing the package costs nothing. This page is made from the docstrings by
`python -m docs.make_api`.

"""


def page() -> str:
    """docs/api.md: modules, and below each its public names by alphabet."""
    parts = [_HEAD]
    for home, names in sorted(jepa_jax._HOMES.items()):
        links = ", ".join(f"[`{name}`](#{name.lower()})" for name in names)
        parts.append(f"- `jepa_jax.{home}`: {links}\n")
    for home, names in sorted(jepa_jax._HOMES.items()):
        parts.append(f"\n## jepa_jax.{home}\n")
        parts.extend(text for name in names for text in _entry(name))
    return "".join(parts)


def stub() -> str:
    """jepa_jax/__init__.pyi: each name imported from its module."""
    lines = ["# Made by `python -m docs.make_api`.", ""]
    for home, names in sorted(jepa_jax._HOMES.items()):
        ordered = sorted(names, key=lambda name: (name[0].islower(), name))
        lines += [f"from jepa_jax.{home} import {name} as {name}" for name in ordered]
    lines += ["", "__version__: str", "__all__: list[str]", ""]
    return "\n".join(lines)


def _entry(name: str) -> Iterator[str]:
    thing = getattr(jepa_jax, name)
    if isinstance(thing, functools.partial):
        given = ", ".join(f"{key}={value!r}" for key, value in thing.keywords.items())
        yield _section("###", name, f"{name} = functools.partial({thing.func.__name__}, {given})")
        yield _docstring(inspect.getdoc(thing))
        return
    # Types as the source has them: Python, JAX and numpy spell them out anew in every version.
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    yield _section("###", name, _signature(name, node))
    yield _docstring(inspect.getdoc(thing))
    for part in node.body if isinstance(node, ast.ClassDef) else ():
        text = ast.get_docstring(part) if isinstance(part, ast.FunctionDef) else None
        if text and (part.name == "__call__" or not part.name.startswith("_")):
            is_property = "property" in map(ast.unparse, part.decorator_list)
            signature = "" if is_property else _signature(part.name, part)
            yield _section("####", f"{name}.{part.name}", signature)
            yield _docstring(text)


def _section(level: str, title: str, signature: str) -> str:
    code = f"```python\n{_wrapped(signature)}\n```\n\n" if signature else ""
    return f"\n{level} {title}\n\n{code}"


def _signature(name: str, node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef):
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        return f"{name}({', '.join(map(_field, fields))})"
    assert isinstance(node, ast.FunctionDef)
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("self")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    # As a formatter has it: every argument with a default has a type too.
    arguments = re.sub(r"(: [^=]*[^ =])=(?=[^ =])", r"\1 = ", arguments)
    return f"{name}({arguments}){returns}"


def _field(node: ast.AnnAssign) -> str:
    """A field of a dataclass, a named tuple or a Flax module, with its default."""
    default = node.value
    if isinstance(default, ast.Call):
        given = {keyword.arg: keyword.value for keyword in default.keywords}
        default = given.get("default", given.get("default_factory"))
    end = f" = {ast.unparse(default)}" if default else ""
    return f"{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{end}"


def _wrapped(signature: str) -> str:
    """On one line if it fits, else one argument a line."""
    signature = signature.replace("'", '"')
    if len(signature) <= _LONGEST_LINE:
        return signature
    lines, depth, last = [], 0, 0
    for place, character in enumerate(signature):
        depth += (character in "([{") - (character in ")]}")
        if (character, depth) in (("(", 1), (",", 1)):
            lines.append(signature[last : place + 1].strip())
            last = place + 1
        if (character, depth) == (")", 0) and lines:
            first, *rest = [*lines, signature[last:place].strip()]
            body = [f"    {line.rstrip(',')}," for line in rest]
            return "\n".join([first, *body, signature[place:]])
    return signature


def _docstring(text: str | None) -> str:
    """A docstring as Markdown: its sections as lists, and all else as it stands."""
    lines, is_list = [], False
    for line in (text or "").splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
        argument = re.fullmatch(r"  (\*{0,2}\w[\w, *.]*?): (.*)", line)
        if heading:
            is_list = heading[1] != "Returns"
            lines += [f"**{heading[1]}**", ""]
        elif is_list and argument:
            lines.append(f"- `{argument[1]}`: {argument[2]}")
        elif line and not line.startswith(" "):
            is_list = False
            lines.append(line)
        else:
            lines.append(f"  {line.strip()}".rstrip() if is_list else line.strip())
    # Outside of code a star is a product or a pair of them, never emphasis.
    lines = [_with_stars(line) for line in lines]
    return "\n".join(lines).rstrip() + "\n"


def _with_stars(line: str) -> str:
    if re.fullmatch(r"\*\*\w+\*\*", line):
        return line
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    STUB.write_text(stub())
