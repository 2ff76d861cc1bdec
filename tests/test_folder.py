"""Laws of folders of images: which files, which labels, which pixels, and a whole run on them."""

import dataclasses
import io
import multiprocessing
import os
import pathlib
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import FLAGS, tiny_config

from jepa_jax import evaluate, load_encoder, runner, train_and_evaluate
from jepa_jax.data import load_dataset
from jepa_jax.data.cifar10 import LABEL_NAMES
from jepa_jax.data.images import decode_image, open_image
from jepa_jax.data.workers import Workers
from jepa_jax.errors import ConfigError, DataError, Interrupted
from jepa_jax.evaluate import evaluate_run
from jepa_jax.metrics import read_json, read_metrics
from jepa_jax.report import write_report
from jepa_jax.representation import split_validation


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def write(root, files):
    """Files by their paths; an int is an image of that shade."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = encoded(np.full((8, 8, 3), content, np.uint8))
        path.write_bytes(content)


def load(root, **options):
    return load_dataset(f"folder:{root}", **options)


def shades(images):
    return [int(image[0, 0, 0]) for image in images[:]]


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# Files, splits and labels


@pytest.mark.parametrize("lazy", [False, True])
def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path, lazy):
    write(tmp_path, {"dog/a.png": 1, "cat/z/deep/b.png": 2, "cat/c.png": 3, "ant-eater/d.png": 4})
    dataset = load(tmp_path, lazy=lazy)
    assert dataset.label_names == ("ant-eater", "cat", "dog")
    assert shades(dataset.train_images) == [4, 3, 2, 1]
    assert dataset.train_labels.tolist() == [0, 1, 1, 2]
    assert dataset.train_labels.dtype == np.int32
    assert dataset.test_images is None and dataset.test_labels is None
    assert dataset.name == f"folder:{tmp_path}" and dataset.image_shape == (8, 8, 3)


@pytest.mark.parametrize(
    "files",
    [
        {"b.png": 1, "a.png": 2},
        {"one/b.png": 1, "one/a.png": 2},
        {"one/b.png": 1, "two/c.png": 3, "a.png": 2},
    ],
)
def test_flat_and_mixed_folders_and_those_of_one_class_have_no_labels(tmp_path, files, capsys):
    write(tmp_path, files)
    dataset = load(tmp_path)
    assert dataset.train_labels is None and dataset.label_names == ()
    assert shades(dataset.train_images) == [files[name] for name in sorted(files)]
    is_mixed = len(files) == 3
    assert ("1 images lie beside 2 folders" in capsys.readouterr().out) == is_mixed


@pytest.mark.parametrize("test", ["test", "validation", "val"])
def test_train_beside_a_folder_to_test_on_are_splits(tmp_path, test):
    write(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, f"{test}/b/3.png": 3})
    dataset = load(tmp_path)
    assert shades(dataset.train_images) == [1, 2] and dataset.train_labels.tolist() == [0, 1]
    assert shades(dataset.test_images) == [3] and dataset.test_labels.tolist() == [1]


def test_test_comes_before_validation_and_another_name_before_both(tmp_path):
    write(tmp_path, {"train/1.png": 1, "test/2.png": 2, "val/3.png": 3, "more/4.png": 4})
    assert shades(load(tmp_path).test_images) == [2]
    assert shades(load(tmp_path, test_split="val").test_images) == [3]
    dataset = load(tmp_path, train_split="more", test_split="train")
    assert shades(dataset.train_images) == [4] and shades(dataset.test_images) == [1]
    assert load(tmp_path, train_split="more").train_labels is None


def test_train_alone_is_a_split_and_never_a_class(tmp_path):
    write(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, "README.txt": 1})
    assert load(tmp_path).label_names == ("a", "b")
    write(tmp_path, {"plane/3.png": 3})
    with pytest.raises(DataError, match="train in .* looks like a split and not like a class"):
        load(tmp_path)
    assert load(tmp_path, train_split="plane").train_labels is None


def test_test_images_in_one_other_folder_have_no_labels(tmp_path):
    """As those of Tiny ImageNet and of many contests."""
    write(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, "test/images/3.png": 3})
    dataset = load(tmp_path)
    assert dataset.test_labels is None and shades(dataset.test_images) == [3]


@pytest.mark.parametrize("other", ["unlabelled_split", "test_split"])
def test_no_image_is_in_two_splits(tmp_path, other):
    write(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, "test/a/3.png": 3})
    with pytest.raises(DataError, match="train/a/1.png in .* is in two splits"):
        load(tmp_path, **{other: "train"})


def test_the_names_of_the_files_are_a_part_of_what_a_dataset_is(tmp_path):
    write(tmp_path, {"cat/1.png": 1, "dog/2.png": 2, "eel/3.png": 3})
    before = load(tmp_path).identity
    assert load(tmp_path).identity == before
    (tmp_path / "cat").rename(tmp_path / "zebra")
    assert load(tmp_path).identity["num_train"] == before["num_train"]
    assert load(tmp_path).identity != before


def test_an_unlabelled_folder_is_trained_on_without_labels(tmp_path):
    files = {"train/a/1.png": 1, "train/b/2.png": 2, "extra/x/3.png": 3, "extra/4.png": 4}
    write(tmp_path, {**files, "test/a/5.png": 5})
    dataset = load(tmp_path, unlabelled_split="extra")
    assert shades(dataset.train_images) == [1, 2, 4, 3]
    assert dataset.train_labels.tolist() == [0, 1, -1, -1]
    assert dataset.label_names == ("a", "b")
    assert len(load(tmp_path).train_images) == 2


def test_test_images_that_lie_loose_have_no_labels(tmp_path):
    write(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, "test/3.png": 3})
    dataset = load(tmp_path)
    assert dataset.test_labels is None and len(dataset.test_images) == 1


def test_hidden_and_other_files_are_left_out_and_the_others_counted(tmp_path, capsys):
    write(tmp_path, {"a.PNG": 1, ".hidden.png": 2, ".cache/b.png": 3, "notes.txt": 4, "c/d.csv": 5})
    assert shades(load(tmp_path).train_images) == [1]
    assert "2 files in" in capsys.readouterr().out


def test_what_a_file_is_its_content_says(tmp_path):
    image = np.full((8, 8, 3), 7, np.uint8)
    write(
        tmp_path, {"a.jpg": encoded(image, "PNG"), "b.png": encoded(image, "WEBP", lossless=True)}
    )
    assert shades(load(tmp_path).train_images) == [7, 7]


def test_links_are_followed_and_never_round_in_circles(tmp_path, capsys):
    write(tmp_path, {"data/a/1.png": 1, "elsewhere/2.png": 2})
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / "b" / "itself").symlink_to(tmp_path / "data" / "b" / "itself")
    dataset = load(tmp_path / "data", max_broken=0.5)
    assert dataset.label_names == ("a", "b") and shades(dataset.train_images) == [1, 1, 2]
    assert "gone.png: No such file" in capsys.readouterr().out


def test_scanning_opens_no_file_whose_size_is_given(tmp_path, monkeypatch):
    write(tmp_path, {f"{k}.png": b"" for k in range(30)})
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    assert load(tmp_path, lazy=True, image_size=8).train_images.shape == (30, 8, 8, 3)


def test_paths_may_have_spaces_and_begin_at_home(tmp_path, monkeypatch):
    write(tmp_path, {"my images/a.png": 1})
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset = load_dataset("folder:~/my images")
    assert shades(dataset.train_images) == [1] and dataset.name == "folder:~/my images"
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("folder:my images").train_images) == 1


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"notes.txt": 1}, {}, "there are no images .PNG, JPEG, WebP. in "),
        ({"train/1.png": 1, "test/a.txt": 1}, {}, "there are no images .*test$"),
        ({"a/1.png": 1}, {"test_split": "held"}, "data.test_split=held is not .* there are: a$"),
        ({"a.png": 1}, {"train_split": "x"}, "data.train_split=x is not .* there are: none$"),
        (
            {"train/1.png": 1},
            {"unlabelled_split": "u"},
            "data.unlabelled_split=u is not .* there are: train .--config.data.unlabelled_split=",
        ),
        (
            {"train/a/1.png": 1, "train/b/2.png": 2, "test/a/3.png": 3, "test/c/4.png": 4},
            {},
            "have the class 'c', which no training image has",
        ),
    ],
)
def test_folders_that_cannot_be_used_are_one_line(tmp_path, files, options, message):
    write(tmp_path, files)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_one_line(tmp_path, monkeypatch):
    write(tmp_path, {"file": 1, "inside/a.png": 1})
    with pytest.raises(DataError, match="^there is no folder .*absent$"):
        load(tmp_path / "absent")
    with pytest.raises(DataError, match="file is not a folder$"):
        load(tmp_path / "file")
    with pytest.raises(DataError, match="^folder: names no folder"):
        load_dataset("folder:")
    with pytest.raises(ConfigError, match="there is no such user"):
        load_dataset("folder:~nobody-here/x")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied$"):
        load(tmp_path / "inside")


# Pixels


def torchvision_resize(image, size):
    """Resize(size) and CenterCrop(size), from torchvision's documentation, by Pillow alone."""
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    image = image.resize((width, height), Image.BILINEAR)
    left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(57, 33), (33, 57), (100, 16), (16, 16), (5, 9), (64, 65)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_are_resized_and_cut_as_torchvision_does(shape, kind):
    content = encoded(noise(*shape), kind)
    expected = torchvision_resize(Image.open(io.BytesIO(content)).convert("RGB"), 16)
    found = decode_image(content, 16)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_enlarging_a_constant_image_keeps_it():
    assert (decode_image(encoded(np.full((3, 4, 3), 9, np.uint8)), 20) == 9).all()


