"""From a run's folder back to live objects."""

import os
import pathlib
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from jepa_jax import checkpoint
from jepa_jax.config import create_encoder
from jepa_jax.errors import CheckpointError
from jepa_jax.metrics import read_json
from jepa_jax.models import Encoder, ModelFns


def load_encoder(
    workdir: str | os.PathLike[str], *, encoder: nn.Module | ModelFns | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """The pretrained encoder of a finished run, as its ridge probe saw it.

    Args:
      workdir: the folder of a run.
      encoder: what was given to `train_and_evaluate` as `encoder`, if anything was.

    Returns:
      (encoder, variables): `encoder.apply(variables, images)` takes uint8 or [0, 1] images
      [B, H, W, 3], normalises them, and returns representations h [B, F], float32.

    Raises:
      CheckpointError: if the folder holds no finished run, or it is damaged.
    """
    workdir = pathlib.Path(workdir).expanduser()
    for name in ("config.json", "encoder"):
        if not (workdir / name).exists():
            raise CheckpointError(f"{workdir} holds no finished run: {name} is missing")
    stored = read_json(workdir / "config.json")
    if encoder is None and "encoder" in stored["custom"]:
        raise CheckpointError(
            f"{workdir} was trained with an encoder of its own, {stored['custom']['encoder']}: "
            "pass it as load_encoder(workdir, encoder=...)"
        )
    variables = checkpoint.load_tree(workdir / "encoder")
    return create_encoder(ConfigDict(stored["config"]), encoder), variables
