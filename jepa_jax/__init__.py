"""jepa_jax: rapid self-supervised learning in JAX.

The public names. They are loaded on first use, so that importing the package starts no JAX backend
and pulls in nothing that a caller may not need.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "api": ("export_encoder", "load_encoder"),
    "augment": (
        "adjust_brightness",
        "adjust_contrast",
        "adjust_hue",
        "adjust_saturation",
        "gaussian_blur",
        "multi_crop_views",
        "pairs_of_views",
        "resized_crop",
        "rgb_to_grayscale",
        "solarize",
        "two_views",
    ),
    "data": ("Dataset", "from_arrays", "load_dataset"),
    "evaluate": ("evaluate_run",),
    "evaluation": ("evaluate_representation",),
    "finetune": ("finetune_run",),
    "health": ("effective_rank", "rank_me"),
    "interop": ("TorchModel", "import_torch"),
    "losses": (
        "barlow_twins_loss",
        "lejepa_loss",
        "nt_xent_loss",
        "sigreg_loss",
        "vicreg_loss",
    ),
    "models": (
        "Encoder",
        "EncoderFns",
        "ImageJEPA",
        "ModelFns",
        "Projector",
        "ResNet",
        "ResNet18",
        "ResNet34",
        "ResNet50",
    ),
    "optim": ("lars", "warmup_cosine"),
    "pairing": ("against_mean", "over_pairs"),
    "probes": ("knn_votes", "logistic_probe", "ridge_probe"),
    "report": ("write_report",),
    "train": ("train_and_evaluate",),
    "train_step": (
        "HParams",
        "TrainState",
        "create_train_state",
        "make_train_epoch",
        "make_train_step",
    ),
    "vit": ("ViT", "ViTB", "ViTS", "ViTTi"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jepa_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jepa_jax.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
