"""The same recipe in PyTorch, process beside process in turns: ours, theirs, ours, theirs."""

import dataclasses
import itertools
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jepa_jax.benchmark.processes import ROOT, MeasurementError, process, run_json
from jepa_jax.benchmark.step import RATE, SIDE
from jepa_jax.benchmark.table import NOT_MEASURED, Table, number, with_range
from jepa_jax.benchmark.timing import spread
from jepa_jax.config import has_blur, num_local_crops
from jepa_jax.config_flags import GivenConfig
from jepa_jax.errors import ConfigError

PAIRS = 5
_REPEATS = 3
_SECONDS_OF_VALUE = 2
_OPTIMIZERS = ("lars", "sgd", "adamw")
_DTYPES = ("float32", "bfloat16")
# Two frameworks on one GPU, each of which would otherwise take the memory it does not use.
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the recipe in PyTorch."""

    mode: str
    dtype: str
    memory_format: str
    augment: str

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.augment}-{self.mode}-{self.memory_format}"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One comparison: a dtype, and how theirs and ours augment."""

    dtype: str
    augment: str

    @property
    def name(self) -> str:
        return f"{self.dtype}-{self.augment}"

    @property
    def our_augment(self) -> str:
        """The DataLoader stands beside our augmentation on the device."""
        return "none" if self.augment == "none" else "device"

    @property
    def screened_augment(self) -> str:
        """Behind a DataLoader the device runs the network alone."""
        return "device" if self.augment == "device" else "none"


VARIANTS = tuple(
    Variant(mode, dtype, memory_format, augment)
    for dtype, augment, mode, memory_format in itertools.product(
        _DTYPES,
        ("none", "device"),
        ("eager", "mixed", "compile"),
        ("channels_last", "contiguous"),
    )
)
RATIOS = (
    Ratio("float32", "device"),
    Ratio("bfloat16", "device"),
    Ratio("bfloat16", "loader"),
    Ratio("float32", "none"),
    Ratio("bfloat16", "none"),
)