MODES = {
    "grey": (noise(6, 7, 0), lambda a: np.stack(3 * [a], -1)),
    "grey and alpha": (noise(6, 7, 2), lambda a: np.repeat(a[..., :1], 3, -1)),
    "RGBA": (noise(6, 7, 4), lambda a: a[..., :3]),
    "RGB": (noise(6, 7, 3), lambda a: a),
    "16 bits": (
        np.arange(42, dtype=np.uint16).reshape(6, 7) * 1560,
        lambda a: np.repeat(np.round(a / 257).astype(np.uint8)[..., None], 3, -1),
    ),
    "1 bit": (noise(6, 7, 0) > 127, lambda a: np.repeat(a[..., None] * np.uint8(255), 3, -1)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_png_becomes_rgb(mode):
    pixels, expected = MODES[mode]
    np.testing.assert_array_equal(decode_image(encoded(pixels)), expected(pixels))


@pytest.mark.parametrize("with_alpha", [False, True])
def test_a_palette_becomes_its_colours(with_alpha):
    palette, indices = noise(1, 256)[0], noise(6, 7, 0)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    options = {"transparency": bytes(range(256))} if with_alpha else {}
    np.testing.assert_array_equal(decode_image(encoded(image, **options)), palette[indices])


def test_cmyk_becomes_rgb():
    # Ink takes light away: r = (1 - c) * (1 - k). A constant image survives JPEG.
    inks = np.full((16, 16, 4), (51, 0, 102, 25), np.uint8)
    found = decode_image(encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100))
    light = 255 * (1 - inks[0, 0, :3] / 255) * (1 - inks[0, 0, 3] / 255)
    assert np.abs(found.astype(float) - light).max() < 3


def claiming(width, height, kind):
    """The beginning of an image that says that it is so large."""
    if kind == "VP8X":
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size
    elif kind == "VP8L":
        bits = (width - 1) | (height - 1) << 14
        chunk = b"VP8L" + struct.pack("<I", 100) + b"\x2f" + struct.pack("<I", bits)
    else:
        frame = bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height)
        chunk = b"VP8 " + struct.pack("<I", 100) + frame
    return b"RIFF" + struct.pack("<I", 200) + b"WEBP" + chunk + bytes(100)


