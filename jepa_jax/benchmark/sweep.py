"""The step over batch sizes and over embedding dimensions, each point a process of its own.

A process of its own, because peak memory is a figure of a process, and because one point that does
not fit must not spoil the next.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jepa_jax.benchmark.processes import MeasurementError, run_json
from jepa_jax.benchmark.table import NOT_MEASURED, Table, gigabytes, number, percent, with_range
from jepa_jax.config_flags import GivenConfig

BATCH_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192)
DIMS = (512, 1024, 2048, 4096, 8192)
_REFERENCE_BATCH = 512
# On a CPU a step that takes longer is not waited for.
_MOST_SECONDS = 60.0


def points(
    batch_sizes: Sequence[int] = BATCH_SIZES, dims: Sequence[int] = DIMS
) -> list[tuple[str, int]]:
    """('batch', size) and ('dim', D), in the order in which they are measured."""
    return [("batch", size) for size in batch_sizes] + [("dim", dim) for dim in dims]


def _changes(kind: str, value: int) -> dict[str, Any]:
    if kind == "batch":
        return {"data.batch_size": value}
    return {"model.proj_output_dim": value, "model.use_projector": True}


def measure_point(
    given: GivenConfig,
    kind: str,
    value: int,
    *,
    smallest: Mapping[str, Any] | None,
    arguments: Sequence[str] = (),
    timeout: float | None = None,
) -> dict[str, Any]:
    """One point: the figures of `--measure-step`, or why there are none.

    Args:
      given: the config that the point changes one key of.
      kind: 'batch' or 'dim'.
      value: the batch size, or D.
      smallest: the point of the smallest batch, from which a CPU's time is estimated.
      arguments: further ones of `--measure-step`.
      timeout: in seconds.

    Raises:
      MeasurementError: if it fails for another reason than memory.
    """
    row: dict[str, Any] = {"kind": kind, "value": value, "measured": None, "reason": ""}
    if smallest and smallest["measured"]:
        measured = smallest["measured"]
        batch = value if kind == "batch" else given.config.data.batch_size
        seconds = measured["step"]["step_seconds"]["median"] * batch
        seconds /= measured["step"]["batch_size"]
        if measured["environment"]["platform"] == "cpu" and seconds > _MOST_SECONDS:
            row["reason"] = f"{NOT_MEASURED}: estimated {seconds:.0f} s a step"
            return row
    flags = given.flags(**_changes(kind, value))
    command = ["-m", "jepa_jax.benchmark", "--measure-step", *arguments, *flags]
    try:
        row["measured"] = run_json(command, timeout=timeout)
    except MeasurementError as error:
        if not error.is_out_of_memory:
            raise
        row["reason"] = f"does not fit: {error}"
    return row


def sweep_tables(
    rows: Sequence[Mapping[str, Any]], matmul: Mapping[str, Any] | None
) -> list[Table]:
    """A table over batch sizes and one over D.

    Args:
      rows: of `measure_point`.
      matmul: the rates of `measure_rates` by dtype.
    """
    titles = {"batch": "Batch size", "dim": "Embedding dimension D"}
    return [
        _table(title, [row for row in rows if row["kind"] == kind], kind, matmul)
        for kind, title in titles.items()
    ]


def _table(title, rows, kind, matmul) -> Table:
    times = {
        row["value"]: row["measured"]["step"]["step_seconds"]["median"]
        / row["measured"]["step"]["batch_size"]
        for row in rows
        if row["measured"]
    }
    reference = times.get(_REFERENCE_BATCH)
    cells, notes = [], []
    for row in rows:
        if not row["measured"]:
            cells.append([str(row["value"]), *[NOT_MEASURED] * 5])
            notes.append(f"{row['value']}: {row['reason']}")
            continue
        step = row["measured"]["step"]
        relative = share = None
        if reference and kind == "batch":
            relative = times[row["value"]] / reference
        if matmul:
            rate = matmul[step["dtype"]]["flops_per_second"]["median"]
            share = step["model_flops_per_second"] / rate
        memory = step["memory"]
        peak = memory["device_peak_bytes"] or memory["host_peak_bytes"]
        cells.append(
            [
                str(row["value"]),
                with_range(step["step_seconds"], 1e3),
                with_range(step["images_per_second"]),
                "-" if kind == "dim" else number(relative),
                percent(share),
                gigabytes(peak),
            ]
        )
    header = (title, "step, ms", "images/s", f"per image, {_REFERENCE_BATCH} = 1", "of matmul")
    return Table(f"Over {title}", (*header, "peak memory"), cells, "; ".join(notes))


def run_sweep(given: GivenConfig, arguments: Sequence[str] = (), on_point=lambda row: None):
    """(rates, rows): the device's rates, and every point.

    Args:
      given: the config.
      arguments: further ones of `--measure-step`.
      on_point: called with each row as it is there.
    """
    rates = run_json(["-m", "jepa_jax.benchmark", "--measure-rates", *given.flags()])
    rows: list[dict[str, Any]] = []
    for kind, value in points():
        try:
            smallest = rows[0] if rows else None
            row = measure_point(given, kind, value, smallest=smallest, arguments=arguments)
        except MeasurementError as error:
            row = {"kind": kind, "value": value, "measured": None, "reason": str(error)}
        rows.append(row)
        on_point(row)
    return rates, rows
