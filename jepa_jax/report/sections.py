"""What a report says, in order: runs and pictures in, sections of words, tables and charts out.

Nothing here is HTML: every text is plain, and `page` escapes it.
"""

import dataclasses
import functools
import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jepa_jax.evaluation import HEALTH_NAMES, PROBE_NAMES
from jepa_jax.progress import duration
from jepa_jax.report import image_plots, plots
from jepa_jax.report.gather import Run, number, part
from jepa_jax.report.pictures import NUM_NEIGHBOURS, Pictures
from jepa_jax.train_step import PRED_LOSS
from jepa_jax.watch import loss_balance

FLOORS = {"untrained": "untrained", "pixels": "raw pixels", "chance": "chance"}
_SPLITS = {"test": "test", "val": "validation"}


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure: `name` of its PNG, a title, what it shows to who cannot see it, and a remark."""

    name: str
    title: str
    alt: str
    draw: plots.Draw
    remark: str = ""
    is_wide: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell: text, a smaller note below it, and 'good', 'bad', 'key' or ''."""

    text: str
    note: str = ""
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of cells; the first is the row's name, the others are numbers unless `is_text`."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    title: str = ""
    is_text: bool = False


@dataclasses.dataclass(frozen=True)
class Note:
    """A line of text; `is_missing` when it says what is not there, `command` what would help."""

    text: str
    command: str = ""
    after: str = ""
    is_missing: bool = False


Item = Chart | Table | Note


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it; tables side by side when `in_columns`."""

    id: str
    title: str
    items: Sequence[Item]
    in_columns: bool = False


@dataclasses.dataclass(frozen=True)
class Headline:
    """The number that a run stands for.

    Attributes:
      value, interval: '58.1' (in %) and '± 1.0'; the interval empty where none is known.
      what: which probe, on which images.
      verdict: how far above its floors, and whether that is beyond chance; '' without floors.
    """

    value: str
    interval: str
    what: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """A short fact about a run's health; `kind` is 'good', 'bad' or ''."""

    text: str
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole page."""

    title: str
    kicker: str
    facts: Sequence[str]
    headline: Headline | None
    chips: Sequence[Chip]
    floors: Chart | None
    sections: Sequence[Section]


def _value(score: Any, key: str = "acc") -> float:
    """A number of a score; NaN where there is no score or no such number in it."""
    return number(score.get(key)) if type(score) is dict else math.nan


def _has(score: Any) -> bool:
    return math.isfinite(_value(score))


def _percent(score: Any) -> str:
    return f"{100 * _value(score):.1f}" if _has(score) else "–"


def _interval(score: Any) -> str:
    """'57.1 – 59.0', or nothing."""
    low, high = _value(score, "low"), _value(score, "high")
    return _together(f"{100 * low:.1f} – {100 * high:.1f}") if math.isfinite(high - low) else ""


def _together(text: str) -> str:
    """The text with spaces at which no line breaks."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _spoken(probe: str) -> str:
    """'linear probe (logistic)' of 'linear, logistic'."""
    kind, _, how = PROBE_NAMES.get(probe, probe).partition(", ")
    return f"{kind} probe ({how})" if how else kind


def main_score(run: Run) -> tuple[str, str, dict[str, Any]] | None:
    """(probe, split, score) of a run's headline: the best known probe, on test if it can be."""
    for probe in PROBE_NAMES:
        encoder = part(run.probes.get(probe), "encoder")
        for split in _SPLITS:
            if _has(encoder.get(split)):
                return probe, split, encoder[split]
    return None


