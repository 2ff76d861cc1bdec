"""Images beyond 32 pixels: one's own folder, STL-10, Imagenette and ImageNet, by their size.

    python -m jepa_jax.main --config=configs/folder.py --config.data.dataset=folder:/path/to/images
    python -m jepa_jax.main --config=configs/folder.py:96

The size is that of the views: 96 (STL-10 by default), 160 (Imagenette; the default, and where to
begin with photographs of one's own) or 224 (ImageNet, ResNet-50, one GPU of 80 GB). The values are
those of published recipes, named beside them. None has been trained here to the end: no accuracy
and no speed has been measured at these sizes, only that every part computes what PyTorch's does
(docs/parity.md) and that a step runs. docs/datasheet.md says which keys follow from the size.
"""

from ml_collections import ConfigDict

from jepa_jax.configs import rapid

SIZES = ("96", "160", "224")


def get_config(size: str = "160") -> ConfigDict:
    """rapid's method at the sizes, networks and strengths that larger images are trained with.

    Args:
      size: one of `SIZES`, the side of the views in pixels.
    """
    if size not in SIZES:
        raise ValueError(f"folder.py has the sizes {', '.join(SIZES)}, not {size}")
    config = rapid.get_config()
    config.meta.seed = 0

    config.data.dataset = "imagenette/160px-v2"
    config.data.image_size = 160
    config.data.batch_size = 256
    config.data.num_val = 1000  # of Imagenette's 9,469
    config.data.mean = (0.485, 0.456, 0.406)  # of ImageNet, from which all three are drawn
    config.data.std = (0.229, 0.224, 0.225)

    # Blur and solarize as in VICReg's appendix (arXiv 2105.04906); all else is rapid's already.
    config.augment.blur_prob = 0.5
    config.augment.blur_sigma = (0.1, 2.0)
    config.augment.solarize_prob = 0.1

    # The paper's stem (arXiv 1512.03385): stage 1 sees maps of a quarter of the side.
    config.model.stem_kernel = 7
    config.model.stem_stride = 2
    config.model.stem_padding = 3
    config.model.stem_pool = True
    config.model.proj_hidden_dim = 2048
    config.model.proj_output_dim = 2048

    config.loss.std_coeff = 1.0  # the paper's balance ...
    config.loss.cov_coeff = 82.0  # ... which at 2048 outputs is (2048 - 1) / 25

    # solo-learn's VICReg of a ResNet-18 on ImageNet-100: this very LARS, rate 0.3 at a batch of
    # 256, decay 1e-4, 400 epochs.
    config.optim.lr = 0.3
    config.optim.weight_decay = 1e-4
    config.optim.epochs = 400.0
    config.optim.warmup_epochs = 10.0  # VICReg's
    config.optim.warmup_start_lr = 0.0

    config.logging.save_every = 10
    if size == "96":
        _stl10(config)
    elif size == "224":
        _imagenet(config)
    return config


def _stl10(config: ConfigDict) -> None:
    config.data.dataset = "stl10"
    config.data.unlabelled_split = "unlabelled"  # 100,000 images beside the 5,000 with labels
    config.data.image_size = 96
    config.data.num_val = 1000  # of those with labels
    # W-MSE's stem for STL-10 (arXiv 2007.06346): stage 1 sees maps of 48 rather than 24.
    config.model.stem_kernel = 3
    config.model.stem_stride = 1
    config.model.stem_padding = 1
    config.optim.epochs = 100.0  # 41,000 steps; W-MSE trains 2,000 epochs
    config.logging.save_every = 5


def _imagenet(config: ConfigDict) -> None:
    """VICReg's single-machine recipe: 100 epochs at a batch of 512, rate 0.3 at 256."""
    config.data.dataset = "imagenet2012"
    config.data.image_size = 256
    config.data.view_size = 224  # crops of 256 lose less sharpness than crops of 224
    config.data.batch_size = 512  # 48 GB in bfloat16 by docs/datasheet.md; the paper has 2048
    config.data.num_val = 10_000
    config.augment.scale = (0.08, 1.0)  # VICReg's, and that of supervised training
    config.model.block = "bottleneck"
    config.model.stage_sizes = (3, 4, 6, 3)  # ResNet-50: 2048 features
    config.model.proj_hidden_dim = 8192
    config.model.proj_output_dim = 8192
    config.loss.cov_coeff = 328.0  # (8192 - 1) / 25
    config.optim.lr = 0.6
    config.optim.weight_decay = 1e-6
    config.optim.epochs = 100.0  # of 2,502 steps; 1,000 in the paper
    config.logging.log_every = 1
    config.logging.save_every = 1
