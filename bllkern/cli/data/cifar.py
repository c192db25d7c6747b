"""CIFAR-10 and CIFAR-100 from their published pickles (the Python version)."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .dataset import Raw


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps what: a folder, its files, the key of the labels, which lie below ``num_classes``."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: str
    num_classes: int


LAYOUTS = {
    "cifar10": Layout(
        "CIFAR-10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "labels", 10
    ),
    "cifar100": Layout("CIFAR-100", "cifar-100-python", ("train",), "test", "fine_labels", 100),
}


def read(name: str, data_dir: Path) -> Raw:
    """Images [N, 3, 32, 32] (uint8) of ``data_dir``, the data set's own folder or the one that holds it."""
    layout = LAYOUTS[name]
    folder = data_dir if data_dir.name == layout.folder else data_dir / layout.folder
    if not folder.is_dir():
        raise UserError(f"--data-dir: no folder {folder}")
    parts = [_read_file(folder / file, layout) for file in layout.train]
    train = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    return Raw(train, _read_file(folder / layout.test, layout), layout.num_classes, augment="flip")


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


def _read_file(path: Path, layout: Layout) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] (uint8) and labels [N] of one file, whose keys may be bytes or str."""
    try:
        with open(path, "rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except FileNotFoundError:
        raise UserError(f"--data-dir: {path} is missing") from None
    except Exception as exception:  # a damaged pickle can raise anything
        raise UserError(f"--data-dir: {path} is truncated or not a {layout.name} file: {exception}") from exception
    if isinstance(content, dict):
        content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
        images, labels = content.get("data"), content.get(layout.labels)
        if _is_batch(images, labels, layout.num_classes):
            return torch.tensor(images).view(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)
    raise UserError(
        f"--data-dir: {path} is not a {layout.name} file: it must be a dict with 'data', uint8 rows of 3,072, "
        f"and {layout.labels!r}, as many integers from 0 to {layout.num_classes - 1}"
    )


def _is_batch(images, labels, num_classes: int) -> bool:
    return (
        isinstance(images, np.ndarray)
        and images.dtype == np.uint8
        and images.ndim == 2
        and images.shape[1] == 3072
        and isinstance(labels, (list, np.ndarray))
        and len(labels) == len(images) > 0
        and all(isinstance(label, (int, np.integer)) and 0 <= label < num_classes for label in labels)
    )
