"""Shears, translations and rotations of images by Pillow's bicubic filter, in one Triton kernel.

:mod:`fcmae.data.pixels.operations` has the same in plain torch, which reads and writes fifty times the memory. Without
fused multiplications and additions the bits are the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _cubic(one, two, three, four, past):
    linear = three - one
    square = 2 * (one - two) + three - four
    cube = two - one - three + four
    return two + past * (linear + past * (square + past * cube))


@triton.jit
def _across(plane, row, col, past, height, width, live):
    """Between two pixels of a row, by four; beyond an edge its pixels repeat."""
    line = plane + tl.minimum(tl.maximum(row, 0), height - 1) * width
    one = tl.load(line + tl.minimum(tl.maximum(col - 1, 0), width - 1), mask=live, other=0).to(tl.float32)
    two = tl.load(line + tl.minimum(tl.maximum(col, 0), width - 1), mask=live, other=0).to(tl.float32)
    three = tl.load(line + tl.minimum(tl.maximum(col + 1, 0), width - 1), mask=live, other=0).to(tl.float32)
    four = tl.load(line + tl.minimum(tl.maximum(col + 2, 0), width - 1), mask=live, other=0).to(tl.float32)
    return _cubic(one, two, three, four, past)


@triton.jit
def _move(imgs, out, places, fill, height, width, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    live = pixel < height * width
    matrix = places + 6 * image
    left = (pixel % width).to(tl.float64) + 0.5
    top = (pixel // width).to(tl.float64) + 0.5
    x = tl.load(matrix) * left + tl.load(matrix + 1) * top + tl.load(matrix + 2)
    y = tl.load(matrix + 3) * left + tl.load(matrix + 4) * top + tl.load(matrix + 5)
    inside = live & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x = x - 0.5
    y = y - 0.5
    col = tl.floor(x)
    row = tl.floor(y)
    past_x = (x - col).to(tl.float32)
    past_y = (y - row).to(tl.float32)
    col = tl.where(inside, col, 0.0).to(tl.int32)
    row = tl.where(inside, row, 0.0).to(tl.int32)
    for channel in tl.static_range(CHANNELS):
        offset = (image * CHANNELS + channel) * height * width
        plane = imgs + offset
        one = _across(plane, row - 1, col, past_x, height, width, inside)
        two = _across(plane, row, col, past_x, height, width, inside)
        three = _across(plane, row + 1, col, past_x, height, width, inside)
        four = _across(plane, row + 2, col, past_x, height, width, inside)
        value = tl.minimum(tl.maximum(_cubic(one, two, three, four, past_y), 0.0), 255.0).to(tl.int32)
        tl.store(out + offset + pixel, tl.where(inside, value, tl.load(fill + channel)).to(tl.uint8), mask=live)


def moved(imgs: Tensor, places: Tensor, fill: Tensor) -> Tensor:
    """Images uint8 ``[n, C, H, W]`` whose pixel at (x, y) is that at (a x + b y + c, d x + e y + f) before.

    Args:
        imgs: contiguous.
        places: a to f of each image, float64 ``[n, 6]``.
        fill: the colour of what comes from outside, int32 ``[C]``.
    """
    count, channels, height, width = imgs.shape
    out = torch.empty_like(imgs)
    grid = (triton.cdiv(height * width, BLOCK), count)
    _move[grid](imgs, out, places, fill, height, width, CHANNELS=channels, BLOCK=BLOCK, enable_fp_fusion=False)
    return out
