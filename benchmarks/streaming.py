"""Streamed data: the same parameters, how fast, what it waits for, and how much memory.

    python -m benchmarks.streaming parity --num_images 5000 --epochs 1 --out parity.json
    python -m benchmarks.streaming throughput --num_images 5000 --workers 1,2,4 --out speed.json
    python -m benchmarks.streaming throughput --side 224 --encoding JPEG --num_images 2000
    python -m benchmarks.streaming records --side 224 --num_images 33500 --out records_5gb.json
    python -m benchmarks.streaming records --side 32 --num_images 1000000 --out records_1m.json

`parity` writes CIFAR-10's training images as PNGs in nested class folders and trains configs/cpu.py
on them, streamed and resident. `throughput` streams a folder by so many workers, several epochs
each. `records` has tfds write a record set and streams it once in random order, and tells speed and
memory by tenths of it. Images of a --side are noise, the same ones whenever they are made.
"""

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
from PIL import Image

from jepa_jax import device, load_dataset, train_and_evaluate
from jepa_jax.command import Parser, errors_as_lines
from jepa_jax.data import Records, prepared
from jepa_jax.errors import DataError
from jepa_jax.metrics import read_json

_SAMPLE_SECONDS = 0.25
# Images of a tfds example are few bytes of disk more than their files; a noisy PNG is not smaller.
_NUM_CLASSES = 10


def _encoded(image: np.ndarray, encoding: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(
        buffer, format=encoding, **({"quality": 90} if encoding == "JPEG" else {})
    )
    return buffer.getvalue()


def _noise(index: int, side: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), np.uint8)


