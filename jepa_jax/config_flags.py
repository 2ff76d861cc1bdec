"""A config from the command line: --config=FILE.py --config.optim.lr=0.3, for every command.

What absl and ml_collections would show as a traceback is one line on stderr and exit code 2.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from jepa_jax import configs
from jepa_jax.command import fail
from jepa_jax.config import compute_dtype, known_keys, nearest
from jepa_jax.progress import say

_DEFAULT_CONFIG = configs.FOLDER / "cpu.py"
_HELP = (
    "The config, by default cpu: a file, or the name of one that comes with the package; any key "
    "is a flag: --config.optim.lr=0.3"
)


@dataclasses.dataclass(frozen=True)
class GivenConfig:
    """A config and where it came from: the file, and the dotted keys that flags replaced."""

    config: ConfigDict
    path: str
    overrides: dict[str, Any]

    @property
    def name(self) -> str:
        """The file's name without its ending, and what was given to it: cpu-5m of cpu.py:5m."""
        path, _, argument = self.path.partition(":")
        return pathlib.Path(path).stem + (f"-{argument}" if argument else "")

    def flags(self, **changes: Any) -> list[str]:
        """The flags with which another process gets the same config, further keys replaced."""
        overrides = {**self.overrides, **changes}
        return [
            f"--config={self.path}",
            *(f"--config.{key}={value}" for key, value in overrides.items()),
        ]


def given_config(arguments: Sequence[str]) -> GivenConfig:
    """The config of a command whose other flags are not absl's.

    Args:
      arguments: the config's flags alone, without the program's name.
    """
    flag_values = flags.FlagValues()
    parse(["", *arguments], flag_values)
    return parsed_config(flag_values)


def parsed_config(flag_values: flags.FlagValues) -> GivenConfig:
    """What `parse` found."""
    flag = flag_values["config"]
    return GivenConfig(
        flag_values.config,
        config_flags.get_config_filename(flag),
        config_flags.get_override_values(flag),
    )


def parse(argv: Sequence[str], flag_values: flags.FlagValues) -> list[str]:
    """Adds --config to the flags and parses all of them; ends the command on bad input.

    Args:
      argv: the program's name and its arguments.
      flag_values: with the command's other flags.

    Returns:
      the program's name.
    """
    if not _config_argument(argv):
        # ml_collections wants the file before the overrides.
        argv = [argv[0], f"--config={_DEFAULT_CONFIG}", *argv[1:]]
    argv, path = _with_found_file(argv)
    try:
        config_flags.DEFINE_config_file(
            "config", None, _HELP, flag_values=flag_values, sys_argv=list(argv)
        )
    except flags.Error as error:  # a --flagfile that cannot be read
        fail(_explain(error, argv, path))
    # Without it --help would not show the flag among the command's own.
    flag_values.register_key_flag_for_module(sys.argv[0], flag_values["config"])
    if not path.is_file():
        near = nearest(path.name, [file.name for file in configs.FOLDER.glob("*.py")])
        fail(f"config file {path} {'is not a file' if path.exists() else 'does not exist'}{near}")
    if not configs.is_shipped(path):
        # It may build on its neighbours as `from configs import base`, wherever we are called.
        sys.path.append(str(path.absolute().parent.parent))
    try:
        rest = flag_values(list(argv))
        config = flag_values.config
    except Exception as error:  # absl's own, or whatever a person's config file raises
        fail(_explain(error, argv, path))
    if not isinstance(config, ConfigDict):
        fail(f"config file {path} gives a {type(config).__name__}, not a ConfigDict")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; overrides look like --config.optim.lr=0.3")
    return rest


def fit_to_device(given: GivenConfig) -> None:
    """On a CPU, computes in float32 where the file says bfloat16 and no flag asks for it.

    XLA's bfloat16 convolutions are float32 ones there, between conversions: no faster, and
    coarser (docs/performance.md). Starts JAX's backend.
    """
    asked = {"training.use_amp", "training.dtype"} & set(given.overrides)
    if jax.default_backend() == "cpu" and compute_dtype(given.config) is jnp.bfloat16 and not asked:
        given.config.training.use_amp = False
        say(
            f"{'note':<10}computing in float32: on a CPU bfloat16 is no faster; "
            "--config.training.use_amp=True computes in it all the same"
        )


def _config_argument(argv: Sequence[str]) -> str:
    for previous, argument in zip(["", *argv], argv, strict=False):
        if argument.startswith(("--config=", "-config=")):
            return argument.split("=", 1)[1]
        if previous in ("--config", "-config"):
            return argument
    return ""


def _with_found_file(argv: Sequence[str]) -> tuple[list[str], pathlib.Path]:
    """The arguments with the file that --config means in place of its name, and that file."""
    name, colon, argument = _config_argument(argv).partition(":")
    try:
        path = configs.find(name)
    except OSError as error:  # such as a name that is too long
        fail(f"config file {name[:100]!r} cannot be read: {error.strerror}")
    if str(path) == name:
        return list(argv), path
    given, found = f"{name}{colon}{argument}", f"{path}{colon}{argument}"
    new = {given: found, f"--config={given}": f"--config={found}"}
    new[f"-config={given}"] = new[f"--config={given}"]
    return [argv[0], *(new.get(text, text) for text in argv[1:])], path


def _explain(error: Exception, argv: Sequence[str], path: pathlib.Path) -> str:
    overrides = [re.match(r"--?config\.([\w.]+)", argument) for argument in argv]
    for match in filter(None, overrides):
        if match[1] not in known_keys():
            return f"config.{match[1]} is not a known key{nearest(match[1], known_keys())}"
    text = " ".join(str(error).split())
    if "Traceback" in text:  # of get_config, which ml_collections puts into its own error
        text = str(error).strip().splitlines()[-1]
    elif isinstance(error, flags.Error):
        return text
    else:
        text = f"{type(error).__name__}: {text}"
    if re.search(r"(named|from) 'configs'", text):
        text += " (those of the package: from jepa_jax.configs import rapid)"
    return f"config file {path} cannot be run: {text}"
