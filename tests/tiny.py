"""configs/cpu.py at a size that trains in a second: 4 steps an epoch of 400 images, 8 features."""

from typing import Any

TINY = {
    "data.batch_size": 100,
    "data.num_val": 80,
    "data.view_size": 0,
    "model.stage_sizes": (1, 1),
    "model.width": 4,
    "model.stem_stride": 2,
    "model.expand_dim": 0,
    "model.proj_hidden_dim": 8,
    "model.proj_output_dim": 8,
    "optim.name": "lars",
}
FLAGS = [f"--config.{key}={value}".replace(" ", "") for key, value in TINY.items()]


def tiny_config(**overrides: Any) -> Any:
    """`TINY` for three epochs; overrides as optim__lr=0.1."""
    from configs import cpu

    config = cpu.get_config()
    config.update_from_flattened_dict(
        {
            **TINY,
            "optim.lr": 0.3,
            "optim.epochs": 3.0,
            "optim.warmup_epochs": 1.0,
            "logging.tqdm_silent": True,
            **{key.replace("__", "."): value for key, value in overrides.items()},
        }
    )
    return config
