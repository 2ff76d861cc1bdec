"""The embedded default: the full method, sized for two CPU cores.

    python -m jepa_jax.main --config=configs/cpu.py

VICReg on all 50,000 training images, with a narrow ResNet.
"""

from ml_collections import ConfigDict

from configs import rapid


def get_config() -> ConfigDict:
    """rapid's method with a network, a batch and an optimiser for two cores."""
    config = rapid.get_config()
    config.meta.seed = 0

    config.data.batch_size = 96

    config.model.stage_sizes = (1, 1, 1)
    config.model.width = 32
    config.model.stem_stride = 2
    config.model.stem_padding = 1
    config.model.stem_init = "whitening"
    config.model.proj_hidden_dim = 512
    config.model.proj_output_dim = 512

    config.loss.std_coeff = 1.0
    config.loss.cov_coeff = 20.0

    config.optim.name = "muon"
    config.optim.lr = 0.02
    config.optim.epochs = 2
    config.optim.warmup_epochs = 0.2
    config.optim.warmup_start_lr = 0.0

    config.training.use_amp = False

    config.logging.log_every = 1
    config.logging.save_every = 1
    return config
