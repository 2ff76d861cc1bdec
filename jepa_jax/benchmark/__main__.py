"""The command: python -m jepa_jax.benchmark --config=configs/cpu.py

Every error a person can act on is one line on stderr and a non-zero exit.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from jepa_jax import configs
from jepa_jax.command import Parser, ends_at_once, errors_as_lines, with_huge_pages
from jepa_jax.config_flags import GivenConfig, fit_to_device, given_config
from jepa_jax.errors import ConfigError
from jepa_jax.metrics import write_json
from jepa_jax.progress import say
from jepa_jax.signals import stop_on_signals

_DESCRIPTION = """\
How fast a config trains on this machine, where the time goes, and how far that is from what the
machine can do. --config=FILE and --config.KEY=VALUE are those of jepa_jax.main; the default is
configs/cpu.py, and configs/rapid.py for --suite. --time-to-accuracy trains on the config's own data
and takes several --config; every --config.KEY=VALUE is for all of them. docs/performance.md says
how to read the tables.
"""
_INTERRUPTED = "interrupted; nothing was kept"
_GOES_ON = "interrupted; the same command goes on with what is missing"


_DEFAULTS = {
    "out": None,
    "images": 50_000,
    "repeats": 5,
    "augment": "device",
    "no_startup": False,
    "miniature": False,
    "peer_python": sys.executable,
    "minutes": None,
    "only": "",
    "seeds": 3,
    "targets": "50,55,60,65,70",
}
# Of each kind of measurement, '' being that of one config; another option is refused.
_OPTIONS = {
    "": {"out", "images", "no_startup", "miniature"},
    "sweep": {"out", "images", "repeats"},
    "peer": {"out", "images", "peer_python"},
    "suite": {"out", "minutes", "only", "miniature", "peer_python"},
    "time-to-accuracy": {"out", "seeds", "targets"},
    "measure-step": {"images", "repeats", "augment"},
    "measure-shares": {"images"},
    "measure-epoch": {"images"},
    "measure-rates": {"miniature"},
    "measure-device": set(),
}
_OUT_HELP = "a JSON file; of --suite and --time-to-accuracy, a folder"


def _parser() -> Parser:
    prog = "python -m jepa_jax.benchmark"
    parser = Parser(
        prog=prog,
        description=_DESCRIPTION,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    kind = parser.add_mutually_exclusive_group()
    for name, text in (
        ("sweep", "over batch sizes and over D"),
        ("suite", "everything, in resumable pieces"),
        ("time-to-accuracy", "train, and read accuracy over time beside its floors"),
        ("measure-step", "the step as one line of JSON"),
        ("measure-shares", "the parts of a step, likewise"),
        ("measure-epoch", "what follows an epoch, likewise"),
        ("measure-rates", "the device's rates, likewise"),
        ("measure-device", "the device's name, likewise"),
    ):
        kind.add_argument(f"--{name}", action="store_const", const=name, dest="kind", help=text)
    kind.add_argument("--peer", choices=["torch"], help="beside the same recipe in PyTorch")
    parser.add_argument("--out", type=pathlib.Path, help=_OUT_HELP)
    parser.add_argument("--no-startup", action="store_true", help="start no processes of main")
    parser.add_argument("--peer-python", help="one that has PyTorch, by default this one")
    parser.add_argument("--minutes", type=float, help="--suite begins nothing that may take longer")
    parser.add_argument("--only", help="pieces of --suite, as rates,step; by default all")
    parser.add_argument("--miniature", action="store_true", help="sizes that only test the code")
    parser.add_argument("--images", type=int, help="synthetic ones to train on, by default 50,000")
    parser.add_argument("--repeats", type=int, help="values of a step, by default 5")
    parser.add_argument("--augment", choices=["device", "none"], help="of --measure-step")
    parser.add_argument("--seeds", type=int, help="of each config, by default 3")
    parser.add_argument("--targets", help="accuracies in percent, by default 50,55,60,65,70")
    return parser


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    found, rest = parser.parse_known_args(argv)
    given = vars(found)
    kind = "peer" if given.pop("peer", None) else given.pop("kind", "")
    for name in sorted(set(given) - _OPTIONS[kind]):
        what = f"--{kind}" if kind else "the measurement of one config"
        parser.error(f"--{name.replace('_', '-')} is no option of {what}")
    arguments = argparse.Namespace(kind=kind, **{**_DEFAULTS, **given})
    if kind in ("suite", "time-to-accuracy") and not arguments.out:
        parser.error(f"--{kind} needs --out DIR")
    arguments.targets = _targets(parser, arguments.targets)
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    if min(arguments.images, arguments.repeats) < 1:
        parser.error("--images and --repeats must be at least 1")
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error("--minutes must be above 0")
    return arguments, rest


def _targets(parser: Parser, text: str) -> list[float]:
    try:
        targets = sorted({float(part) for part in text.split(",")})
    except ValueError:
        targets = []
    if not targets or not all(0 < target < 100 for target in targets):
        parser.error(f"--targets must be percentages above 0 and below 100, as 50,60; got {text!r}")
    return targets


def _print(tables: Sequence[Any]) -> None:
    from jepa_jax.benchmark.table import as_text

    for table in tables:
        say("\n" + as_text(table))


def _write(arguments: argparse.Namespace, content: dict[str, Any]) -> None:
    if arguments.out:
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out, content)
        except OSError as error:
            raise ConfigError(
                f"--out={arguments.out} cannot be written: {error.strerror}"
            ) from error
        say(f"{'written':<10}{arguments.out}")


def _measure_part(arguments: argparse.Namespace, given: GivenConfig) -> None:
    from jepa_jax import device
    from jepa_jax.benchmark import measure, rates, shares, step

    device.select(given.config.meta.device)
    content: dict[str, Any] = {}
    if arguments.kind == "measure-rates":
        content["rates"] = rates.measure_rates(is_miniature=arguments.miniature)
    elif arguments.kind != "measure-device":
        fit_to_device(given)
        plan = step.synthetic_plan(
            given.config, num_images=arguments.images, augment=arguments.augment
        )
        if arguments.kind == "measure-step":
            content["step"] = step.measure_step(plan, repeats=arguments.repeats)
        elif arguments.kind == "measure-shares":
            content.update(parts=shares.step_parts(plan), xla=measure.xla_counts(plan))
        else:
            content["parts"] = shares.epoch_parts(plan)
    environment = measure.environment()
    print(json.dumps(measure.document(arguments.kind, environment=environment, **content)))


def _sweep(arguments: argparse.Namespace, given: GivenConfig) -> None:
    from jepa_jax.benchmark import measure, sweep

    def on_point(row):
        words = row["reason"] or "done"
        say(f"{'measured':<10}{row['kind']} {row['value']}: {words}")

    flags = [f"--images={arguments.images}", f"--repeats={arguments.repeats}"]
    rates, rows = sweep.run_sweep(given, flags, on_point)
    _print(sweep.sweep_tables(rows, rates["rates"]["matmul"]))
    content = measure.document("a sweep", config=given.flags(), rates=rates, rows=rows)
    _write(arguments, content)


def _peer(arguments: argparse.Namespace, given: GivenConfig) -> None:
    from jepa_jax.benchmark import measure, peer

    peer.require_torch(arguments.peer_python)
    with tempfile.TemporaryDirectory() as folder:
        sides = peer.Peer(
            given,
            pathlib.Path(folder),
            python=arguments.peer_python,
            num_images=arguments.images,
            num_workers=min(given.config.data.num_workers, os.cpu_count() or 1),
        )
        if sides.note:
            say(f"{'note':<10}{sides.note}")
        result = peer.run_peer(sides, lambda text: say(f"{'measured':<10}{text}"))
    _print(result.pop("tables"))
    _write(arguments, measure.document("beside PyTorch", config=given.flags(), **result))


def _whole(arguments: argparse.Namespace, given: GivenConfig) -> None:
    from jepa_jax.benchmark import measure

    result = measure.measure_config(
        given,
        num_images=arguments.images,
        with_startup=not arguments.no_startup,
        is_miniature=arguments.miniature,
    )
    _print(measure.tables(result))
    say("")
    _write(arguments, result)


def _suite(arguments: argparse.Namespace, given: GivenConfig) -> None:
    from jepa_jax.benchmark.suite import run_suite

    code = run_suite(
        given,
        arguments.out,
        minutes=arguments.minutes,
        only=[name.strip() for name in arguments.only.split(",")] if arguments.only else [],
        is_miniature=arguments.miniature,
        peer_python=arguments.peer_python,
    )
    if code:
        sys.exit(code)


def _time_to_accuracy(arguments: argparse.Namespace, configs: Sequence[GivenConfig]) -> None:
    from jepa_jax.benchmark.time_to_accuracy import run_time_to_accuracy

    code = run_time_to_accuracy(
        configs, arguments.out, num_seeds=arguments.seeds, targets=arguments.targets
    )
    if code:
        sys.exit(code)


def _each_config(rest: Sequence[str]) -> list[GivenConfig]:
    """A config for every --config; the overrides are for all of them."""
    files, overrides, previous = [], [], ""
    for flag in rest:
        if previous in ("--config", "-config"):
            files.append(flag)
        elif flag.startswith(("--config=", "-config=")):
            files.append(flag.split("=", 1)[1])
        elif flag not in ("--config", "-config"):
            overrides.append(flag)
        previous = flag
    flags = [[f"--config={file}"] for file in files] or [[]]
    return [given_config([*file, *overrides]) for file in flags]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    arguments, rest = _parse(argv)
    if arguments.kind == "suite" and not any(flag.startswith("--config=") for flag in rest):
        rest = [f"--config={configs.FOLDER / 'rapid.py'}", *rest]
    is_timed = arguments.kind == "time-to-accuracy"
    given = _each_config(rest) if is_timed else given_config(rest)
    interrupted = _GOES_ON if is_timed or arguments.kind == "suite" else _INTERRUPTED
    with errors_as_lines(interrupted), stop_on_signals(interrupted):
        if is_timed:
            _time_to_accuracy(arguments, given)
            return
        from jepa_jax.config import validate

        validate(given.config)
        kinds = {"": _whole, "sweep": _sweep, "peer": _peer, "suite": _suite}
        kinds.get(arguments.kind, _measure_part)(arguments, given)


if __name__ == "__main__":
    with_huge_pages()
    with ends_at_once():
        main()
