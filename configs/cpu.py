"""The embedded default: the full method, tuned for two CPU cores, in three lengths.

    python -m jepa_jax.main --config=configs/cpu.py
    python -m jepa_jax.main --config=configs/cpu.py:5m

VICReg on all 50,000 training images of CIFAR-10. The length, 90s (the default), 5m or 12m, is that
of the training on two cores of an AMD EPYC: each has its own number of epochs and ends its own
schedule; docs/recipe.md has what each reached, over which floors, and why the values are these.
"""

from ml_collections import ConfigDict

from jepa_jax.configs import rapid

EPOCHS = {"90s": 1.4, "5m": 4.7, "12m": 11.4}


def get_config(length: str = "90s") -> ConfigDict:
    """rapid's method with a network, a batch and an optimiser for two cores.

    Args:
      length: a key of `EPOCHS`.
    """
    if length not in EPOCHS:
        raise ValueError(f"cpu.py has the lengths {', '.join(EPOCHS)}, not {length}")
    config = rapid.get_config()
    config.meta.seed = 0

    config.data.batch_size = 96  # many small steps learn more per image than few large ones
    # Views of a quarter of the pixels, judged on whole images: the network sees objects in a test
    # image at the size that a crop showed them.
    config.data.view_size = 16

    # 13.3 million multiplications a view, where ResNet-18 with rapid's stem has 704 million.
    config.model.stage_sizes = (1, 1, 1)
    config.model.width = 32  # 32, 64, 128 channels on maps of 16, 8, 4 (of 32, 16, 8 in evaluation)
    config.model.stem_padding = 1  # the usual CIFAR stem
    config.model.stem_init = "whitening"
    config.model.expand_dim = 512  # the features that a probe sees
    config.model.proj_hidden_dim = 512
    config.model.proj_output_dim = 512

    config.loss.std_coeff = 1.0  # the paper's balance ...
    config.loss.cov_coeff = 20.0  # ... which at 512 outputs is (512 - 1) / 25

    config.optim.name = "muon"
    config.optim.lr = 0.02
    config.optim.epochs = EPOCHS[length]
    config.optim.warmup_epochs = 0.2
    config.optim.warmup_start_lr = 0.0

    config.training.use_amp = False  # CPUs emulate bfloat16: float32 is faster

    config.logging.log_every = 1
    config.logging.save_every = 1
    return config