def has_torch(python: str) -> bool:
    """Whether this interpreter can import PyTorch; it is not imported."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        with process(["-c", look], python=python) as child:
            child.communicate()
    except OSError as error:
        raise ConfigError(f"--peer-python={python} cannot be run: {error.strerror}") from error
    return child.returncode == 0


def require_torch(python: str) -> None:
    """ConfigError, one line, without PyTorch or without its side of the benchmark."""
    if not has_torch(python):
        raise ConfigError(
            f"PyTorch is not installed in {python}: pip install -e '.[parity]', or give "
            "--peer-python=PATH of an environment that has it"
        )
    if not (ROOT / "benchmarks").is_dir():
        raise ConfigError("--peer needs the repository: benchmarks/ is not part of the package")


def what_it_lacks(config: ConfigDict) -> str:
    """Why a config cannot be compared, in a few words; empty if it can."""
    if config.model.type != "resnet":
        return f"the peer has no {config.model.type}"
    if config.model.predictor:
        return "the peer has no predictor"
    if config.loss.type != "vicreg":
        return "the peer has no loss but vicreg"
    block = config.model.block
    return "" if block == "basic" else f"the peer has no {block} blocks"


class Peer:
    """Both sides of one config.

    Args:
      given: the config; an optimiser that the peer lacks is replaced by lars on both sides, more
        views than two by two of more images, and a blur is left out.
      folder: where the recipe for the other side is written.
      python: of the environment with PyTorch.
      num_images: synthetic images of either side.
      num_workers: of the DataLoader; the config's, but no more than there are cores.
      seconds_left: for the next process; None for as long as it takes.

    Raises:
      ConfigError: for a network that the peer lacks.
    """

    def __init__(
        self,
        given: GivenConfig,
        folder: pathlib.Path,
        *,
        python: str,
        num_images: int,
        num_workers: int,
        seconds_left: Callable[[], float | None] = lambda: None,
    ):
        if reason := what_it_lacks(given.config):
            raise ConfigError(f"this config cannot be compared with PyTorch: {reason}")
        self._given, self._python, self._seconds_left = given, python, seconds_left
        self._num_images, self._num_workers = num_images, num_workers
        name = given.config.optim.name
        self.optimizer = name if name in _OPTIMIZERS else "lars"
        num_views, notes = given.config.data.num_views, []
        if num_local_crops(given.config):
            notes.append("the local crops are left out on both sides: the peer has none")
        self.batch_size = given.config.data.batch_size * num_views // 2
        if self.optimizer != name:
            notes.append(f"{name} is replaced by lars on both sides: the peer has no {name}")
        if num_views != 2:
            notes.append(
                f"{num_views} views an image are replaced by 2 of {self.batch_size} images a step "
                "on both sides: the peer has no more"
            )
        if has_blur(given.config):
            notes.append("the blur is left out on both sides: the peer has none")
        self.note = "; ".join(notes)
        self._recipe = folder / "recipe.json"
        self._recipe.write_text(json.dumps(self.recipe(), indent=1) + "\n")

    def recipe(self) -> dict[str, Any]:
        """What the other side is told."""
        config = self._given.config
        model, optim = config.model, config.optim
        names = ("width", "stem_kernel", "stem_stride", "stem_padding", "stem_pool", "expand_dim")
        return {
            "batch_size": self.batch_size,
            "stage_sizes": list(model.stage_sizes),
            **{name: model[name] for name in names},
            "view_size": config.data.view_size or SIDE,
            "use_projector": model.use_projector,
            "proj_hidden_dim": model.proj_hidden_dim,
            "proj_output_dim": model.proj_output_dim,
            **{name: config.loss[name] for name in ("sim_coeff", "std_coeff", "cov_coeff")},
            "optimizer": self.optimizer,
            "lr": RATE,
            "weight_decay": optim.weight_decay,
            "momentum": optim.momentum,
            "num_images": self._num_images,
        }

    def ours(self, dtype: str, augment: str) -> dict[str, Any]:
        """`--measure-step` of this config in a process of its own."""
        changes = {
            "optim.name": self.optimizer,
            "data.num_views": 2,
            "data.num_local_crops": 0,
            "data.batch_size": self.batch_size,
            "augment.blur_prob": 0.0,
            "training.use_amp": dtype != "float32",
            "training.dtype": dtype,
        }
        return run_json(
            [
                *("-m", "jepa_jax.benchmark", "--measure-step", f"--augment={augment}"),
                f"--images={self._num_images}",
                f"--repeats={_REPEATS}",
                *self._given.flags(**changes),
            ],
            environment=_ENVIRONMENT,
            timeout=self._seconds_left(),
        )

    def theirs(self, variant: Variant, augment: str) -> dict[str, Any]:
        """The peer in a process of its own."""
        return run_json(
            [
                *("-m", "benchmarks.torch_peer", "--recipe", str(self._recipe)),
                *("--mode", variant.mode, "--dtype", variant.dtype),
                *("--memory-format", variant.memory_format, "--augment", augment),
                *("--workers", str(self._num_workers), "--warmup", "3"),
                *("--seconds", str(_SECONDS_OF_VALUE), "--repeats", str(_REPEATS)),
            ],
            python=self._python,
            environment=_ENVIRONMENT,
            timeout=self._seconds_left(),
        )

    def pair(self, ratio: Ratio, variant: Variant) -> dict[str, Any]:
        """Ours and then theirs, and the ratio of the medians of their images/s."""
        ours, theirs = (
            self.ours(ratio.dtype, ratio.our_augment),
            self.theirs(variant, ratio.augment),
        )
        speeds = {"ours": _speed(ours["step"]), "theirs": _speed(theirs)}
        return {
            **speeds,
            "ratio": speeds["ours"] / speeds["theirs"],
            "raw": {"ours": ours, "theirs": theirs},
        }


def _speed(side: Mapping[str, Any]) -> float:
    speeds = side["images_per_second"]
    return statistics.median(speeds["values"] if isinstance(speeds, Mapping) else speeds)


def fastest(screened: Mapping[Variant, Mapping[str, Any]], ratio: Ratio) -> Variant:
    """The variant with the most images/s that the ratio can be made with.

    Raises:
      MeasurementError: if none was measured.
    """
    wanted = (ratio.dtype, ratio.screened_augment)
    speeds = {at: _speed(side) for at, side in screened.items() if (at.dtype, at.augment) == wanted}
    if not speeds:
        raise MeasurementError(f"no variant of the peer ran in {ratio.dtype}")
    return max(speeds, key=speeds.get)


def summary(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spreads of both speeds and of their ratio over the pairs."""
    return {name: spread([pair[name] for pair in pairs]) for name in ("ours", "theirs", "ratio")}


