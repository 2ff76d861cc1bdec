"""What this package computes where PyTorch's answer is known, and how far apart the two are.

Every function of PIECES takes PyTorch's digests (of whole tensors, or those of
fixtures/torch_reference.npz) and returns this package's arrays under the same names, in PyTorch's
layout. ROWS say which names belong together, how their difference is measured, and what is asked.
test_parity.py checks the rows against the fixture, test_parity_live.py against a PyTorch at hand,
and make_parity_report.py writes the table of docs/parity.md.
"""

import dataclasses
import functools
import itertools
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

sys.path.insert(0, str(pathlib.Path(__file__).parent / "fixtures"))

import reference_inputs as inputs  # noqa: E402

from configs import full, rapid  # noqa: E402
from jepa_jax import augment  # noqa: E402
from jepa_jax.config import hparams_from  # noqa: E402
from jepa_jax.interop import import_torch  # noqa: E402
from jepa_jax.interop.torch_names import from_torch, to_torch  # noqa: E402
from jepa_jax.losses import vicreg_loss  # noqa: E402
from jepa_jax.models import (  # noqa: E402
    CIFAR10_MEAN,
    CIFAR10_STD,
    ImageJEPA,
    Projector,
    ResNet18,
    ResNet50,
    linen_model,
)
from jepa_jax.optim import lars  # noqa: E402
from jepa_jax.train_step import (  # noqa: E402
    HParams,
    create_train_state,
    learning_rate,
    make_train_step,
)

Arrays = dict[str, np.ndarray]


# --- this package's side ------------------------------------------------------------------------


def loss(_: Arrays) -> Arrays:
    gradients = jax.jit(
        jax.value_and_grad(
            functools.partial(vicreg_loss, **inputs.LOSS_COEFFS), argnums=(0, 1), has_aux=True
        )
    )
    found = {}
    for shape in inputs.LOSS_SHAPES:
        for kind in inputs.LOSS_KINDS:
            (total, terms), (gradient1, gradient2) = gradients(*inputs.embeddings(kind, shape))
            start = f"loss/{kind}/{shape[0]}x{shape[1]}"
            found |= {
                f"{start}/loss": total,
                f"{start}/invariance": terms["invariance_loss"],
                f"{start}/var": terms["var_loss"],
                f"{start}/cov": terms["cov_loss"],
                f"{start}/gradient1": gradient1,
                f"{start}/gradient2": gradient2,
            }
    return jax.device_get(found)


def _whole(name: str, wanted: Arrays, shape: tuple[int, ...]) -> np.ndarray:
    """A small array, which a digest holds whole behind its magnitude."""
    return np.reshape(np.ravel(wanted[name])[-int(np.prod(shape)) :], shape)


LARS_SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "conv.bias": (4,),
    "norm.weight": (4,),
    "norm.bias": (4,),
    "zero.weight": (5, 4),
    "zero.bias": (5,),
    "rare.weight": (3, 4),
    "rare.bias": (3,),
}


