"""The configs that come with the package: `from jepa_jax.configs import rapid`, `--config=rapid`.

In a checkout they are the files of `configs/`; a wheel holds the same files inside the package, so
that an installation puts nothing called `configs` beside a user's own folder of that name. This
module makes a package of whichever is there.
"""

import pathlib

_INSTALLED = pathlib.Path(__file__).parent / "_configs"
_CHECKOUT = pathlib.Path(__file__).parents[1] / "configs"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT

# What makes a module a package: its submodules are looked for here.
__path__ = [str(FOLDER)]


def find(name: str, *, folder: str = "configs") -> pathlib.Path:
    """The file that a command means by --config=NAME or --axes=NAME.

    A file of that name in the current folder goes first, then one that comes with the package; the
    ending .py may be left out, and so may `folder` where the file is the package's.

    Args:
      name: as `rapid`, `rapid.py`, `configs/rapid.py` or a path.
      folder: where such files lie in a checkout, `configs` or `configs/sweeps`.

    Returns:
      the file's path; `name` itself if there is no such file.

    Raises:
      OSError: if the system takes no such name.
    """
    path = pathlib.Path(name)
    inside = path.relative_to(folder) if path.is_relative_to(folder) else path
    shipped = FOLDER / pathlib.Path(folder).relative_to("configs") / inside
    # One's own folder is never left: ../x is a path and nothing else.
    places = [path] if ".." in path.parts else [path, shipped]
    for place in filter(lambda place: place.name, places):
        for candidate in (place, place.with_name(f"{place.name}.py")):
            if candidate.is_file():
                return candidate
    return path


def is_shipped(path: pathlib.Path) -> bool:
    """Whether a file is one of the package's own."""
    return path.absolute().is_relative_to(FOLDER)
