"""configs/cpu.py with small local crops beside the two views: 90 seconds on two CPU cores.

    python -m jepa_jax.main --config=configs/multicrop.py

Every image gives two views of 16 pixels and three crops of 8 (SwAV, arXiv 2006.09882), each crop a
twentieth to a fifth of the image. Network, loss, batch and optimiser are cpu.py's, none of it tuned
for crops.
"""

from ml_collections import ConfigDict

from jepa_jax.configs import cpu


def get_config() -> ConfigDict:
    """cpu.py:90s with crops."""
    config = cpu.get_config()

    # A crop of 8 pixels has a quarter of the positions of a view of 16: three cost less than one
    # view more. A twentieth to a fifth of 32x32 is 7 to 14 pixels wide, which 8 pixels show at the
    # scale at which 16 show a view of 18 to 32: a network sees objects at one size in both.
    config.data.num_local_crops = 3
    config.data.local_size = 8
    config.augment.local_scale = (0.05, 0.2)
    # Views are pulled to crops that show other parts: they should themselves show most of the
    # image (DINO, arXiv 2104.14294, has 0.4 to 1 with crops and 0.14 to 1 without).
    config.augment.scale = (0.3, 1.0)

    # Two views and three quarters in place of two, so fewer steps in the same time.
    config.optim.epochs = 1.0
    return config
