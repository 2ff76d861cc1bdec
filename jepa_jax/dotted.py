"""A person's own function, named in a config as `my_module:my_name`: text in, the object out."""

import difflib
import importlib
import os
import re
import sys
from typing import Any

from jepa_jax.errors import ConfigError

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", re.ASCII)


def is_dotted(name: str) -> bool:
    """Whether it has the form `my_package.my_module:my_name`; nothing is imported."""
    return bool(_FORM.fullmatch(name))


def load_dotted(key: str, path: str) -> Any:
    """What `path` names; its module is imported, from the current folder too.

    Args:
      key: of the config, for the message.
      path: 'my_package.my_module:my_name'.

    Raises:
      ConfigError: if there is none, or importing its module fails; one line.
    """
    start = f"config.{key}={path}:"
    name, _, attribute = path.partition(":")
    folder = os.getcwd()
    # Kept there: what is found may import its neighbours when it is called.
    if not {"", folder} & set(sys.path):
        sys.path.append(folder)
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{start} no module {error.name} in the current folder ({folder}) or installed"
            ) from error
        raise ConfigError(f"{start} importing {name} failed: {one_line(error)}") from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1, cutoff=0.6)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{start} {name} has no {attribute}{hint}")
    return getattr(module, attribute)


def one_line(error: Exception) -> str:
    """'ValueError: what it says', of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:297]}..."
