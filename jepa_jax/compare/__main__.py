"""The command: python -m jepa_jax.compare configs/cpu.py optim.lr=0.05 --seeds 5

Every error a person can act on is one line on stderr and a non-zero exit.
"""

import argparse
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Mapping, Sequence

from jepa_jax.command import Parser, ends_at_once, errors_as_lines, with_huge_pages
from jepa_jax.compare import PLACES
from jepa_jax.config_flags import GivenConfig, fit_to_device, given_config
from jepa_jax.errors import TrainingError
from jepa_jax.progress import say
from jepa_jax.signals import stop_on_signals

_DESCRIPTION = """\
Is B better than A? Trains both with the same seeds for the same time and compares their ridge
probes on the validation images (val/*), pair by pair. Positional arguments: the config file A,
then another one or KEY=VALUE overrides of A; a file may carry an argument, as in FILE.py:ARGUMENT.
--config.KEY=VALUE overrides both. The test set is left for the last look. The same command again
goes on with what is missing.
"""
_INTERRUPTED = "interrupted; the same command goes on with what is missing"
# Of a folder; file systems end at 255 bytes.
_LONGEST_NAME = 150


def _parser() -> Parser:
    parser = Parser(prog="python -m jepa_jax.compare", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "sides", nargs="*", metavar="A B", help="FILE.py FILE.py, or FILE.py KEY=VALUE"
    )
    parser.add_argument("--seeds", type=int, default=5, help="pairs, at least 2; by default 5")
    parser.add_argument(
        "--workdir", help="by default a folder of its own in $EBJEPA_CKPTS or runs/"
    )
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """With `a`, `b` (a file, or empty), `overrides` of B and `common` flags added."""
    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    common = [text for text in argv if re.match(r"--config\.[\w.]+=", text)]
    # Positional arguments may stand on both sides of a flag.
    arguments = parser.parse_intermixed_args([text for text in argv if text not in common])
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: one difference has no spread")
    a, *rest = arguments.sides or [""]
    overrides = [text for text in rest if re.match(r"[\w.]+=", text)]
    files = [text for text in rest if text not in overrides]
    if not a or not rest:
        parser.error(
            "two things are compared: name a second config file, or overrides as optim.lr=0.05 "
            "(--config.KEY=VALUE holds for both)"
        )
    if len(files) > 1 or (files and overrides):
        parser.error(f"B is one config file or overrides of A, KEY=VALUE; got {' and '.join(rest)}")
    everywhere = [*common, *(f"--config.{text}" for text in overrides)]
    if any(text.startswith("--config.meta.seed") for text in everywhere):
        parser.error("config.meta.seed is set here: 0, 1, ... on both sides")
    if any(text.startswith("optim.epochs=") for text in overrides):
        parser.error(
            "B trains as long as A, so its epochs follow; --config.optim.epochs sets those of A"
        )
    arguments.a, arguments.b = a, files[0] if files else ""
    arguments.overrides, arguments.common = overrides, common
    return arguments


def _given(arguments: argparse.Namespace) -> tuple[GivenConfig, GivenConfig]:
    a = given_config([f"--config={arguments.a}", *arguments.common])
    own = [f"--config.{override}" for override in arguments.overrides]
    b = given_config([f"--config={arguments.b or arguments.a}", *arguments.common, *own])
    return a, b


def _names(arguments: argparse.Namespace, a: GivenConfig) -> dict[str, str]:
    common = [f"{key}={value}" for key, value in a.overrides.items() if key not in PLACES]
    files = [pathlib.Path(path).name for path in (arguments.a, arguments.b or arguments.a)]
    both = {"both": " ".join(common)} if common else {}
    return {"A": files[0], "B": " ".join([files[1], *arguments.overrides]), **both}


def _default_workdir(names: Mapping[str, str]) -> pathlib.Path:
    """A folder of its own for every comparison, so that no two collide."""
    name = ",".join(["compare", *names.values()]).replace(" ", ",").replace(":", "-")
    name = re.sub(r"[^\w.,=+-]", "", name)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
    return pathlib.Path(os.environ.get("EBJEPA_CKPTS", "runs")) / name


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    arguments = _parse(argv)
    given = _given(arguments)
    names = _names(arguments, given[0])
    with errors_as_lines(_INTERRUPTED), stop_on_signals(_INTERRUPTED):
        from jepa_jax import device
        from jepa_jax.compare.pairs import check, compare_configs
        from jepa_jax.compare.table import as_text, closing_lines, table

        # Before a backend is started; again below, for a CPU may have made the two one.
        check(*(side.config for side in given))
        device.select(given[0].config.meta.device)
        for side in given:
            fit_to_device(side)
        workdir = pathlib.Path(arguments.workdir or _default_workdir(names))
        document = compare_configs(
            *(side.config for side in given), workdir, num_seeds=arguments.seeds, names=names
        )
        say("\n".join(["", as_text(table(document["rows"])), "", *closing_lines(document)]))
        say(f"{'written':<10}{workdir}: compare.json, compare.md")
        if document["verdict"] is None:
            raise TrainingError(document["sentence"])


if __name__ == "__main__":
    with_huge_pages()
    with ends_at_once():
        main()
