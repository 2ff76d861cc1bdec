"""The report: one file that asks no host for anything, says what is missing, and is true."""

import base64
import dataclasses
import functools
import html.parser
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jepa_jax import load_encoder, train
from jepa_jax.data import from_arrays
from jepa_jax.errors import CheckpointError, ConfigError, DataError
from jepa_jax.report import gather, image_plots, pictures, plots, sections, theme, write_report
from jepa_jax.report import write as writer
from jepa_jax.report.__main__ import main

FIGURES = {
    "floors",
    "loss",
    "gradients",
    "probes",
    "learning_rate",
    "throughput",
    "time",
    "rank",
    "spread",
    "spectrum",
    "pairs",
    "neighbours",
    "map",
    "confusion",
}
SECTIONS = ["probes", "training", "representation", "images", "config", "machine"]
SVG = "{http://www.w3.org/2000/svg}"


class Page(html.parser.HTMLParser):
    """Tags, the text of every element with an id or a class, and the figures of a page."""

    VOID = {"meta", "link", "img", "source", "wbr"}

    def __init__(self, path):
        super().__init__()
        self.path, self.source = path, path.read_text()
        self.tags, self.open, self.words = [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join("".join(self.words).replace("\xa0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.words.append(" ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.words.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def figures(self):
        return [attrs["id"].removeprefix("figure-") for attrs in self.all("figure")]

    def svgs(self, name):
        """(light, dark) of a figure, as text."""
        place = self.figures.index(name)
        urls = self.all("img")[place]["src"], self.all("source")[place]["srcset"]
        assert self.all("source")[place]["media"] == "(prefers-color-scheme: dark)"
        head = "data:image/svg+xml;base64,"
        assert all(url.startswith(head) for url in urls)
        return tuple(base64.b64decode(url.removeprefix(head)).decode() for url in urls)


@pytest.fixture(scope="module")
def finished(tiny_config, small_cifar, tmp_path_factory):
    """A finished run of three epochs, its files as this version writes them."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train.train_and_evaluate(tiny_config, folder, dataset=small_cifar)
    return folder


def score(acc, count=200):
    half = 1.96 * np.sqrt(acc * (1 - acc) / count)
    return {"acc": acc, "low": acc - half, "high": acc + half, "count": count}


def full_evaluation(names):
    """An evaluation.json with everything that the command can write."""
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 9, (10, 10)) + 11 * np.eye(10, dtype=int)

    def row(acc, *floors):
        kinds = dict(zip(("untrained", "pixels", "chance"), floors, strict=True))
        kinds = {kind: {"val": score(a, 80), "test": score(a)} for kind, a in kinds.items()}
        return {
            "encoder": {"val": score(acc - 0.01, 80), "test": score(acc), "lambda": 1.0}
        } | kinds

    def health(dim, rank):
        spectrum = (np.arange(1, dim + 1) ** -1.5).tolist()
        return {
            "dim": dim,
            "num_images": 200,
            "rank_me": rank,
            "dead_fraction": 0.0,
            "std_min": 0.1,
            "std_mean": 0.5,
            "spectrum": spectrum,
        }

    both = {"h": health(8, 5.5), "z": health(8, 6.5)}
    online = {"encoder": {"val": score(0.2, 80), "test": score(0.21)}, "untrained": None}
    return {
        "schema_version": 1,
        "checkpoint": {"which": "latest", "step": 12},
        "dataset": {"name": "arrays", "num_test": 200, "label_names": list(names)},
        "feature_dim": 8,
        "embedding_dim": 8,
        "probes": {
            "linear": row(0.43, 0.28, 0.22, 0.1),
            "knn": row(0.3, 0.29, 0.2, 0.1),
            "online": online,
        },
        "per_class": {"probe": "linear", "split": "test", "scores": []},
        "confusion": confusion.tolist(),
        "health": {"encoder": both, "untrained": both},
        "online_gap": "online 21.0 %, offline 43.0 % & why",
    }


@pytest.fixture(scope="module")
def workdir(finished, small_cifar, tmp_path_factory):
    """The same run with the long evaluation."""
    folder = tmp_path_factory.mktemp("reports") / "tiny"
    shutil.copytree(finished, folder)
    evaluation = full_evaluation(small_cifar.label_names)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


@pytest.fixture(scope="module")
def page(workdir, small_cifar):
    return Page(write_report([workdir], dataset=small_cifar))


@pytest.fixture
def changed(workdir, tmp_path, small_cifar):
    """Writes the report of a copy of the run that a function has changed: a Page."""

    def build(change=lambda folder: None, *, name="run", dataset=small_cifar):
        folder = tmp_path / name
        ignored = shutil.ignore_patterns("report*", "checkpoints")
        shutil.copytree(workdir, folder, ignore=ignored)
        change(folder)
        return Page(write_report([folder], dataset=dataset))

    return build


@pytest.fixture
def quick(monkeypatch):
    """For what is neither about the map nor about PNGs: two features for the one, no bytes for
    the others."""
    render = plots.render
    monkeypatch.setattr(pictures, "tsne", lambda h: np.array(h[:, :2]))
    monkeypatch.setattr(
        writer, "render", lambda *args: b"" if args[2:] == ("png",) else render(*args)
    )


def edit(folder, name, **changes):
    path = folder / name
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        functools.reduce(lambda part, k: part[k], above, content)[last] = value
    path.write_text(json.dumps(content))


def edit_rows(folder, change):
    path = folder / "metrics.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- the file -----------------------------------------------------------------------------------


def test_the_page_has_every_section_and_every_figure_once(page, workdir):
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS
    assert sorted(page.figures) == sorted(FIGURES)
    assert page.path == workdir / "report.html"
    assert {attrs["href"] for attrs in page.all("a")} == {f"#{name}" for name in SECTIONS}


def test_nothing_is_fetched_from_any_host(page):
    assert not page.all("script") and not page.all("iframe")
    named = [
        value
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key in ("src", "srcset", "href", "poster", "action", "data")
    ]
    assert named and all(value.startswith(("data:", "#")) for value in named)
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "@import" not in style and "url(" not in style
    for svg in (svg for name in page.figures for svg in page.svgs(name)):
        for element in ET.fromstring(svg).iter():
            for key, value in element.attrib.items():
                if key.endswith(("href", "src")):
                    assert value.startswith(("data:", "#"))
        assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)", svg))
        assert "@import" not in svg


def test_the_page_is_small_and_every_image_says_what_it_shows(page):
    assert page.path.stat().st_size < 5 * 2**20
    assert len(page.all("img")) == len(page.all("source")) == len(FIGURES)
    assert all(len(attrs["alt"]) > 10 for attrs in page.all("img"))


def test_large_noisy_images_make_no_heavy_page(changed, quick, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (40, 160, 200, 3), np.uint8)
    labels = np.arange(40) % 10
    monkeypatch.setattr(
        pictures, "_features", lambda run, images: np.float32(images.reshape(len(images), -1))
    )
    page = changed(dataset=from_arrays(noise, labels, noise, labels))
    assert {"pairs", "neighbours"} <= set(page.figures)
    assert page.path.stat().st_size < 5 * 2**20


def test_every_figure_is_drawn_for_light_and_for_dark(page):
    for name in page.figures:
        light, dark = page.svgs(name)
        assert theme.LIGHT.background in light and theme.DARK.background not in light
        assert theme.DARK.background in dark and light != dark
        for text in (light, dark):
            assert ET.fromstring(text).tag == f"{SVG}svg"
    assert f"--background:{theme.DARK.background}" in page.source


def test_every_figure_lies_beside_the_page_as_png(page):
    files = {path.stem: path for path in (page.path.parent / "report").iterdir()}
    assert set(files) == FIGURES
    for name, path in files.items():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", content[16:24])
        wide = name in ("spectrum", "pairs", "neighbours", "map", "confusion")
        assert width == (1600 if wide else 1040) and height > 100


def test_curves_name_their_axes_with_units(page):
    for name, words in {
        "loss": ("epoch", "loss and weighted terms"),
        "learning_rate": ("epoch", "learning rate"),
        "probes": ("epoch", "accuracy of the online probe, %"),
        "throughput": ("epoch", "images/s"),
        "floors": ("accuracy, %",),
        "rank": ("epoch", "effective dimensions"),
        "spread": ("epoch", "standard deviation"),
        "gradients": ("epoch", "gradient norm (L2)"),
        "spectrum": ("rank of the eigenvalue", "eigenvalue of the covariance"),
        "confusion": ("predicted class", "true class, %"),
    }.items():
        shown = " ".join(element.text or "" for element in texts(page.svgs(name)[0]))
        assert all(word in shown for word in words), (name, shown)


# --- colours ------------------------------------------------------------------------------------


def texts(svg):
    return list(ET.fromstring(svg).iter(f"{SVG}text"))


def wcag(one, other):
    """The contrast ratio by WCAG 2.2's own words, of two #rrggbb."""

    def luminance(colour):
        share = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", theme.THEMES, ids=lambda colours: colours.name)
def test_text_is_readable_on_the_page(colours):
    assert theme.contrast("#ffffff", "#000000") == pytest.approx(21)
    for name, colour in colours.text_colours().items():
        for ground in (colours.background, colours.surface):
            assert wcag(colour, ground) >= 4.5, name
            assert theme.contrast(colour, ground) == pytest.approx(wcag(colour, ground))
    for share in np.linspace(0, 1, 101):
        cell = theme.blend(colours, share)
        assert wcag(theme.text_on(cell), cell) >= 4.5


def test_text_in_figures_is_readable(page):
    for name in FIGURES - {"confusion"}:  # its numbers lie on cells, see above
        for svg, colours in zip(page.svgs(name), theme.THEMES, strict=True):
            for element in texts(svg):
                # Marks of a key and of a map: not text, and named beside themselves.
                if element.text in ("■", "●"):
                    continue
                found = re.search(r"fill: (#\w{6})", element.attrib["style"])
                assert wcag(found[1] if found else "#000000", colours.background) >= 4.5


@pytest.mark.parametrize("colours", theme.THEMES, ids=lambda colours: colours.name)
def test_colours_that_share_a_figure_differ_for_a_deuteranope(colours):
    """By the matrix of Machado, Oliveira and Fernandes (2009), severity 1, in linear RGB."""
    matrix = np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    )

    def seen(colour):
        share = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return np.cbrt(np.clip(matrix @ linear, 0, 1))

    terms = [colours.terms[name] for name in gather.KNOWN_TERMS]
    for group in (terms, colours.classes, colours.more):
        points = [seen(colour) for colour in group]
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[:i]]
        assert min(gaps) > 0.05
    assert len(set(colours.classes)) == 10


def test_a_term_keeps_its_colour_in_every_figure(page):
    for svg, colours in ((0, theme.LIGHT), (1, theme.DARK)):
        for name in ("loss", "gradients"):
            found = {e.text.split()[0]: e.attrib["style"] for e in texts(page.svgs(name)[svg])}
            for term in gather.KNOWN_TERMS:
                assert colours.terms[term] in found[plots.term_name(term)]


# --- what it says -------------------------------------------------------------------------------


def test_the_headline_is_the_best_known_probe_above_its_highest_floor(page):
    assert "43.0 % ± 6.9" in page.text
    assert "Test accuracy, linear probe (logistic), 200 images" in page.text
    assert "15.0 points above its highest floor, untrained" in page.text
    assert "✓ +15.0" in page.text and "✗ +1.0" in page.text  # kNN's intervals overlap
    assert "Online 21.0 %, offline 43.0 % & why." in page.text
    names = [e.text for e in texts(page.svgs("floors")[0])]
    assert {"this run", "untrained", "raw pixels", "chance", "43.0 %", "28.0 %"} <= set(names)


def test_the_equation_below_the_loss_adds_up(page):
    shown = re.search(r"Last epoch: (\S+) = (.*?)\.(?: |$)(?=\D)", page.text)
    parts = re.findall(r"(\S+) × (\S+) ", shown[2])
    assert len(parts) == 3
    total = sum(float(weight) * float(value) for weight, value in parts)
    assert total == pytest.approx(float(shown[1]), rel=0.01)


def test_the_config_is_whole_and_marks_what_differs_from_rapid(page, workdir):
    stored = json.loads((workdir / "config.json").read_text())
    rows = page.source.split('id="config"')[1].split("</section>")[0]
    for name in ("batch_size", "stage_sizes", "cov_coeff", "probe_lr", "tqdm_silent"):
        assert f">{name}</th>" in rows
    assert '<td class="differs">100<small>rapid: 3072</small>' in rows
    assert f"momentum</th><td>{stored['config']['optim']['momentum']}</td>" in rows
    assert stored["environment"]["jax"] in page.text and "CPU" in page.text


def test_percentages_of_a_confusion_matrix_add_to_a_hundred(page, workdir):
    matrix = json.loads((workdir / "evaluation.json").read_text())["confusion"]
    percent = image_plots.row_percent(matrix)
    np.testing.assert_allclose(percent.sum(axis=1), 100)
    np.testing.assert_array_equal(np.argsort(percent[0]), np.argsort(np.array(matrix[0]) / 1.0))
    assert image_plots.row_percent([[0, 0], [1, 3]]).tolist() == [[0, 0], [25, 75]]
    shown = [e.text for e in texts(page.svgs("confusion")[0])]
    numbers = [f"{value:.0f}" if value >= 0.5 else "·" for value in percent.ravel()]
    assert "".join(numbers) in "".join(shown)


# --- images -------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_by_cosine(workdir, small_cifar, quick):
    seen = pictures.take_pictures(gather.read_run(workdir), small_cifar)
    encoder, variables = load_encoder(workdir)
    h = np.asarray(encoder.apply(variables, small_cifar.test_images), np.float64)
    unit = h / np.linalg.norm(h, axis=1)[:, None]
    found = seen.neighbours
    assert found.indices.shape == (10, 9) and found.num_images == 200
    assert len(set(found.labels[:, 0])) == 10
    for row, cosines in zip(found.indices, found.cosines, strict=True):
        expected = unit @ unit[row[0]]
        expected[row[0]] = -2
        np.testing.assert_allclose(cosines, np.sort(expected)[::-1][:8], atol=1e-5)
        np.testing.assert_allclose(expected[row[1:]], cosines, atol=1e-5)
    np.testing.assert_array_equal(found.labels, small_cifar.test_labels[found.indices])
    images = small_cifar.test_images[found.indices] / 255
    np.testing.assert_allclose(found.images, images, atol=1e-6)
    nearest = np.argsort(-(unit @ unit.T - 3 * np.eye(200)), axis=1)[:, :8]
    labels = np.asarray(small_cifar.test_labels)
    assert found.same_class == pytest.approx(np.mean(labels[nearest] == labels[:, None]), abs=2e-3)


def test_views_are_pairs_of_training_images(workdir, small_cifar, quick):
    pairs = pictures.take_pictures(gather.read_run(workdir), small_cifar).pairs
    for shown in pairs:
        assert shown.shape == (12, 32, 32, 3) and shown.min() >= 0 and shown.max() <= 1
    train_images = small_cifar.train_images.reshape(400, -1) / 255
    for image, first, second in zip(*pairs, strict=True):
        assert np.abs(train_images - image.reshape(1, -1)).max(axis=1).min() < 1e-6
        assert np.abs(first - image).max() > 0.05 and np.abs(first - second).max() > 0.05


def test_the_pairs_of_a_blurred_run_are_blurred(workdir, small_cifar, quick):
    """Of a run that only blurs: the first view is the image, smoother at its edges."""
    off = ("jitter_prob", "grayscale_prob", "solarize_prob", "flip_prob")
    augment = {"scale": [1.0, 1.0], **dict.fromkeys(off, 0.0)}
    for blur_prob in (0.0, 1.0):
        run = gather.read_run(workdir)
        blur = {"blur_prob": blur_prob, "blur_sigma": [1.0, 1.5]}
        strengths = {f"augment.{name}": value for name, value in {**augment, **blur}.items()}
        run = dataclasses.replace(run, config={**run.config, **strengths})
        shown, first, _ = pictures.take_pictures(run, small_cifar).pairs
        roughness = [np.abs(np.diff(images, axis=1)).mean() for images in (shown, first)]
        assert (roughness[1] < 0.8 * roughness[0]) == (blur_prob == 1)
        assert np.abs(first - shown).mean() < 0.1


def test_the_map_keeps_groups_together_and_is_the_same_every_time():
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    h = np.float32(rng.normal(size=(90, 60)) + 9 * np.eye(60)[labels])
    places = pictures.tsne(h)
    assert places.shape == (90, 2)
    np.testing.assert_array_equal(places, pictures.tsne(h))
    gaps = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(90)
    assert np.mean(labels[gaps.argmin(axis=1)] == labels) > 0.95
    with pytest.raises(DataError, match="all alike: the run has collapsed"):
        pictures.tsne(np.ones((90, 60), np.float32))
    with pytest.raises(DataError, match="too few for a map"):
        pictures.tsne(h[:5])


# --- what is missing ----------------------------------------------------------------------------


def remove(*names):
    def change(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def without_watch(folder):
    edit_rows(folder, lambda row: {k: v for k, v in row.items() if "watch" not in k})
    remove("evaluation.json")(folder)


def own_encoder(folder):
    edit(folder, "config.json", custom={"encoder": "mine.ViT", "augment_fn": "mine.views"})
    remove("evaluation.json")(folder)


def other_dataset(folder):
    edit(folder, "config.json", dataset__name="cifar99", config__data__dataset="cifar99")


def not_evaluated(folder):
    edit(folder, "config.json", dataset__name="cifar10")
    remove("evaluation.json")(folder)


CASES = {
    "no evaluation": (
        not_evaluated,
        {"confusion"},
        "python -m jepa_jax.evaluate --workdir=",
    ),
    "an older version": (
        without_watch,
        {"rank", "spread", "spectrum", "confusion"},
        "this run's version did not watch them",
    ),
    "not finished": (
        remove("summary.json", "evaluation.json", "encoder"),
        {"floors", "neighbours", "map", "confusion"},
        "there is no encoder to judge yet",
    ),
    "an encoder of its own": (
        own_encoder,
        {"pairs", "neighbours", "map", "confusion"},
        "was trained with an encoder of its own, mine.ViT",
    ),
    "no rows": (
        remove("metrics.jsonl"),
        {"loss", "gradients", "probes", "learning_rate", "throughput", "rank", "spread"},
        "metrics.jsonl has no row",
    ),
    "no parameters": (
        remove("encoder"),
        {"neighbours", "map"},
        "holds no finished run: encoder is missing",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=CASES)
def test_what_is_missing_is_left_out_and_named(case, changed, quick):
    change, missing, line = CASES[case]
    page = changed(change)
    assert set(page.figures) == FIGURES - missing
    assert line in page.text
    assert [attrs["id"] for attrs in page.all("section")] == SECTIONS


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda folder: None, "trained on arrays of its own, 'arrays'"),
        (other_dataset, "cifar99 is not prepared in "),
        (lambda f: edit(f, "config.json", dataset={}), "config.json names no dataset"),
    ],
    ids=["arrays", "not prepared", "unnamed"],
)
def test_a_dataset_out_of_reach_costs_the_images_only(change, line, changed, tmp_path, monkeypatch):
    monkeypatch.setenv("EBJEPA_DSETS", str(tmp_path / "nothing"))
    page = changed(change, dataset=None)
    assert set(page.figures) == FIGURES - {"pairs", "neighbours", "map"}
    assert f"Not here: pairs, neighbours and map; {line}" in page.text.replace("the run was ", "")
    assert not (tmp_path / "nothing").exists()


