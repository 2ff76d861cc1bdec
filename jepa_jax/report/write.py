"""From folders to files: gathers, draws every figure in both themes, writes the page at once."""

import os
import pathlib
import uuid
from collections.abc import Iterator, Sequence

import jepa_jax
from jepa_jax.data import Dataset
from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.paths import home_expanded
from jepa_jax.report.gather import read_runs
from jepa_jax.report.page import html_of
from jepa_jax.report.pictures import take_pictures
from jepa_jax.report.plots import render
from jepa_jax.report.sections import Chart, Report, comparison_of, report_of
from jepa_jax.report.sweep_page import holds_sweep, read_sweep, sweep_report
from jepa_jax.report.theme import DARK, LIGHT

_PAGE, _FIGURES = "report.html", "report"


def write(
    workdirs: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None,
    dataset: Dataset | None,
) -> pathlib.Path:
    """See `jepa_jax.report.write_report`."""
    if not workdirs:
        raise ConfigError("give the folder of at least one run")
    first = home_expanded(workdirs[0]).absolute()
    if len(workdirs) == 1 and holds_sweep(first):
        folder, report = first, sweep_report(read_sweep(first))
    elif len(runs := read_runs(workdirs)) == 1:
        folder = runs[0].workdir
        report = report_of(runs[0], take_pictures(runs[0], dataset))
    else:
        folder = pathlib.Path(os.environ.get("EBJEPA_CKPTS", "runs")) / "comparison"
        report = comparison_of(runs)
    folder = home_expanded(folder if out is None else out).absolute()
    charts = list(_charts(report))
    drawn = {c.name: (render(c.draw, LIGHT), render(c.draw, DARK)) for c in charts}
    pngs = {f"{c.name}.png": render(c.draw, LIGHT, "png") for c in charts}
    footer = [
        f"Written by jepa_jax {jepa_jax.__version__}. Figures as PNG: {folder / _FIGURES}",
        "Accuracies are in % with 95 % intervals; test images are shown, never chosen on.",
    ]
    page = html_of(report, drawn, footer=footer)
    try:
        _replace(folder, page.encode(), pngs)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{folder / _PAGE} cannot be written: {reason}") from error
    return folder / _PAGE


def _charts(report: Report) -> Iterator[Chart]:
    if report.floors is not None:
        yield report.floors
    for section in report.sections:
        yield from (item for item in section.items if isinstance(item, Chart))


def _replace(folder: pathlib.Path, page: bytes, pngs: dict[str, bytes]) -> None:
    """Puts every file in its place at once, the page last, and takes away PNGs of an older page."""
    figures = folder / _FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    files = {**{figures / name: content for name, content in pngs.items()}, folder / _PAGE: page}
    for leftover in folder.glob(f".{_PAGE}.*.partial"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    partial = folder / f".{_PAGE}.{uuid.uuid4().hex[:8]}.partial"
    try:
        for path, content in files.items():
            partial.write_bytes(content)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    for path in figures.glob("*.png"):
        if path.name not in pngs:
            path.unlink(missing_ok=True)
