"""What every data set becomes: inputs and targets to train on and to test on, batches of them, and augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .files import ImageFiles

PADDING = 4  # of random crops (BWBPF, arXiv 2312.13311, and most work on CIFAR)
AUGMENTATIONS = ("none", "flip", "crop-flip")

Part = tuple["Tensor | ImageFiles", Tensor]


@dataclass(frozen=True)
class Raw:
    """A data set as its files have it: inputs and targets, and the augmentation that is usual for it.

    ``causal``: the target of a position may depend on the inputs up to it only, as for a language model.
    """

    train: Part
    test: Part
    num_classes: int
    augment: str = "none"
    causal: bool = False


@dataclass(frozen=True)
class Dataset:
    """Inputs and targets, ready for a network.

    Images are [N, C, H, W], float32, the channels of the training images with mean 0 and variance 1; in memory, or
    :class:`ImageFiles`.  Their labels are [N].  Tokens and the targets of each are [N, T].  Labels, tokens are int64.
    ``test_x`` and ``test_y`` are what accuracy is reported on: ``held_out`` says whether as ``"test"`` or
    ``"validation"`` data.
    """

    train_x: Tensor | ImageFiles
    train_y: Tensor
    test_x: Tensor | ImageFiles
    test_y: Tensor
    num_classes: int
    augment: Augmentation
    causal: bool = False
    held_out: str = "test"

    def to(self, device: torch.device) -> Dataset:
        moved = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y", "augment")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Augmentation:
    """Random mirroring, and crops of the image padded by ``PADDING`` black pixels, on the images' device.

    ``black`` [C, 1, 1] is what a black pixel is after normalisation.
    """

    kind: str
    black: Tensor

    def to(self, device: torch.device) -> Augmentation:
        return replace(self, black=self.black.to(device))

    def __call__(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Images [B, C, H, W], each changed in its own way, drawn from ``random`` (a CPU generator)."""
        if self.kind == "none":
            return images
        count, _, height, width = images.shape
        mirrored = torch.rand(count, 1, generator=random) < 0.5
        columns = torch.arange(width)
        columns = torch.where(mirrored, columns.flip(0), columns)
        rows = torch.arange(height).expand(count, height)
        if self.kind == "crop-flip":
            shift = torch.randint(0, 2 * PADDING + 1, (2, count, 1), generator=random)
            rows, columns = rows + shift[0], columns + shift[1]
            padded = self.black.expand(*images.shape[:2], height + 2 * PADDING, width + 2 * PADDING).clone()
            padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = images
            images = padded
        places = (torch.arange(count).view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1))
        sample, row, column = (place.to(images.device, non_blocking=True) for place in places)
        return images.permute(0, 2, 3, 1)[sample, row, column].permute(0, 3, 1, 2).contiguous()


def batches(
    x: Tensor | ImageFiles, y: Tensor, batch_size: int, augment: Augmentation, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (inputs, targets) in an order drawn from ``order``, without what is left after the last full batch.

    ``augment`` changes the inputs, drawing from ``order`` too.
    """
    permutation = torch.randperm(len(x), generator=order)
    index = permutation[: len(x) // batch_size * batch_size].view(-1, batch_size)
    for chosen, inputs in zip(index, _inputs(x, list(index)), strict=True):
        yield augment(inputs, order), y[chosen.to(y.device)]


def in_order(x: Tensor | ImageFiles, y: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All (inputs, targets), unchanged and in their own order."""
    index = torch.arange(len(x)).split(batch_size)
    yield from zip(_inputs(x, list(index)), y.split(batch_size), strict=True)


def _inputs(x: Tensor | ImageFiles, index: list[Tensor]) -> Iterator[Tensor]:
    """The inputs of each batch of indices."""
    if isinstance(x, ImageFiles):
        return x.batches(index)
    return (x[chosen.to(x.device)] for chosen in index)