def floors_of(run: Run, probe: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, score) of the floors that a probe has."""
    row = part(run.probes, probe)
    scores = [(text, part(row, name).get(split)) for name, text in FLOORS.items()]
    return [(text, score) for text, score in scores if _has(score)]


def above_floors(
    score: dict[str, Any], floors: Sequence[tuple[str, dict]]
) -> tuple[float, bool | None]:
    """(points above the highest floor, whether the two 95 % intervals are apart or, without any,
    None)."""
    _, highest = max(floors, key=lambda floor: floor[1]["acc"])
    low, high = _value(score, "low"), _value(highest, "high")
    is_apart = low > high if math.isfinite(low - high) else None
    return 100 * (_value(score) - _value(highest)), is_apart


def _gain(score: Any, floors: Sequence[tuple[str, Any]]) -> Cell:
    """How far above its floors, with a tick or a cross where intervals say so."""
    known = [(name, floor) for name, floor in floors if _has(floor)]
    # Chance alone, the online probe's, is not a floor to be proud of.
    if not _has(score) or all(name in ("chance", FLOORS["chance"]) for name, _ in known):
        return Cell("–")
    points, is_apart = above_floors(score, known)
    mark, kind = {None: ("", ""), True: ("✓ ", "good"), False: ("✗ ", "bad")}[is_apart]
    return Cell(f"{mark}{points:+.1f}".replace("-", "−"), kind=kind)


def headline_of(run: Run) -> Headline | None:
    """The number, what it is and what it stands above; None for a run without a probe."""
    found = main_score(run)
    if found is None:
        return None
    probe, split, score = found
    floors = floors_of(run, probe, split)
    count = f", {score['count']:,} images" if type(score.get("count")) is int else ""
    low, high = (number(score.get(key)) for key in ("low", "high"))
    interval = f"± {50 * (high - low):.1f}" if math.isfinite(high - low) else ""
    what = f"{_SPLITS[split]} accuracy, {_spoken(probe)}{count}"
    what = what[:1].upper() + what[1:]
    verdict = ""
    if floors:
        points, is_apart = above_floors(score, floors)
        name, _ = max(floors, key=lambda floor: floor[1]["acc"])
        side = f"{points:.1f} points above" if points >= 0 else f"{-points:.1f} points below"
        verdict = f"{side} its highest floor, {name}"
        if is_apart is False:
            verdict += ": the 95 % intervals overlap, which proves nothing"
    return Headline(_percent(score), interval, what, verdict)


def floors_chart(run: Run) -> Chart | None:
    """The headline beside its floors, with intervals."""
    found = main_score(run)
    floors = floors_of(run, *found[:2]) if found else []
    if not floors:
        return None
    scores = [("this run", found[2]), *floors]
    spoken = ", ".join(f"{name} {_percent(score)} %" for name, score in scores)
    return Chart(
        "floors",
        "Above its floors?",
        f"Accuracies with 95 % intervals: {spoken}.",
        functools.partial(plots.floors, scores),
    )


def chips_of(run: Run) -> list[Chip]:
    """What a person wants to know of a run's health at once."""
    chips = []
    kinds = [row.get("watch/collapse") for row in run.rows if "watch/collapse" in row]
    if any(kinds):
        epochs = [row.get("epoch") for row in run.rows if row.get("watch/collapse")]
        kind = next(filter(None, kinds))
        chips.append(Chip(f"collapse ({kind}) from epoch {epochs[0]}", "bad"))
    elif kinds:
        chips.append(Chip("no collapse seen", "good"))
    for space, health in run.health().items():
        rank, dim = number(health.get("rank_me")), number(health.get("dim"))
        if math.isfinite(rank):
            of = f" of {dim:.0f}" if math.isfinite(dim) else ""
            chips.append(Chip(f"RankMe of {space} {rank:.0f}{of}"))
        dead = number(health.get("dead_fraction"))
        if dead > 0:
            text = f"{100 * dead:.1f} % of the dimensions of {space} are dead"
            chips.append(Chip(text, "bad" if dead > 0.1 else ""))
    dead = [number(health.get("dead_fraction")) for health in run.health().values()]
    if dead and max(dead) == 0:
        chips.append(Chip("no dead dimension", "good"))
    return chips


# --- probes -------------------------------------------------------------------------------------


