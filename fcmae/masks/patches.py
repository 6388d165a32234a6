"""Patches and masks as pure tensor functions; nothing here knows a model.

An image of H x W pixels is a row-major grid of L = (H / p) * (W / p) patches of p x p pixels.
A mask is bool ``[N, L]`` with True = masked. Every image of a batch keeps the same number of patches,
so that the visible ones form a dense array (MAE, arXiv 2111.06377, section 3).
"""

import torch
from torch import Tensor

from fcmae.grid import grid_size as grid_size
from fcmae.grid import len_keep as len_keep


def random_mask(noise: Tensor, keep: int) -> Tensor:
    """Masks all but the ``keep`` patches with the smallest noise.

    Args:
        noise: ``[N, L]``; equal values are ordered by position.
        keep: visible patches per image, 1 <= keep <= L.

    Returns:
        bool ``[N, L]``, True = masked.
    """
    visible = noise.argsort(dim=1, stable=True)[:, :keep]
    return torch.ones_like(noise, dtype=torch.bool).scatter_(1, visible, False)


def visible_indices(mask: Tensor, keep: int) -> Tensor:
    """Positions of the visible patches in ascending order, int64 ``[N, keep]``.

    Every row of ``mask`` must have exactly ``keep`` visible patches; this is not checked, because reading
    the mask would make the host wait for the device.
    """
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :keep]


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """``[N, C, H, W]`` to ``[N, L, P]`` with P = patch_size**2 * C, the channel fastest as in the official code."""
    n, c, height, width = imgs.shape
    rows, cols = grid_size(height, width, patch_size)
    x = imgs.reshape(n, c, rows, patch_size, cols, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * cols, patch_size * patch_size * c)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patchify`: ``[N, L, P]`` to ``[N, C, H, W]``."""
    rows, cols = grid_size(height, width, patch_size)
    x = patches.reshape(patches.shape[0], rows, cols, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)


def upsample_mask(mask: Tensor, rows: int, cols: int, factor: int) -> Tensor:
    """A mask ``[N, rows * cols]`` on a grid ``factor`` times finer: bool ``[N, rows * factor, cols * factor]``."""
    grid = mask.view(-1, rows, cols)
    return grid.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
