"""Histograms of oriented gradients (HOG), as MaskFeat predicts them (arXiv 2112.09133, section 3.2)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.masks.patches import patchify
from fcmae.targets.base import Seen
from fcmae.targets.losses import get_loss

LOSSES = ("mse", "l1", "smooth_l1", "cosine")


class Hog:
    """Predicts a histogram of the gradient's direction in each square cell of a patch, for each channel.

    The histogram of a cell and a channel has length 1, so neither brightness nor contrast matters.

    Args:
        bins: directions, without sign, over 180 degrees.
        cell: pixels per side of a cell; a divisor of the patch size.
        loss: ``mse``, ``l1``, ``smooth_l1`` or ``cosine`` (:mod:`fcmae.targets.losses`).

    Raises ValueError for other values.
    """

    def __init__(self, patch_size: int, in_chans: int, bins: int = 9, cell: int = 8, loss: str = "mse") -> None:
        for name, value in (("bins", bins), ("cell", cell)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}")
        if patch_size % cell:
            raise ValueError(f"cell must divide the {patch_size} px of a predicted patch; got {cell}")
        self.bins, self.cell = bins, cell
        self.cells = patch_size // cell
        self.dim = self.cells**2 * bins * in_chans
        self._error = get_loss(loss, LOSSES)

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """Valid are the cells that have a gradient between pixels with a value."""
        if seen.valid is None:
            return self._patches(hog(seen.imgs, self.bins, self.cell)), None
        known = have_neighbours(seen.valid).expand_as(seen.imgs)
        histograms = hog(seen.imgs, self.bins, self.cell, known)
        cells = F.max_pool2d(known.float(), self.cell).unsqueeze(2).expand_as(histograms)
        return self._patches(histograms), self._patches(cells) > 0

    def _patches(self, histograms: Tensor) -> Tensor:
        return patchify(histograms.flatten(1, 2), self.cells)

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
        return self._error(pred, target, valid)

    def to_pixels(self, pred: Tensor, imgs: Tensor) -> None:
        """A histogram cannot be drawn as pixels."""


def hog(imgs: Tensor, bins: int = 9, cell: int = 8, known: Tensor | None = None) -> Tensor:
    """Histograms of oriented gradients, float32 ``[N, C, bins, H / cell, W / cell]``.

    The gradient is the difference of the two neighbours of a pixel in x and in y, 0 across the image's border. Each
    pixel adds the magnitude to the bin of the direction, and the histogram of a cell is divided by its L2 norm; it is 0
    where the cell is flat.

    Args:
        known: bool ``[N, C, H, W]``, the gradients that count; None = all.
    """
    x = F.pad(imgs.float(), (1, 1, 1, 1), mode="reflect")
    dx = x[..., 1:-1, 2:] - x[..., 1:-1, :-2]
    dy = x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    size = torch.hypot(dx, dy)
    if known is not None:
        size = torch.where(known, size, 0.0)
    bin_of = (torch.atan2(dy, dx) * (bins / math.pi)).floor() % bins
    # One bin after another: adding to all at once would be an atomic sum, whose order differs from run to run.
    counts = [F.avg_pool2d(torch.where(bin_of == index, size, 0.0), cell) for index in range(bins)]
    return F.normalize(torch.stack(counts, dim=2), dim=2)


def have_neighbours(valid: Tensor) -> Tensor:
    """Whether the four neighbours of a pixel in the image have a value, bool like ``valid`` ``[N, C, H, W]``."""
    x = F.pad(valid.float(), (1, 1, 1, 1), value=1.0)
    sides = (x[..., 1:-1, :-2], x[..., 1:-1, 2:], x[..., :-2, 1:-1], x[..., 2:, 1:-1])
    return torch.stack(sides).amin(dim=0) > 0
