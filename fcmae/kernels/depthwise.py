"""Depthwise convolution over the visible patches of a masked image.

The visible part of a batch is packed as ``[N, V, S, S, C]``: V patches an image of S x S sites with C channels.
A k x k depthwise convolution reads across patch borders; sites of masked patches and beyond the image count as zero,
and outputs exist at visible sites only (the submanifold convolution of SparseConvNet, arXiv 1711.10275).
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Neighbors(NamedTuple):
    """Where the packed patches of a batch lie, on a grid of ``rows`` x ``cols`` patches."""

    index: Tensor
    """int64 ``[N, V]``: the grid position (row-major) of every visible patch, ascending."""
    rows: int
    cols: int


def neighbors(index: Tensor, rows: int, cols: int) -> Neighbors:
    """Tables for :func:`packed_depthwise` from the visible positions ``index`` (int64 ``[N, V]``, ascending)."""
    return Neighbors(index, rows, cols)


def packed_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, where: Neighbors) -> Tensor:
    """Convolves packed patches with a depthwise kernel.

    Args:
        x: ``[N, V, S, S, C]``.
        weight: ``[C, 1, k, k]`` as in ``torch.nn.Conv2d``, k odd.
        bias: ``[C]`` or None.
        where: the tables of :func:`neighbors`.

    Returns:
        ``[N, V, S, S, C]``.
    """
    dense = scatter_patches(x, where.index, where.rows, where.cols)
    dense = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return gather_patches(dense, where.index, where.rows, where.cols)


def scatter_patches(x: Tensor, index: Tensor, rows: int, cols: int) -> Tensor:
    """Packed ``[N, V, S, S, C]`` to a dense map ``[N, C, rows * S, cols * S]``, channels last in memory, else zero."""
    n, v, s, _, c = x.shape
    dense = x.new_zeros(n, rows * cols, s * s * c)
    dense = dense.scatter(1, index[..., None].expand(-1, -1, s * s * c), x.reshape(n, v, s * s * c))
    dense = dense.view(n, rows, cols, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(n, rows * s, cols * s, c)
    return dense.permute(0, 3, 1, 2)


def gather_patches(dense: Tensor, index: Tensor, rows: int, cols: int) -> Tensor:
    """The visible patches ``[N, V, S, S, C]`` of a dense map ``[N, C, rows * S, cols * S]``."""
    n, c, height, _ = dense.shape
    s = height // rows
    x = dense.permute(0, 2, 3, 1).reshape(n, rows, s, cols, s, c).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, rows * cols, s * s * c)
    return x.gather(1, index[..., None].expand(-1, -1, s * s * c)).view(n, -1, s, s, c)