def test_a_run_without_labels_and_without_test_images(small_cifar, changed, quick):
    def change(folder):
        without_watch(folder)
        edit_rows(folder, lambda row: {k: v for k, v in row.items() if "probe" not in k})
        summary = json.loads((folder / "summary.json").read_text())
        kept = {key: value for key, value in summary.items() if "probe" not in key}
        (folder / "summary.json").write_text(json.dumps(kept))

    page = changed(change, dataset=from_arrays(small_cifar.train_images))
    expected = {"rank", "spread", "spectrum", "confusion", "floors", "probes"}
    assert set(page.figures) == FIGURES - expected
    assert "no probe has judged this run" in page.text
    assert "80 validation images" in page.text and "✓" not in page.text


def test_imported_weights_and_no_rapid_to_compare_with(changed, monkeypatch, quick):
    monkeypatch.setattr(gather, "_RAPID", gather._RAPID.with_name("absent.py"))

    def change(folder):
        remove("metrics.jsonl", "summary.json", "evaluation.json")(folder)
        config = json.loads((folder / "config.json").read_text())["config"]
        config["data"] = {"mean": config["data"]["mean"], "std": config["data"]["std"]}
        content = {"config": config, "dataset": {"image_shape": [32, 32, 3]}, "custom": {}}
        content["imported"] = {"source": "torchvision", "file": "resnet.pth", "ignored": []}
        content["schema_version"] = 1
        (folder / "config.json").write_text(json.dumps(content))

    page = changed(change)
    assert set(page.figures) == {"pairs", "neighbours", "map"}
    assert "these are imported weights" in page.text and "resnet.pth" in page.text
    assert "the difference to configs/rapid.py, which is not there" in page.text
    assert "--dataset=cifar10" in page.text