@pytest.mark.parametrize("kind", ["VP8X", "VP8L", "VP8 "])
def test_a_webp_that_claims_many_pixels_is_refused_before_it_is_decoded(kind):
    with pytest.raises(ValueError, match="an image of 16000x12000 pixels"):
        open_image(claiming(16000, 12000, kind))


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}, {"exif": b"Exif\0\0"}])
@pytest.mark.parametrize("channels", [3, 4])
def test_webp_is_decoded_whatever_its_first_chunk(options, channels):
    pixels = noise(9, 14, channels)
    content = encoded(pixels, "WEBP", **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(content), expected)


def test_an_image_that_resizing_would_blow_up_is_broken():
    content = encoded(np.zeros((1, 200_000, 3), np.uint8))
    assert decode_image(content).shape == (1, 200_000, 3)
    with pytest.raises(ValueError, match="pixels"):
        decode_image(content, 224)


BROKEN = {
    "truncated png": encoded(noise(30, 30))[:500],
    "truncated jpeg": encoded(noise(30, 30), "JPEG")[:500],
    "truncated webp": encoded(noise(30, 30), "WEBP")[:300],
    "empty": b"",
    "text": b"<html>not found</html>",
    "another format": encoded(noise(8, 8), "GIF"),
    "half a header": b"\x89PNG\r\n\x1a\n",
    "half a webp header": b"RIFF\x10\0\0\0WEBPVP8 ",
    "bomb": claiming(16000, 16000, "VP8X"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("image_size", [0, 8])
def test_a_broken_file_is_named_and_another_image_stands_in(tmp_path, kind, image_size, capsys):
    write(tmp_path, {"a/1.png": 1, "a/2.png": BROKEN[kind], "b/3.png": 3, "b/4.png": 4})
    write(tmp_path, {"a/5.png": 5})
    options = {"image_size": image_size, "max_broken": 0.5, "num_workers": 1}
    dataset = load(tmp_path, lazy=True, **options)
    assert shades(dataset.train_images) == [1, 5, 5, 3, 4]
    said = capsys.readouterr().out
    assert said.startswith("broken    a/2.png: ") and said.count("\n") == 1
    assert shades(load(tmp_path, **options).train_images) == [1, 5, 5, 3, 4]
    with pytest.raises(DataError, match="1 of 5 images are broken.*such as a/2.png") as caught:
        load(tmp_path, image_size=image_size)
    assert "--config.data.max_broken" in str(caught.value)


def test_a_file_that_goes_while_a_run_is_on_is_broken(tmp_path):
    write(tmp_path, {"1.png": 1, "2.png": 2, "3.png": 3})
    dataset = load(tmp_path, lazy=True, max_broken=0.5)
    (tmp_path / "2.png").unlink()
    assert shades(dataset.train_images) == [1, 3, 3]


def test_images_of_two_sizes_need_one_to_be_named(tmp_path):
    write(tmp_path, {"1.png": 1, "2.png": encoded(noise(9, 12))})
    with pytest.raises(DataError, match="--config.data.image_size=8 brings them to one"):
        load(tmp_path)
    assert load(tmp_path, image_size=6).image_shape == (6, 6, 3)


# Validation


def test_validation_images_are_drawn_among_the_labelled(small_cifar):
    order = np.random.default_rng(0).permutation(400)
    for labels in (small_cifar.train_labels, None, np.full(400, -1)):
        train, val = split_validation(dataclasses.replace(small_cifar, train_labels=labels), 50)
        np.testing.assert_array_equal(val, np.sort(order[:50]))
        np.testing.assert_array_equal(train, np.sort(order[50:]))
    partly = np.where(np.arange(400) % 3 == 0, small_cifar.train_labels, -1)
    train, val = split_validation(dataclasses.replace(small_cifar, train_labels=partly), 50)
    np.testing.assert_array_equal(val, np.sort([n for n in order if partly[n] >= 0][:50]))
    assert sorted([*train, *val]) == list(range(400))


# Whole runs


@pytest.fixture(scope="module")
def cifar_folder(tmp_path_factory, cifar_arrays):
    """The fixture's images as PNGs in nested class folders."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        labels = cifar_arrays[f"{split}_labels"]
        for k, (image, label) in enumerate(
            zip(cifar_arrays[f"{split}_images"], labels, strict=True)
        ):
            write(root, {f"{split}/{LABEL_NAMES[label]}/{k % 3}/{k:04d}.png": encoded(image)})
    return root


@pytest.fixture
def run(tmp_path):
    """Trains on a folder with the tiny config; returns the workdir."""

    def start(name, root, **overrides):
        overrides = {"data__num_workers": 2, "data__placement": "stream", **overrides}
        train_and_evaluate(
            tiny_config(data__dataset=f"folder:{root}", **overrides), tmp_path / name
        )
        return tmp_path / name

    return start


def test_a_folder_trains_to_the_same_parameters_wherever_its_images_lie(run, cifar_folder, capsys):
    places = {"device": "resident", "host": "in the host's memory", "stream": "streamed"}
    results = []
    for placement, words in places.items():
        summary = read_json(
            run(placement, cifar_folder, data__placement=placement) / "summary.json"
        )
        results.append({key: summary[key] for key in ("params_digest", "ridge_probe_acc")})
        assert words in capsys.readouterr().out
    assert results[0] == results[1] == results[2] and results[0]["ridge_probe_acc"] > 0


def test_an_interrupted_stream_goes_on_in_mid_epoch_with_the_same_bits(
    run, cifar_folder, monkeypatch
):
    whole, read = run("whole", cifar_folder), []
    original = Workers.batches

    def noting(self, rows):
        rows = list(rows)
        read.extend(map(tuple, rows))
        yield from original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Runner, "run", stopped_after(6, runner.Runner.run))
        with pytest.raises(Interrupted, match="stopped at step 6 of 12"):
            run("halves", cifar_folder)
    monkeypatch.setattr(Workers, "batches", noting)
    halves = run("halves", cifar_folder, data__num_workers=1)
    assert len(read) == len(set(read)) == 6  # what was left, once
    digests = [read_json(folder / "summary.json")["params_digest"] for folder in (whole, halves)]
    assert digests[0] == digests[1]


def stopped_after(step, original):
    """`Runner.run` that has a signal delivered after so many steps."""
    done = 0

    def stopped(self, *arguments):
        nonlocal done
        for item in original(self, *arguments):
            done += item[2]
            if done == step:
                signal.raise_signal(signal.SIGTERM)
            yield item

    return stopped


def test_the_commands_take_the_run_of_a_folder(run, cifar_folder, capsys):
    workdir = run("labelled", cifar_folder, optim__epochs=1.0)
    identity = {"name": f"folder:{cifar_folder}", "num_train": 400, "image_shape": [32, 32, 3]}
    stored = read_json(workdir / "config.json")["dataset"]
    assert stored.pop("fingerprint") and stored == identity
    evaluation = evaluate_run(workdir, parts=("ridge",))
    assert evaluation["probes"]["ridge"]["encoder"]["test"]["count"] == 200
    assert evaluation["dataset"]["label_names"] == sorted(LABEL_NAMES)
    assert "airplane" in write_report([workdir]).read_text()
    encoder, variables = load_encoder(workdir)
    assert encoder.apply(variables, np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 8)
    assert not multiprocessing.active_children()


def test_a_flat_folder_trains_without_labels_and_ends_with_its_health(run, tmp_path, cifar_arrays):
    root = tmp_path / "flat images"
    write(root, {f"{k}.png": encoded(i) for k, i in enumerate(cifar_arrays["train_images"])})
    (root / "7.png").write_bytes(b"broken")
    workdir = run("flat", root, optim__epochs=1.0)
    evaluation = read_json(workdir / "evaluation.json")
    assert evaluation["probes"] == {} and evaluation["health"]["encoder"]["h"]["rank_me"] >= 1
    (row,) = read_metrics(workdir / "metrics.jsonl")
    assert not [key for key in row if "acc" in key] and row["watch/h_rank_me"] >= 1
    evaluate.main(["--workdir", str(workdir)])
    page = write_report([workdir]).read_text()
    assert "RankMe" in page


def test_a_run_of_few_labels_holds_validation_out_of_these(run, tmp_path, cifar_arrays):
    images, labels = cifar_arrays["train_images"], cifar_arrays["train_labels"] % 2
    labelled = {f"train/{labels[k]}/{k:03}.png": encoded(images[k]) for k in range(200)}
    rest = {f"more/{k:03}.png": encoded(images[k]) for k in range(200, 400)}
    test = {f"test/{k % 2}/{k}.png": encoded(i) for k, i in enumerate(cifar_arrays["test_images"])}
    write(tmp_path / "few", {**labelled, **rest, **test})
    options = {"data__unlabelled_split": "more", "optim__epochs": 1.0}
    workdir = run("few labels", tmp_path / "few", **options)
    summary, stored = (read_json(workdir / name) for name in ("summary.json", "config.json"))
    assert summary["ridge_probe_acc"] > 0 and summary["val_ridge_probe_acc"] > 0
    assert stored["dataset"]["num_train"] == 400
    evaluation = read_json(workdir / "evaluation.json")
    assert evaluation["probes"]["ridge"]["encoder"]["val"]["count"] == 80
    with pytest.raises(ConfigError, match="leaves none of the 200 labelled training images"):
        run("none left", tmp_path / "few", **options, data__num_val=200)


def test_too_many_broken_images_end_the_command_in_one_line(tmp_path, cifar_arrays):
    root = tmp_path / "bad"
    write(root, {f"{k}.png": encoded(i) for k, i in enumerate(cifar_arrays["train_images"])})
    for k in range(6):
        (root / f"{k}.png").write_bytes(b"")
    flags = ["--config=configs/cpu.py", *FLAGS, f"--config.data.dataset=folder:{root}"]
    result = subprocess.run(
        [sys.executable, "-m", "jepa_jax.main", *flags, "--config.data.placement=stream"]
        + [f"--workdir={tmp_path / 'run'}", "--config.data.num_workers=1"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "5 of 400 images are broken" in line and "--config.data.max_broken" in line
    assert result.stdout.count("another image stands in") == 5
