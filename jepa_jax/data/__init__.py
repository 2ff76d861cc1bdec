"""Images and labels from tfds, a folder or arrays, resident on the device or streamed to it."""

from jepa_jax.data.batches import choose_placement, epoch_order, stream_batches, take
from jepa_jax.data.dataset import Dataset, from_arrays
from jepa_jax.data.folder import FOLDER_PREFIX
from jepa_jax.data.load import load_dataset
from jepa_jax.data.prepared import data_dir
from jepa_jax.data.records import Records

__all__ = [
    "FOLDER_PREFIX",
    "Dataset",
    "Records",
    "choose_placement",
    "data_dir",
    "epoch_order",
    "from_arrays",
    "load_dataset",
    "stream_batches",
    "take",
]
