"""The guide's long recipe: rapid with smaller batches, a lower rate and 800 epochs.

    python -m jepa_jax.main --config=configs/full.py

The guide promises more than 80 % by an online linear probe, after about three hours on an RTX 4090.
"""

from ml_collections import ConfigDict

from jepa_jax.configs import rapid


def get_config() -> ConfigDict:
    """rapid with three numbers changed."""
    config = rapid.get_config()
    config.data.batch_size = 512  # 97 steps an epoch in place of 16
    config.optim.lr = 0.3  # the rate that goes with the smaller batch
    config.optim.epochs = 800.0
    return config