def test_odd_numbers_in_the_rows_draw_gaps(changed, quick):
    def change(folder):
        def odd(row):
            empty = row["epoch"] == 2
            spectrum = [None, -1.0, 0.5] if empty else row["watch/h_spectrum"]
            row |= {"watch/h_spectrum": spectrum, "train/loss": None if empty else 1.0}
            return row | {"train/cov_loss": 0.0, "watch/z_rank_me": None, "train/odd": "text"}

        edit_rows(folder, odd)

    assert set(changed(change).figures) == FIGURES


def test_own_loss_terms_keep_their_names(changed, quick):
    def rename(row):
        names = {"var_loss": "spread_loss", "cov_loss": "$x^$_loss<b>"}
        return {
            functools.reduce(lambda k, n: k.replace(n, names[n]), names, key): value
            for key, value in row.items()
        }

    def change(folder):
        edit(folder, "config.json", custom={"loss_fn": "mine.loss"})
        edit_rows(folder, rename)

    page = changed(change)
    shown = " ".join(element.text for element in texts(page.svgs("loss")[0]))
    assert "spread " in shown and "$x^$ loss<b> " in shown and "terms as they are" in shown
    assert "Last epoch:" not in page.text


def test_a_collapse_that_the_run_saw_is_named_first(changed, quick):
    def collapse(row):
        return row | {"watch/collapse": "low rank" if row["epoch"] > 1 else None}

    page = changed(lambda folder: edit_rows(folder, collapse))
    assert "✗ collapse (low rank) from epoch 2" in page.text
    healthy = changed(
        lambda folder: edit_rows(folder, lambda row: row | {"watch/collapse": None}), name="healthy"
    )
    assert "✓ no collapse seen" in healthy.text and "RankMe of h 6 of 8" in healthy.text


