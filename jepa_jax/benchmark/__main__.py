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

from jepa_jax.command import Parser, errors_as_lines, with_huge_pages
from jepa_jax.config_flags import GivenConfig, fit_to_device, given_config
from jepa_jax.errors import ConfigError
from jepa_jax.metrics import write_json
from jepa_jax.progress import say
from jepa_jax.signals import stop_on_signals

_DESCRIPTION = """\
How fast a config trains on this machine, where the time goes, and how far that is from what the
machine can do. --config=FILE and --config.KEY=VALUE are those of jepa_jax.main; the default is
configs/cpu.py, and configs/rapid.py for --suite. docs/performance.md says how to read the tables.
"""
_INTERRUPTED = "interrupted; the same --suite command goes on, of the rest nothing was kept"


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    prog = "python -m jepa_jax.benchmark"
    parser = Parser(prog=prog, description=_DESCRIPTION, allow_abbrev=False)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sweep", action="store_true", help="over batch sizes and over D")
    kind.add_argument("--peer", choices=["torch"], help="beside the same recipe in PyTorch")
    kind.add_argument("--suite", action="store_true", help="everything, in resumable pieces")
    kind.add_argument("--measure-step", action="store_true", help="the step as one line of JSON")
    kind.add_argument("--measure-rates", action="store_true", help="the device, likewise")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; of --suite, a folder")
    parser.add_argument("--no-startup", action="store_true", help="start no processes of main")
    parser.add_argument("--peer-python", default=sys.executable, help="one that has PyTorch")
    parser.add_argument("--minutes", type=float, help="--suite begins nothing that may take longer")
    parser.add_argument("--miniature", action="store_true", help="sizes that only test the code")
    parser.add_argument("--images", type=int, default=50_000, help="synthetic ones to train on")
    parser.add_argument("--repeats", type=int, default=5, help="values of --measure-step")
    parser.add_argument(
        "--augment", choices=["device", "none"], default="device", help="of --measure-step"
    )
    arguments, rest = parser.parse_known_args(argv)
    if arguments.suite and not arguments.out:
        parser.error("--suite needs --out DIR")
    if min(arguments.images, arguments.repeats) < 1:
        parser.error("--images and --repeats must be at least 1")
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error("--minutes must be above 0")
    return arguments, rest


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


def _measure_step(arguments: argparse.Namespace, given: GivenConfig) -> None:
    from jepa_jax import device
    from jepa_jax.benchmark import measure, step

    device.select(given.config.meta.device)
    fit_to_device(given)
    plan = step.synthetic_plan(given.config, num_images=arguments.images, augment=arguments.augment)
    figures = step.measure_step(plan, repeats=arguments.repeats)
    content = measure.document("one step", environment=measure.environment(), step=figures)
    print(json.dumps(content))


def _measure_rates(arguments: argparse.Namespace, given: GivenConfig) -> None:
    from jepa_jax import device
    from jepa_jax.benchmark import measure
    from jepa_jax.benchmark.rates import measure_rates

    device.select(given.config.meta.device)
    rates = measure_rates(is_miniature=arguments.miniature)
    content = measure.document("rates", environment=measure.environment(), rates=rates)
    print(json.dumps(content))


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
        given, arguments.out, minutes=arguments.minutes, is_miniature=arguments.miniature
    )
    if code:
        sys.exit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    arguments, rest = _parse(argv)
    if arguments.suite and not any(flag.startswith("--config=") for flag in rest):
        from jepa_jax.benchmark.processes import ROOT

        rest = [f"--config={ROOT / 'configs' / 'rapid.py'}", *rest]
    given = given_config(rest)
    with errors_as_lines(_INTERRUPTED), stop_on_signals(_INTERRUPTED):
        from jepa_jax.config import validate

        validate(given.config)
        for is_asked, run in (
            (arguments.measure_step, _measure_step),
            (arguments.measure_rates, _measure_rates),
            (arguments.sweep, _sweep),
            (arguments.peer, _peer),
            (arguments.suite, _suite),
            (True, _whole),
        ):
            if is_asked:
                run(arguments, given)
                return


if __name__ == "__main__":
    with_huge_pages()
    main()
