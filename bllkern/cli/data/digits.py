"""The digits that scikit-learn contains."""

from __future__ import annotations

import torch

from ..errors import UserError
from .dataset import Raw


def read() -> Raw:
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
    return Raw((train_x, train_y), (test_x, test_y), num_classes=10)
