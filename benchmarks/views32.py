"""The 32-pixel network of docs/performance.md and docs/evaluation.md: an earlier configs/cpu.py."""

from ml_collections import ConfigDict

from configs import cpu


def get_config() -> ConfigDict:
    """configs/cpu.py with views of 32 pixels, a stem of stride 2 and 128 features, 2 epochs."""
    config = cpu.get_config()
    config.data.view_size = 0
    config.model.stem_stride = 2
    config.model.expand_dim = 0
    config.optim.epochs = 2.0
    return config
