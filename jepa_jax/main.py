"""The command: python -m jepa_jax.main --config=configs/rapid.py --config.optim.lr=0.707

Flags in, one call of `train_and_evaluate`; every error a person can act on is one line on stderr
and a non-zero exit.
"""

import os
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from jepa_jax.command import errors_as_lines, fail
from jepa_jax.config import known_keys, nearest

_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"

_DEFAULT_CONFIG = _CONFIGS / "cpu.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    f"The config file, by default {_DEFAULT_CONFIG.name}; any key is a flag: --config.optim.lr=0.3",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "The run's folder. By default config.meta.model_folder, else a folder named after the config "
    "and the overrides, in $EBJEPA_CKPTS or runs/.",
)
_REPORT = flags.DEFINE_bool("report", True, "Whether to write report.html at the end.")
_INIT_FROM = flags.DEFINE_string("init_from", "", "Another run's folder, to start from.")


def _config_argument(argv: Sequence[str]) -> str:
    for previous, argument in zip(["", *argv], argv, strict=False):
        if argument.startswith(("--config=", "-config=")):
            return argument.split("=", 1)[1]
        if previous in ("--config", "-config"):
            return argument
    return ""


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; what absl and ml_collections would show as a traceback is one line."""
    if not _config_argument(argv):
        # ml_collections reads the overrides from sys.argv, and wants the file before them.
        argv = sys.argv = [argv[0], f"--config={_DEFAULT_CONFIG}", *argv[1:]]
    path = pathlib.Path(_config_argument(argv).split(":")[0])
    if not path.is_file():
        near = nearest(path.name, [file.name for file in _CONFIGS.glob("*.py")])
        fail(f"config file {path} does not exist{near}")
    # A config may build on its neighbours as `from configs import rapid`, wherever we are called.
    sys.path.append(str(path.absolute().parent.parent))
    try:
        rest = flags.FLAGS(list(argv))
        _ = _CONFIG.value
    except Exception as error:  # absl's own, or whatever a person's config file raises
        fail(_explain(error, argv, path))
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; overrides look like --config.optim.lr=0.3")
    return rest


def _explain(error: Exception, argv: Sequence[str], path: pathlib.Path) -> str:
    overrides = [re.match(r"--?config\.([\w.]+)", argument) for argument in argv]
    for match in filter(None, overrides):
        if match[1] not in known_keys():
            return f"config.{match[1]} is not a known key{nearest(match[1], known_keys())}"
    text = " ".join(str(error).split())
    if isinstance(error, flags.Error):
        return text
    return f"config file {path} cannot be run: {type(error).__name__}: {text}"


def _default_workdir(config: ConfigDict, argv: Sequence[str]) -> pathlib.Path:
    """A folder of its own for every set of overrides, so that two experiments do not collide."""
    if config.meta.model_folder:
        return pathlib.Path(config.meta.model_folder)
    name = pathlib.Path(_config_argument(argv)).stem
    for key, value in sorted(config_flags.get_override_values(flags.FLAGS["config"]).items()):
        if not key.startswith(("logging.", "meta.device")):
            name += f",{key}={value}"
    name = re.sub(r"[^\w.,=+-]", "", name)
    return pathlib.Path(os.environ.get("EBJEPA_CKPTS", "runs")) / name


def _main(argv: Sequence[str]) -> None:
    del argv
    config = _CONFIG.value
    with errors_as_lines("interrupted; the same command goes on from the last checkpoint"):
        from jepa_jax import device
        from jepa_jax.config import validate
        from jepa_jax.train import train_and_evaluate

        validate(config)
        device.select(config.meta.device)
        workdir = pathlib.Path(_WORKDIR.value or _default_workdir(config, sys.argv)).expanduser()
        train_and_evaluate(config, workdir, init_from=_INIT_FROM.value)
        if _REPORT.value:
            _write_report(workdir)


def _write_report(workdir: pathlib.Path) -> None:
    """Writes report.html unless that of this very end of the run is there."""
    from jepa_jax.progress import say
    from jepa_jax.report import write_report

    page = workdir / "report.html"
    try:
        if not page.exists() or page.stat().st_mtime < (workdir / "summary.json").stat().st_mtime:
            page = write_report([workdir])
        say(f"{'report':<10}{page}")
    except Exception as error:  # the run is done and saved: no fault of a plot makes it a failure
        reason = " ".join(str(error).split())[:200]
        say(f"{'note':<10}no report was written ({type(error).__name__}: {reason})")


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)
