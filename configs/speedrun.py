"""The speedrun ladder: ResNet-18 with 512 features for one GPU, in four lengths.

    python -m jepa_jax.main --config=configs/speedrun.py
    python -m jepa_jax.main --config=configs/speedrun.py:92

A length is named after the percentage that it is for: ridge regression on the 512 pooled features,
at the last step of its own schedule. On one H100, 80 reached 82.9 % in 40 s (2 seeds) and 55 only
51.0 ± 3.6 % in 3 s (3 seeds); 90 and 92 have not been run. The epochs are leads from published
runs, halved for four views. One command runs all:

    python -m benchmarks.lengths --config=configs/speedrun.py --workdir runs/speedrun --out all.json
"""

from ml_collections import ConfigDict

from jepa_jax.configs import rapid

EPOCHS = {"55": 1.5, "80": 22.5, "90": 300.0, "92": 1000.0}
# Short lengths train as cpu.py does, on a quarter of the pixels (0 is whole images) and on four
# views of half as many images, which gained at equal time there; the long ones as published runs.
_VIEW_SIZES = {"55": 16, "80": 16, "90": 0, "92": 0}
_NUM_VIEWS = {"55": 4, "80": 4, "90": 2, "92": 2}


def get_config(length: str = "80") -> ConfigDict:
    """rapid's network with the usual stem, under cpu.py's method.

    Args:
      length: a key of `EPOCHS`.
    """
    if length not in EPOCHS:
        raise ValueError(f"speedrun.py has the lengths {', '.join(EPOCHS)}, not {length}")
    epochs = EPOCHS[length]
    config = rapid.get_config()
    config.meta.seed = 0

    config.data.num_views = _NUM_VIEWS[length]
    # 1024 views a step: 97 steps an epoch with two, 195 with four; rapid's 3072 images leave 16.
    config.data.batch_size = 1024 // config.data.num_views
    config.data.view_size = _VIEW_SIZES[length]

    config.model.stem_padding = 1  # the usual CIFAR stem: maps of 32, not 34
    config.model.stem_init = "whitening"  # 54 of the 64 filters, the others random
    config.model.proj_hidden_dim = 2048
    config.model.proj_output_dim = 1024

    config.loss.std_coeff = 1.0  # the paper's balance ...
    config.loss.cov_coeff = 41.0  # ... which at 1024 outputs is (1024 - 1) / 25

    config.optim.name = "muon"
    config.optim.lr = 0.02
    config.optim.epochs = epochs
    config.optim.warmup_epochs = min(0.1 * epochs, 10.0)  # the paper's 1000 epochs begin with 10
    config.optim.warmup_start_lr = 0.0

    config.logging.log_every = max(1, round(epochs / 20))
    return config
