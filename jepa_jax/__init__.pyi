# Made by `python -m docs.make_api`.

from jepa_jax.api import export_encoder as export_encoder
from jepa_jax.api import load_encoder as load_encoder
from jepa_jax.augment import adjust_brightness as adjust_brightness
from jepa_jax.augment import adjust_contrast as adjust_contrast
from jepa_jax.augment import adjust_hue as adjust_hue
from jepa_jax.augment import adjust_saturation as adjust_saturation
from jepa_jax.augment import gaussian_blur as gaussian_blur
from jepa_jax.augment import pairs_of_views as pairs_of_views
from jepa_jax.augment import resized_crop as resized_crop
from jepa_jax.augment import rgb_to_grayscale as rgb_to_grayscale
from jepa_jax.augment import solarize as solarize
from jepa_jax.augment import two_views as two_views
from jepa_jax.data import Dataset as Dataset
from jepa_jax.data import from_arrays as from_arrays
from jepa_jax.data import load_dataset as load_dataset
from jepa_jax.evaluate import evaluate_run as evaluate_run
from jepa_jax.evaluation import evaluate_representation as evaluate_representation
from jepa_jax.health import effective_rank as effective_rank
from jepa_jax.health import rank_me as rank_me
from jepa_jax.interop import TorchModel as TorchModel
from jepa_jax.interop import import_torch as import_torch
from jepa_jax.losses import vicreg_loss as vicreg_loss
from jepa_jax.models import Encoder as Encoder
from jepa_jax.models import ImageJEPA as ImageJEPA
from jepa_jax.models import ModelFns as ModelFns
from jepa_jax.models import Projector as Projector
from jepa_jax.models import ResNet as ResNet
from jepa_jax.models import ResNet18 as ResNet18
from jepa_jax.models import ResNet50 as ResNet50
from jepa_jax.optim import lars as lars
from jepa_jax.optim import warmup_cosine as warmup_cosine
from jepa_jax.probes import knn_votes as knn_votes
from jepa_jax.probes import logistic_probe as logistic_probe
from jepa_jax.probes import ridge_probe as ridge_probe
from jepa_jax.report import write_report as write_report
from jepa_jax.train import train_and_evaluate as train_and_evaluate
from jepa_jax.train_step import HParams as HParams
from jepa_jax.train_step import TrainState as TrainState
from jepa_jax.train_step import create_train_state as create_train_state
from jepa_jax.train_step import make_train_epoch as make_train_epoch
from jepa_jax.train_step import make_train_step as make_train_step

__version__: str
__all__: list[str]
