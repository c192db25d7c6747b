"""The data sets of the command line, read from ``--data-dir`` in their standard layouts; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from . import cifar, digits, folders, idx, sequences
from .dataset import AUGMENTATIONS, Augmentation, Dataset, Part, Raw, batches, in_order
from .files import ImageFiles

__all__ = ["AUGMENTATIONS", "DATASETS", "Augmentation", "Dataset", "ImageFiles", "batches", "in_order", "load"]

# how each is read, and what its --data-dir is; None where it needs none
DATASETS: dict[str, tuple[Callable[..., Raw], str | None]] = {
    "digits": (digits.read, None),
    "cifar10": (partial(cifar.read, "cifar10"), "the folder that holds cifar-10-batches-py"),
    "cifar100": (partial(cifar.read, "cifar100"), "the folder that holds cifar-100-python"),
    "mnist": (partial(idx.read, "mnist"), "the folder of train-images-idx3-ubyte(.gz)"),
    "fashion-mnist": (partial(idx.read, "fashion-mnist"), "the folder of train-images-idx3-ubyte(.gz)"),
    "tiny-imagenet": (folders.read_tiny_imagenet, f"the folder that holds {folders.TINY}"),
    "folder": (folders.read_classes, "a folder with a folder of images for each class"),
    "text": (sequences.read_text, "a text file"),
    "reversal": (sequences.reversal, None),
}
SCALED = ("tiny-imagenet", "folder")  # whose images may have any size
IN_MEMORY = 2**30  # bytes of float32 up to which images are kept in memory
SAMPLE = 1_000  # images by which those that are not are normalised


def load(
    name: str,
    data_dir: str | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    validation: int | None = None,
    augment: str | None = None,
    image_size: int | None = None,
) -> Dataset:
    """The data set ``name`` of :data:`DATASETS`, from ``data_dir``.

    Args:
        train_size, test_size: take the first samples of a fixed permutation, the same for every training seed.
        validation: test on so many of the training samples instead, the last of that permutation, and leave the test
            data alone.
        augment: one of :data:`AUGMENTATIONS`; by default what is usual for the data set.
        image_size: side to which the images of :data:`SCALED` data sets are scaled; 64 by default.

    Raises :class:`UserError` that names the option or the file.
    """
    read, what = DATASETS[name]
    if what is not None and data_dir is None:
        raise UserError(f"--data {name} needs --data-dir, {what}")
    options = {} if image_size is None else {"size": image_size}
    if options and name not in SCALED:
        raise UserError(f"--image-size is for --data {' and '.join(SCALED)}, not for --data {name}")
    raw = read(**options) if what is None else read(Path(data_dir), **options)
    train, test = raw.train, raw.test
    if validation is not None:
        train, test = hold_out(*train, validation)
    train = _in_memory(*_first(*train, train_size, "--train-size"))
    test = _in_memory(*_first(*test, test_size, "--test-size"))
    images, black = len(train[0].shape) == 4, torch.zeros(())
    if images:
        mean, std = _moments(train[0])
        train, test = ((_normalised(x, mean, std), y) for x, y in (train, test))
        black = -mean / std
    elif augment not in (None, "none"):
        raise UserError(f"--augment {augment} is for images, not for --data {name}")
    augmentation = Augmentation(augment or raw.augment, black)
    held_out = "test" if validation is None else "validation"
    return Dataset(*train, *test, raw.num_classes, augmentation, raw.causal, held_out)


def _permutation(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _subset(x: Tensor | ImageFiles, y: Tensor, index: Tensor) -> Part:
    return (x.subset(index) if isinstance(x, ImageFiles) else x[index]), y[index]


def hold_out(x: Tensor | ImageFiles, y: Tensor, size: int) -> tuple[Part, Part]:
    """All but the last ``size`` samples of the fixed permutation, and those; each in the order of that permutation."""
    if not 1 <= size < len(x):
        raise UserError(f"--validation must be from 1 to {len(x) - 1}, got {size}")
    order = _permutation(len(x))
    return _subset(x, y, order[:-size]), _subset(x, y, order[-size:])


def _first(x: Tensor | ImageFiles, y: Tensor, size: int | None, option: str) -> Part:
    """The first ``size`` samples of a fixed permutation, or all of them."""
    if size is None:
        return x, y
    if not 1 <= size <= len(x):
        raise UserError(f"{option} must be from 1 to {len(x)}, got {size}")
    return _subset(x, y, _permutation(len(x))[:size])


def _in_memory(x: Tensor | ImageFiles, y: Tensor) -> Part:
    """The images themselves where there are few enough of them, else their files."""
    small = isinstance(x, ImageFiles) and 4 * x.shape.numel() <= IN_MEMORY
    return (x[:] if small else x), y


def _moments(x: Tensor | ImageFiles) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel [C, 1, 1] over all images in memory, or ``SAMPLE`` of the files."""
    if isinstance(x, ImageFiles):
        x = x[_permutation(len(x))[:SAMPLE]]
    std, mean = torch.std_mean(x.float(), (0, 2, 3), correction=0)
    return mean.view(-1, 1, 1), std.clamp_min(1e-6).view(-1, 1, 1)  # a channel that never varies becomes 0, not NaN


def _normalised(x: Tensor | ImageFiles, mean: Tensor, std: Tensor) -> Tensor | ImageFiles:
    return x.normalised(mean, std) if isinstance(x, ImageFiles) else (x.float() - mean) / std
