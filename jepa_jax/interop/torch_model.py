"""From a PyTorch checkpoint to this package's model: which project wrote it, and what is in it.

Known are the layouts of facebookresearch/eb_jepa, vturrisi/solo-learn and torchvision, for ResNets
of basic blocks (ResNet-18, -34) and of bottlenecks (ResNet-50, -101, -152), and for narrower or
shorter ones.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.errors import CheckpointError, ConfigError
from jepa_jax.interop.torch_file import read_file, shown
from jepa_jax.interop.torch_names import from_torch, to_torch
from jepa_jax.models import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    Encoder,
    ImageJEPA,
    Projector,
    ResNet,
    block_expansion,
    linen_model,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# solo-learn's constants for CIFAR-10: its mean is the usual one.
SOLO_LEARN_STD = (0.2470, 0.2435, 0.2616)

# Where a checkpoint keeps the model's tensors; the file itself comes first.
_CONTAINERS = ("model_state_dict", "state_dict", "model")
# ResNet-152, the largest of the paper, has 50.
_MOST_BLOCKS = 100
# Put before every name by DistributedDataParallel and by torch.compile.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


@dataclasses.dataclass(frozen=True)
class _Source:
    """How a project names an encoder, its linear probe, and how it pads a 3x3 stem."""

    name: str
    encoder: str
    probe: str | None
    stem_padding: int
    std: tuple[float, ...] = CIFAR10_STD
    has_projector: bool = True
    # Whether tensors outside the known parts, such as a momentum encoder, may be there.
    may_hold_more: bool = False


# In this order: each prefix is the beginning of the one above it.
_SOURCES = (
    _Source("eb_jepa", "backbone.backbone.", None, 2),
    _Source("solo-learn", "backbone.", "classifier.", 2, SOLO_LEARN_STD, may_hold_more=True),
    # Its files of 2021 and before.
    _Source("solo-learn", "encoder.", "classifier.", 2, SOLO_LEARN_STD, may_hold_more=True),
    _Source("torchvision", "", "fc.", 1, has_projector=False),
)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchModel:
    """A model read from a PyTorch or safetensors file.

    `model.encoder.apply(model.variables, images)` gives representations h [B, F].

    Attributes:
      source: the project whose names it has: 'eb_jepa', 'solo-learn' or 'torchvision'.
      module: the model, with a projector if the file has one.
      variables: {'params': ..., 'batch_stats': ...}, numpy arrays, float32.
      mean: of the images it was trained on, per channel; see `import_torch`.
      std: likewise.
      probe: {'kernel': [F, K], 'bias': [K]} of the linear probe or head, if the file has one.
      ignored: names of the file's tensors that are not part of the above, such as a momentum
        encoder's.
      dtypes: in which the file stores the model's tensors; all are float32 now.
      file: the file's name.
      sha256: of its bytes.
    """

    source: str
    module: ImageJEPA
    variables: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    probe: dict[str, np.ndarray] | None
    ignored: tuple[str, ...]
    dtypes: tuple[str, ...]
    file: str
    sha256: str

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The model with its normalisation: takes uint8 or [0, 1] images [B, H, W, 3]."""
        return Encoder(linen_model(self.module), self.mean, self.std)

    @property
    def stem_padding(self) -> int:
        """Zeros on each side of the image in the first convolution."""
        return self.module.encoder.stem_padding


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """The tensors of a file's model, under the names of the package's own table.

    Attributes:
      source: the project.
      wrapper: what DistributedDataParallel or torch.compile put before every name.
      known: 'encoder.*', 'projector.*' and 'probe.*' to arrays.
      own: the same names to the file's own.
      others: the file's own names of the rest.
    """

    source: _Source
    wrapper: str
    known: dict[str, np.ndarray]
    own: dict[str, str]
    others: tuple[str, ...]

    def own_name(self, name: str) -> str:
        """The file's own name, also of what it does not have."""
        part, _, rest = name.partition(".")
        prefixes = {"encoder": self.source.encoder, "probe": self.source.probe or "classifier."}
        return self.own.get(name, f"{self.wrapper}{prefixes.get(part, f'{part}.')}{rest}")

    def projector(self) -> "_Tensors":
        """The projector's alone."""
        known = {name: a for name, a in self.known.items() if name.startswith("projector.")}
        return dataclasses.replace(self, known=known)

    def without_projector(self) -> "_Tensors":
        """With the projector's among the others."""
        dropped = self.projector().known
        known = {name: array for name, array in self.known.items() if name not in dropped}
        others = (*self.others, *(self.own[name] for name in dropped))
        return dataclasses.replace(self, known=known, others=others)


