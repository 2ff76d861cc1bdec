"""Endless batches of two normalised views and labels, made in three ways."""

import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.torch_peer import augment
from benchmarks.torch_peer.recipe import Recipe
from benchmarks.torch_peer.training import NUM_CLASSES

SIZE = 32
_PREFETCHED = 4
# A value of so many queues: what lay in one before it is a small part.
_QUEUES_IN_A_PERIOD = 10
Batch = tuple[Tensor, Tensor, Tensor]


def noise(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] from a fixed seed."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, SIZE, SIZE, 3), dtype=np.uint8)
    return images, rng.integers(0, NUM_CLASSES, num_images)


def fixed(recipe: Recipe, device: torch.device, memory_format: torch.memory_format):
    """The same normal random views again and again: no augmentation, a pure step."""
    generator = torch.Generator().manual_seed(0)
    size = recipe.view_size
    views = torch.randn(2, recipe.batch_size, 3, size, size, generator=generator).to(device)
    x1, x2 = (view.contiguous(memory_format=memory_format) for view in views)
    labels = torch.from_numpy(noise(recipe.batch_size)[1]).to(device)
    return itertools.repeat((x1, x2, labels))


def resident(
    recipe: Recipe, device: torch.device, memory_format: torch.memory_format, *, compiled: bool
) -> Iterator[Batch]:
    """Shuffled epochs of images that lie on the device as uint8, augmented there."""
    images, labels = (torch.from_numpy(array) for array in noise(recipe.num_images))
    images, labels = images.transpose(2, 3).contiguous().to(device), labels.to(device)
    two_views = torch.compile(augment.two_views) if compiled else augment.two_views
    num_batches = recipe.num_images // recipe.batch_size
    while True:
        order = torch.randperm(recipe.num_images, device=device)
        for indices in order[: num_batches * recipe.batch_size].split(recipe.batch_size):
            yield *two_views(images[indices], memory_format, recipe.view_size), labels[indices]


def import_torchvision() -> Any:
    """torchvision, beside a CPU build of torch too: for that there is no build of its own.

    Its compiled operators then miss those of the GPU; transforms and models need none.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("_meta_registrations")
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


class PilViews(Dataset):
    """Two views of an image by torchvision's transforms of PIL images, and its label."""

    def __init__(self, num_images: int, size: int):
        transforms = import_torchvision().transforms
        self._images, self._labels = noise(num_images)
        self._transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomSolarize(128, p=0.1),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(augment.MEAN, augment.STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = self._images[index]
        return self._transform(image), self._transform(image), int(self._labels[index])


def loader_period(recipe: Recipe, workers: int) -> int:
    """Steps of `loaded` after which its queue holds what it held before them.

    An epoch begins and ends with an empty queue, so that whole epochs count no batch that was
    made outside them. Where an epoch is longer, ten full queues drain one that can be drained.
    """
    queues = _QUEUES_IN_A_PERIOD * workers * _PREFETCHED
    return min(max(1, queues), recipe.num_images // recipe.batch_size)


def loaded(
    recipe: Recipe, device: torch.device, memory_format: torch.memory_format, *, workers: int
) -> Iterator[Batch]:
    """Shuffled epochs from a DataLoader whose worker processes augment."""
    loader = DataLoader(
        PilViews(recipe.num_images, recipe.view_size),
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=_PREFETCHED if workers else None,
        pin_memory=device.type == "cuda",
    )
    while True:
        for *views, labels in loader:
            x1, x2 = (
                view.to(device, non_blocking=True, memory_format=memory_format) for view in views
            )
            yield x1, x2, labels.to(device, non_blocking=True)
