"""The recipe that both sides of the benchmark compute, read from a JSON file."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

OPTIMIZERS = ("lars", "sgd", "adamw")


class PeerError(Exception):
    """What a person can mend: printed as it is."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What both sides of the benchmark compute; the names are those of jepa_jax's configs."""

    batch_size: int
    stage_sizes: tuple[int, ...]
    width: int
    stem_kernel: int
    stem_stride: int
    stem_padding: int
    stem_pool: bool
    expand_dim: int
    view_size: int
    use_projector: bool
    proj_hidden_dim: int
    proj_output_dim: int
    sim_coeff: float
    std_coeff: float
    cov_coeff: float
    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    num_images: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _FITS[field.type](value):
                raise PeerError(f"{field.name} cannot be {value!r}")
        if self.optimizer not in OPTIMIZERS:
            raise PeerError(f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        smallest = {"batch_size": 2, "width": 1, "stem_kernel": 1, "stem_stride": 1, "view_size": 8}
        smallest |= {"proj_hidden_dim": 1, "proj_output_dim": 2, "num_images": self.batch_size}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise PeerError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def num_features(self) -> int:
        """F, the size of a representation."""
        return self.expand_dim or self.width * 2 ** (len(self.stage_sizes) - 1)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_FITS = {
    int: _is_count,
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str,
    float: lambda value: type(value) in (int, float) and math.isfinite(value) and value >= 0,
    tuple[int, ...]: lambda value: len(value) > 0 and all(_is_count(v) and v for v in value),
}


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe, one JSON object with exactly the fields of `Recipe`.

    Raises:
      PeerError: if the file is missing, is no such object, or a value is out of range.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise PeerError(f"{path} cannot be read: {error}") from error
    names = {field.name for field in dataclasses.fields(Recipe)}
    if not isinstance(content, dict) or set(content) != names:
        keys = set(content) if isinstance(content, dict) else set()
        differences = [f"no {name}" for name in sorted(names - keys)]
        differences += [f"unknown {name}" for name in sorted(keys - names)]
        raise PeerError(f"{path} is not a recipe: {', '.join(differences)}")
    if not isinstance(content["stage_sizes"], list):
        raise PeerError(f"stage_sizes cannot be {content['stage_sizes']!r}")
    return Recipe(**{**content, "stage_sizes": tuple(content["stage_sizes"])})
