"""MNIST and Fashion-MNIST from their idx files (http://yann.lecun.com/exdb/mnist), compressed or not."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .dataset import Raw

PLACES = {"mnist": ("", "MNIST/raw", "mnist"), "fashion-mnist": ("", "FashionMNIST/raw", "fashion-mnist", "fashion")}
NAMES = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
_MAGIC = {"images": 0x803, "labels": 0x801}  # uint8 with three dimensions, with one


def read(name: str, data_dir: Path) -> Raw:
    """Images [N, 1, 28, 28] (uint8) of ``data_dir``, or of the folder in it that is usual for the data set."""
    if not data_dir.is_dir():
        raise UserError(f"--data-dir: no folder {data_dir}")
    folders = [data_dir / place for place in PLACES[name]]
    folder = next((f for f in folders if _find(f, "train", "images")), data_dir)
    return Raw(_part(folder, "train"), _part(folder, "t10k"), num_classes=10)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    """The file, whose name some copies write with a dot, compressed or not."""
    name = f"{part}-{NAMES[kind]}"
    names = [name, name.replace("-idx", ".idx")]
    return next((folder / n for n in [*names, *(n + ".gz" for n in names)] if (folder / n).is_file()), None)


def _part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images, labels = (_array(folder, part, kind) for kind in NAMES)
    if len(images) != len(labels):
        raise UserError(f"--data-dir: {folder} holds {len(images)} {part} images, but {len(labels)} labels")
    if len(labels) == 0 or labels.max() > 9:
        raise UserError(f"--data-dir: {_find(folder, part, 'labels')} must hold labels from 0 to 9")
    return images.unsqueeze(1), labels.long()


def _array(folder: Path, part: str, kind: str) -> Tensor:
    path = _find(folder, part, kind)
    if path is None:
        raise UserError(f"--data-dir: {folder / f'{part}-{NAMES[kind]}'} is missing, and so is its .gz")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, gzip.zlib.error) as exception:
        raise UserError(f"--data-dir: {path} is truncated or not a gzip file: {exception}") from exception
    rank = _MAGIC[kind] & 0xFF
    head = np.frombuffer(content[: 4 + 4 * rank], ">u4") if len(content) >= 4 + 4 * rank else []
    if len(head) == 0 or head[0] != _MAGIC[kind]:
        raise UserError(f"--data-dir: {path} is truncated or not an idx file of {kind}")
    shape = [int(side) for side in head[1:]]
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if len(values) != math.prod(shape):
        raise UserError(
            f"--data-dir: {path} is truncated: it must hold {math.prod(shape):,} bytes of {kind}, got {len(values):,}"
        )
    return torch.tensor(values.reshape(shape))
