"""The reference's own default: VICReg with balanced terms, 300 epochs.

    python -m jepa_jax.main --config=configs/default.py

The reference reports about 90 % by a linear probe for close relatives of it (std 1, cov 100,
projector 2048-1024, batch 256, 300 epochs).
"""

from ml_collections import ConfigDict

from jepa_jax.configs import rapid


def get_config() -> ConfigDict:
    """rapid with the reference's default values."""
    config = rapid.get_config()
    config.data.batch_size = 256  # 195 steps an epoch
    config.model.proj_hidden_dim = 2048
    config.model.proj_output_dim = 2048
    config.loss.std_coeff = 1.0
    config.loss.cov_coeff = 80.0  # the paper's balance at 2048 outputs is 82
    config.optim.lr = 0.3
    config.optim.epochs = 300.0
    config.optim.warmup_epochs = 10.0
    return config