def test_what_files_say_is_shown_and_never_run(changed, small_cifar, quick):
    evil = '"><script>alert(1)</script>&\x1b\ud800'
    names = tuple(f"{evil}{n}" for n in range(10))

    def change(folder):
        edit(folder, "config.json", config__data__dataset=evil, environment={evil: evil})
        edit(folder, "evaluation.json", dataset__label_names=names, online_gap=evil)
        edit(folder, "evaluation.json", dataset__name=evil)

    arrays = (small_cifar.train_images, small_cifar.train_labels)
    dataset = from_arrays(*arrays, *arrays, label_names=names)
    page = changed(change, name="<img src=x onerror=alert(1)>", dataset=dataset)
    assert not page.all("script") and len(page.all("img")) == len(FIGURES)
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert '"><script>alert(1)</script>&??' in page.text
    assert page.all("h1") and "<img src=x onerror=alert(1)>" in page.text
    for name in FIGURES:
        for svg in page.svgs(name):
            assert not [e for e in ET.fromstring(svg).iter() if e.tag.endswith("script")]


# --- several runs -------------------------------------------------------------------------------


def test_several_runs_are_overlaid_and_compared(workdir, tmp_path):
    folders = []
    for place in range(3):
        folder = tmp_path / f"group{place}" / "run"
        shutil.copytree(workdir, folder, ignore=shutil.ignore_patterns("report*", "checkpoints"))
        edit(folder, "config.json", config__optim__lr=0.1 * (place + 1))
        folders.append(folder)
    remove("evaluation.json", "summary.json")(folders[2])
    page = Page(write_report(folders, out=tmp_path / "out"))
    assert page.path == tmp_path / "out" / "report.html" and page.figures == ["compared"]
    names = [f"group{place}/run" for place in range(3)]
    shown = [element.text for element in texts(page.svgs("compared")[0])]
    assert [text for text in shown if "group" in text] == names
    assert all(unit in shown for unit, _ in plots.COMPARED.values())
    for place, colours in enumerate(theme.THEMES):
        styles = [plots.run_style(run, colours)["color"] for run in range(3)]
        assert len(set(styles)) == 3
        assert all(page.svgs("compared")[place].count(f"stroke: {c}") >= 4 for c in styles)
    rows = page.source.split('id="config"')[1]
    assert "optim.lr" in rows and "momentum" not in rows
    assert "✓ +15.0" in page.text and "43.0" in page.text
    assert (tmp_path / "out" / "report" / "compared.png").exists()


