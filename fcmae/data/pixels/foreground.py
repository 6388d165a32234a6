"""Which windows of a large image are worth learning from: those with enough foreground."""

from collections.abc import Callable

import torch
from torch import Tensor

from fcmae.config import DataConfig

TRIES = 10
"""Windows that are drawn where ``data.foreground`` does not say."""


class Foreground:
    """Draws windows until one has enough pixels whose mean over the channels is above or below a value."""

    def __init__(self, cfg: DataConfig) -> None:
        given = cfg.foreground
        self.above, self.below = given.get("above"), given.get("below")
        self.share: float = given["share"]
        self.tries: int = given.get("tries", TRIES)

    def of(self, window: Tensor) -> float:
        """The share of the foreground in raw ``[C, H, W]``."""
        white = 1.0 if window.is_floating_point() else float(torch.iinfo(window.dtype).max)
        values = window.float().mean(dim=0) / white
        found = torch.zeros_like(values, dtype=torch.bool)
        if self.above is not None:
            found |= values > self.above
        if self.below is not None:
            found |= values < self.below
        return float(found.float().mean())

    def choose(self, draw: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The first of some windows, each with what belongs to it, that has enough, or else the one with the most."""
        best, most = draw(), 0.0
        for number in range(self.tries):
            drawn = draw() if number else best
            share = self.of(drawn[0])
            if share >= self.share:
                return drawn
            if share > most:
                best, most = drawn, share
        return best
