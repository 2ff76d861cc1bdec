"""From a run's folder back to live objects, and from there to files that need no jepa_jax."""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy
from flax import linen as nn
from ml_collections import ConfigDict

from jepa_jax import checkpoint
from jepa_jax.config import SCHEMA_VERSION, check_stored, create_encoder, feature_dim
from jepa_jax.encoders import is_own, model_type, vit_sizes
from jepa_jax.errors import CheckpointError, ConfigError, Interrupted
from jepa_jax.interop import TorchModel, encoder_tensors, projector_tensors, serialize_encoder
from jepa_jax.metrics import read_json, write_json
from jepa_jax.models import Encoder, EncoderFns, ModelFns
from jepa_jax.signals import stop_on_signals

# Of an export's card.json.
CARD_SCHEMA_VERSION = 1


def load_encoder(
    workdir: str | os.PathLike[str], *, encoder: nn.Module | EncoderFns | ModelFns | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """The pretrained encoder of a finished run, as its ridge probe saw it.

    Args:
      workdir: the folder of a run, or of imported weights.
      encoder: what was given to `train_and_evaluate` as `encoder`, if anything was.

    Returns:
      (encoder, variables): `encoder.apply(variables, images)` takes uint8 or [0, 1] images
      [B, H, W, 3], normalises them, and returns representations h [B, F], float32.

    Raises:
      CheckpointError: if the folder holds no finished run, or it is damaged.
    """
    workdir, stored = read_run(workdir)
    described = described_encoder(workdir, stored, encoder)
    _check_finished(workdir)
    return described, checkpoint.load_tree(workdir / "encoder")


def _check_finished(workdir: pathlib.Path) -> None:
    if not (workdir / "encoder").exists():
        raise CheckpointError(f"{workdir} holds no finished run: encoder is missing")


def read_run(workdir: str | os.PathLike[str]) -> tuple[pathlib.Path, dict[str, Any]]:
    """A run's folder, and what its config.json says.

    Raises:
      CheckpointError: if it is not the folder of a run, or damaged.
    """
    try:
        workdir = pathlib.Path(workdir).expanduser()
        is_there = (workdir / "config.json").exists()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, no such home, a NUL
        raise CheckpointError(f"{workdir} cannot be found: {error}") from error
    if not is_there:
        raise CheckpointError(f"{workdir} holds no run: config.json is missing")
    stored = read_json(workdir / "config.json")
    check_stored(workdir / "config.json", stored)
    return workdir, stored


def described_encoder(
    workdir: pathlib.Path,
    stored: dict[str, Any],
    encoder: nn.Module | EncoderFns | ModelFns | None = None,
) -> Encoder:
    """The encoder that a run's config.json describes, see `read_run`, without its variables.

    Raises:
      CheckpointError: if it cannot be described, or the run had an encoder of its own that is not
        given.
      ConfigError: if it names one by dotted path that cannot be had here.
    """
    if encoder is None and "encoder" in stored["custom"]:
        raise CheckpointError(
            f"{workdir} was trained with an encoder of its own, {stored['custom']['encoder']}: "
            "pass it in Python as encoder=..."
        )
    try:
        return create_encoder(ConfigDict(stored["config"]), encoder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # That one's own encoder is not here says nothing against the folder.
        if isinstance(error, ConfigError) and is_own(stored["config"]["model"]):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{workdir / 'config.json'} describes no encoder of this version ({reason})"
        ) from error


def save_import(model: TorchModel, folder: str | os.PathLike[str]) -> None:
    """Writes a model read by `import_torch` to a new folder, which then serves as a run's does.

    `load_encoder` and `--init_from` read it. A linear probe lies in probe.safetensors, as kernel
    [F, K] and bias [K].

    Raises:
      CheckpointError: if the folder exists and is not empty, or cannot be written.
    """
    resnet, projector = model.module.encoder, model.module.projector
    sizes = {
        "type": "resnet",
        "stage_sizes": list(resnet.stage_sizes),
        "width": resnet.width,
        "stem_kernel": resnet.stem_kernel,
        "stem_stride": resnet.stem_stride,
        "stem_padding": resnet.stem_padding,
        "stem_pool": resnet.stem_pool,
        "expand_dim": resnet.expand_dim,
        "block": resnet.block,
        "use_projector": projector is not None,
    }
    if projector is not None:
        sizes["proj_hidden_dim"] = projector.hidden_dim
        sizes["proj_output_dim"] = projector.output_dim
    side = 32 if resnet.stem_kernel == 3 else 224
    content = {
        "config": {
            "data": {"mean": list(model.mean), "std": list(model.std)},
            "model": sizes,
            "training": {"use_amp": False, "dtype": "float32"},
        },
        "dataset": {"image_shape": [side, side, 3]},
        "custom": {},
        "imported": {
            "source": model.source,
            "file": model.file,
            "sha256": model.sha256,
            "stem_padding": model.stem_padding,
            "ignored": list(model.ignored),
        },
        "schema_version": SCHEMA_VERSION,
    }
    with _new_folder(folder) as partial:
        checkpoint.save_tree(partial / "encoder", model.variables)
        if model.probe is not None:
            _save_tensors(partial / "probe.safetensors", model.probe)
        write_json(partial / "config.json", content)


def export_encoder(workdir: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Writes the encoder of a finished run to a new folder, for use without this package.

    encoder.safetensors: the weights, float32; those of a ResNet in torchvision's names and layouts,
      of a transformer in the package's own ('block0.qkv.kernel').
    projector.safetensors: those of the projector if there is one, in an nn.Sequential's names.
    probe.safetensors: the linear probe of imported weights, in an nn.Linear's.
    encoder.stablehlo: (tensors, images) -> h [b, F], tensors as loaded from encoder.safetensors,
      images float32 [b, H, W, 3] in [0, 1]; the normalisation is inside. For `jax.export`.
    card.json: preprocessing, architecture, the run's config and figures, versions, digests.

    Args:
      workdir: the folder of a run, or of imported weights.
      folder: is created; it may exist if it is empty.

    Raises:
      CheckpointError: if the run is not finished, is damaged or has an encoder of its own, or if
        the folder is not empty or cannot be written.
    """
    workdir, stored = read_run(workdir)
    _check_finished(workdir)
    if "encoder" in stored["custom"]:
        raise CheckpointError(
            f"{workdir} was trained with an encoder of its own, {stored['custom']['encoder']}: "
            "only the package's ResNet has names in PyTorch"
        )
    variables = checkpoint.load_tree(workdir / "encoder")
    described_encoder(workdir, stored)
    if is_own(stored["config"]["model"]):
        raise CheckpointError(
            f"{workdir} was trained with an encoder of its own, {stored['config']['model']['type']}"
            ": only the package's encoders are exported"
        )
    model = {**stored["config"]["model"], "use_projector": False}
    alone = {**stored, "config": {**stored["config"], "model": model}}
    encoder = described_encoder(workdir, alone)
    image_shape = stored["dataset"].get("image_shape")
    with _new_folder(folder) as partial:
        _save_tensors(partial / "encoder.safetensors", encoder_tensors(variables))
        if tensors := projector_tensors(variables):
            _save_tensors(partial / "projector.safetensors", tensors)
        if (workdir / "probe.safetensors").exists():
            probe = safetensors.numpy.load_file(workdir / "probe.safetensors")
            tensors = {"weight": probe["kernel"].T, "bias": probe["bias"]}
            _save_tensors(partial / "probe.safetensors", tensors)
        program = serialize_encoder(encoder, variables, image_shape)
        (partial / "encoder.stablehlo").write_bytes(program)
        files = sorted(partial.iterdir())
        card = {
            "schema_version": CARD_SCHEMA_VERSION,
            "preprocessing": {
                "mean": list(encoder.mean),
                "std": list(encoder.std),
                "range": [0.0, 1.0],
                "layout": {
                    "encoder.stablehlo": "NHWC",
                    "encoder.safetensors": _layout(stored["config"]),
                },
                "image_shape": list(image_shape),
            },
            "architecture": _architecture(stored["config"]),
            "config": stored["config"],
            "imported": stored.get("imported"),
            "metrics": _metrics(workdir),
            "versions": _versions(),
            "git": _git_revision(),
            "files": {file.name: _describe(file) for file in files},
        }
        write_json(partial / "card.json", card)


def _is_resnet(config: dict[str, Any]) -> bool:
    return model_type(config["model"]) == "resnet"


def _layout(config: dict[str, Any]) -> str:
    return "NCHW" if _is_resnet(config) else "NHWC"


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    model, training = config["model"], config["training"]
    block = model.get("block", "basic")
    names = ("stage_sizes", "width", "stem_kernel", "stem_stride", "stem_padding", "stem_pool")
    projector = None
    if model["use_projector"]:
        hidden = model["proj_hidden_dim"]
        projector = [hidden, hidden, model["proj_output_dim"]]
    if _is_resnet(config):
        sizes = {
            "type": f"ResNet of {block} blocks",
            "block": block,
            **{name: model[name] for name in names},
            "expand_dim": model.get("expand_dim", 0),
        }
    else:
        sizes = {"type": model_type(model), **vit_sizes(model)}
    return {
        **sizes,
        "feature_dim": feature_dim(model),
        "projector": projector,
        "compute_dtype": training["dtype"] if training["use_amp"] else "float32",
    }


def _metrics(workdir: pathlib.Path) -> Any:
    path = workdir / "summary.json"
    return read_json(path) if path.exists() else None


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "numpy", "safetensors")
    versions = {name: importlib.metadata.version(name) for name in packages}
    # Its own without the metadata: it may run from a checkout that was never installed.
    own = sys.modules[__package__].__version__
    return {"python": platform.python_version(), "jepa_jax": own, **versions}


def _git_revision() -> dict[str, Any] | None:
    """The revision of the package's own checkout; None where it lies in none."""
    here = pathlib.Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        # An installed package may lie below somebody else's checkout.
        git("ls-files", "--error-unmatch", here.name)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _describe(file: pathlib.Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _save_tensors(path: pathlib.Path, tensors: dict[str, Any]) -> None:
    # It writes the memory as it lies and knows nothing of strides: a transposed view would come
    # back as another matrix. "pt" is what PyTorch's own readers look for.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))


@contextlib.contextmanager
def _new_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A folder beside the wanted one, which takes its place when all is written, or goes.

    SIGINT and SIGTERM wait for what is being written: its threads cannot be stopped halfway.
    """
    partial = None
    try:
        folder = pathlib.Path(folder).expanduser().resolve()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists and is not an empty folder: give a new one")
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
        with stop_on_signals("interrupted; nothing was written") as stop:
            stop.deferring = True
            partial.mkdir(parents=True)
            yield partial
            if stop.signal_number:
                raise Interrupted(stop.message, stop.signal_number)
            if not folder.exists():
                os.replace(partial, folder)
            # The folder itself may be somebody's current one. What makes it readable comes last.
            last = ("config.json", "card.json")
            for path in sorted(partial.glob("*"), key=lambda path: path.name in last):
                os.replace(path, folder / path.name)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder} cannot be written: {reason}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
