"""Mean and standard deviation of images, per channel."""

import functools
import itertools
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fcmae.data.pixels.decode import Encoded, LazyImage, PixelFormat, StoredImage, open_image
from fcmae.data.pixels.nodata import NoData
from fcmae.data.sources.base import Source
from fcmae.errors import ImageError

PART = 2**22
"""Pixels that are converted to float64 at a time."""
TILE = 1024
"""Rows and columns of an array that are read at a time."""


@dataclass
class Sums:
    """The numbers, means and sums of squared deviations ``[C]`` of pixels, and errors of unreadable images.

    Integers count in 0..1. Deviations from the mean, merged by Chan's formula (Chan, Golub and LeVeque 1983), keep
    their digits where the mean is much larger than the deviation, as of temperatures in kelvins.
    """

    pixels: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    unreadable: list[ImageError]

    def __add__(self, other: "Sums") -> "Sums":
        pixels, apart = self.pixels + other.pixels, other.mean - self.mean
        share = other.pixels / pixels.clip(min=1)
        squares = self.squares + other.squares + apart**2 * self.pixels * share
        return Sums(pixels, self.mean + apart * share, squares, self.unreadable + other.unreadable)

    @property
    def std(self) -> np.ndarray:
        """The deviation of the population, in float64."""
        return np.sqrt(self.squares / self.pixels)


def sum_images(source: Source, indices: Iterable[int], to: PixelFormat, no_data: NoData | None = None) -> Sums:
    """Sums over all pixels of some images but those without a value. Unreadable images are left out and recorded."""
    sums = _nothing(to)
    for index in indices:
        try:
            sums += functools.reduce(operator.add, _parts(source[index].image, to, no_data), _nothing(to))
        except ImageError as error:
            sums.unreadable.append(error)
    return sums


def _nothing(to: PixelFormat) -> Sums:
    return Sums(np.zeros(to.in_chans, dtype=np.int64), np.zeros(to.in_chans), np.zeros(to.in_chans), [])


def _parts(image: Encoded | Tensor | LazyImage, to: PixelFormat, no_data: NoData | None) -> Iterator[Sums]:
    """The sums of an image, part by part."""
    for tile in _tiles(open_image(image, to)):
        white = 1.0 if tile.dtype.is_floating_point else float(torch.iinfo(tile.dtype).max)
        for part in tile.flatten(1).split(PART, dim=1):
            values, valid = part.double() / white, torch.ones(part.shape, dtype=torch.bool)
            if no_data is not None:
                valid = no_data.valid(part[..., None])[..., 0]
            count = valid.sum(1, keepdim=True)
            mean = torch.where(valid, values, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
            squares = torch.where(valid, values - mean, 0.0).square().sum(1)
            yield Sums(count[:, 0].numpy(), mean[:, 0].numpy(), squares.numpy(), [])


def _tiles(image: LazyImage) -> Iterator[Tensor]:
    """The pixels ``[C, H, W]``, of an array in tiles, since it may be larger than the memory."""
    if not isinstance(image, StoredImage):
        yield image.pixels(1)
        return
    height, width = image.size
    for top, left in itertools.product(range(0, height, TILE), range(0, width, TILE)):
        yield image.part(top, left, min(TILE, height - top), min(TILE, width - left))[0]


def left_out(errors: Iterable[ImageError]) -> list[str]:
    """A line per reason, apart from numbers in it, for images that were left out."""
    kinds: dict[str, list[ImageError]] = {}
    for error in errors:
        kinds.setdefault(re.sub(r"\d+", "", error.reason), []).append(error)
    lines = []
    for alike in kinds.values():
        others = f" and {len(alike) - 1} more images" if len(alike) > 1 else ""
        lines.append(f"left out {alike[0].name}{others}: {alike[0].reason}")
    return lines
