"""The command: python -m jepa_jax.sweep --config=configs/rapid.py --grid optim.lr=0.1,0.3 --seeds 3

Every error a person can act on is one line on stderr and a non-zero exit.
"""

import argparse
import os
import pathlib
import re
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

from jepa_jax.command import Parser, ends_at_once, errors_as_lines, with_huge_pages
from jepa_jax.compare import PLACES
from jepa_jax.config_flags import GivenConfig, fit_to_device, given_config
from jepa_jax.errors import ConfigError, TrainingError
from jepa_jax.progress import say, seconds_of
from jepa_jax.signals import stop_on_signals
from jepa_jax.sweep.axes import MOST_POINTS, Axes, axes_of_file, axes_of_text, points

_DESCRIPTION = """\
Trains every point of a sweep with several seeds in one compiled program where the points allow
it, judges each by the ridge probe on validation images (val/*), and names the winner. Any key of
the config can be swept; --config.KEY=VALUE holds for all points. The same command again goes on
with what is missing; a changed grid adds its points.
"""
_INTERRUPTED = "interrupted; the same command goes on with the points that are missing"
_LONGEST_NAME = 150


def _parser() -> Parser:
    parser = Parser(prog="python -m jepa_jax.sweep", description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--config", default="", help="the config file, by default cpu.py; FILE.py:ARGUMENT")
    add("--grid", nargs="+", action="extend", default=[], metavar="KEY=V,V", help="all together")
    add("--zip", nargs="+", action="extend", default=[], metavar="KEY=V,V", help="one by one")
    add(
        "--random",
        nargs="+",
        default=[],
        metavar="N KEY=LOW..HIGH",
        help="N draws; LOW..HIGH:log is log-uniform, V,V a choice",
    )
    add("--axes", help="an axis file, as configs/sweeps/lr_search.py")
    add("--seeds", type=int, default=3, help="of every point; by default 3")
    add("--stack", default="auto", help="cells side by side; auto measures what is fastest")
    add("--halving", type=int, default=0, metavar="N", help="keep the best of N at every rung")
    add("--budget", default="", help="time for all of it, as 10m or 1h30m: chooses optim.epochs")
    add("--workdir", help="by default a folder of its own in $EBJEPA_CKPTS or runs/")
    add("--yes", action="store_true", help=f"allow more than {MOST_POINTS:,} points")
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    common = [text for text in argv if re.match(r"--config\.[\w.]+=", text)]
    arguments = parser.parse_args([text for text in argv if text not in common])
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    if arguments.halving and arguments.halving < 2:
        parser.error("--halving must be at least 2: one of so many goes on")
    if arguments.stack != "auto" and not (arguments.stack.isdecimal() and int(arguments.stack) > 0):
        parser.error(f"--stack is auto or a number of at least 1, got {arguments.stack}")
    if arguments.axes and (arguments.grid or arguments.zip or arguments.random):
        parser.error("--axes is instead of --grid, --zip and --random")
    return arguments, common


def _given(arguments: argparse.Namespace, common: Sequence[str]) -> tuple[GivenConfig, Axes]:
    file = [f"--config={arguments.config}"] if arguments.config else []

    def parse(key: str, text: str) -> Any:
        found = given_config([*file, f"--config.{key}={text}"]).config
        for part in key.split("."):
            found = found[part]
        return found

    if arguments.axes:
        axes = axes_of_file(arguments.axes, parse)
    else:
        axes = axes_of_text(arguments.grid, arguments.zip, arguments.random, parse)
    fixed = [text.removeprefix("--config.").partition("=")[0] for text in common]
    for key in axes.keys:
        if key in fixed:
            raise ConfigError(f"config.{key} is swept and given a value of its own")
    if axes.num_points > MOST_POINTS and not arguments.yes:
        raise ConfigError(
            f"{axes.num_points:,} points are more than {MOST_POINTS:,}: --yes if they are meant"
        )
    set_by_file = [f"--config.{k}={v}".replace(" ", "") for k, v in axes.config.items()]
    return given_config([*file, *set_by_file, *common]), axes


def _sets_epochs(common: Sequence[str]) -> bool:
    return any(text.startswith("--config.optim.epochs=") for text in common)


def _default_workdir(given: GivenConfig, axes: Axes) -> pathlib.Path:
    """A folder of its own for every base config and set of keys: a changed grid adds to it."""
    common = [f"{k}={v}" for k, v in sorted(given.overrides.items()) if k not in PLACES]
    name = re.sub(r"[^\w.,=+-]", "", ",".join(["sweep", given.name, *axes.keys, *common]))
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
    return pathlib.Path(os.environ.get("EBJEPA_CKPTS", "runs")) / name


def _command(argv: Sequence[str] | None) -> str:
    """The command, without the folders of this machine."""
    from jepa_jax.environment import without_folders

    shown = without_folders(sys.argv[1:] if argv is None else argv)
    return " ".join(["python -m jepa_jax.sweep", *shown])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    arguments, common = _parse(argv)
    began = time.perf_counter()
    with errors_as_lines(_INTERRUPTED), stop_on_signals(_INTERRUPTED):
        given, axes = _given(arguments, common)
        seconds = seconds_of(arguments.budget) if arguments.budget else 0.0
        if seconds and ("optim.epochs" in axes.keys or _sets_epochs(common)):
            raise ConfigError("--budget chooses config.optim.epochs: give one of them")
        from jepa_jax import device
        from jepa_jax.compare.table import as_text
        from jepa_jax.report import write_report
        from jepa_jax.report.sweep_table import closing_lines, table
        from jepa_jax.sweep.run import Sweep

        device.select(given.config.meta.device)
        device.split_cpu()
        fit_to_device(given)
        workdir = pathlib.Path(arguments.workdir or _default_workdir(given, axes))
        found = points(axes)
        sweep = Sweep(
            given.config,
            found,
            workdir,
            num_seeds=arguments.seeds,
            stack=0 if arguments.stack == "auto" else int(arguments.stack),
            factor=arguments.halving,
            name=given.name,
            command=_command(argv),
        )
        if seconds:
            sweep.fit_to_budget(seconds, time.perf_counter() - began)
        say(f"{'sweep':<10}{len(found)} points, {arguments.seeds} seeds each: {workdir}")
        document = sweep.run()
        closing = [f"{name:<10}{text}" for name, text in closing_lines(document)]
        say("\n".join(["", as_text(table(document)), "", *closing]))
        say(f"{'written':<10}{workdir}: sweep.json, sweep.md, cells/")
        say(f"{'report':<10}{write_report([workdir])}")
        if document["winner"] is None:
            raise TrainingError("no point finished with every seed")


if __name__ == "__main__":
    with_huge_pages()
    with ends_at_once():
        main()
