"""Masks that hide patches in proportion to a weight, such as how much an image varies there."""

import math

import torch
from torch import Tensor


class WeightedMask:
    """Draws the hidden patches one after another, each with a probability in proportion to its weight.

    The draw is Efraimidis and Spirakis' weighted sampling without replacement: the smallest of e / weight, with e from
    the exponential distribution, is hidden first.

    Args:
        channel: the channel of the image whose mean is the weight of a patch; None = the variance of a patch's pixels,
            averaged over the channels.
        power: exponent of the weight; 0 = uniform, negative = hide what varies least.
        floor: added to every weight, as a share of the image's mean weight, so that flat patches are hidden too.

    Raises ValueError for values out of range.
    """

    needs_pixels = True

    def __init__(self, channel: int | None = None, power: float = 1.0, floor: float = 0.05) -> None:
        self.channel, self.power, self.floor = channel, float(power), float(floor)
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must be in (0, 1]; got {floor}")
        if not math.isfinite(self.power):
            raise ValueError(f"power must be finite; got {power}")
        if channel is not None and (type(channel) is not int or channel < 0):
            raise ValueError(f"channel must be the number of a channel, from 0, or null; got {channel!r}")

    def scores(self, rng: torch.Generator, rows: int, cols: int, crop: Tensor | None) -> Tensor:
        assert crop is not None
        channels, height, width = crop.shape
        if self.channel is not None and not 0 <= self.channel < channels:
            raise ValueError(f"channel must be from 0 to {channels - 1} (data.in_chans={channels}); got {self.channel}")
        pixels = crop.float().reshape(channels, rows, height // rows, cols, width // cols)
        if self.channel is None:
            weight = pixels.var(dim=(2, 4), correction=0).mean(dim=0).flatten()
        else:
            weight = pixels[self.channel].mean(dim=(1, 3)).flatten().clamp(min=0)
        weight = (weight / weight.mean().clamp(min=1e-12) + self.floor) ** self.power
        exponential = -torch.rand(rows * cols, generator=rng).clamp(min=1e-12).log()
        return -exponential / weight
