"""Paths as a person gives them."""

import os
import pathlib

from jepa_jax.errors import ConfigError


def home_expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path with a leading `~` or `~user` replaced by that home.

    Raises:
      ConfigError: if this machine does not know the user.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} cannot be found: there is no such user here") from error