def import_torch(
    path: str | os.PathLike[str],
    *,
    stem_padding: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> TorchModel:
    """Reads a ResNet from a file of torch.save or safetensors, without PyTorch.

    Nothing in the file is run. Width, blocks, projector and probe follow from its tensors;
    float16, bfloat16 and float64 become float32. Weights do not tell everything: a 3x3 stem is
    taken to have stride 1 and no max-pool, a 7x7 stem to be that of the ImageNet network (stride
    2, padding 3, max-pool), and the stride of a bottleneck to be on its 3x3 convolution, as
    torchvision has it.

    Args:
      path: .pth, .pt, .ckpt, .pth.tar (torch.save of PyTorch 1.6 and newer) or .safetensors.
      stem_padding: of a 3x3 stem, 1 or 2; by default 2 for eb_jepa and solo-learn, as they have
        it, and 1, the usual CIFAR stem, for torchvision's names.
      mean: of the training images per channel, in [0, 1]; by default CIFAR-10's as eb_jepa or
        solo-learn has them, or ImageNet's for a 7x7 stem.
      std: likewise.

    Raises:
      CheckpointError: if the file is missing, damaged, holds anything but tensors and plain
        containers, or its tensors are not those of a known model; names them.
      ConfigError: if an argument is out of range.
    """
    path = pathlib.Path(path)
    content, digest = read_file(path)
    tensors = _find_tensors(path, content)
    encoder = _infer_encoder(path, tensors, stem_padding)
    projector = _infer_projector(tensors)
    if projector and tensors.source.may_hold_more:
        # Other methods have projectors of other forms.
        wanted = _wanted(ImageJEPA(encoder, projector), "projector.")
        if _differences(tensors.projector(), wanted):
            tensors, projector = tensors.without_projector(), None
    module = ImageJEPA(encoder, projector)
    wanted = _wanted(module)
    if any(name.startswith("probe.") for name in tensors.known):
        num_classes = _rows(tensors, "probe.weight")
        last_stage = encoder.width * 2 ** (len(encoder.stage_sizes) - 1)
        num_features = encoder.expand_dim or block_expansion(encoder.block) * last_stage
        wanted |= {"probe.weight": (num_classes, num_features), "probe.bias": (num_classes,)}
    if problems := _differences(tensors, wanted):
        raise CheckpointError(
            f"{path} has the names of a ResNet of {tensors.source.name} but is none that is known: "
            f"{'; '.join(problems)}"
        )
    # Views of one storage are legal, but a thousand names for one tensor would fill the memory.
    if sum(tensors.known[name].nbytes for name in wanted) > 2 * path.expanduser().stat().st_size:
        raise CheckpointError(f"{path} has more weights than bytes: its tensors share them")
    found = {name: _to_float32(tensors.known[name]) for name in wanted}
    for name, array in found.items():
        if not np.isfinite(array).all() or (name.endswith("running_var") and array.min() < 0):
            wrong = "negative" if np.isfinite(array).all() else "not finite in float32"
            raise CheckpointError(f"{path}: {shown(tensors.own_name(name))} is {wrong}")
    is_small = encoder.stem_kernel == 3
    return TorchModel(
        source=tensors.source.name,
        module=module,
        variables=from_torch(found, _template(module)),
        mean=_channels("mean", mean, CIFAR10_MEAN if is_small else IMAGENET_MEAN),
        std=_channels("std", std, tensors.source.std if is_small else IMAGENET_STD),
        probe=_probe(found),
        ignored=tensors.others,
        dtypes=tuple(sorted({tensors.known[name].dtype.name for name in wanted})),
        file=path.name,
        sha256=digest,
    )


# --- which project wrote it ----------------------------------------------------------------------


def _find_tensors(path: pathlib.Path, content: Any) -> _Tensors:
    """The model's tensors, wherever the checkpoint keeps them."""
    if type(content) is not dict:
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    for place in (content, *(content.get(name) for name in _CONTAINERS)):
        if type(place) is not dict:
            continue
        names = {_WRAPPERS.sub("", str(name)): name for name in place}
        for source in _SOURCES:
            first = f"{source.encoder}conv1.weight"
            if {first, f"{source.encoder}layer1.0.conv1.weight"} <= names.keys():
                if len(names) != len(place):
                    raise CheckpointError(f"{path} holds the same tensors under two names")
                wrapper = str(names[first]).removesuffix(first)
                state = {name: place[own] for name, own in names.items()}
                own = {name: str(own) for name, own in names.items()}
                return _sort_out(source, wrapper, state, own, content)
    places = [content, *(content.get(name) for name in _CONTAINERS)]
    innermost = [place for place in places if type(place) is dict][-1]
    found = [shown(str(name), 60) for name in innermost]
    raise CheckpointError(
        f"{path} holds no ResNet with the names of eb_jepa, solo-learn or torchvision, but "
        f"{_first_five(found) or 'nothing'}"
    )


def _sort_out(
    source: _Source, wrapper: str, state: dict[str, Any], own: dict[str, str], content: Any
) -> _Tensors:
    known, own_names, others = {}, {}, []
    for name, array in state.items():
        ours = ""
        if source.has_projector and name.startswith("projector."):
            ours = name
        elif source.probe and name.startswith(source.probe):
            ours = f"probe.{name.removeprefix(source.probe)}"
        elif name.startswith(source.encoder):
            ours = f"encoder.{name.removeprefix(source.encoder)}"
        if ours and type(array) is np.ndarray:
            known[ours], own_names[ours] = array, own[name]
        else:
            others.append(own[name])
    if source.probe is None and type(content.get("linear_probe_state_dict")) is dict:
        for name, array in content["linear_probe_state_dict"].items():
            rest = _WRAPPERS.sub("", str(name)).removeprefix("classifier.")
            if rest in ("weight", "bias") and type(array) is np.ndarray:
                known[f"probe.{rest}"], own_names[f"probe.{rest}"] = array, str(name)
            else:
                others.append(f"linear_probe_state_dict.{name}")
    return _Tensors(source, wrapper, known, own_names, tuple(others))


# --- what it is ----------------------------------------------------------------------------------


def _infer_encoder(path: pathlib.Path, tensors: _Tensors, stem_padding: int | None) -> ResNet:
    """The ResNet of the stem's size and the blocks' names."""
    stem = "encoder.conv1.weight"
    shape = tensors.known[stem].shape if stem in tensors.known else ()
    if len(shape) != 4 or shape[0] < 1 or shape[1:] not in ((3, 3, 3), (3, 7, 7)):
        raise CheckpointError(
            f"{path} has a stem that is not known: {shown(tensors.own_name(stem))} is "
            f"{list(shape)}, wanted [width, 3, 3, 3] or [width, 3, 7, 7]"
        )
    blocks: dict[int, set[str]] = {}
    for name in tensors.known:
        if match := re.match(r"encoder\.layer([1-9])\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    counts = {stage: len(numbers) for stage, numbers in blocks.items()}
    # Before a network of that many blocks is traced.
    if sum(counts.values()) > _MOST_BLOCKS or any(
        numbers != set(map(str, range(counts[stage]))) for stage, numbers in blocks.items()
    ):
        raise CheckpointError(
            f"{path} has blocks that no ResNet has: in each layer they are numbered from 0, and "
            f"there are at most {_MOST_BLOCKS}"
        )
    is_small = shape[2] == 3
    legal = (1, 2) if is_small else (3,)
    is_legal = type(stem_padding) is int and stem_padding in legal
    if stem_padding is not None and not is_legal:
        raise ConfigError(
            f"stem_padding must be {' or '.join(map(str, legal))} for the {shape[2]}x{shape[2]} "
            f"stem of {path}, got {stem_padding!r}"
        )
    return ResNet(
        stage_sizes=tuple(counts[stage] for stage in sorted(counts)) or (1,),
        width=shape[0],
        stem_kernel=shape[2],
        stem_stride=1 if is_small else 2,
        stem_padding=stem_padding or (tensors.source.stem_padding if is_small else 3),
        stem_pool=not is_small,
        expand_dim=_rows(tensors, "encoder.expand.0.weight", missing=0),
        block="bottleneck" if "encoder.layer1.0.conv3.weight" in tensors.known else "basic",
    )


def _infer_projector(tensors: _Tensors) -> Projector | None:
    if not any(name.startswith("projector.") for name in tensors.known):
        return None
    return Projector(_rows(tensors, "projector.0.weight"), _rows(tensors, "projector.6.weight"))


def _rows(tensors: _Tensors, name: str, *, missing: int = 1) -> int:
    """Outputs of a linear layer or 1x1 convolution; 1 for a misshapen one, which is found later."""
    array = tensors.known.get(name)
    if array is None:
        return missing
    return array.shape[0] if array.ndim in (2, 4) and array.size else 1


def _template(module: ImageJEPA) -> Any:
    """Shapes of the variables: those of the module itself, computed from nothing."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)


def _wanted(module: ImageJEPA, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes in PyTorch's layout by name, of the names that begin with `prefix`."""
    leaves = jax.eval_shape(to_torch, _template(module))
    return {name: leaf.shape for name, leaf in leaves.items() if name.startswith(prefix)}


# --- whether all of it is there ------------------------------------------------------------------


def _first_five(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _differences(tensors: _Tensors, wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unknown and misshapen, each as a phrase in the file's own names."""
    missing = [name for name in wanted if name not in tensors.known]
    unknown = [
        name
        for name in tensors.known
        if name not in wanted and not _is_counter_of(name, wanted, tensors.known[name])
    ]
    others = () if tensors.source.may_hold_more else tensors.others
    misshapen = []
    for name in wanted.keys() & tensors.known.keys():
        array, own = tensors.known[name], shown(tensors.own_name(name))
        if array.shape != wanted[name]:
            misshapen.append(f"{own} is {list(array.shape)}, wanted {list(wanted[name])}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            misshapen.append(f"{own} is {array.dtype.name}, wanted a floating-point type")
    phrases = []
    if missing:
        names = [shown(tensors.own_name(name)) for name in missing]
        phrases.append(f"missing {_first_five(names)}")
    if unknown or others:
        names = [shown(name) for name in (*map(tensors.own_name, unknown), *others)]
        phrases.append(f"unknown {_first_five(names)}")
    # What is missing may have decided the sizes that are wanted.
    if misshapen and not missing:
        phrases.append(_first_five(sorted(misshapen)))
    return phrases


def _is_counter_of(name: str, wanted: Mapping[str, Any], array: np.ndarray) -> bool:
    """Whether it is a BatchNorm's count of batches, which nothing depends on."""
    stem = name.removesuffix("num_batches_tracked")
    return stem != name and f"{stem}running_mean" in wanted and array.size == 1


# --- what becomes of it --------------------------------------------------------------------------


def _to_float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array(array, np.float32, order="C")


def _probe(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    if "probe.weight" not in tensors:
        return None
    return {"kernel": tensors["probe.weight"].T, "bias": tensors["probe.bias"]}


def _channels(
    name: str, values: Sequence[float] | None, default: tuple[float, ...]
) -> tuple[float, ...]:
    if values is None:
        return default
    rule = "three numbers above 0 and at most 1" if name == "std" else "three numbers in [0, 1]"
    try:
        numbers = tuple(float(value) for value in values)
        is_legal = len(numbers) == 3 and all(0 <= number <= 1 for number in numbers)
    except (TypeError, ValueError, OverflowError):
        numbers, is_legal = (), False
    if not is_legal or (name == "std" and min(numbers) == 0):
        raise ConfigError(f"{name} must be {rule}, got {values}")
    return numbers
