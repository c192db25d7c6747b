"""Images as tiles [places, channels] in either layout, contiguous or channels-last, and statistics of their channels.

``LAST`` tells a kernel that the channels of a place lie side by side; else the places of a channel do.
"""

import torch

import triton
import triton.language as tl

from ._launch import TILE, WARPS, cdiv, launch, power_of_2, splits

LINE = 64  # channels that a channels-last tile has, if there are as many: 128 bytes of half precision


def each(last: bool) -> int:
    """Elements of a thread: of channels-last images twice 16 bytes of half precision are on their way to it."""
    return 16 if last else 8


def tile(places: int, channels: int, last: bool, summed: bool = False) -> tuple[int, int]:
    """Powers of two ``(ROWS, COLS)``, at most TILE together, or half as many where a channels-last tile is ``summed``
    up: what lies side by side comes first."""
    elements = TILE // 2 if last and summed else TILE
    rows, cols = power_of_2(places), power_of_2(channels)
    cols = min(cols, max(LINE if last else 1, elements // rows))
    return max(1, min(rows, elements // cols)), cols


def pieces(length: int, rows: int, tiles: int) -> tuple[int, int]:
    """How many pieces, and of what length, a multiple of ``rows``, so that with as many ``tiles`` they fill a GPU;
    several times, so that it is not the last few that take long, where that leaves each at least 8 times ``rows``."""
    count = max(splits(tiles, length, rows), min(2048 // tiles, length // (8 * rows)))
    piece = rows * cdiv(length, rows * count)
    return cdiv(length, piece), piece


def launch_tiles(kernel, parts: int, channels: int, shape: tuple[int, int], *arguments, each=TILE // WARPS // 32):
    """``kernel`` for so many parts of images, each in as many tiles of channels as it takes; a thread has ``each``
    elements of a tile."""
    warps = max(1, min(WARPS, shape[0] * shape[1] // (32 * each)))
    launch(kernel, (parts * cdiv(channels, shape[1]),), *arguments, *shape, num_warps=warps)


@triton.jit
def share(parts, channels, COLS: tl.constexpr):
    """Of this program the image, which of its parts, and the channels; those of one part follow each other."""
    program, tiles = tl.program_id(0), tl.cdiv(channels, COLS)
    column = program % tiles * COLS + tl.arange(0, COLS)
    return (program // tiles // parts).to(tl.int64), program // tiles % parts, column


@triton.jit
def at(image_ptr, place, column, places, channels, LAST: tl.constexpr):
    """Pointers [ROWS, COLS] into an image of so many places and channels."""
    if LAST:
        return (image_ptr + place.to(tl.int64) * channels)[:, None] + column[None, :]
    else:
        return (image_ptr + column.to(tl.int64) * places)[None, :] + place[:, None]


@triton.jit
def constants(weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps, column, channels):
    """Of channels: mean, reciprocal deviation, what ``x - mean`` is scaled by, and bias, [1, COLS] each."""
    mask = column < channels
    reciprocal = tl.rsqrt(tl.load(variance_ptr + column, mask=mask, other=1.0) + eps)
    scale = tl.load(weight_ptr + column, mask=mask, other=0.0) * reciprocal
    bias = tl.load(bias_ptr + column, mask=mask, other=0.0)
    mean = tl.load(mean_ptr + column, mask=mask, other=0.0)
    return mean[None, :], reciprocal[None, :], scale[None, :], bias[None, :]


@triton.jit
def _statistics(
    x_ptr,  # [images, places, channels] or [images, channels, places]
    means_ptr,  # [pieces, channels] float32, as is the next
    squares_ptr,
    places,
    channels,
    length,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean of a piece of ``length`` places, and the sum of squared differences from it; one program for each piece.

    The piece is read once: with d the differences from the mean of its first ROWS places, of n places the mean of d is
    to be added to that, and ``n mean(d)^2`` to be taken from the sum of ``d^2``.  Of that sum it is at most the part
    ``1 - ROWS / n``, as the first places differ from the mean too: ``log2(n / ROWS)`` bits cancel.
    """
    parts = tl.cdiv(places, length)
    image, part, column = share(parts, channels, COLS)
    x_ptr += image * places * channels
    first = part.to(tl.int64) * length
    here = tl.minimum(places - first, length).to(tl.int32)
    row, known = tl.arange(0, ROWS), (column < channels)[None, :]
    mask = (row < here)[:, None] & known
    x = tl.load(at(x_ptr, first + row, column, places, channels, LAST), mask=mask, other=0.0).to(tl.float32)
    center = tl.sum(x, 0) / tl.minimum(here, ROWS)
    sums = tl.where(mask, x - center[None, :], 0.0)
    squares = sums * sums
    for start in range(ROWS, here, ROWS):
        mask = (start + row < here)[:, None] & known
        x_there = at(x_ptr, first + start + row, column, places, channels, LAST)
        d = tl.where(mask, tl.load(x_there, mask=mask, other=0.0).to(tl.float32) - center[None, :], 0.0)
        sums += d
        squares += d * d
    off = tl.sum(sums, 0) / here
    square = tl.sum(squares, 0) - off * off * here
    out = (image * parts + part) * channels + column
    tl.store(means_ptr + out, center + off, mask=column < channels)
    tl.store(squares_ptr + out, tl.where(square < 0, 0.0, square), mask=column < channels)


@triton.jit
def _combined(
    means_ptr,  # [pieces, channels] float32, as is the next
    squares_ptr,
    mean_ptr,  # [channels] float32, as is the next
    variance_ptr,
    pieces,
    channels,
    length,
    values,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Mean and variance of ``values`` values from what :func:`_statistics` finds of pieces; the last may be shorter.

    In one sweep, as there: differences are from the mean of the first ROWS pieces' means.
    """
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)
    known = (column < channels)[None, :]
    row = tl.arange(0, ROWS)
    mask = (row < pieces)[:, None] & known
    own = tl.load(at(means_ptr, row, column, pieces, channels, True), mask=mask, other=0.0)
    center = tl.sum(own, 0) / tl.minimum(pieces, ROWS)
    offs = tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, pieces, ROWS):
        piece = start + row
        mask = (piece < pieces)[:, None] & known
        own = tl.load(at(means_ptr, piece, column, pieces, channels, True), mask=mask, other=0.0)
        own_squares = tl.load(at(squares_ptr, piece, column, pieces, channels, True), mask=mask, other=0.0)
        count = tl.minimum(values - piece.to(tl.int64) * length, length).to(tl.float32)[:, None]
        off = tl.where(mask, own - center[None, :], 0.0)
        offs += off * (count / values)
        squares += own_squares + off * off * count
    off = tl.sum(offs, 0)
    variance = tl.sum(squares, 0) / values - off * off
    tl.store(mean_ptr + column, center + off, mask=column < channels)
    tl.store(variance_ptr + column, tl.where(variance < 0, 0.0, variance), mask=column < channels)


def statistics(x, last: bool):
    """Mean and variance [C] of ``x`` [N, C, H, W], which has elements."""
    images, channels, height, width = x.shape
    # of channels-last images the places follow each other from one to the next
    images, places = (1, images * height * width) if last else (images, height * width)
    shape = tile(places, channels, last, summed=True)
    parts, length = pieces(places, shape[0], cdiv(channels, shape[1])) if last else (1, places)
    means, squares = (x.new_empty(images * parts, channels, dtype=torch.float32) for _ in range(2))
    arguments = (x, means, squares, places, channels, length, last)
    launch_tiles(_statistics, images * parts, channels, shape, *arguments, each=each(last))
    mean, variance = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    arguments = (means, squares, mean, variance, images * parts, channels, length, images * places)
    launch_tiles(_combined, 1, channels, _few_channels(images * parts, channels), *arguments)
    return mean, variance


def _few_channels(pieces: int, channels: int) -> tuple[int, int]:
    """A tile of what pieces have left, which is little."""
    return min(power_of_2(pieces), 512), min(power_of_2(channels), 8)


@triton.jit
def _added(
    found_ptr,  # [several, pieces, channels] float32
    sums_ptr,  # [several, channels] float32
    pieces,
    channels,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The sums over the pieces, in a fixed order."""
    one, _, column = share(1, channels, COLS)
    known = (column < channels)[None, :]
    found_ptr += one * pieces * channels
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, pieces, ROWS):
        piece = start + tl.arange(0, ROWS)
        mask = (piece < pieces)[:, None] & known
        sums += tl.load(at(found_ptr, piece, column, pieces, channels, True), mask=mask, other=0.0)
    tl.store(sums_ptr + one * channels + column, tl.sum(sums, 0), mask=column < channels)


def added(found):
    """``found`` [several, pieces, channels] added up over the pieces."""
    several, pieces, channels = found.shape
    sums = found.new_empty(several, channels)
    launch_tiles(_added, several, channels, _few_channels(pieces, channels), found, sums, pieces, channels)
    return sums
