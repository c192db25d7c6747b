"""Folders of images: tiny-imagenet-200, and any folder whose folders are the classes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .dataset import Raw
from .files import ImageFiles

TINY = "tiny-imagenet-200"
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEST_SHARE = 5  # one image in so many is held out where a folder says nothing about it


def read_tiny_imagenet(data_dir: Path, size: int = 64) -> Raw:
    """``train/CLASS/images/*`` and ``val/images/*`` with ``val/val_annotations.txt``; classes by ``wnids.txt``."""
    root = data_dir if data_dir.name == TINY else data_dir / TINY
    if not root.is_dir():
        raise UserError(f"--data-dir: no folder {root}")
    classes = _lines(root / "wnids.txt")
    train = _labelled([(path, i) for i, name in enumerate(classes) for path in _images(root / "train" / name)], size)
    labels, test = {name: i for i, name in enumerate(classes)}, []
    for line in _lines(root / "val" / "val_annotations.txt"):
        file, name = (line.split("\t") + [""])[:2]
        if name not in labels:
            raise UserError(f"--data-dir: {root / 'val' / 'val_annotations.txt'}: {line!r} names no class of wnids.txt")
        test.append((root / "val" / "images" / file, labels[name]))
    return Raw(train, _labelled(test, size), len(classes), augment="flip")


def read_classes(data_dir: Path, size: int = 64) -> Raw:
    """``train/CLASS/*`` and ``val/CLASS/*`` (or ``test``), or ``CLASS/*``, of which every fifth image is for testing.

    Classes are numbered in the order of their names; images may lie in folders inside of a class.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data-dir: no folder {data_dir}")
    if not (data_dir / "train").is_dir():
        classes = _classes(data_dir)
        everything = _samples(data_dir, classes)
        mixed = [everything[i] for i in torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))]
        test, train = mixed[::TEST_SHARE], [s for i, s in enumerate(mixed) if i % TEST_SHARE]
    else:
        classes = _classes(data_dir / "train")
        held_out = next((data_dir / name for name in ("val", "test") if (data_dir / name).is_dir()), None)
        if held_out is None:
            raise UserError(f"--data-dir: {data_dir} has a folder train, but neither val nor test")
        train, test = _samples(data_dir / "train", classes), _samples(held_out, classes)
    return Raw(_labelled(train, size), _labelled(test, size), len(classes), augment="flip")


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"--data-dir: {path} is missing") from None
    except UnicodeDecodeError:
        raise UserError(f"--data-dir: {path} is not a text file") from None
    if not lines:
        raise UserError(f"--data-dir: {path} is empty")
    return lines


def _classes(folder: Path) -> list[str]:
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise UserError(f"--data-dir: {folder} must hold a folder for each of at least 2 classes, got {classes}")
    return classes


def _samples(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    return [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]


def _images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"--data-dir: {folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    return found


def _labelled(samples: list[tuple[Path, int]], size: int) -> tuple[ImageFiles, Tensor]:
    return ImageFiles([path for path, _ in samples], size), torch.tensor([label for _, label in samples])