def test_several_runs_go_to_a_folder_of_their_own(workdir, tmp_path, monkeypatch):
    monkeypatch.setenv("EBJEPA_CKPTS", str(tmp_path / "runs"))
    folder = tmp_path / "other"
    shutil.copytree(workdir, folder, ignore=shutil.ignore_patterns("report*", "checkpoints"))
    assert write_report([workdir, folder]) == tmp_path / "runs" / "comparison" / "report.html"
    page = Page(tmp_path / "runs" / "comparison" / "report.html")
    assert "The configs are the same, key for key." in page.text


# --- the command and its files ------------------------------------------------------------------


@pytest.fixture
def refused(capsys):
    """Runs the command in this process; it must end with 2 and one line, which comes back."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert stopped.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable()
        return err

    return call


def test_the_commands_errors_are_one_line(refused, tmp_path, workdir):
    assert "is not a folder" in refused("--workdir", tmp_path / "absent")
    assert "holds no run: config.json is missing" in refused("--workdir", tmp_path)
    assert "--workdir" in refused()
    (tmp_path / "file").touch()
    out = ("--out", tmp_path / "file")
    assert "cannot be written" in refused("--workdir", workdir, "--workdir", workdir, *out)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refused("--workdir", tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "config.json is not that of a run" in refused("--workdir", tmp_path)
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([])


def test_the_command_prints_the_path_of_the_page(workdir, tmp_path, capsys):
    main([f"--workdir={workdir}", f"--workdir={workdir}", f"--out={tmp_path / 'new' / 'folder'}"])
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'new' / 'folder' / 'report.html'}\n" and err == ""
    assert Page(tmp_path / "new" / "folder" / "report.html").figures == ["compared"]


def test_an_interruption_is_one_line(workdir, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "render", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main([f"--workdir={workdir}", f"--workdir={workdir}", f"--out={tmp_path}"])
    assert stopped.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "error: interrupted; the page was not written\n"
    assert not list(tmp_path.iterdir())


def test_a_page_is_written_whole_or_not_at_all(workdir, tmp_path, monkeypatch):
    path = write_report([workdir, workdir], out=tmp_path)
    before = path.read_bytes()
    (tmp_path / "report" / "stale.png").touch()
    real = writer.os.replace

    def full_disk(source, target):
        if target == path:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(writer.os, "replace", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        write_report([workdir, workdir], out=tmp_path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    (tmp_path / ".report.html.0123abcd.partial").touch()  # of a process that was killed
    write_report([workdir, workdir], out=tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["compared.png", "report", "report.html"]
    assert path.read_bytes() == before  # the same runs, the same bytes


def test_the_room_loads_no_matplotlib_until_a_page_is_wanted():
    code = "import sys, jepa_jax.report; print({'matplotlib', 'sklearn', 'jax'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


def test_names_at_the_edge_lie_apart_and_inside():
    rng = np.random.default_rng(0)
    for count in range(1, 10):
        places = np.sort(rng.uniform(-20, 180, count))
        moved = plots.spread_out(places, 12.0, 0.0, 160.0)
        assert all(np.diff(moved) >= 12 - 1e-9)
        assert moved[-1] <= 160 and moved[0] >= 0
    apart = [10.0, 40.0, 90.0]
    assert plots.spread_out(apart, 12.0, 0.0, 160.0) == apart


def test_probes_of_an_old_summary_stand_in_for_an_evaluation(finished):
    run = gather.read_run(finished)
    summary = {**run.summary, "ridge_probe_acc": 0.5, "untrained_ridge_probe_acc": 0.4}
    probes = gather._probes_of(summary)
    assert probes["ridge"]["encoder"]["test"] == {"acc": 0.5}
    points, is_apart = sections.above_floors({"acc": 0.5}, [("untrained", {"acc": 0.4})])
    assert points == pytest.approx(10) and is_apart is None
