"""VICReg with a vision transformer as the encoder, for small images.

    python -m jepa_jax.main --config=configs/transformers.py:s4     # one GPU
    python -m jepa_jax.main --config=configs/transformers.py:cpu    # two CPU cores

The argument is the size, ti, s or b (arXiv 2010.11929, 2012.12877), and the side of a patch: 4 on
images of 32 pixels gives 64 tokens; half the side is four times the tokens. `cpu` is four blocks of
Ti at patches of 4. The optimiser is DINO's (arXiv 2104.14294, section 3.2): AdamW at
0.0005 * batch / 256 after ten epochs of linear warm-up, with the weight decay that it starts from.
None of it was searched for here.
"""

import re

from ml_collections import ConfigDict

from jepa_jax.configs import rapid


def get_config(size: str = "s4") -> ConfigDict:
    """rapid's method with a transformer, and the paper's balance of the loss.

    Args:
      size: ti, s or b and then the patch: 2, 4, 8 or 16; or cpu.
    """
    found = re.fullmatch(r"(ti|s|b)(2|4|8|16)", "ti4" if size == "cpu" else size)
    if not found:
        raise ValueError(f"transformers.py has ti, s or b and a patch, as s4, or cpu, not {size}")
    config = rapid.get_config()

    config.model.type = f"vit_{found[1]}"
    config.model.patch_size = int(found[2])
    config.model.pos_embed = "sincos"  # as MoCo v3 has it (arXiv 2104.02057)
    config.model.proj_hidden_dim = 2048
    config.model.proj_output_dim = 2048

    config.loss.std_coeff = 1.0  # the VICReg paper's balance ...
    config.loss.cov_coeff = 82.0  # ... which at 2048 outputs is (2048 - 1) / 25

    config.data.batch_size = 512
    config.optim.name = "adamw"
    config.optim.lr = 0.0005 * 512 / 256
    config.optim.weight_decay = 0.04
    config.optim.epochs = 100.0
    config.optim.warmup_epochs = 10.0
    config.optim.warmup_start_lr = 0.0
    if size == "cpu":
        config.model.depth = 4
        config.model.proj_hidden_dim = 512
        config.model.proj_output_dim = 512
        config.loss.cov_coeff = 20.0  # (512 - 1) / 25
        config.data.batch_size = 96
        config.data.view_size = 16  # 16 tokens a view, 64 in evaluation
        config.optim.lr = 0.0005  # more than the rule's, for there are few steps
        config.optim.epochs = 1.4
        config.optim.warmup_epochs = 0.2
        config.training.use_amp = False  # CPUs emulate bfloat16: float32 is faster
        config.logging.log_every = 1
        config.logging.save_every = 1
    return config
