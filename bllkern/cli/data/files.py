"""Images that stay in their files until a batch needs them, read ahead by torch's DataLoader."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError

READ_AHEAD = 2_000  # images from which on other processes read them


class ImageFiles:
    """Image files, each scaled until its shorter side is ``size`` and cut to the square in the middle.

    ``files[index]`` reads what a tensor of that ``shape`` would hold there: float32, normalised.
    """

    def __init__(self, paths: list[Path], size: int):
        self.paths, self.size = paths, size
        self.mean, self.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.paths), 3, self.size, self.size))

    def __len__(self):
        return len(self.paths)

    def subset(self, index: Tensor) -> ImageFiles:
        """Some of the files, none of which is read."""
        return self._changed(paths=[self.paths[i] for i in index.tolist()])

    def normalised(self, mean: Tensor, std: Tensor) -> ImageFiles:
        """The same files, of whose images ``mean`` [3, 1, 1] is taken away before they are divided by ``std``."""
        return self._changed(mean=mean, std=std)

    def to(self, device: torch.device) -> ImageFiles:
        """The same files, to be read to ``device``."""
        return self._changed(mean=self.mean.to(device), std=self.std.to(device))

    def _changed(self, **changes) -> ImageFiles:
        changed = copy.copy(self)
        changed.__dict__.update(changes)
        return changed

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return torch.cat(list(self.batches([torch.arange(len(self))[index]])))

    def batches(self, index: list[Tensor]) -> Iterator[Tensor]:
        """The images at each tensor of indices.  Raises :class:`UserError` naming a file that is no whole image."""
        count = sum(map(len, index))
        loader = DataLoader(
            _Batches(self.paths, self.size, index),
            batch_size=None,
            num_workers=min(8, os.cpu_count() or 1) if count >= READ_AHEAD else 0,
            pin_memory=self.mean.is_cuda,
            generator=torch.Generator(),  # workers get their seed from it, and not from the generator of the training
        )
        for images in loader:
            if isinstance(images, UserError):
                raise images
            yield (images.to(self.mean.device, non_blocking=True).float() - self.mean) / self.std


class _Batches(Dataset):
    """Item i is a batch of images, uint8 [B, 3, size, size], or the error that came up while one was read."""

    def __init__(self, paths: list[Path], size: int, index: list[Tensor]):
        self.paths, self.size, self.index = paths, size, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i: int) -> Tensor | UserError:
        try:
            return torch.stack([_image(self.paths[j], self.size) for j in self.index[i].tolist()])
        except UserError as error:  # raised in another process, it would come back as a traceback
            return error


def _image(path: Path, size: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise UserError(f"--data-dir: {path} is missing") from None
    except Exception as exception:  # a damaged image can raise anything
        raise UserError(f"--data-dir: {path} is truncated or not an image: {exception}") from exception
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