def probes_section(run: Run) -> Section:
    """All probes and floors as a table, and why online and offline disagree."""
    items: list[Item] = []
    found = {name: run.probes[name] for name in run.probes if part(run.probes, name)}
    if any(_has(part(row, "encoder").get(s)) for row in found.values() for s in _SPLITS):
        items.append(_probe_table(found))
    if gap := _gap(run):
        items.append(Note(gap))
    if not items:
        items.append(_missing(run, "no probe has judged this run", "judges its encoder"))
    elif "linear" not in found:
        items.append(
            _missing(
                run,
                "more than the short evaluation at the end of the run",
                "adds logistic regression, nearest neighbours, few labels, raw pixels and "
                "accuracies by class",
            )
        )
    return Section("probes", "Probes and floors", items)


def _probe_table(found: dict[str, dict[str, Any]]) -> Table:
    order = [
        *(name for name in PROBE_NAMES if name in found),
        *(n for n in found if n not in PROBE_NAMES),
    ]
    has_test = any(_has(part(row, "encoder").get("test")) for row in found.values())
    main = "test" if has_test else "val"
    columns = [
        name for name in FLOORS if any(_has(part(r, name).get(main)) for r in found.values())
    ]
    head = ["accuracy, %"] + [_SPLITS[split] for split in _SPLITS if has_test or split == "val"]
    head += [FLOORS[name] for name in columns] + ["above floors"]
    rows = []
    for name in order:
        row, encoder = found[name], part(found[name], "encoder")
        cells: list[Cell | str] = [Cell(PROBE_NAMES.get(name, name), kind="key")]
        for split in head[1 : 2 + has_test]:
            score = encoder.get("val" if split == "validation" else split)
            cells.append(Cell(_percent(score), _interval(score)))
        floors = [(name, part(row, name).get(main)) for name in columns]
        cells += [_percent(score) for _, score in floors]
        rows.append([*cells, _gain(encoder.get(main), floors)])
    return Table(head, rows)


def _gap(run: Run) -> str:
    """Why the online and the offline probe disagree; measured shares where there are any."""
    explained = run.evaluation.get("online_gap")
    if type(explained) is str and explained:
        return explained[:1].upper() + explained[1:] + "."
    for split, text in _SPLITS.items():
        scores = {name: part(run.probes.get(name), "encoder").get(split) for name in PROBE_NAMES}
        offline = next((name for name in ("linear", "ridge") if _has(scores[name])), None)
        if offline and _has(scores["online"]):
            return (
                f"On {text} images the online probe is at {_percent(scores['online'])} % and the "
                f"offline {_spoken(offline)} at {_percent(scores[offline])} %. The online one "
                "followed moving features of augmented views and reads BatchNorm's running "
                "statistics; the offline one is fitted to the finished features of clean images."
            )
    return ""


def _missing(run: Run, what: str, gives: str) -> Note:
    """What is not there and, where the command could give it, the command."""
    if not run.has_encoder and not (run.workdir / "checkpoints").is_dir():
        return Note(f"Not here: {what}, and there is no encoder to judge yet.", is_missing=True)
    name = run.config.get("data.dataset")
    given = ["encoder"] if "encoder" in run.custom else []
    given += ["dataset"] if part(run.stored, "dataset").get("name", name) != name else []
    if given:
        options = ", ".join(f"{option}=..." for option in given)
        text = f"Not here: {what}. The run was given its {' and '.join(given)} in Python, where "
        return Note(text, f"evaluate_run(workdir, {options})", gives, is_missing=True)
    command = f"python -m jepa_jax.evaluate --workdir={shlex.quote(str(run.workdir))}"
    command += "" if name else " --dataset=cifar10"
    return Note(f"Not here: {what}. ", command, gives, is_missing=True)


# --- curves -------------------------------------------------------------------------------------


