"""The pixels of patches as rows of a matrix, in one pass over the images by Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels import precompile

TILE = 4096
"""Elements of a tile."""


@triton.jit(do_not_specialize=["rows", "keep"])
def patch_rows_kernel(
    imgs, index, out, rows, keep, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    SIDE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """imgs: ``[N, CHANNELS, HEIGHT, WIDTH]``. index: int64 ``[N, keep]``. out: ``[rows, CHANNELS * STRIDE * STRIDE]``.

    LENGTH: a power of two that is not less than the length of a row.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, LENGTH)
    patch = row // (SIDE * SIDE)
    site = row % (SIDE * SIDE)
    columns: tl.constexpr = WIDTH // (SIDE * STRIDE)
    at = tl.load(index + patch, mask=row < rows, other=0)
    y = (at // columns * SIDE + site // SIDE) * STRIDE
    x = (at % columns * SIDE + site % SIDE) * STRIDE
    first = (patch // keep).to(tl.int64) * (CHANNELS * HEIGHT * WIDTH) + y * WIDTH + x
    within = (e // (STRIDE * STRIDE) * HEIGHT + e // STRIDE % STRIDE) * WIDTH + e % STRIDE
    length: tl.constexpr = CHANNELS * STRIDE * STRIDE
    inside = (row < rows)[:, None] & (e < length)[None, :]
    value = tl.load(imgs + first[:, None] + within[None, :], mask=inside, other=0.0)
    place = row.to(tl.int64)[:, None] * length + e[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def patch_rows(imgs: Tensor, index: Tensor, side: int, stride: int, dtype: torch.dtype) -> Tensor:
    """What a convolution of kernel and stride ``stride`` multiplies at the sites of square tiles.

    Args:
        imgs: ``[N, C, H, W]``.
        index: int64 ``[N, V]``, the tiles in row-major order on the grid of all whole tiles.
        side: S, sites per side of a tile.

    Returns:
        ``[N * V * S * S, C * stride * stride]`` of ``dtype``, a row in the order of a convolution's weight.
    """
    precompile.wait()
    imgs, index = imgs.contiguous(), index.contiguous()
    _, channels, height, width = imgs.shape
    length = channels * stride * stride
    out = imgs.new_empty(index.numel() * side * side, length, dtype=dtype)
    padded = triton.next_power_of_2(length)
    rows = max(1, TILE // padded)
    patch_rows_kernel[(triton.cdiv(len(out), rows),)](
        imgs, index, out, len(out), index.shape[1], CHANNELS=channels, HEIGHT=height, WIDTH=width, SIDE=side,
        STRIDE=stride, LENGTH=padded, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return out
