"""Joint-embedding prediction at cpu.py's size: of the other view, or of masked blocks.

    python -m jepa_jax.main --config=configs/jepa.py
    python -m jepa_jax.main --config=configs/jepa.py:blocks

By default cpu.py's network with a predictor in place of VICReg's invariance: from the embedding of
one view it tells what a target network, an average of the network over its past, says of the other
(BYOL, arXiv 2006.07733). `blocks` is I-JEPA (arXiv 2301.08243) at a small size: a transformer sees
some patches of a crop, and a predictor tells the target network's tokens of four blocks of others.
In both VICReg's variance and covariance keep the embeddings from collapsing.
"""

from ml_collections import ConfigDict

from jepa_jax.configs import cpu


def get_config(what: str = "views") -> ConfigDict:
    """cpu.py's data, optimiser and length with a predictor.

    Args:
      what: is predicted; 'views' or 'blocks'.
    """
    if what not in ("views", "blocks"):
        raise ValueError(f"jepa.py predicts views or blocks, not {what}")
    config = cpu.get_config()
    config.model.predictor = True
    # Of hundreds of steps; BYOL and I-JEPA have 0.996 of many more.
    config.model.target_ema = 0.9
    config.model.pred_hidden_dim = 512
    config.loss.sim_coeff = 0.0  # the predictor alone brings the views together ...
    config.loss.pred_coeff = 5.0  # ... and at 1 it hardly does: docs/recipe.md has both searched
    if what == "blocks":
        _masked(config)
    return config


def _masked(config: ConfigDict) -> None:
    # The paper's views: crops, half of them flipped, and no change of colour.
    config.augment.scale = (0.3, 1.0)
    config.augment.jitter_prob = 0.0
    config.augment.grayscale_prob = 0.0
    config.augment.solarize_prob = 0.0
    config.data.view_size = 24  # 6x6 patches: of the smallest grids that four blocks fit into

    config.model.type = "vit_ti"
    config.model.depth = 4  # of the type's twelve blocks
    config.model.patch_size = 4
    config.model.pos_embed = "sincos"
    config.model.pool = "mean"  # a class token would take no part in the prediction
    config.model.stem_init = "random"
    config.model.mask = "blocks"
    config.model.target_ema = 0.99  # this and the weight were not searched for
    config.loss.pred_coeff = 1.0
    config.model.pred_dim = 96  # half the encoder's width, as the paper's narrow predictor
    config.model.pred_depth = 2

    config.optim.name = "adamw"
    config.optim.lr = 1e-3  # the paper's
    config.optim.weight_decay = 0.05
    config.optim.epochs = 0.5
    config.optim.warmup_epochs = 0.1