def follow(optimizer: optax.GradientTransformation, wanted: Arrays) -> list[Arrays]:
    """Parameters after every step on PyTorch's gradients."""
    params = {n: _whole(f"lars/start/{n}", wanted, s) for n, s in LARS_SHAPES.items()}
    state, history = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for step in range(len(inputs.LARS_RATES)):
        gradients = {
            n: _whole(f"lars/{step:02}/gradient/{n}", wanted, s) for n, s in LARS_SHAPES.items()
        }
        updates, state = update(gradients, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        history.append(params)
    return history


def lars_rate(step: jax.Array) -> jax.Array:
    return jnp.asarray(inputs.LARS_RATES, jnp.float32)[step]


def lars_steps(wanted: Arrays) -> Arrays:
    history = follow(lars(lars_rate, **inputs.LARS_OPTIONS), wanted)
    return {
        f"lars/{step:02}/parameter/{name}": value
        for step, params in enumerate(history)
        for name, value in params.items()
    }


def augmentations(_: Arrays) -> Arrays:
    images = inputs.augmentation_images().astype(np.float32) / np.float32(255)
    results = {}
    for size in inputs.CROP_SIZES:
        crop = jax.jit(
            jax.vmap(
                functools.partial(augment.resized_crop, size=size), (0, None, None, None, None)
            )
        )
        for box in inputs.CROPS:
            results[f"crop{size}/{'-'.join(map(str, box))}"] = crop(images, *box)
    for kind in ("brightness", "contrast", "saturation"):
        adjust = jax.jit(jax.vmap(getattr(augment, f"adjust_{kind}"), (0, None)))
        for factor in inputs.FACTORS:
            results[f"{kind}/{factor}"] = adjust(images, np.float32(factor))
    shift = jax.jit(jax.vmap(augment.adjust_hue, (0, None)))
    for delta in inputs.HUES:
        results[f"hue/{delta}"] = shift(images, np.float32(delta))
    results["greyscale/"] = augment.rgb_to_grayscale(images)
    for threshold in inputs.THRESHOLDS:
        results[f"solarize/{threshold}"] = augment.solarize(images, np.float32(threshold / 255))
    for sigma, kernel_size in inputs.BLURS:
        blur = jax.vmap(
            functools.partial(augment.gaussian_blur, kernel_size=kernel_size), (0, None)
        )
        results[f"blur/{sigma}-{kernel_size}"] = blur(images, np.float32(sigma))
    results = jax.device_get(results)
    return {
        f"augment/{side}/{name}": array
        for side in ("pil", "tensor")
        for name, array in results.items()
    }


# --- ResNet-18 and projector --------------------------------------------------------------------


def network(stem_padding: int, hidden: int, output: int, dtype: Any = jnp.float32) -> ImageJEPA:
    return ImageJEPA(
        ResNet18(stem_padding=stem_padding, dtype=dtype), Projector(hidden, output, dtype)
    )


def given_variables(module: ImageJEPA, dtype: Any = np.float32) -> dict[str, Any]:
    """Variables with the weights of reference_inputs, which go by PyTorch's names and shapes."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    tensors = {
        name: inputs.weight(name, t.shape).astype(dtype) for name, t in to_torch(zeros).items()
    }
    return from_torch(tensors, zeros)


def resnet(stem_padding: int, dtype: Any) -> Arrays:
    """One backward pass, three train-mode passes, then evaluation."""
    start = f"resnet/padding{stem_padding}/{np.dtype(dtype).name}"
    module = network(stem_padding, 2048, 2048, dtype)
    variables = given_variables(module, dtype)
    apply = linen_model(module).apply
    batches = inputs.normalized_batches(3, 8).astype(dtype)
    weights = [inputs.output_weights(n, (8, d)).astype(dtype) for n, d in (("h", 512), ("z", 2048))]

    def weighted_sum(params, images):
        outputs, stats = apply({**variables, "params": params}, images, True)
        total = sum(jnp.sum(out * w) for out, w in zip(outputs, weights, strict=True))
        return total, (outputs, stats)

    gradients = jax.jit(jax.value_and_grad(weighted_sum, argnums=(0, 1), has_aux=True))
    (_, ((h, z), stats)), (params, images) = gradients(variables["params"], batches[0])
    found = {"h": h, "z": z, "gradient/images": images}
    found |= {f"gradient/{name}": array for name, array in to_torch({"params": params}).items()}
    jitted = jax.jit(apply, static_argnums=2)
    for batch in batches[1:]:
        _, stats = jitted({**variables, "batch_stats": stats}, batch, True)
    found |= {f"statistics/{n}": array for n, array in to_torch({"batch_stats": stats}).items()}
    (h, z), _ = jitted({**variables, "batch_stats": stats}, batches[0], False)
    found |= {"h_eval": h, "z_eval": z}
    return {f"{start}/{name}": array for name, array in jax.device_get(found).items()}


def resnets(_: Arrays) -> Arrays:
    found = {}
    for stem_padding in (1, 2):
        found |= resnet(stem_padding, np.float32)
        # Flax's parameters and statistics are float32 when they are made, whatever they are later.
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            found |= resnet(stem_padding, np.float64)
    return found


def large_resnets(_: Arrays) -> Arrays:
    """In evaluation, with the stem of larger images."""
    found = {}
    for name, side in inputs.LARGE:
        network = {"resnet18": ResNet18, "resnet50": ResNet50}[name]
        module = ImageJEPA(
            network(stem_kernel=7, stem_stride=2, stem_padding=3, stem_pool=True), None
        )
        variables = given_variables(module)
        images = inputs.large_images(side).astype(np.float32)
        h, _ = jax.jit(module.apply)(variables, images)
        size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        found |= {f"large/{name}/{side}/h": h, f"large/{name}/{side}/count": np.array(size)}
    return jax.device_get(found)


def initial(wanted: Arrays) -> Arrays:
    module = network(2, 2048, 2048)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    tensors = jax.device_get(to_torch(variables))
    counts = {
        f"initial/count/{part}": np.array(sum(leaf.size for leaf in jax.tree.leaves(params)))
        for part, params in variables["params"].items()
    }
    tensors = {f"initial/{name}": tensor for name, tensor in tensors.items()}
    return {name: (tensors | counts)[name] for name in wanted if name.startswith("initial/")}


# --- random draws and schedule ------------------------------------------------------------------


def draws(_: Arrays) -> Arrays:
    keys = jax.random.split(jax.random.key(0), inputs.NUM_DRAWS)
    boxes = jax.jit(jax.vmap(lambda key: augment.random_crop_box(key, 32, 32)))(keys)
    jitters = jax.jit(jax.vmap(augment.random_jitter_parameters))(keys)
    kinds = ("brightness", "contrast", "saturation", "hue")
    image = inputs.augmentation_images()[0].astype(np.float32) / np.float32(255)
    choices = ("jitter", "grayscale", "solarize", "flip")

    @jax.jit
    def changed(probabilities):
        options = {f"{name}_prob": p for name, p in zip(choices, probabilities, strict=True)}
        view = functools.partial(augment.random_view, image=image, scale=(1.0, 1.0), **options)
        views = jax.lax.map(lambda key: view(key), keys, batch_size=500)
        return jnp.sum(jnp.max(jnp.abs(views - image[None]), axis=(1, 2, 3)) > 1e-4)

    recipe = np.diag(np.float32([0.8, 0.2, 0.1, 0.5]))
    counts = {name: changed(row) for name, row in zip(choices, recipe, strict=True)}
    found = {
        "draws/boxes": jnp.stack(boxes, axis=1),
        "draws/orders": jitters["order"],
        "draws/factors": jnp.stack([jitters[kind] for kind in kinds], axis=1),
        **{f"draws/changed/{name}": count for name, count in counts.items()},
    }
    return jax.device_get(found)


def _schedule(config: Any, steps_per_epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Every step's rate by the code that training runs, and by the closed formula in float64."""
    hparams = hparams_from(config, steps_per_epoch)
    steps = np.arange(config.optim.epochs * steps_per_epoch)
    found = jax.jit(jax.vmap(functools.partial(learning_rate, hparams)))(steps)
    wanted = [
        inputs.rate(
            step,
            peak=config.optim.lr,
            num_steps=len(steps),
            warmup_steps=round(config.optim.warmup_epochs * steps_per_epoch),
            start=config.optim.warmup_start_lr,
            end=config.optim.min_lr,
        )
        for step in steps
    ]
    return np.asarray(found), np.array(wanted)


# Batches of an epoch of 50,000 images, the last incomplete one dropped.
SCHEDULES = {"rapid": (rapid.get_config(), 16), "full": (full.get_config(), 97)}


def schedules(_: Arrays) -> Arrays:
    return {f"schedule/{name}": _schedule(*args)[0] for name, args in SCHEDULES.items()}


def closed_formulas() -> Arrays:
    return {f"schedule/{name}": _schedule(*args)[1] for name, args in SCHEDULES.items()}


# --- training -----------------------------------------------------------------------------------


def training(_: Arrays) -> Arrays:
    """The package's own training step on given views: they come in as six channels."""
    module = network(2, *inputs.TRAINING_PROJECTOR)
    schedule = {
        "lr": inputs.SCHEDULE["peak"],
        "warmup_start_lr": inputs.SCHEDULE["start"],
        "min_lr": inputs.SCHEDULE["end"],
        "warmup_steps": inputs.SCHEDULE["warmup_steps"],
        "num_steps": inputs.SCHEDULE["num_steps"],
    }
    numbers = {**inputs.TRAINING, **schedule, "probe_lr": 1e-3}
    hparams = HParams(seed=np.uint32(0), **{k: np.float32(v) for k, v in numbers.items()})

    def augment_fn(_, images):
        return augment.to_float(images[..., :3]), augment.to_float(images[..., 3:])

    model = linen_model(module)
    step = jax.jit(
        make_train_step(model, augment_fn=augment_fn, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    )
    views = inputs.training_views()
    create = functools.partial(
        create_train_state, model, image_shape=views.shape[3:], num_classes=0
    )
    state = jax.jit(create)(hparams).replace(**given_variables(module))
    labels = np.full(inputs.TRAINING_BATCH, -1, np.int32)
    history = []
    for pair in views:
        state, metrics = step(state, np.concatenate(pair, axis=-1), labels, hparams)
        history.append(jax.device_get(metrics))
    names = {"loss": "loss", "invariance": "invariance_loss", "var": "var_loss", "cov": "cov_loss"}
    return {
        f"training/float32/{short}": np.array([metrics[name] for metrics in history])
        for short, name in names.items()
    }


# --- weights ------------------------------------------------------------------------------------


def weights(path: pathlib.Path) -> Arrays:
    """Of a file of torch.save: its tensors, read and named anew, and the features of 256 images."""
    model = import_torch(path)
    images = model.encoder.normalize(inputs.real_images()[:256])
    (h, z), _ = jax.jit(model.encoder.model.apply, static_argnums=2)(model.variables, images, False)
    tensors = {f"weights/tensor/{name}": t for name, t in to_torch(model.variables).items()}
    return jax.device_get({"weights/h": h, "weights/z": z, **tensors})


PIECES = (
    loss,
    lars_steps,
    schedules,
    resnets,
    large_resnets,
    initial,
    augmentations,
    draws,
    training,
)


# --- how far apart ------------------------------------------------------------------------------

# A bias before a BatchNorm has no gradient: what both sides find is rounding, to be measured
# against the gradient of the weights beside it.
NO_GRADIENT = ("gradient/projector.0.bias", "gradient/projector.3.bias")


def _relative(name: str, found: np.ndarray, wanted: dict[str, np.ndarray]) -> float:
    """The largest difference over the largest magnitude of the tensor (digests both)."""
    scale_name = name.removesuffix("bias") + "weight" if name.endswith(NO_GRADIENT) else name
    scale = wanted[scale_name][0]
    difference = np.max(np.abs(found[1:].astype(np.float64) - wanted[name][1:]))
    return float(difference / scale if scale > 1e-12 else difference)


def _each_relative(name: str, found: np.ndarray, wanted: Arrays) -> float:
    """The largest relative difference of single values."""
    return float(np.max(np.abs(found[1:] / wanted[name][1:].astype(np.float64) - 1)))


def _worst(name: str, found: np.ndarray, wanted: Arrays) -> float:
    return float(np.max(np.abs(found[1:] - wanted[name][1:])))


def _worst_levels(name: str, found: np.ndarray, wanted: Arrays) -> float:
    # A whole number of levels is one whatever the last bit of a float says.
    return round(255 * _worst(name, found, wanted), 3)


def _mean_levels(name: str, found: np.ndarray, wanted: Arrays) -> float:
    return 255 * float(np.mean(np.abs(found[1:] - wanted[name][1:])))


def _same_distribution(name: str, found: np.ndarray, wanted: Arrays) -> float:
    """p of a two-sample Kolmogorov-Smirnov test; constants must be equal."""
    if np.ptp(wanted[name][1:]) == 0:
        return float(np.array_equal(found[1:], wanted[name][1:]))
    return float(scipy.stats.ks_2samp(found[1:], wanted[name][1:]).pvalue)


def _same_counts(found: np.ndarray, wanted: np.ndarray) -> float:
    """p of a chi-square test that two columns of counts are of one distribution."""
    return float(scipy.stats.chi2_contingency(np.stack([found, wanted])).pvalue)


def _same_draws(name: str, found: np.ndarray, wanted: Arrays) -> float:
    """The smallest p of the tests that fit the kind of draw."""
    drawn, total = wanted[name], inputs.NUM_DRAWS
    if name.startswith("draws/changed"):
        return _same_counts(np.array([found, total - found]), np.array([drawn, total - drawn]))
    if name == "draws/orders":
        orders = list(itertools.permutations(range(4)))
        counts = [[sum((rows == order).all(1)) for order in orders] for rows in (found, drawn)]
        return _same_counts(*np.array(counts))
    if name == "draws/boxes":
        found, drawn = (_box_statistics(boxes.astype(np.float64)) for boxes in (found, drawn))
    return min(scipy.stats.ks_2samp(a, b).pvalue for a, b in zip(found.T, drawn.T, strict=True))


def _box_statistics(boxes: np.ndarray) -> np.ndarray:
    """Area, aspect ratio and corner of boxes (top, left, height, width)."""
    top, left, height, width = boxes.T
    return np.stack([height * width, np.log(width / height), top, left], axis=1)


@dataclasses.dataclass(frozen=True)
class Measure:
    """How two digests of one name are compared; `at_least` where more is better, as of p-values."""

    words: str
    compute: Callable[[str, np.ndarray, Arrays], float]
    at_least: bool = False


RELATIVE = Measure("largest difference / largest magnitude", _relative)
EACH_RELATIVE = Measure("largest relative difference", _each_relative)
WORST = Measure("largest difference", _worst)
MEAN_LEVELS = Measure("mean difference, in 255ths", _mean_levels)
WORST_LEVELS = Measure("largest difference, in 255ths", _worst_levels)
DISTRIBUTION = Measure("smallest p, Kolmogorov-Smirnov", _same_distribution, at_least=True)
DRAWS = Measure("smallest p, Kolmogorov-Smirnov or chi-square", _same_draws, at_least=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """What is asked of all names that a pattern matches."""

    piece: str
    pattern: str
    measure: Measure
    asked: float


BLENDS = "brightness|contrast|saturation|greyscale|solarize"


def _resnet_rows() -> list[Row]:
    parts = {
        "features and projections": "(h|z|h_eval|z_eval)$",
        "gradient of the images": "gradient/images",
        "gradients of all parameters": "gradient/(encoder|projector)",
        "running statistics after 3 passes": "statistics/",
    }
    return [
        Row(
            f"ResNet-18 and projector, stem padding {padding}, {precision}: {part}",
            f"resnet/padding{padding}/{precision}/{pattern}",
            RELATIVE,
            asked,
        )
        for padding in (1, 2)
        for precision, asked in (("float32", 1e-4), ("float64", 1e-9))
        for part, pattern in parts.items()
    ]


ROWS = (
    Row("VICReg: total and terms", "loss/.*/(loss|invariance|var|cov)$", RELATIVE, 1e-5),
    Row("VICReg: gradients", "loss/.*/gradient", RELATIVE, 1e-5),
    Row("LARS: parameters after each of 20 steps", "lars/.*/parameter", RELATIVE, 1e-5),
    Row("Schedule: all 800 steps of rapid", "schedule/rapid", RELATIVE, 1e-6),
    Row("Schedule: all 77,600 steps of full", "schedule/full", RELATIVE, 1e-6),
    *_resnet_rows(),
    *(
        Row(
            f"torchvision's {name} with its own stem, {side} px, float32: features",
            f"large/{name}/{side}/h",
            RELATIVE,
            1e-4,
        )
        for name, side in inputs.LARGE
    ),
    Row("Numbers of parameters of both, 11,176,512 and 23,508,032", "large/.*/count", WORST, 0.0),
    Row("Numbers of parameters, 11,168,832 and 9,451,520", "initial/count", WORST, 0.0),
    Row("Initial distributions", "initial/(encoder|projector)", DISTRIBUTION, 1e-3),
    Row("Resized crop to 32 px, PIL: mean", "augment/pil/crop32", MEAN_LEVELS, 1.0),
    Row("Resized crop to 32 px, PIL: worst", "augment/pil/crop32", WORST_LEVELS, 4.0),
    Row("Resized crop to 16 px, PIL: mean", "augment/pil/crop16", MEAN_LEVELS, 1.0),
    Row("Resized crop to 16 px, PIL: worst", "augment/pil/crop16", WORST_LEVELS, 4.0),
    Row("Resized crops, tensors, antialiased", "augment/tensor/crop", WORST, 1e-4),
    Row(
        "Brightness, contrast, saturation, greyscale, solarize, PIL",
        f"augment/pil/({BLENDS})",
        WORST_LEVELS,
        1.5,
    ),
    Row("Hue, PIL (its HSV has 8 bits): mean", "augment/pil/hue", MEAN_LEVELS, 2.0),
    Row("Hue, PIL: worst", "augment/pil/hue", WORST_LEVELS, 16.0),
    Row("Gaussian blur, PIL", "augment/pil/blur", WORST_LEVELS, 1.0),
    Row("Gaussian blur, tensors", "augment/tensor/blur", WORST, 1e-5),
    Row("All colour operations, tensors", f"augment/tensor/({BLENDS}|hue)", WORST, 1e-4),
    Row("Draws: crop area, aspect ratio and place", "draws/boxes", DRAWS, 1e-3),
    Row("Draws: jitter factors", "draws/factors", DRAWS, 1e-3),
    Row("Draws: order of the jitter", "draws/orders", DRAWS, 1e-3),
    Row("Draws: how often each operation is applied", "draws/changed", DRAWS, 1e-3),
    Row("Training: loss of 20 full steps", "training/float32/loss", EACH_RELATIVE, 1e-3),
)

# Of a file of 80 MB, which only a PyTorch at hand can write.
WEIGHT_ROWS = (
    Row("Weights of a .pth.tar: h and z of 256 real images", "weights/(h|z)", RELATIVE, 1e-4),
    Row("Weights of a .pth.tar: every tensor, there and back", "weights/tensor", WORST, 0.0),
)


def compare(row: Row, found: Arrays, wanted: Arrays) -> tuple[str, float]:
    """(name, measure) of a row's worst, of digests; a NaN is worse than any number.

    Raises:
      ValueError: if no name matches, or one side lacks what the other has.
    """
    names = [name for name in wanted if re.match(row.pattern, name)]
    if not names or set(names) != {name for name in found if re.match(row.pattern, name)}:
        raise ValueError(f"{row.piece}: the two sides do not have the same names")
    values = {name: row.measure.compute(name, found[name], wanted) for name in names}
    sign = -1 if row.measure.at_least else 1
    return max(values.items(), key=lambda item: (np.isnan(item[1]), sign * item[1]))


def holds(row: Row, value: float) -> bool:
    return value >= row.asked if row.measure.at_least else value <= row.asked


def digests(arrays: Arrays, *, whole: bool) -> Arrays:
    return {name: inputs.digest(name, array, whole=whole) for name, array in arrays.items()}


def both_sides(torchs: Arrays, *, whole: bool, pieces: Any = PIECES) -> tuple[Arrays, Arrays]:
    """(found, wanted): digests of this package's arrays, and of PyTorch's and the formulas'."""
    wanted = {**torchs, **digests(closed_formulas(), whole=whole)}
    found = {name: a for piece in pieces for name, a in piece(torchs).items()}
    return digests(found, whole=whole), wanted
