"""Masks that hide contiguous blocks (BEiT, arXiv 2106.08254, algorithm 1)."""

import math

import torch
from torch import Tensor


class BlockMask:
    """Hides rectangles of random place, area and aspect ratio, one after another, until enough patches are hidden.

    The last rectangle is hidden in part, so the number of hidden patches is exact.

    Args:
        area: smallest and largest area of a rectangle, as shares of the image.
        aspect: smallest ratio of its sides; the largest is the inverse.

    Raises ValueError for values out of range.
    """

    needs_pixels = False
    BLOCKS = 64
    """Rectangles drawn per image; enough to cover nearly all of it."""

    def __init__(self, area: tuple[float, float] = (0.05, 0.2), aspect: float = 0.3) -> None:
        self.area, self.aspect = [float(share) for share in area], float(aspect)
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area must be two numbers, 0 < smallest <= largest <= 1; got {list(area)}")
        if not 0 < self.aspect <= 1:
            raise ValueError(f"aspect must be in (0, 1]; got {aspect}")

    def scores(self, rng: torch.Generator, rows: int, cols: int, crop: Tensor | None) -> Tensor:
        area, ratio, top, left = torch.rand(4, self.BLOCKS, generator=rng)
        area = (self.area[0] + (self.area[1] - self.area[0]) * area) * rows * cols
        ratio = torch.exp((2 * ratio - 1) * math.log(self.aspect))
        height = (area * ratio).sqrt().round().clamp(1, rows)
        width = (area / ratio).sqrt().round().clamp(1, cols)
        top = (top * (rows - height + 1)).floor()
        left = (left * (cols - width + 1)).floor()
        row, col = torch.arange(rows), torch.arange(cols)
        in_rows = (row >= top[:, None]) & (row < (top + height)[:, None])
        in_cols = (col >= left[:, None]) & (col < (left + width)[:, None])
        inside = (in_rows[:, :, None] & in_cols[:, None, :]).flatten(1)
        first = inside.float().argmax(dim=0)  # the first rectangle that covers a patch is hidden first
        outside = -self.BLOCKS - torch.rand(rows * cols, generator=rng)
        return torch.where(inside.any(dim=0), -first.float(), outside)