def training_section(run: Run) -> Section:
    """Loss by term, rate, gradients, probe curves, throughput and where the time went."""
    items: list[Item] = []
    if run.series("train/loss"):
        items.append(
            Chart(
                "loss",
                "Loss by term",
                f"The loss and its terms over the epochs. {_equation(run)}",
                functools.partial(plots.loss, run),
                " ".join(filter(None, (_equation(run), _balance(run)))),
            )
        )
    if any(run.series(f"watch/grad_norm/{term}") for term in run.terms()) or any(
        value > 0 for value in run.series("train/grad_norm")
    ):
        items.append(
            Chart(
                "gradients",
                "Gradient by term",
                f"Gradient norms over the epochs, by loss term. {_pull(run)}",
                functools.partial(plots.gradients, run),
                _pull(run),
            )
        )
    if run.series("val/online_probe_acc") or run.series("train/probe_acc"):
        items.append(_probe_chart(run))
    if run.series("train/lr"):
        rates = run.series("train/lr")
        highest = int(np.nanargmax(rates))
        remark = f"Highest in epoch {run.epochs()[highest]:g}: {rates[highest]:.3g}."
        alt = f"The learning rate over the epochs. {remark}"
        draw = functools.partial(plots.learning_rate, run)
        items.append(Chart("learning_rate", "Learning rate", alt, draw, remark))
    if run.series("images_per_second"):
        speeds = [value for value in run.series("images_per_second") if math.isfinite(value)]
        num_views = run.config.get("data.num_views", 2)
        crops = run.config.get("data.num_local_crops", 0)
        of_crops = f" and {crops} local crops" if crops else ""
        remark = (
            f"Median {np.median(speeds):,.0f} images/s, each image in {num_views} views{of_crops}."
        )
        draw = functools.partial(plots.throughput, run)
        items.append(Chart("throughput", "Throughput", f"By epoch. {remark}", draw, remark))
    if seconds := run.seconds():
        spoken = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        draw = functools.partial(plots.time_spent, run)
        title, alt = "Where the time went", f"One bar: {spoken}."
        items.append(Chart("time", title, alt, draw))
    if not run.rows:
        what = "metrics.jsonl has no row: these are imported weights"
        if "imported" not in run.stored:
            what = "metrics.jsonl has no row: the first epoch is not over"
        items.append(Note(f"Not here: {what}.", is_missing=True))
    elif not run.summary:
        text = "This run is not finished: the curves end with its last whole epoch."
        items.insert(0, Note(text, is_missing=True))
    return Section("training", "Training", items)


def _probe_chart(run: Run) -> Chart:
    offline, found = None, main_score(run)
    if found and found[0] in ("linear", "ridge"):
        offline = ("offline", number(found[2]["acc"]))
    spoken = [
        f"{name} {100 * value:.1f} %"
        for name, value in (
            ("validation", run.last("val/online_probe_acc")),
            ("test", run.last("test/online_probe_acc")),
        )
        if value is not None
    ]
    remark = ""
    if offline:
        remark = f"Dotted: the finished run, {_spoken(found[0])}, {_SPLITS[found[1]]} images."
    return Chart(
        "probes",
        "Online probe",
        f"Accuracy of the online probe over the epochs; at the end {', '.join(spoken)}.",
        functools.partial(plots.probe_curves, run, offline),
        remark,
    )


def _equation(run: Run) -> str:
    """'Last epoch: 1.24 = 1 × 0.301 invariance + ...', which a reader can check."""
    weights, terms = run.weights(), run.terms()
    total = run.last("train/loss")
    if total is None or not terms or not weights:
        return ""
    parts = [
        f"{weights[term]:g} × {run.last(f'train/{term}'):.3g} {plots.term_name(term)}"
        for term in terms
        if term in weights
    ]
    return f"Last epoch: {total:.3g} = {' + '.join(parts)}."


def _balance(run: Run) -> str:
    """What is odd about the weights, against VICReg's paper; '' if nothing is."""
    if run.config.get("loss.type") != "vicreg" or run.config.get("model.mask") == "blocks":
        return ""
    weights = run.weights()
    num_dims = number(run.evaluation.get("embedding_dim"))
    if not math.isfinite(num_dims):
        num_dims = number(run.config.get("model.proj_output_dim"))
    if not weights or not num_dims > 1:
        return ""
    pull = weights.pop(PRED_LOSS, 0.0)
    sim, std, cov = weights.values()
    _, warning = loss_balance(int(num_dims), sim_coeff=sim + pull, std_coeff=std, cov_coeff=cov)
    return f"{warning[:1].upper()}{warning[1:]}." if warning else ""


