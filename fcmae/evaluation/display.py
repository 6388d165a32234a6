"""How images of any number of channels and bits become pictures that show something."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fcmae.config import DataConfig
from fcmae.data.pixels.transforms import denormalize

PERCENTILES = (0.5, 99.5)
"""Of an image's pixels: black and white of a stretched channel."""
LITTLE = 0.25
"""Values that use less of the range than this are stretched, whatever their bits."""
LEAST_SPAN = 0.02
"""Of the span over all images: an image that is nearly flat is stretched no further, or it would show its noise."""
SAMPLED = 2**16
"""Pixels per channel that the percentiles are taken of, at most."""


class Display(NamedTuple):
    """Which channels are shown, three or one, and whether each is stretched."""

    channels: tuple[int, ...]
    stretched: bool

    def __str__(self) -> str:
        names = ", ".join(map(str, self.channels))
        shown = f"channels {names} as red, green and blue" if len(self.channels) == 3 else f"channel {names} as grey"
        low, high = PERCENTILES
        how = f", each image and channel stretched from its {low} to its {high} percentile" if self.stretched else ""
        return f"{shown}{how}"


def choose(imgs: Tensor, data: DataConfig | None, channels: Sequence[int] | None = None) -> Display:
    """How to show normalised ``[N, C, H, W]``: ``channels`` if given; else the first channel as grey, or three as RGB.

    Without ``data`` they are values of any scale, which are stretched.

    Channels are stretched if they have more than 8 bits, are not those of an ordinary image file (grey, RGB, RGBA), or
    if their values use little of the range or leave it.
    """
    count = imgs.shape[1]
    chosen = tuple(channels) if channels else tuple(range(3 if count >= 3 else 1))
    if data is None:
        return Display(chosen, True)
    low, high = _percentiles(denormalize(imgs, data.mean, data.std)[:, chosen])
    spans = high.amax(0) - low.amin(0)
    ordinary = (
        data.bit_depth == 8
        and data.dtype == "uint"
        and count in (1, 3, 4)
        and low.min() > -LITTLE
        and high.max() < 1 + LITTLE
    )
    return Display(chosen, not ordinary or bool(spans.max() < LITTLE))


def rgb(display: Display, original: Tensor, *others: Tensor, data: DataConfig | None) -> list[Tensor]:
    """Normalised ``[N, C, H, W]`` as pictures ``[N, 3, H, W]`` of values in 0..1, all on the scale of ``original``."""
    mean, std = ([], []) if data is None else (data.mean, data.std)
    raw = [denormalize(x.float(), mean, std)[:, display.channels] for x in (original, *others)]
    if display.stretched:
        low, high = _percentiles(raw[0])
        least = LEAST_SPAN * (high.amax(0) - low.amin(0))
        span = torch.maximum(high - low, least).clamp(min=1e-6)[..., None, None]
        raw = [(x - low[..., None, None]) / span for x in raw]
    return [x.clamp(0, 1).expand(-1, 3, -1, -1) for x in raw]


def _percentiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two :data:`PERCENTILES` of each image and channel, ``[N, C]``."""
    pixels = x.float().flatten(2)
    pixels = pixels[..., :: -(-pixels.shape[2] // SAMPLED)]
    at = torch.tensor(PERCENTILES, device=x.device) / 100
    low, high = torch.stack([image.quantile(at, dim=1) for image in pixels], dim=1)
    return low, high
