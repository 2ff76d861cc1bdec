"""The command: python -m jepa_jax.main --config=configs/rapid.py --config.optim.lr=0.707

Flags in, one call of `train_and_evaluate`; every error a person can act on is one line on stderr
and a non-zero exit.
"""

import os
import pathlib
import re
import time
from collections.abc import Sequence

from absl import app, flags

from jepa_jax import config_flags
from jepa_jax.command import ends_at_once, errors_as_lines, with_huge_pages
from jepa_jax.errors import ConfigError

_WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "The run's folder. By default config.meta.model_folder, else a folder named after the config "
    "and the overrides, in $EBJEPA_CKPTS or runs/.",
)
_REPORT = flags.DEFINE_bool("report", True, "Whether to write report.html at the end.")
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Whether to write a trace of a few steps to WORKDIR/profile."
)
_BUDGET = flags.DEFINE_string(
    "budget",
    "",
    "Time for all of it up to the summary, as 90s, 10m or 1h30m: chooses config.optim.epochs.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Of several processes: address and free port of process 0, as host:1234."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_INIT_FROM = flags.DEFINE_string("init_from", "", "Another run's folder, to start from.")


def _parse(argv: Sequence[str]) -> list[str]:
    # As `jepa-jax` the flags are not of the module that runs: --help would show none of them.
    for flag in flags.FLAGS.flags_by_module_dict().get(__name__, []):
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    return config_flags.parse(argv, flags.FLAGS)


def _default_workdir(given: config_flags.GivenConfig) -> pathlib.Path:
    """A folder of its own for every set of overrides, so that two experiments do not collide."""
    if given.config.meta.model_folder:
        return pathlib.Path(given.config.meta.model_folder)
    name = given.name
    for key, value in sorted(given.overrides.items()):
        if not key.startswith(("logging.", "meta.device")):
            name += f",{key}={value}"
    if _BUDGET.value:
        name += f",budget={_BUDGET.value}"
    name = re.sub(r"[^\w.,=+-]", "", name)
    return pathlib.Path(os.environ.get("EBJEPA_CKPTS", "runs")) / name


def _main(argv: Sequence[str]) -> None:
    del argv
    began = time.perf_counter()
    given = config_flags.parsed_config(flags.FLAGS)
    config = given.config
    with errors_as_lines("interrupted; the same command goes on from the last checkpoint"):
        from jepa_jax import device, distributed
        from jepa_jax.config import validate
        from jepa_jax.paths import home_expanded
        from jepa_jax.train import train_and_evaluate

        validate(config)
        device.prepare(config.meta.device)
        distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        device.check(config.meta.device)
        with distributed.one_of_many():
            config_flags.fit_to_device(given)
            workdir = home_expanded(_WORKDIR.value or _default_workdir(given))
            dataset = None
            if _BUDGET.value:
                config, dataset = _fitted(given, workdir, began)
            train_and_evaluate(
                config,
                workdir,
                dataset=dataset,
                init_from=_INIT_FROM.value,
                profile=_PROFILE.value,
            )
            if _REPORT.value:
                distributed.on_main(lambda: _write_report(workdir))


def _fitted(given: config_flags.GivenConfig, workdir: pathlib.Path, began: float):
    """The config for --budget, and the dataset that was read to measure its pace."""
    import jax

    from jepa_jax.pace import fit_to_budget
    from jepa_jax.progress import seconds_of

    seconds = seconds_of(_BUDGET.value)
    if "optim.epochs" in given.overrides:
        raise ConfigError("--budget chooses config.optim.epochs: give one of them")
    if jax.process_count() > 1:
        raise ConfigError("--budget is for one process: of several, give config.optim.epochs")
    spent = time.perf_counter() - began
    return fit_to_budget(given.config, workdir, seconds, spent=spent, init_from=_INIT_FROM.value)


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


def main() -> None:
    """The command `jepa-jax`, and `python -m jepa_jax.main`."""
    with_huge_pages()
    with ends_at_once():
        app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
    main()