def _pull(run: Run) -> str:
    """Which weighted term moves the encoder most, in the last epoch."""
    norms = {term: run.last(f"watch/grad_norm/{term}") for term in run.terms()}
    known = sorted(
        ((value, plots.term_name(term)) for term, value in norms.items() if value is not None),
        reverse=True,
    )
    if not known:
        return "Of all terms together, over all parameters; this run did not watch single terms."
    named = ", ".join(f"{name} {value:.2g}" for value, name in known)
    return f"Pull on the encoder in the last epoch, strongest first: {named}."


# --- representation -----------------------------------------------------------------------------


def representation_section(run: Run) -> Section:
    """Has it collapsed? Rank and spread over the epochs, the spectrum, a table of health."""
    items: list[Item] = []
    spaces = ("h", "z")
    if any(run.series(f"watch/{space}_rank_me") for space in spaces):
        alt = f"RankMe over the epochs. {_fall(run)}"
        draw = functools.partial(plots.rank, run)
        items.append(Chart("rank", "RankMe", alt, draw, _fall(run)))
    if any(run.series(f"watch/{space}_std_mean") for space in spaces):
        remark = "Solid: mean of the dimensions; dashed: the least of them."
        draw = functools.partial(plots.spread, run)
        alt = f"Standard deviation of the features over the epochs. {remark}"
        items.append(Chart("spread", "Spread", alt, draw, remark))
    watched = any(plots.spectra(run, space) for space in spaces)
    if watched or any(plots.final_spectrum(run, "encoder", space) for space in spaces):
        remark = "A line that drops early is a representation that uses few of its directions."
        if any(plots.final_spectrum(run, "untrained", space) for space in spaces):
            remark += " Dashed: the untrained network."
        draw = functools.partial(plots.spectrum, run)
        alt = f"Covariance eigenvalues of h and z by rank, log-log. {remark}"
        title = "Covariance spectrum over the epochs" if watched else "Covariance spectrum"
        items.append(Chart("spectrum", title, alt, draw, remark, is_wide=True))
    if table := _health_table(run):
        items.append(table)
    if run.rows and not any(isinstance(i, Chart) and i.name == "rank" for i in items):
        text = "Not here: RankMe and spread over the epochs; this run's version did not watch them."
        items.append(Note(text, is_missing=True))
    if not part(run.evaluation, "health"):
        items.append(_missing(run, "health of h and z", "measures it"))
    return Section("representation", "Representation", items)


def _fall(run: Run) -> str:
    ranks = run.series("watch/h_rank_me")
    if not ranks:
        return ""
    best = int(np.nanargmax(ranks))
    last, epoch = run.last("watch/h_rank_me"), run.epochs()[best]
    if last < 0.7 * ranks[best]:
        return f"RankMe of h fell from {ranks[best]:.0f} in epoch {epoch:g} to {last:.0f}."
    return "h: what the probes read; z: what the loss sees."


def _health_table(run: Run) -> Table | None:
    health = part(run.evaluation, "health")
    columns = [
        (f"{space}, {'this run' if network == 'encoder' else network}", part(figures, space))
        for space in ("h", "z")
        for network, figures in health.items()
        if part(figures, space)
    ]
    if not columns:
        return None
    rows = []
    for key, text in HEALTH_NAMES.items():
        values = [number(figures.get(key)) for _, figures in columns]
        if any(map(math.isfinite, values)):
            rows.append([Cell(text, kind="key"), *(_health_number(key, v) for v in values)])
    return Table(["", *(title for title, _ in columns)], rows, "Health at the end")


