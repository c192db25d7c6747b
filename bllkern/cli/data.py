"""The data sets of the command line, in memory: digits (from scikit-learn) and CIFAR-10 (from its standard files)."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILE = "test_batch"


@dataclass(frozen=True)
class Dataset:
    """Images [N, C, H, W] (float32; channels of the training images have mean 0, variance 1), labels [N] (int64)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    flips: bool  # mirrored images keep their label

    def to(self, device: torch.device) -> Dataset:
        tensors = (t.to(device) for t in (self.train_x, self.train_y, self.test_x, self.test_y))
        return Dataset(*tensors, self.num_classes, self.flips)


def load(
    name: str, data_dir: str | None = None, train_size: int | None = None, test_size: int | None = None
) -> Dataset:
    """The data set ``name``: ``digits``, or ``cifar10`` from ``data_dir``.

    ``train_size`` and ``test_size`` take the first images of a fixed permutation, the same for every training seed.
    Raises :class:`UserError` that names the option or the file.
    """
    if name == "digits":
        train, test = _digits()
    else:
        train, test = _cifar10(data_dir)
    train = _first(*train, train_size, "--train-size")
    test = _first(*test, test_size, "--test-size")
    train_x, test_x = _normalised(train[0], test[0])
    return Dataset(train_x, train[1], test_x, test[1], num_classes=10, flips=name == "cifar10")


def batches(x: Tensor, y: Tensor, batch_size: int, flips: bool, order: torch.Generator):
    """One epoch of (images, labels) in an order drawn from ``order``, without what is left after the last full batch.

    ``flips`` mirrors each image with probability one half.
    """
    permutation = torch.randperm(len(x), generator=order)
    for start in range(0, len(x) - batch_size + 1, batch_size):
        index = permutation[start : start + batch_size].to(x.device)
        images = x[index]
        if flips:
            mirrored = torch.rand(batch_size, 1, 1, 1, generator=order).to(x.device) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        yield images, y[index]


def _digits():
    """1,437 images of 8x8 pixels to train on and 360 to test on, every class in proportion."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as exception:
        raise UserError(f"--data digits needs scikit-learn: pip install scikit-learn ({exception})") from exception
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64) for y in split[2:])
    return (train_x, train_y), (test_x, test_y)


def _cifar10(data_dir: str | None):
    if data_dir is None:
        raise UserError(f"--data cifar10 needs --data-dir DIR, the folder that holds {FOLDER}")
    folder = Path(data_dir)
    if folder.name != FOLDER:
        folder = folder / FOLDER
    if not folder.is_dir():
        raise UserError(f"--data-dir: no folder {folder}")
    parts = [_read_batch(folder / name) for name in TRAIN_FILES]
    train = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    return train, _read_batch(folder / TEST_FILE)


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and Python's containers; refuses every other callable, so a pickle cannot run code."""

    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # how an array is rebuilt, under the names that numpy 1 and numpy 2 give it
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        # how Python 3 writes bytes in the old protocols
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no data file needs") from None


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] (uint8) and labels [N] of one CIFAR-10 file, whose keys may be bytes or str."""
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except FileNotFoundError:
        raise UserError(f"--data-dir: {path} is missing") from None
    except Exception as exception:  # a damaged pickle can raise anything
        raise UserError(f"--data-dir: {path} is truncated or not a CIFAR-10 file: {exception}") from exception
    if isinstance(content, dict):
        content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
        images, labels = content.get("data"), content.get("labels")
        if _is_batch(images, labels):
            return torch.tensor(images).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)
    raise UserError(
        f"--data-dir: {path} is not a CIFAR-10 file: it must be a dict with 'data', uint8 rows of 3,072, "
        "and 'labels', as many integers from 0 to 9"
    )


def _is_batch(images, labels) -> bool:
    return (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and images.ndim == 2
        and images.shape[1] == 3072
        and isinstance(labels, (list, np.ndarray))
        and len(labels) == len(images) > 0
        and all(isinstance(label, (int, np.integer)) and 0 <= label <= 9 for label in labels)
    )


def _first(x: Tensor, y: Tensor, size: int | None, option: str) -> tuple[Tensor, Tensor]:
    """The first ``size`` images of a fixed permutation, or all of them."""
    if size is None:
        return x, y
    if not 1 <= size <= len(x):
        raise UserError(f"{option} must be from 1 to {len(x)}, got {size}")
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:size]
    return x[chosen], y[chosen]


def _normalised(train_x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32, by the mean and standard deviation of each channel of the training images."""
    train_x, test_x = train_x.float(), test_x.float()
    std, mean = torch.std_mean(train_x, (0, 2, 3), correction=0, keepdim=True)
    std = std.clamp_min(1e-6)  # a channel that never varies becomes 0, not NaN
    return (train_x - mean) / std, (test_x - mean) / std
