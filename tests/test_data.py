"""Laws of the data room: one order, one result, whatever holds the images."""

import functools
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import threading
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jepa_jax import data
from jepa_jax.data import cifar10, load, prepared
from jepa_jax.data.cifar10 import LABEL_NAMES, write_cifar10
from jepa_jax.data.images import open_image
from jepa_jax.errors import ConfigError, DataError

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "cifar10_small.npz"


@pytest.fixture(scope="module")
def small():
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


@pytest.fixture
def root(tmp_path, small):
    """A data folder with a small but genuine cifar10."""
    write_cifar10(
        tmp_path,
        train=(small["train_images"][:60], small["train_labels"][:60]),
        test=(small["test_images"][:20], small["test_labels"][:20]),
    )
    return tmp_path


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 4, 5, 3), np.uint8)
    return images, rng.integers(0, 3, 37).astype(np.int32)


def version_folder(root):
    (info,) = root.glob("cifar10/*/dataset_info.json")
    return info.parent


def prepare_tiny(root, name, features, examples, supervised_keys=None, **splits):
    """Writes a tfds dataset `name` of the given features as ArrayRecord."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=features, supervised_keys=supervised_keys
                )

            def _split_generators(self, dl_manager):
                return {"train": iter(enumerate(examples))} | {
                    split: iter(enumerate(values)) for split, values in splits.items()
                }

            def _generate_examples(self):
                raise NotImplementedError

    Tiny.name = name
    with prepared.quiet_tfds():
        Tiny(data_dir=root).download_and_prepare(file_format="array_record")


def png(image):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


# Order


def test_epoch_order_is_a_prefix_of_a_permutation():
    order = data.epoch_order(jax.random.key(0), 23, 5)
    assert order.shape == (4, 5) and order.dtype == jnp.int32
    flat = np.asarray(order).ravel()
    assert len(set(flat.tolist())) == 20 and flat.min() >= 0 and flat.max() < 23


def test_epoch_order_is_a_function_of_the_key():
    first, again, other = (data.epoch_order(jax.random.key(s), 100, 10) for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_epoch_order_covers_all_images_when_the_batch_divides():
    flat = np.asarray(data.epoch_order(jax.random.key(3), 40, 8)).ravel()
    assert sorted(flat.tolist()) == list(range(40))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_epoch_order_refuses_a_batch_that_does_not_fit(batch_size):
    with pytest.raises(ConfigError, match=f"batch size {batch_size} .* 10 images"):
        data.epoch_order(jax.random.key(0), 10, batch_size)


# Resident equals streamed


@pytest.mark.parametrize("with_labels", [True, False])
def test_resident_equals_streamed_bit_for_bit(arrays, with_labels):
    images, labels = arrays
    labels = labels if with_labels else None
    order = data.epoch_order(jax.random.key(0), len(images), 8)
    streamed = list(data.stream_batches(images, labels, order))
    assert len(streamed) == len(order)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        resident_labels = None if labels is None else jnp.asarray(labels)
        for row, (x, y) in zip(order, streamed, strict=True):
            resident_x, resident_y = data.take(jnp.asarray(images), resident_labels, row)
            assert x.dtype == resident_x.dtype == jnp.uint8
            assert y.dtype == resident_y.dtype == jnp.int32
            assert (x == resident_x).all() and (y == resident_y).all()
            assert (np.asarray(x) == images[np.asarray(row)]).all()
            assert (np.asarray(y) == (-1 if labels is None else labels[np.asarray(row)])).all()


def test_records_equal_arrays(root):
    eager = data.load_dataset("cifar10", data_dir=str(root))
    lazy = data.load_dataset("cifar10", data_dir=str(root), lazy=True, num_workers=3)
    assert isinstance(lazy.train_images, data.Records)
    assert lazy.train_images.shape == eager.train_images.shape
    assert lazy.train_images.nbytes == eager.train_images.nbytes
    assert len(lazy.test_images) == 20 and lazy.image_shape == eager.image_shape == (32, 32, 3)
    for index in (slice(None), slice(3, 9), np.array([5, 1, 1, 59]), np.array([-1])):
        assert (lazy.train_images[index] == eager.train_images[index]).all()
    assert (lazy.train_labels == eager.train_labels).all()
    assert (lazy.test_labels == eager.test_labels).all()
    order = data.epoch_order(jax.random.key(1), 60, 16)
    for one, two in zip(
        data.stream_batches(eager.train_images, eager.train_labels, order),
        data.stream_batches(lazy.train_images, lazy.train_labels, order),
        strict=True,
    ):
        assert (one[0] == two[0]).all() and (one[1] == two[1]).all()
    with pytest.raises(IndexError):
        lazy.train_images[np.array([60])]


@pytest.mark.parametrize("lazy", [False, True])
def test_fewer_training_images_are_a_part_of_more_with_their_labels(root, lazy):
    whole = data.load_dataset("cifar10", data_dir=str(root))
    dataset = data.load_dataset("cifar10", data_dir=str(root), lazy=lazy)
    assert dataset.with_num_train(0) is dataset and dataset.with_num_train(60) is dataset
    known = {image.tobytes(): n for n, image in enumerate(whole.train_images)}
    places = {}
    for num_train in (20, 40):
        fewer = dataset.with_num_train(num_train)
        assert fewer.train_images.shape == (num_train, 32, 32, 3)
        assert fewer.train_images.nbytes == num_train * 32 * 32 * 3
        found = [known[image.tobytes()] for image in fewer.train_images[:]]
        assert found == sorted(set(found))
        assert (fewer.train_labels == whole.train_labels[found]).all()
        assert fewer.test_images is dataset.test_images
        places[num_train] = found
        again = fewer.with_num_train(num_train)
        assert (again.train_images[:] == fewer.train_images[:]).all()
    assert set(places[20]) < set(places[40])
    assert places[20] != list(range(20))  # a dataset may be sorted by class
    with pytest.raises(ConfigError, match="num_train .61. is more than the 60 training images"):
        dataset.with_num_train(61)


def streaming_threads():
    return [thread for thread in threading.enumerate() if thread.name == "stream_batches"]


@pytest.mark.parametrize("taken", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_closing_the_stream_early_ends_its_thread(arrays, taken, prefetch):
    batches = data.stream_batches(*arrays, np.zeros((50, 2), np.int32), prefetch=prefetch)
    for _ in range(taken):
        next(batches)
    assert len(streaming_threads()) == 1
    batches.close()
    assert not streaming_threads()


def test_the_stream_runs_ahead_by_no_more_than_prefetch(arrays):
    images, labels = arrays
    gathered = []
    third = threading.Event()

    class Counting:
        def __getitem__(self, index):
            gathered.append(index)
            if len(gathered) == 4:
                third.set()
            return images[index]

    batches = data.stream_batches(Counting(), labels, np.zeros((50, 2), np.int32), prefetch=2)
    next(batches)
    # One taken, two waiting, one in the thread's hand: without this bound memory would fill.
    assert third.wait(10)
    assert not threading.Event().wait(0.2) and len(gathered) == 4
    batches.close()


def test_an_error_in_the_thread_reaches_the_consumer(arrays):
    images, labels = arrays
    batches = data.stream_batches(images, labels, np.array([[0, 1], [2, 99]]))
    next(batches)
    with pytest.raises(IndexError, match="99"):
        next(batches)
    assert not streaming_threads()


# Placement


def test_choose_placement(monkeypatch):
    from jepa_jax.data import batches

    monkeypatch.setattr(batches.device, "memory_limit", lambda: 300)
    assert data.choose_placement("auto", 100) == "device"
    assert data.choose_placement("auto", 101) == "stream"
    assert data.choose_placement("stream", 1) == "stream"
    assert data.choose_placement("device", 10**15) == "device"
    with pytest.raises(ConfigError, match="'gpu'"):
        data.choose_placement("gpu", 1)


def test_placement_knows_the_memory_of_this_machine():
    assert data.choose_placement("auto", 1) == "device"
    assert data.choose_placement("auto", 2**60) == "stream"


# Arrays of one's own


def test_from_arrays(arrays):
    images, labels = arrays
    dataset = data.from_arrays(images, labels, images[:5], labels[:5], label_names=("a", "b", "c"))
    assert dataset.num_classes == 3 and dataset.image_shape == (4, 5, 3)
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    assert (dataset.train_images == images).all() and dataset.label_names == ("a", "b", "c")
    assert data.from_arrays(images, labels.astype(np.uint8)).label_names == ("0", "1", "2")


def test_from_arrays_without_labels(arrays):
    images, labels = arrays
    assert data.from_arrays(images).train_labels is None
    assert data.from_arrays(images).num_classes == 0
    partly = np.where(np.arange(len(labels)) % 2 == 0, -1, labels)
    assert data.from_arrays(images, partly).num_classes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 8, 8, 3), np.float32)}, r"float32 \[4, 8, 8, 3\]"),
        ({"images": np.zeros((4, 8, 8), np.uint8)}, r"uint8 \[4, 8, 8\]"),
        ({"images": np.zeros((4, 8, 8, 1), np.uint8)}, r"uint8 \[4, 8, 8, 1\]"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, r"\[0, 8, 8, 3\]"),
        ({"labels": np.zeros(3, np.int64)}, r"integers \[4\], got int64 \[3\]"),
        ({"labels": np.zeros(4)}, "float64"),
        ({"labels": np.array([0, 1, 3, 3])}, "2 does not occur"),
        ({"labels": np.array([0, -2, 1, 1])}, "got -2"),
        ({"label_names": ("only",)}, "1 label_names for 2 classes"),
        ({"test_images": np.zeros((2, 9, 8, 3), np.uint8)}, "differ in size"),
        ({"test_images": None}, "test_labels without test_images"),
        ({"test_labels": np.array([0, 2])}, "has class 2"),
    ],
)
def test_from_arrays_names_what_is_wrong(change, message):
    good = {
        "images": np.zeros((4, 8, 8, 3), np.uint8),
        "labels": np.array([0, 1, 1, 0]),
        "test_images": np.zeros((2, 8, 8, 3), np.uint8),
        "test_labels": np.array([0, 1]),
    }
    data.from_arrays(**good)
    with pytest.raises(DataError, match=message):
        data.from_arrays(**(good | change))


# The data folder and the cache


def test_data_dir_order(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EBJEPA_DSETS", raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert data.data_dir() == tmp_path / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert data.data_dir() == tmp_path / "tfds"
    monkeypatch.setenv("EBJEPA_DSETS", "~/dsets")
    assert data.data_dir() == tmp_path / "dsets"
    assert data.data_dir("~/mine") == tmp_path / "mine"


def test_second_load_comes_from_the_cache(root, monkeypatch):
    first = data.load_dataset("cifar10", data_dir=str(root))
    monkeypatch.setattr(load, "_open", lambda *_: pytest.fail("read the records again"))
    second = data.load_dataset("cifar10", data_dir=str(root))
    assert (first.train_images == second.train_images).all()
    assert (first.test_labels == second.test_labels).all()
    assert first.label_names == second.label_names == LABEL_NAMES


def test_lazy_load_caches_the_labels(root, monkeypatch):
    first = data.load_dataset("cifar10", data_dir=str(root), lazy=True)
    monkeypatch.setattr(load, "_read_all", lambda *_, **__: pytest.fail("scanned again"))
    second = data.load_dataset("cifar10", data_dir=str(root), lazy=True)
    assert (first.train_labels == second.train_labels).all()


def damage_by_flipping(path):
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def damage_by_truncating(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [damage_by_flipping, damage_by_truncating, os.remove])
@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy", "index.json"])
def test_a_damaged_cache_is_rebuilt(root, damage, name):
    first = data.load_dataset("cifar10", data_dir=str(root))
    expected = {k: np.array(getattr(first, k)) for k in ("train_images", "test_labels")}
    damage(version_folder(root) / "jepa_jax_cache" / name)
    # The cache is mapped, so that `first` may show the damage: compare with the copies.
    again = data.load_dataset("cifar10", data_dir=str(root))
    for key, value in expected.items():
        assert (getattr(again, key) == value).all()
    assert load._read_cache(version_folder(root), with_images=True) is not None


def test_a_cache_of_other_records_is_rebuilt(root, small, tmp_path):
    data.load_dataset("cifar10", data_dir=str(root))
    other = tmp_path / "other"
    some = (small["train_images"][60:90], small["train_labels"][60:90])
    folder = write_cifar10(other, train=some, test=some)
    for file in folder.iterdir():
        os.replace(file, version_folder(root) / file.name)
    dataset = data.load_dataset("cifar10", data_dir=str(root))
    assert len(dataset.train_images) == 30
    assert sorted(dataset.train_labels) == sorted(some[1])


def test_the_cache_survives_a_kill_between_its_files(root):
    """New arrays with an old index, and a leftover of the writer: rebuilt, and cleaned up."""
    data.load_dataset("cifar10", data_dir=str(root))
    cache = version_folder(root) / "jepa_jax_cache"
    np.save(cache / "train_labels.npy", np.zeros(60, np.int32))
    (cache / "train_images.npy.123.tmp").write_bytes(b"half")
    assert data.load_dataset("cifar10", data_dir=str(root)).train_labels.any()
    assert not list(cache.glob("*.tmp"))


def test_a_folder_without_room_for_a_cache_does_without(root, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(load, "_replacing", refuse)
    assert len(data.load_dataset("cifar10", data_dir=str(root)).train_images) == 60


# Prepared datasets that are not whole


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("damage", [truncate, os.remove])
@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_shards_are_one_line(root, lazy, damage, split):
    data.load_dataset("cifar10", data_dir=str(root), lazy=lazy)  # A cache must not hide it.
    (shard,) = version_folder(root).glob(f"cifar10-{split}*")
    damage(shard)
    with pytest.raises(DataError, match="is damaged .* delete that folder and run again") as caught:
        data.load_dataset("cifar10", data_dir=str(root), lazy=lazy)
    assert str(version_folder(root)) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_byte_in_a_record_is_one_line(root):
    (shard,) = version_folder(root).glob("cifar10-train*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        data.load_dataset("cifar10", data_dir=str(root))


def test_a_wrong_count_is_one_line(root):
    info = version_folder(root) / "dataset_info.json"
    info.write_text(info.read_text().replace('"60"', '"61"'))
    with pytest.raises(DataError, match="has 60 records, not 61"):
        data.load_dataset("cifar10", data_dir=str(root))


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_metadata_is_one_line(root, name):
    (version_folder(root) / name).write_text('{"half": ')
    with pytest.raises(DataError, match="is damaged"):
        data.load_dataset("cifar10", data_dir=str(root))


# Other tfds datasets


def test_another_prepared_dataset_with_grey_images_and_validation(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "digit": tfds.features.Image(shape=(6, 7, 1)),
            "mask": tfds.features.Image(shape=(None, None, 3)),
            "kind": tfds.features.ClassLabel(names=["no", "yes"]),
        }
    )
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (9, 6, 7), np.uint8)
    examples = [
        {"digit": png(image), "mask": png(image[: i + 1]), "kind": i % 2}
        for i, image in enumerate(grey)
    ]
    keys = ("digit", "kind")
    prepare_tiny(tmp_path, "tiny", features, examples, keys, validation=examples[:4])
    for lazy in (False, True):
        dataset = data.load_dataset("tiny", data_dir=str(tmp_path), lazy=lazy)
        assert dataset.label_names == ("no", "yes") and len(dataset.test_images) == 4
        images = dataset.train_images[:]
        assert images.shape == (9, 6, 7, 3)
        assert (images == images[..., :1]).all()
        assert {image[..., 0].tobytes() for image in images} == {g.tobytes() for g in grey}
    assert data.load_dataset("tiny:1.0.0", data_dir=str(tmp_path)).num_classes == 2


def test_validation_stands_in_for_a_test_split_without_labels(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
    )
    image = png(np.zeros((4, 4, 3), np.uint8))
    labelled, unlabelled = [{"image": image, "label": label} for label in (1, -1)]
    prepare_tiny(tmp_path, "hidden", features, [labelled], test=[unlabelled], validation=[labelled])
    assert data.load_dataset("hidden", data_dir=str(tmp_path)).test_labels.tolist() == [1]


def test_a_dataset_without_a_train_split_is_refused(root):
    info = version_folder(root) / "dataset_info.json"
    info.write_text(info.read_text().replace('"train"', '"unlabelled"'))
    with pytest.raises(DataError, match="has no split 'train'"):
        data.load_dataset("cifar10", data_dir=str(root))


def test_a_config_is_named_when_there_are_several(tmp_path, small):
    some = (small["test_images"][:3], small["test_labels"][:3])
    folder = write_cifar10(tmp_path, train=some, test=some)
    for config in ("left", "right"):
        target = tmp_path / "pair" / config / "1.0.0"
        target.mkdir(parents=True)
        for file in folder.iterdir():
            os.link(file, target / file.name)
    assert len(data.load_dataset("pair/left", data_dir=str(tmp_path)).train_images) == 3
    with pytest.raises(DataError, match="pair/left, pair/right"):
        data.load_dataset("pair", data_dir=str(tmp_path))


def test_the_newest_version_is_read(tmp_path, small):
    for version, count in (("2.0.0", 3), ("10.0.0", 5)):
        some = (small["test_images"][:count], small["test_labels"][:count])
        folder = write_cifar10(tmp_path / version, train=some, test=some)
        (tmp_path / "many").mkdir(exist_ok=True)
        os.rename(folder, tmp_path / "many" / version)
    assert len(data.load_dataset("many", data_dir=str(tmp_path)).train_images) == 5
    assert len(data.load_dataset("many:2.0.0", data_dir=str(tmp_path)).train_images) == 3


def test_images_of_mixed_sizes_are_refused(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
    )
    sizes = [(4, 4), (4, 4), (5, 4)]
    examples = [{"image": png(np.zeros((*size, 3), np.uint8)), "label": 0} for size in sizes]
    prepare_tiny(tmp_path, "mixed", features, examples)
    with pytest.raises(DataError, match=r"differ in size .*\(5, 4, 3\)"):
        data.load_dataset("mixed", data_dir=str(tmp_path))


def write_with_png(root, content):
    """A cifar10 whose images were all written as these bytes."""
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), [0] * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "_png", lambda image: content)
        write_cifar10(root, (images, labels), (images, labels))


def test_a_record_that_claims_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 9400, 9400, 8, 2, 0, 0, 0)  # below Pillow's own limit
    chunk = struct.pack(">I4s", len(header), b"IHDR") + header
    png = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    # Pillow reads on to where the pixels begin.
    png += struct.pack(">I4s", 16, b"IDAT") + bytes(20)
    write_with_png(tmp_path, png)
    assert_damaged(tmp_path, "an image of 9400x9400 pixels")


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_record_that_is_no_png_or_jpeg_is_one_line(tmp_path, content):
    write_with_png(tmp_path, content)
    assert_damaged(tmp_path, "is damaged (")


def assert_damaged(root, reason):
    for lazy in (False, True):
        with pytest.raises(DataError, match="is damaged") as caught:
            data.load_dataset("cifar10", data_dir=str(root), lazy=lazy)
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_jpegs_are_opened_too():
    image = np.full((8, 8, 3), 100, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG")
    np.testing.assert_array_equal(open_image(buffer.getvalue()), image)


def test_a_label_of_no_class_is_damage(root):
    names = version_folder(root) / "label.labels.txt"
    names.write_text("\n".join(LABEL_NAMES[:3]))
    assert_damaged(root, "of 3 classes")


def test_metadata_nested_without_end_is_one_line(root):
    (version_folder(root) / "dataset_info.json").write_text("[" * 100_000)
    assert_damaged(root, "recursion")


def test_a_data_folder_of_nobody_is_one_line():
    with pytest.raises(DataError, match="the data folder ~nobody-here/x cannot be found"):
        data.data_dir("~nobody-here/x")


def test_a_dataset_without_images_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    features = {"label": tfds.features.ClassLabel(num_classes=2), "text": tfds.features.Text()}
    features = tfds.features.FeaturesDict(features)
    prepare_tiny(tmp_path, "lacking", features, [{"label": 0, "text": "a"}])
    with pytest.raises(DataError, match="has 0 .* its image .*features are .*text"):
        data.load_dataset("lacking", data_dir=str(tmp_path))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_dataset_without_class_labels_is_read_without_them(tmp_path, lazy):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    examples = [{"image": png(image)} for image in images]
    prepare_tiny(tmp_path, "unlabelled", features, examples, test=examples[:2])
    for _ in range(2):  # the second time from the cache
        dataset = data.load_dataset("unlabelled", data_dir=str(tmp_path), lazy=lazy)
        assert dataset.train_labels is None and dataset.test_labels is None
        assert dataset.num_classes == 0 and len(dataset.test_images) == 2
        found = {image.tobytes() for image in dataset.train_images[:]}
        assert found == {image.tobytes() for image in images}


def test_a_dataset_with_two_images_and_no_supervised_one_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    features = {"left": tfds.features.Image(), "right": tfds.features.Image()}
    features |= {"label": tfds.features.ClassLabel(num_classes=2)}
    image = png(np.zeros((4, 4, 3), np.uint8))
    example = {"left": image, "right": image, "label": 1}
    prepare_tiny(tmp_path, "stereo", tfds.features.FeaturesDict(features), [example])
    with pytest.raises(DataError, match="has 2 .* its image"):
        data.load_dataset("stereo", data_dir=str(tmp_path))


def test_a_known_dataset_that_is_not_prepared_names_the_command(tmp_path):
    with pytest.raises(DataError) as caught:
        data.load_dataset("mnist", data_dir=str(tmp_path))
    assert f"tfds.builder('mnist', data_dir='{tmp_path}')" in str(caught.value)
    assert "file_format='array_record'" in str(caught.value)


def test_a_tfrecord_copy_of_another_dataset_names_the_command_beside_it(tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    with pytest.raises(DataError, match="only as tfrecord") as caught:
        data.load_dataset("mnist", data_dir=str(tmp_path))
    assert f"data_dir='{tmp_path / 'array_record'}'" in str(caught.value)


def test_an_unknown_name_gets_the_nearest_one(tmp_path):
    with pytest.raises(DataError, match="did you mean cifar100?"):
        data.load_dataset("cifar_100", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="no dataset 'qqqqqq'"):
        data.load_dataset("qqqqqq", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="is not a dataset name"):
        data.load_dataset("../cifar10", data_dir=str(tmp_path))


# Import


def test_import_starts_nothing():
    code = (
        "import sys, jepa_jax.data\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    here = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=here)


# Splits, sizes and broken records of tfds


@pytest.fixture
def semi(tmp_path):
    """Like STL-10: 6 labelled images, 5 whose label 0 must not be used, 3 to test on."""
    import tensorflow_datasets as tfds

    names = {"label": tfds.features.ClassLabel(num_classes=3), "image": tfds.features.Image()}
    shades = iter(range(100))

    def examples(count):
        return [
            {"image": png(np.full((8, 8, 3), next(shades), np.uint8)), "label": k % 3}
            for k in range(count)
        ]

    splits = {"unlabelled": examples(5), "test": examples(3), "extra": examples(4)}
    features = tfds.features.FeaturesDict(names)
    prepare_tiny(tmp_path, "semi", features, examples(6), **splits)
    return tmp_path


def shades_of(images):
    return [int(image[0, 0, 0]) for image in images[:]]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_second_split_is_trained_on_without_its_labels(semi, lazy):
    load = functools.partial(data.load_dataset, "semi", data_dir=str(semi), lazy=lazy)
    usual = load()
    assert len(usual.train_images) == 6 and (usual.train_labels >= 0).all()
    for _ in range(2):  # the second time from the cache, beside that of the usual splits
        both = load(unlabelled_split="unlabelled")
        assert shades_of(both.train_images)[:6] == shades_of(usual.train_images)
        assert sorted(shades_of(both.train_images)[6:]) == [0, 1, 2, 3, 4]
        assert both.train_labels[:6].tolist() == usual.train_labels.tolist()
        assert both.train_labels[6:].tolist() == 5 * [-1]
        assert shades_of(both.test_images) == shades_of(usual.test_images)
        other = load(train_split="extra", test_split="train")
        assert sorted(shades_of(other.train_images)) == [8, 9, 10, 11]
        assert shades_of(other.test_images) == shades_of(usual.train_images)
        assert other.test_labels.tolist() == usual.train_labels.tolist()
        assert shades_of(load().train_images) == shades_of(usual.train_images)


@pytest.mark.parametrize("split", ["train_split", "unlabelled_split", "test_split"])
def test_a_split_that_is_not_there_is_one_line(semi, split):
    with pytest.raises(DataError, match="no split 'trian'; there are: extra, test, train, unlab"):
        data.load_dataset("semi", data_dir=str(semi), **{split: "trian"})


@pytest.mark.parametrize("lazy", [False, True])
def test_records_are_resized_like_files(root, lazy):
    as_they_are = data.load_dataset("cifar10", data_dir=str(root))
    for _ in range(2):
        resized = data.load_dataset("cifar10", data_dir=str(root), lazy=lazy, image_size=20)
        for images, found in (
            (as_they_are.train_images, resized.train_images),
            (as_they_are.test_images, resized.test_images),
        ):
            expected = [Image.fromarray(i).resize((20, 20), Image.BILINEAR) for i in images]
            np.testing.assert_array_equal(found[:], np.stack(expected))
        assert (resized.train_labels == as_they_are.train_labels).all()


def test_streamed_records_equal_resident_ones(root):
    eager = data.load_dataset("cifar10", data_dir=str(root))
    lazy = data.load_dataset("cifar10", data_dir=str(root), lazy=True, num_workers=2)
    rows = np.random.default_rng(0).integers(0, 60, (7, 9))
    for row, batch in zip(rows, lazy.train_images.batches(rows), strict=True):
        np.testing.assert_array_equal(batch, eager.train_images[row])
    lazy.train_images.close()


@pytest.mark.parametrize("lazy", [False, True])
def test_a_broken_record_is_replaced_and_remembered_in_the_cache(tmp_path, lazy, capsys):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
    )
    examples = [{"image": png(np.full((8, 8, 3), k, np.uint8)), "label": k % 2} for k in range(12)]
    examples[5]["image"] = examples[5]["image"][:50]
    prepare_tiny(tmp_path, "some", features, examples)
    load = functools.partial(data.load_dataset, "some", data_dir=str(tmp_path), lazy=lazy)
    found = []
    for _ in range(2):
        dataset = load(max_broken=0.1)
        found.append(shades_of(dataset.train_images))
        assert "broken" in capsys.readouterr().out
        assert [shade % 2 for shade in found[-1]] == dataset.train_labels.tolist()
    assert found[0] == found[1] and len(set(found[0])) == 11 and 5 not in found[0]
    with pytest.raises(DataError, match="is damaged .1 of 12 images are broken"):
        load(max_broken=0.05).train_images[:]
