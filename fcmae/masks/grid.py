"""Masks whose visible patches are spread evenly (the grid-wise sampling of MAE, arXiv 2111.06377, figure 6)."""

import torch
from torch import Tensor


class GridMask:
    """Keeps patches on a regular grid with a random offset: of four patches in a square one each, before any second.

    The order is Bayer's matrix for ordered dithering, so any mask ratio gives an even pattern.
    """

    needs_pixels = False

    def scores(self, rng: torch.Generator, rows: int, cols: int, crop: Tensor | None) -> Tensor:
        order = torch.zeros(1, 1)
        while len(order) < max(rows, cols):
            order = torch.cat([torch.cat([4 * order, 4 * order + 2], 1), torch.cat([4 * order + 3, 4 * order + 1], 1)])
        down, right = torch.randint(len(order), (2,), generator=rng).tolist()
        return order.roll((down, right), (0, 1))[:rows, :cols].flatten()
