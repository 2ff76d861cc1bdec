"""What is swept: from text or an axis file to points, each a dict of a config's keys and values.

A grid is every combination; zipped keys change together; drawn ones are random numbers of a range.
Several kinds at once multiply.
"""

import dataclasses
import itertools
import math
import pathlib
import runpy
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jepa_jax import configs
from jepa_jax.config import known_keys, nearest
from jepa_jax.errors import ConfigError
from jepa_jax.paths import home_expanded

Point = dict[str, Any]
# The text of a value, as after --config.KEY=, to the value that the config's key takes.
Parse = Callable[[str, str], Any]
# More than a person asks for on purpose.
MOST_POINTS = 1000
_SET_BY_SEEDS = "meta.seed"
_FILE_PARTS = ("grid", "zip", "random", "num_random", "config")
# Enough to tell two draws apart, short enough to paste.
_DIGITS = 4


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers between two bounds, uniform, or uniform in their logarithm."""

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False

    def draw(self, uniform: float) -> float | int:
        """A number of [0, 1) to one of the range, whole or to four significant digits."""
        if self.is_log:
            value = self.low * (self.high / self.low) ** uniform
        else:
            value = self.low + (self.high - self.low) * uniform
        value = min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)
        return round(value) if self.is_whole else value


@dataclasses.dataclass(frozen=True)
class Axes:
    """Keys and what they take.

    Attributes:
      grid: key to values; every combination is a point.
      zipped: key to values, as many for each key; the n-th of all go together.
      drawn: key to a range, or to values of which one is drawn.
      num_drawn: how many draws.
      config: keys that an axis file sets for all points alike.
    """

    grid: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    zipped: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    drawn: Mapping[str, Range | tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    num_drawn: int = 0
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Swept keys, in the order in which they were given."""
        return [*self.grid, *self.zipped, *self.drawn]

    @property
    def num_points(self) -> int:
        """Before equal ones are merged."""
        count = math.prod(len(values) for values in self.grid.values())
        count *= len(next(iter(self.zipped.values()), (None,)))
        return count * (self.num_drawn if self.drawn else 1)


# --- text -------------------------------------------------------------------------------------


