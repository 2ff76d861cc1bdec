"""Weights in and out: PyTorch's files read without PyTorch, encoders written for everyone."""

from jepa_jax.interop.export import encoder_tensors, projector_tensors, serialize_encoder
from jepa_jax.interop.torch_file import shown
from jepa_jax.interop.torch_model import TorchModel, import_torch

__all__ = [
    "TorchModel",
    "encoder_tensors",
    "import_torch",
    "projector_tensors",
    "serialize_encoder",
    "shown",
]