def _health_number(key: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if key == "dead_fraction":
        return f"{100 * value:.1f} %"
    digits = 0 if key == "dim" else 1 if "rank" in key else 3
    return f"{value:,.{digits}f}".replace("-", "−")


# --- images -------------------------------------------------------------------------------------


def images_section(run: Run, pictures: Pictures) -> Section:
    """Augmented pairs, nearest neighbours, the map and the confusion matrix."""
    items: list[Item] = []
    missing = dict(pictures.missing)
    if len(set(missing.values())) == 1 and len(missing) == 3:
        reason = next(iter(missing.values()))
        items.append(Note(f"Not here: pairs, neighbours and map; {reason}.", is_missing=True))
        missing = {}
    if pictures.pairs is not None:
        items.append(
            Chart(
                "pairs",
                "What the network is asked to see as one",
                f"{len(pictures.pairs[0])} training images with two augmented views of each.",
                functools.partial(image_plots.pairs, pictures.pairs),
                "Training images as they are, and two augmented views of each: a pair.",
                is_wide=True,
            )
        )
    if pictures.neighbours is not None:
        items.append(_neighbours_chart(pictures))
    if pictures.map is not None:
        count, names = len(pictures.map.labels), pictures.label_names
        draw = functools.partial(image_plots.map_of, pictures.map, names)
        title = f"Map of the {pictures.split} set"
        remark = (
            f"t-SNE of {count:,} images after PCA to 50 dimensions. Names stand at the medians. "
            "What is near is alike; the distance between far groups means nothing."
        )
        alt = f"t-SNE map of {count} {pictures.split} images, coloured by class."
        items.append(Chart("map", title, alt, draw, remark, is_wide=True))
    for name, text in (
        ("pairs", "augmented pairs"),
        ("neighbours", "nearest neighbours"),
        ("map", "the map"),
    ):
        if name in missing:
            items.append(Note(f"Not here: {text}; {missing[name]}.", is_missing=True))
    items.append(_confusion(run))
    return Section("images", "Images", items)


def _neighbours_chart(pictures: Pictures) -> Chart:
    found, names = pictures.neighbours, pictures.label_names
    remark = (
        f"{len(found.labels)} of {found.num_images:,} {pictures.split} images and the nearest by "
        "the cosine of h. "
    )
    if found.same_class is not None:
        remark += (
            "✓ same class, with its cosine; ✗ another class, with its name. Over the whole set "
            f"{100 * found.same_class:.0f} % of the {NUM_NEIGHBOURS} nearest have the class of "
            f"their query; {100 * found.by_chance:.0f} % would by chance."
        )
    spoken = []
    for row in found.labels:
        if row[0] >= 0:
            spoken.append(f"{names[row[0]]} {np.sum(row[1:] == row[0])} of {len(row) - 1}")
    alt = f"The nearest neighbours of {len(found.labels)} images."
    if spoken:
        alt += f" Of the same class: {', '.join(spoken)}."
    return Chart(
        "neighbours",
        "Nearest neighbours",
        alt,
        functools.partial(image_plots.neighbours, found, names),
        remark,
        is_wide=True,
    )


def _confusion(run: Run) -> Item:
    matrix = run.evaluation.get("confusion")
    if type(matrix) is not list or not matrix:
        return _missing(run, "the confusion matrix", "adds it")
    about = part(run.evaluation, "per_class")
    names = part(run.evaluation, "dataset").get("label_names") or range(len(matrix))
    names = tuple(map(str, names))
    percent = image_plots.row_percent(matrix)
    hits = np.diag(percent)
    worst = int(np.argmin(hits))
    mistakes = percent - np.diag(hits)
    true, predicted = np.unravel_index(int(np.argmax(mistakes)), mistakes.shape)
    split = _SPLITS.get(about.get("split"), str(about.get("split")))
    probe = _spoken(str(about.get("probe")))
    remark = (
        f"{probe[:1].upper()}{probe[1:]}, {split} images. Hardest: {names[worst]} "
        f"({hits[worst]:.0f} % right). Most common mistake: {names[true]} taken for "
        f"{names[predicted]} "
        f"({mistakes[true, predicted]:.0f} %)."
    )
    draw = functools.partial(image_plots.confusion, matrix, names)
    return Chart("confusion", "Confusion matrix", remark, draw, remark, is_wide=True)


# --- config, machine ----------------------------------------------------------------------------


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value in ("", None) else str(value)


def config_section(run: Run) -> Section:
    """Every key by group, those that differ from configs/rapid.py marked."""
    groups: dict[str, list[list[Cell]]] = {}
    differing = 0
    for key, value in run.config.items():
        group, _, name = key.partition(".")
        note = ""
        if run.rapid is not None and value != run.rapid.get(key):
            differing += 1
            note = f"rapid: {_shown(run.rapid[key])}" if key in run.rapid else "not in rapid"
        row = [
            Cell(name or group, kind="key"),
            Cell(_shown(value), note, "differs" if note else ""),
        ]
        groups.setdefault(group, []).append(row)
    items: list[Item] = [
        Table((), rows, title=group, is_text=True) for group, rows in sorted(groups.items())
    ]
    if not items:
        items = [Note("Not here: config.json.", is_missing=True)]
    elif run.rapid is None:
        text = "Not here: the difference to configs/rapid.py, which is not there."
        items.append(Note(text, is_missing=True))
    else:
        text = f"{differing} of {len(run.config)} keys differ from configs/rapid.py: marked"
        items.insert(0, Note(f"{text}, with rapid's value below."))
    return Section("config", "Config", items, in_columns=True)


def machine_section(run: Run) -> Section:
    """Hardware, versions, and what tells this run from another."""
    environment = part(run.stored, "environment")
    tables: list[Item] = []
    if environment:
        rows = [[Cell(name, kind="key"), _shown(value)] for name, value in environment.items()]
        tables.append(Table((), rows, "Machine", is_text=True))
    if evaluated := part(run.evaluation, "environment"):
        changed = {n: v for n, v in evaluated.items() if environment.get(n) != v}
        rows = [[Cell(name, kind="key"), _shown(value)] for name, value in changed.items()]
        if rows:
            tables.append(Table((), rows, "The evaluation's, where it differs", is_text=True))
    identity: dict[str, Any] = {"folder": str(run.workdir)}
    identity |= {n: run.summary[n] for n in ("seed", "steps", "epochs") if n in run.summary}
    identity |= {f"own {name}": thing for name, thing in run.custom.items()}
    if run.stored.get("init_from"):
        identity["started from"] = run.stored["init_from"]
    identity |= {f"imported {n}": v for n, v in part(run.stored, "imported").items() if v}
    if "params_digest" in run.summary:
        identity["parameters, SHA-256"] = run.summary["params_digest"]
    rows = [[Cell(name, kind="key"), _shown(value)] for name, value in identity.items()]
    tables.append(Table((), rows, "This run", is_text=True))
    if not environment:
        tables.append(
            Note("Not here: hardware and versions; config.json has none.", is_missing=True)
        )
    return Section("machine", "Hardware and versions", tables, in_columns=True)


# --- whole pages --------------------------------------------------------------------------------


def _facts(run: Run) -> list[str]:
    facts = [run.dataset_name]
    features = number(run.evaluation.get("feature_dim", run.summary.get("feature_dim")))
    if math.isfinite(features):
        facts.append(f"{features:.0f} features")
    epochs = run.last("epoch")
    if epochs:
        planned = number(run.config.get("optim.epochs"))
        of = f" of {planned:.3g}" if planned > 1.001 * epochs else ""
        facts.append(f"{epochs:.3g}{of} epoch{'s' if max(epochs, planned) != 1 else ''}")
    if seconds := run.seconds():
        facts.append(duration(sum(seconds.values())))
    facts.append(str(part(run.stored, "environment").get("device", "")))
    return [fact for fact in facts if fact]


def report_of(run: Run, pictures: Pictures) -> Report:
    """The page of one run."""
    return Report(
        title=run.name,
        kicker="jepa_jax run",
        facts=_facts(run),
        headline=headline_of(run),
        chips=chips_of(run),
        floors=floors_chart(run),
        sections=(
            probes_section(run),
            training_section(run),
            representation_section(run),
            images_section(run, pictures),
            config_section(run),
            machine_section(run),
        ),
    )


def comparison_of(runs: Sequence[Run]) -> Report:
    """The page of several runs: a table of figures, curves overlaid, the keys that differ."""
    sections = [Section("figures", "Figures", [_figures_table(runs)])]
    if any(run.series(key) for run in runs for key in plots.COMPARED):
        chart = Chart(
            "compared",
            "Curves",
            f"Curves over the epochs of {len(runs)} runs: {', '.join(run.name for run in runs)}.",
            functools.partial(plots.compared, runs),
            is_wide=True,
        )
        sections.append(Section("curves", "Over the epochs", [chart]))
    else:
        note = Note("Not here: curves; no run has a row in metrics.jsonl.", is_missing=True)
        sections.append(Section("curves", "Over the epochs", [note]))
    sections.append(Section("config", "Config keys that differ", [_differing_keys(runs)]))
    datasets = list(dict.fromkeys(run.dataset_name for run in runs if run.dataset_name))
    return Report(
        title=f"{len(runs)} runs",
        kicker="jepa_jax comparison",
        facts=datasets,
        headline=None,
        chips=(),
        floors=None,
        sections=sections,
    )


def _figures_table(runs: Sequence[Run]) -> Table:
    columns: dict[str, Callable[[Run], Cell]] = {
        _together(f"{name}, %"): functools.partial(_score_cell, probe=probe)
        for probe, name in (("linear", "logistic"), ("ridge", "ridge"), ("online", "online"))
    }
    columns |= {
        "above floors": _floors_cell,
        "RankMe of h": functools.partial(_rank_cell, space="h"),
        "RankMe of z": functools.partial(_rank_cell, space="z"),
        "time": _time_cell,
    }
    filled = {head: [cell(run) for run in runs] for head, cell in columns.items()}
    filled = {head: cells for head, cells in filled.items() if any(c.text != "–" for c in cells)}
    rows = []
    for place, run in enumerate(runs):
        epochs = run.last("epoch") or 0
        name = Cell(run.name, f"{epochs:.0f} epoch{'s' if epochs != 1 else ''}", "key")
        rows.append([name, *(cells[place] for cells in filled.values())])
    return Table(["run", *filled], rows)


def _score_cell(run: Run, *, probe: str) -> Cell:
    """Accuracy on test images, with its interval and that on validation images below."""
    scores = part(run.probes.get(probe), "encoder")
    shown = [
        (text, scores.get(split)) for split, text in _SPLITS.items() if _has(scores.get(split))
    ]
    if not shown:
        return Cell("–")
    (text, score), *others = shown
    half = (_value(score, "high") - _value(score, "low")) / 2
    notes = [f"± {100 * half:.1f}"] if math.isfinite(half) else []
    notes += [text] if text != "test" else []
    notes += [f"val {_percent(other)}" for _, other in others]
    return Cell(_percent(score), ", ".join(map(_together, notes)))


def _floors_cell(run: Run) -> Cell:
    found = main_score(run)
    floors = floors_of(run, *found[:2]) if found else []
    return _gain(found[2], floors) if found else Cell("–")


def _rank_cell(run: Run, *, space: str) -> Cell:
    health = run.health().get(space, {})
    value, dim = number(health.get("rank_me")), number(health.get("dim"))
    of = f"of {dim:.0f}" if math.isfinite(dim) else ""
    return Cell(f"{value:.0f}", of) if math.isfinite(value) else Cell("–")


def _time_cell(run: Run) -> Cell:
    seconds = run.seconds()
    speeds = [value for value in run.series("images_per_second") if math.isfinite(value)]
    speed = f"{np.median(speeds):,.0f} images/s" if speeds else ""
    return Cell(duration(sum(seconds.values())) if seconds else "–", speed)


def _differing_keys(runs: Sequence[Run]) -> Item:
    """Keys and runs as a table that is longer than wide."""
    values = {
        key: [_shown(run.config[key]) if key in run.config else "absent" for run in runs]
        for key in sorted({key for run in runs for key in run.config})
    }
    values = {key: row for key, row in values.items() if len(set(row)) > 1}
    if not values:
        return Note("The configs are the same, key for key.")
    names = [run.name for run in runs]
    if len(runs) > len(values):
        columns = zip(*values.values(), strict=True)
        rows = [[Cell(name, kind="key"), *row] for name, row in zip(names, columns, strict=True)]
        return Table(["run", *values], rows, is_text=True)
    rows = [[Cell(key, kind="key"), *row] for key, row in values.items()]
    return Table(["key", *names], rows, is_text=True)
