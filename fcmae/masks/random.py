"""Uniformly random masks, as in the paper (ConvNeXt V2, arXiv 2301.00808, section 3.1)."""

import torch
from torch import Tensor


class RandomMask:
    """Every patch is equally likely to be hidden."""

    needs_pixels = False

    def scores(self, rng: torch.Generator, rows: int, cols: int, crop: Tensor | None) -> Tensor:
        return torch.rand(rows * cols, generator=rng)