def screening_table(screened: Mapping[Variant, Mapping[str, Any]], failed: Mapping[str, str]):
    """Images/s of every variant."""
    rows = [
        [at.dtype, at.augment, at.mode, at.memory_format, number(_speed(side))]
        for at, side in screened.items()
    ]
    rows += [[*name.split("-"), NOT_MEASURED] for name in failed]
    note = "; ".join(f"{name}: {text}" for name, text in failed.items())
    header = ("dtype", "augmentation", "mode", "memory format", "images/s")
    return Table("PyTorch's variants", header, rows, note)


def ratio_table(measured: Mapping[Ratio, Mapping[str, Any]], failed: Mapping[str, str], note: str):
    """Ours beside theirs, for every ratio."""
    rows = []
    for ratio, at in measured.items():
        figures = [with_range(at[name]) for name in ("ours", "theirs", "ratio")]
        variant = ", ".join(at["variant"].split("-")[2:])
        rows.append([ratio.dtype, ratio.augment, variant, *figures, str(at["ratio"]["n"])])
    rows += [[*name.split("-"), "-", *[NOT_MEASURED] * 3, "0"] for name in failed]
    header = ("dtype", "their augmentation", "their variant", "ours, images/s", "theirs, images/s")
    notes = [f"{name}: {text}" for name, text in failed.items()] + [note] * bool(note)
    return Table("Beside PyTorch", (*header, "ours / theirs", "pairs"), rows, "; ".join(notes))


def run_peer(peer: Peer, say=lambda text: None) -> dict[str, Any]:
    """Screens the variants, then measures every ratio in turns; what fails is named and left out.

    Returns:
      screening, ratios (with raw values) and failed, by name, the recipe, a note, the tables.
    """
    screened: dict[Variant, Any] = {}
    failed: dict[str, dict[str, str]] = {"screening": {}, "ratios": {}}
    for variant in VARIANTS:
        try:
            screened[variant] = peer.theirs(variant, variant.augment)
            say(f"{variant.name}: {number(_speed(screened[variant]))} images/s")
        except MeasurementError as error:
            failed["screening"][variant.name] = str(error)
    measured: dict[Ratio, Any] = {}
    for ratio in RATIOS:
        try:
            variant, pairs = fastest(screened, ratio), []
            for _ in range(PAIRS):
                pairs.append(peer.pair(ratio, variant))
                say(f"{ratio.name}: ours / theirs {pairs[-1]['ratio']:.3f}")
            measured[ratio] = {**summary(pairs), "variant": variant.name, "pairs": pairs}
        except MeasurementError as error:
            failed["ratios"][ratio.name] = str(error)
    return {
        "screening": {variant.name: side for variant, side in screened.items()},
        "ratios": {ratio.name: at for ratio, at in measured.items()},
        "failed": failed,
        "recipe": peer.recipe(),
        "note": peer.note,
        "tables": [
            screening_table(screened, failed["screening"]),
            ratio_table(measured, failed["ratios"], peer.note),
        ],
    }
