"""The resize of numbers by torch's antialiased bicubic filter, as products of matrices.

torch's own loops over floating-point pixels have no vector code: the products take half of the time or less.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from fcmae.threads import one_thread

SUPPORT = 2
"""Pixels to each side that the filter reads, of the coarser of the two images."""
WHOLE = 64
"""New pixels up to which one product makes all of them."""
LARGER, SMALLER = 32, 16
"""New pixels per product otherwise, of an image that gets larger or smaller; with more it would multiply zeros."""
KEPT = 512
"""Pixels up to which weights are kept."""
WIDE = 16
"""Columns come first if otherwise the memory between the two steps were this many times as much."""

Block = tuple[int, int, int, int, Tensor]
"""New pixels from one to before another, the old ones that they read, and the weights ``[new, old]``."""


def resize_numbers(pixels: Tensor, size: tuple[int, int], vflip: bool = False, flip: bool = False) -> Tensor:
    """``[C, H, W]`` in host memory, of any type, to float32 ``[C, *size]``, as torch's ``interpolate`` does it.

    In memory the rows come before the channels: whoever stacks a batch copies each image anyway. The result's bits are
    a function of the arguments alone, whatever the threads and addresses.

    Args:
        vflip: whether the result is mirrored top to bottom.
        flip: left to right.
    """
    height, width = pixels.shape[-2:]
    rows = pixels.permute(1, 0, 2)  # so that one product makes all channels
    down, across = _blocks(height, size[0], vflip), _blocks(width, size[1], flip)
    with one_thread():
        if size[0] * width <= WIDE * height * size[1]:
            rows = _across(_down(rows, size[0], down), size[1], across)
        else:
            rows = _down(_across(_copied(rows), size[1], across), size[0], down)
    return rows.view(1, *size) if len(pixels) == 1 else rows.permute(1, 0, 2)


def _down(rows: Tensor, size: int, blocks: list[Block]) -> Tensor:
    """``[H, C, W]`` to ``[size, C, W]``."""
    out = torch.empty(size, *rows.shape[1:])
    for begin, end, low, high, weights in blocks:
        torch.mm(weights, _copied(rows[low:high]).flatten(1), out=out[begin:end].flatten(1))
    return out


def _across(rows: Tensor, size: int, blocks: list[Block]) -> Tensor:
    """``[H, C, W]``, copied, to ``[H, C, size]``."""
    flat, out = rows.flatten(0, 1), torch.empty(*rows.shape[:2], size)
    for begin, end, low, high, weights in blocks:
        torch.mm(flat[:, low:high], weights.T, out=out.flatten(0, 1)[:, begin:end])
    return out


def _copied(rows: Tensor) -> Tensor:
    """As float32 in memory that begins where torch aligns it."""
    return torch.empty(rows.shape).copy_(rows)


def _blocks(side: int, size: int, mirrored: bool) -> list[Block]:
    return (_kept if max(side, size) <= KEPT else _made)(side, size, mirrored)


def _made(side: int, size: int, mirrored: bool) -> list[Block]:
    scale = side / size
    reach, centre = SUPPORT * max(scale, 1.0), scale * (np.arange(size) + 0.5)
    first = (centre - reach + 0.5).astype(np.int64).clip(0)
    end = (centre + reach + 0.5).astype(np.int64).clip(max=side)
    read = first[:, None] + np.arange(2 * math.ceil(reach) + 1)
    # Factors in float32, as torch rounds.
    middle = np.float32(scale) * (np.arange(size, dtype=np.float32) + np.float32(0.5))
    factors = _cubic((read.astype(np.float32) - middle[:, None] + np.float32(0.5)) / np.float32(max(scale, 1.0)))
    factors[read >= end[:, None]] = 0
    factors /= factors.sum(axis=1, keepdims=True)
    step = size if size <= WHOLE else LARGER if scale < 1 else SMALLER
    lows = first[::step]
    read -= np.repeat(lows, step)[:size, None]
    matrices = torch.zeros(size, int(read.max()) + 1)
    np.put_along_axis(matrices.numpy(), read, factors, axis=1)
    blocks = []
    for begin, low in zip(range(0, size, step), lows.tolist(), strict=True):
        stop, high = min(size, begin + step), min(side, low + matrices.shape[1])
        weights = matrices[begin:stop, : high - low]
        if mirrored:
            begin, stop, weights = size - stop, size - begin, weights.flip(0)
        blocks.append((begin, stop, low, high, weights))
    return blocks


@functools.lru_cache(maxsize=512)
def _kept(side: int, size: int, mirrored: bool) -> list[Block]:
    with torch.inference_mode(False):  # training could not use what an evaluation made
        return _made(side, size, mirrored)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' filter, whose ``a`` is -0.5 where torch antialiases."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))
