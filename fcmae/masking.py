"""Patches and masks as pure tensor functions; nothing here knows a model.

An image of H x W pixels is a row-major grid of L = (H / p) * (W / p) patches of p x p pixels.
A mask is bool ``[N, L]`` with True = masked. Every image of a batch keeps the same number of patches,
so that the visible ones form a dense array (MAE, arXiv 2111.06377, section 3).
"""

import torch
from torch import Tensor


def grid_size(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image.

    Raises ValueError, naming the sizes that fit, unless both sides are multiples of ``patch_size``.
    """
    for name, size in (("height", height), ("width", width)):
        if size < patch_size or size % patch_size:
            below = size // patch_size * patch_size
            fits = [str(s) for s in (below, below + patch_size) if s]
            raise ValueError(
                f"image {name} {size} is not a multiple of the patch of {patch_size} px; "
                f"the nearest {'sizes that fit are' if len(fits) > 1 else 'size that fits is'} {' and '.join(fits)}"
            )
    return height // patch_size, width // patch_size


def len_keep(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches, ``int(L * (1 - mask_ratio))`` as in MAE: 49 patches at 0.6 keep 19.

    Raises ValueError if none would stay visible or the ratio is outside [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio is {mask_ratio}; allowed is a number in [0, 1)")
    keep = int(num_patches * (1 - mask_ratio))
    if keep < 1:
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves none of {num_patches} patches visible; "
            f"the largest ratio that keeps one is {1 - 1 / num_patches:.4g}"
        )
    return keep


def random_mask(noise: Tensor, keep: int) -> Tensor:
    """Masks all but the ``keep`` patches with the smallest noise.

    Args:
        noise: ``[N, L]``; equal values are ordered by position.
        keep: visible patches an image, 1 <= keep <= L.

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
