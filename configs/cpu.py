"""The embedded default: the full method, sized for two CPU cores.

    python -m jepa_jax.main --config=configs/cpu.py

VICReg on all 50,000 training images of CIFAR-10, with a narrow ResNet of 128 features. Expect some
two and a half minutes of training, four in all on two cores, and a ridge probe about 20 points
above the same network untrained; the README has the measured figures.
"""

from ml_collections import ConfigDict

from configs import rapid


def get_config() -> ConfigDict:
    """rapid's method with a network, a batch and an optimiser for two cores."""
    config = rapid.get_config()
    config.meta.seed = 0

    config.data.batch_size = 96  # many small steps learn more per image than few large ones

    # 12.3 million multiplications an image, where ResNet-18 with rapid's stem has 704 million.
    config.model.stage_sizes = (1, 1, 1)
    config.model.width = 32  # 32, 64, 128 channels
    config.model.stem_stride = 2  # maps of 16x16: a quarter of the work of 32x32
    config.model.stem_padding = 1  # the usual CIFAR stem
    # 3 to 4 points of validation accuracy after 60,000 images (one seed), for a second of work.
    config.model.stem_init = "whitening"
    config.model.proj_hidden_dim = 512  # four times the features, as in the reference's default
    config.model.proj_output_dim = 512

    config.loss.std_coeff = 1.0  # the paper's balance ...
    config.loss.cov_coeff = 20.0  # ... which at 512 outputs is (512 - 1) / 25

    # After 60,000 images 5 points ahead of AdamW at 2e-3 (one seed), at 0.75 of its speed; a rate
    # of 0.05 ties.
    config.optim.name = "muon"
    config.optim.lr = 0.02
    config.optim.epochs = 2  # what fits into three minutes
    config.optim.warmup_epochs = 0.2
    config.optim.warmup_start_lr = 0.0

    config.training.use_amp = False  # CPUs emulate bfloat16: float32 is faster

    config.logging.log_every = 1
    config.logging.save_every = 1
    return config
