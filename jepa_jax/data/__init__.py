"""Images and labels: from tfds or from arrays, resident on the device or streamed to it."""

from jepa_jax.data.batches import choose_placement, epoch_order, stream_batches, take
from jepa_jax.data.dataset import Dataset, Records, from_arrays
from jepa_jax.data.load import load_dataset
from jepa_jax.data.prepared import data_dir

__all__ = [
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