def split_values(text: str) -> list[str]:
    """'0.1,0.3' or '(1, 1),(2, 2)' to its parts: a comma in brackets separates nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _key_and_text(flag: str, text: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    key = key.removeprefix("config.")
    if not equals:
        raise ConfigError(f"{flag} takes KEY=VALUE,VALUE as in optim.lr=0.1,0.3, got {text!r}")
    _check_key(flag, key)
    if not values.strip():
        raise ConfigError(f"{flag} {key} has no values: an axis needs at least one")
    return key, values


def _check_key(flag: str, key: str) -> None:
    if key not in known_keys():
        raise ConfigError(f"{flag}: {key} is not a known key{nearest(key, known_keys())}")
    if key == _SET_BY_SEEDS:
        raise ConfigError(f"{flag}: {key} is set by --seeds, which counts up from the config's own")
    if key.startswith(("meta.", "logging.")):
        raise ConfigError(f"{flag}: {key} does not change what is learnt")


def _values(flag: str, key: str, text: str, parse: Parse) -> tuple[Any, ...]:
    parts = split_values(text)
    if not all(parts):
        raise ConfigError(f"{flag} {key} has an empty value in {text!r}")
    return tuple(parse(key, part) for part in parts)


def _range(key: str, text: str, parse: Parse) -> Range | None:
    """Of 'LOW..HIGH' or 'LOW..HIGH:log'; None for text that is no range."""
    low, dots, rest = text.strip().partition("..")
    if not dots:
        return None
    high, colon, kind = rest.partition(":")
    if colon and kind != "log":
        raise ConfigError(f"--random {key}={text}: a range ends in :log or in nothing")
    return _checked_range(key, parse(key, low), parse(key, high), bool(colon))


def _checked_range(key: str, low: Any, high: Any, is_log: bool) -> Range:
    if any(type(bound) not in (int, float) for bound in (low, high)):
        raise ConfigError(
            f"--random {key}: a range is of numbers, LOW..HIGH, got {low!r}..{high!r}"
        )
    found = Range(low, high, is_log, isinstance(low, int))
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
        raise ConfigError(f"--random {key}: {found.low:g}..{found.high:g} is empty or not finite")
    if found.is_log and found.low <= 0:
        raise ConfigError(f"--random {key}: a log-uniform range starts above 0, not {found.low:g}")
    return found


def axes_of_text(
    grid: Sequence[str], zipped: Sequence[str], drawn: Sequence[str], parse: Parse
) -> Axes:
    """The axes of a command line.

    Args:
      grid: of --grid, as 'optim.lr=0.1,0.3'.
      zipped: of --zip, in the same form.
      drawn: of --random: how many, then 'optim.lr=0.01..1:log', 'loss.std_coeff=1..25' or
        'model.width=16,32'.
      parse: see `Parse`.

    Raises:
      ConfigError: one line that names the key and what would be right.
    """
    found: dict[str, dict[str, Any]] = {"grid": {}, "zipped": {}, "drawn": {}}
    for flag, name, texts in (("--grid", "grid", grid), ("--zip", "zipped", zipped)):
        for text in texts:
            key, values = _key_and_text(flag, text)
            _put(found, flag, name, key, _values(flag, key, values, parse))
    count, *ranges = [*drawn] or ["0"]
    if drawn and not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"--random takes a number of draws and then ranges, got {count!r}")
    if drawn and not ranges:
        raise ConfigError("--random needs a range beside the number, as optim.lr=0.01..1:log")
    for text in ranges:
        key, values = _key_and_text("--random", text)
        choice = _range(key, values, parse) or _values("--random", key, values, parse)
        _put(found, "--random", "drawn", key, choice)
    return _checked(Axes(**found, num_drawn=int(count)))


def _put(found: dict[str, dict[str, Any]], flag: str, name: str, key: str, values: Any) -> None:
    if any(key in part for part in found.values()):
        raise ConfigError(f"{flag}: {key} is given twice")
    found[name][key] = values


def _checked(axes: Axes) -> Axes:
    lengths = {key: len(values) for key, values in axes.zipped.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise ConfigError(f"--zip pairs values one to one: {counts}")
    if not axes.keys:
        raise ConfigError("nothing is swept: --grid optim.lr=0.1,0.3, --zip, --random or --axes")
    return axes


# --- files ------------------------------------------------------------------------------------


def axes_of_file(path: str | pathlib.Path, parse: Parse) -> Axes:
    """The axes of a file whose `get_sweep()` returns a dict.

    Its parts: 'grid' and 'zip', key to values; 'random', key to (low, high), (low, high, 'log')
    or a list of values, with 'num_random'; 'config', keys that are set for all points.

    Raises:
      ConfigError: for a file that cannot be run, or that says something else.
    """
    path = configs.find(str(home_expanded(path)), folder="configs/sweeps")
    if not path.is_file():
        near = ""
        if path.parent.is_dir():
            near = nearest(path.name, [file.name for file in path.parent.glob("*.py")])
        raise ConfigError(f"axis file {path} does not exist{near}")
    try:
        content = runpy.run_path(str(path))["get_sweep"]()
    except KeyError as error:
        raise ConfigError(f"axis file {path} has no function get_sweep()") from error
    except Exception as error:  # whatever a person's file raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"axis file {path} cannot be run: {reason}") from error
    if not isinstance(content, Mapping) or not set(content) <= set(_FILE_PARTS):
        raise ConfigError(f"axis file {path}: get_sweep() returns a dict of {_FILE_PARTS}")
    parts: dict[str, dict[str, Any]] = {"grid": {}, "zipped": {}, "drawn": {}}
    for name, part in (("grid", "grid"), ("zip", "zipped"), ("random", "drawn")):
        for key, values in content.get(name, {}).items():
            _check_key(str(path), key)
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError(f"axis file {path}: {key} has no values")
            found: Any
            if name != "random" or isinstance(values, list):
                found = tuple(parse(key, str(value)) for value in values)
            else:
                low, high = (parse(key, str(value)) for value in values[:2])
                found = _checked_range(key, low, high, values[2:] == ("log",))
            _put(parts, str(path), part, key, found)
    config = {key: parse(key, str(value)) for key, value in content.get("config", {}).items()}
    return _checked(Axes(**parts, num_drawn=content.get("num_random", 0), config=config))


# --- points -----------------------------------------------------------------------------------


def points(axes: Axes) -> list[Point]:
    """Every point once, the last grid key changing fastest.

    The n-th draw of a key is the same however many are drawn: a larger number adds points.
    """
    grid = [
        dict(zip(axes.grid, values, strict=True))
        for values in itertools.product(*axes.grid.values())
    ]
    zipped = [
        dict(zip(axes.zipped, values, strict=True))
        for values in zip(*axes.zipped.values(), strict=True)
    ] or [{}]
    drawn = [{}]
    if axes.drawn:
        columns = {key: _draws(key, of, axes.num_drawn) for key, of in axes.drawn.items()}
        drawn = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    found = [{**a, **b, **c} for a in grid for b in zipped for c in drawn]
    unique = {tuple(point.items()): point for point in found}
    return list(unique.values())


def _draws(key: str, of: Range | tuple[Any, ...], count: int) -> list[Any]:
    uniform = np.random.default_rng(zlib.crc32(key.encode())).random(count)
    if isinstance(of, Range):
        return [of.draw(float(value)) for value in uniform]
    return [of[int(value * len(of))] for value in uniform]


def label(point: Mapping[str, Any]) -> str:
    """'0.1', or 'optim.lr=0.1 loss.std_coeff=25' where several keys are swept."""

    def text(value):
        return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")

    if len(point) == 1:
        return text(next(iter(point.values())))
    return " ".join(f"{key}={text(value)}" for key, value in point.items())


def as_flags(point: Mapping[str, Any]) -> str:
    """The point as it is pasted behind a command."""
    return " ".join(f"--config.{key}={value}".replace(" ", "") for key, value in point.items())