def _write_folder(root: pathlib.Path, images: Any, labels: Any, encoding: str) -> None:
    """Files root/<class>/<tenth>/<number>."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / f"class{label}" / str(index % 10)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:07}.{encoding.lower()}").write_bytes(_encoded(image, encoding))


def _write_records(root: pathlib.Path, count: int, side: int, encoding: str) -> None:
    """The tfds dataset `noise`, as ArrayRecord."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered, shuffle

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(side, side, 3)),
            "label": tfds.features.ClassLabel(num_classes=_NUM_CLASSES),
        }
    )
    with registered.skip_registration():

        class Noise(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for index in range(count):
                    image = _encoded(_noise(index, side), encoding)
                    yield index, {"image": image, "label": index % _NUM_CLASSES}

    # Above that it shuffles on the disk, by TensorFlow.
    shuffle.MAX_MEM_BUFFER_SIZE = 2**50
    with prepared.quiet_tfds():
        Noise(data_dir=root).download_and_prepare(file_format="array_record")


# --- memory -------------------------------------------------------------------------------------


class _Memory:
    """Samples the memory of this process and of all below it, in a thread."""

    def __init__(self):
        self._process = psutil.Process()
        self._ended = threading.Event()
        self.peak = self.peak_since = {"rss": 0, "pss": 0}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def now(self) -> dict[str, int]:
        """Bytes: RSS counts what processes share once for each of them, PSS once in all."""
        found = {"rss": 0, "pss": 0}
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                info = process.memory_full_info()
            except psutil.Error:  # it has ended
                continue
            found["rss"] += info.rss
            found["pss"] += getattr(info, "pss", info.rss)
        return found

    def take_peak(self) -> dict[str, int]:
        """Since it was last taken."""
        peak, self.peak_since = self.peak_since, {"rss": 0, "pss": 0}
        return peak

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            now = self.now()
            self.peak = {kind: max(self.peak[kind], size) for kind, size in now.items()}
            self.peak_since = {k: max(self.peak_since[k], size) for k, size in now.items()}


# --- what is measured ---------------------------------------------------------------------------


def _parity(arguments: argparse.Namespace, root: pathlib.Path) -> dict[str, Any]:
    from configs import cpu

    cifar10 = load_dataset("cifar10")
    for split, count in (("train", arguments.num_images), ("test", arguments.num_images // 5)):
        images = getattr(cifar10, f"{split}_images")[:count]
        labels = getattr(cifar10, f"{split}_labels")[:count]
        _write_folder(root / "images" / split, images, labels, arguments.encoding)
    runs = {}
    for placement in ("stream", "device"):
        config = cpu.get_config()
        config.update_from_flattened_dict(
            {
                "data.dataset": f"folder:{root / 'images'}",
                "data.placement": placement,
                "data.num_workers": max(arguments.workers),
                "data.num_val": arguments.num_images // 10,
                "optim.epochs": arguments.epochs,
                "optim.warmup_epochs": min(config.optim.warmup_epochs, arguments.epochs),
                "logging.tqdm_silent": True,
            }
        )
        train_and_evaluate(config, root / placement)
        summary = read_json(root / placement / "summary.json")
        wanted = ("params_digest", "ridge_probe_acc", "images_per_second", "train_seconds")
        runs[placement] = {key: summary[key] for key in wanted}
    digests = {run["params_digest"] for run in runs.values()}
    return {"runs": runs, "same_parameters": len(digests) == 1}


def _throughput(arguments: argparse.Namespace, root: pathlib.Path) -> dict[str, Any]:
    count = arguments.num_images
    if arguments.side:
        images: Any = (_noise(index, arguments.side) for index in range(count))
        labels: Any = np.arange(count) % _NUM_CLASSES
    else:
        cifar10 = load_dataset("cifar10")
        images, labels = cifar10.train_images[:count], cifar10.train_labels[:count]
    _write_folder(root, images, labels, arguments.encoding)
    rows = []
    for num_workers in arguments.workers:
        dataset = load_dataset(
            f"folder:{root}", lazy=True, num_workers=num_workers, image_size=arguments.image_size
        )
        rows.append(_speed(dataset.train_images, arguments))
        print(json.dumps(rows[-1]), flush=True)
        dataset.train_images.close()
    return {"by_workers": rows}


def _order(count: int, batch_size: int, seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(count)
    return order[: count // batch_size * batch_size].reshape(-1, batch_size)


def _speed(records: Records, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images/s of several epochs after one to warm up, and what the time went to."""
    began = time.perf_counter()
    next(records.batches(_order(len(records), arguments.batch_size, 0)))
    first = time.perf_counter() - began
    speeds, before = [], None
    for seed in range(1 + arguments.repeats):
        order = _order(len(records), arguments.batch_size, seed)
        began = time.perf_counter()
        for _ in records.batches(order):
            pass
        if seed:
            speeds.append(order.size / (time.perf_counter() - began))
        else:
            before, whole = dict(records.workers.seconds), time.perf_counter()
    wall, workers = time.perf_counter() - whole, records.workers.num_workers
    spent = {name: seconds - before[name] for name, seconds in records.workers.seconds.items()}
    shares = {name: spent[name] / wall / workers for name in ("reading", "decoding")}
    shares["workers_idle"] = 1 - sum(shares.values())
    shares |= {f"parent_{name}": spent[name] / wall for name in ("waiting", "moving")}
    return {
        "num_workers": workers,
        "images_per_second": {
            "median": statistics.median(speeds),
            "min": min(speeds),
            "max": max(speeds),
            "n": len(speeds),
        },
        "shares": shares,
        "bottleneck": max(("reading", "decoding", "parent_moving"), key=shares.get),
        "seconds_to_first_batch": first,
    }


def _records(arguments: argparse.Namespace, root: pathlib.Path) -> dict[str, Any]:
    began = time.perf_counter()
    # By another process: it holds all of them in its memory, which is not what is measured.
    writing = (root, arguments.num_images, arguments.side, arguments.encoding)
    writer = multiprocessing.get_context("spawn").Process(target=_write_records, args=writing)
    writer.start()
    writer.join()
    if writer.exitcode:
        raise DataError(f"the records could not be written: exit code {writer.exitcode}")
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    written = time.perf_counter() - began
    with _Memory() as memory:
        at_start = memory.now()
        began = time.perf_counter()
        dataset = load_dataset(
            "noise",
            data_dir=str(root),
            lazy=True,
            num_workers=max(arguments.workers),
            image_size=arguments.image_size,
        )
        opened = time.perf_counter() - began
        tenths = list(_tenths(dataset.train_images, arguments.batch_size, memory))
        peak = memory.peak
    return {
        "record_bytes": size,
        "decoded_bytes": dataset.train_images.nbytes,
        "num_workers": dataset.train_images.workers.num_workers,
        "seconds_to_write": written,
        "seconds_to_open_and_read_labels": opened,
        "memory_before_bytes": at_start,
        "memory_peak_bytes": peak,
        "tenths": tenths,
    }


def _tenths(records: Records, batch_size: int, memory: _Memory) -> Iterator[dict[str, Any]]:
    order = _order(len(records), batch_size, 0)
    ends = [len(order) * tenth // 10 for tenth in range(1, 11)]
    memory.take_peak()
    began, start = time.perf_counter(), 0
    for done, _ in enumerate(records.batches(order), 1):
        if done == ends[0]:
            now = time.perf_counter()
            speed = (done - start) * batch_size / (now - began)
            row = {"images_per_second": speed, "memory_peak_bytes": memory.take_peak()}
            print(json.dumps(row), flush=True)
            yield row
            began, start = now, done
            ends.pop(0)


# --- the command --------------------------------------------------------------------------------

_WHAT = {"parity": _parity, "throughput": _throughput, "records": _records}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parse() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("what", choices=_WHAT)
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=0, help="of noise images; 0: CIFAR-10's own")
    parser.add_argument("--encoding", choices=("PNG", "JPEG", "WEBP"), default="PNG")
    parser.add_argument("--image_size", type=int, default=0, help="as config.data.image_size")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--workers", type=_numbers, default=[os.cpu_count()], help="1,2,4")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each throughput")
    parser.add_argument("--epochs", type=float, default=1.0, help="of parity's two runs")
    parser.add_argument("--folder", type=pathlib.Path, help="where to write the images; then kept")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.what == "records" and not arguments.side:
        parser.error("records needs a --side")
    return arguments


def main() -> None:
    """Writes the images, measures, and removes them."""
    arguments = _parse()
    root = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="jepa_jax_streaming_"))
    try:
        with errors_as_lines("interrupted; nothing was written"):
            found = _WHAT[arguments.what](arguments, root)
    finally:
        if not arguments.folder:
            shutil.rmtree(root)
    packages = ("jax", "grain", "numpy", "pillow", "tensorflow-datasets", "array_record")
    document = {
        "what": arguments.what,
        "command": f"python -m benchmarks.streaming {' '.join(sys.argv[1:])}",
        "environment": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            "device": device.describe(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "num_images": arguments.num_images,
        **found,
    }
    print(json.dumps(document, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(not found.get("same_parameters", True))


if __name__ == "__main__":
    main()
