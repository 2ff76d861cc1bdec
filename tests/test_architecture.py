"""The shape of the house: who imports whom, what an import costs, how long a function may be."""

import ast
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import jepa_jax

PACKAGE = pathlib.Path(jepa_jax.__file__).parent

# A room imports only from lower floors, never sideways. `data` is one room.
FLOORS = (
    {"errors"},
    {"augment", "health", "losses", "masks", "optim", "pairing", "probes"}
    | {"configs", "device", "dotted", "last_words", "lock", "paths", "progress", "signals"},
    {
        "checkpoint",
        "command",
        "data",
        "distributed",
        "environment",
        "metrics",
        "models",
        "objectives",
        "profile",
        "random_patches",
        "vit",
    },
    {
        "encoders",
        "interop",
        "predictors",
        "representation",
        "sgd_probe",
        "train_step",
    },  # pure training and features
    {"config", "divergence", "evaluation", "finetuning", "runner", "watch"},
    {"config_flags", "plan"},
    {"api", "loop"},
    {"train"},
    {"pace"},
    {"compare", "convert", "evaluate", "report"},
    {"benchmark", "finetune", "main", "sweep"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Arrays in, arrays out: no file, no config, no framework.
PURE_MATHS = ("augment", "health", "losses", "masks", "optim", "pairing", "probes")
ALLOWED_IN_PURE_MATHS = {"collections", "functools", "itertools", "jax", "math", "optax", "typing"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """Full names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            # `from jepa_jax import device` imports a module, `from jepa_jax.device import x` none.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_file_is_on_a_floor():
    assert {room_of(path) for path in FILES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_from_lower_floors_only(path):
    room = room_of(path)
    used = {name.split(".")[1] for name in imported_modules(path) if name.startswith("jepa_jax.")}
    sideways = {other for other in used - {room} if FLOOR_OF[other] >= FLOOR_OF[room]}
    assert not sideways, f"{room} imports {sorted(sideways)}"


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_inside_a_room_of_several_files_no_two_need_each_other(room):
    needs = {
        path.stem: {
            part
            for name in imported_modules(path)
            if name.startswith(f"jepa_jax.{room}.")
            for part in name.split(".")[2:3]
        }
        for path in (PACKAGE / room).glob("[!_]*.py")
    }
    assert len(needs) > 1
    while needs:
        free = {stem for stem, used in needs.items() if not used & set(needs)}
        assert free, f"a circle among {sorted(needs)}"
        needs = {stem: used for stem, used in needs.items() if stem not in free}


def test_pure_maths_needs_jax_and_optax_alone():
    for path in FILES:
        room, own = room_of(path), f"jepa_jax.{room_of(path)}."
        if room in PURE_MATHS:
            names = {name for name in imported_modules(path) if not name.startswith(own)}
            assert {name.split(".")[0] for name in names} <= ALLOWED_IN_PURE_MATHS, path


def test_no_function_is_longer_than_eighty_lines():
    long = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > 80:
                    long[f"{path.name}:{node.name}"] = length
    assert not long


# JAX_PLATFORMS names no platform, so that whatever starts a backend fails.
IMPORT_ALL = """
import sys
import jepa_jax
heavy = {"jax", "flax", "tensorflow", "matplotlib", "orbax", "tensorflow_datasets", "PIL"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from jepa_jax import lars, resized_crop, ridge_probe, two_views, vicreg_loss
from jepa_jax import HParams, ImageJEPA, Projector, ResNet18, make_train_step
heavy -= {"jax", "flax"}
assert "orbax.checkpoint" not in sys.modules
heavy -= {"orbax"}  # flax imports the namespace
assert not heavy & set(sys.modules), heavy & set(sys.modules)
for name in jepa_jax.__all__:
    getattr(jepa_jax, name)
assert "tensorflow" not in sys.modules
import jax
try:
    jax.devices()
except RuntimeError:
    print("no backend was started")
"""


def test_importing_starts_no_backend_and_nothing_heavy():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "no backend was started\n"


@pytest.mark.parametrize("name", [name for name in jepa_jax.__all__ if name != "__version__"])
def test_public_names_have_docstrings_of_their_own(name):
    thing = getattr(jepa_jax, name)
    text = inspect.getdoc(thing)
    assert text
    assert text != inspect.getdoc(type(thing))
    assert name in dir(jepa_jax)


def test_the_version_is_public_and_an_unknown_name_is_an_attribute_error():
    assert jepa_jax.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'vicreg_los'"):
        _ = jepa_jax.vicreg_los
