"""Mean, standard deviation, range and percentiles of images, per channel.

Percentiles are exact, in memory that does not grow with the number of images: integers are counted by value. float32 is
counted by the upper half of its bits, put into ascending order; a second pass counts the lower half where a percentile
is.
"""

import functools
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

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
HALF = 2**16
"""Numbers that half the bits of float32 can be."""


@dataclass
class Sums:
    """The numbers, means, sums of squared deviations and ranges ``[C]`` of pixels, and errors of unreadable images.

    Integers count in 0..1. Deviations from the mean, merged by Chan's formula (Chan, Golub and LeVeque 1983), keep
    their digits where the mean is much larger than the deviation, as of temperatures in kelvins.
    """

    pixels: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    least: np.ndarray
    most: np.ndarray
    unreadable: list[ImageError] = field(default_factory=list)

    @classmethod
    def nothing(cls, channels: int) -> "Sums":
        none = np.zeros(channels)
        return cls(none.astype(np.int64), none, none, none + np.inf, none - np.inf)

    def __add__(self, other: "Sums") -> "Sums":
        pixels, apart = self.pixels + other.pixels, other.mean - self.mean
        share = other.pixels / pixels.clip(min=1)
        squares = self.squares + other.squares + apart**2 * self.pixels * share
        least, most = np.minimum(self.least, other.least), np.maximum(self.most, other.most)
        unreadable = self.unreadable + other.unreadable
        return Sums(pixels, self.mean + apart * share, squares, least, most, unreadable)

    @property
    def std(self) -> np.ndarray:
        """The deviation of the population, in float64."""
        return np.sqrt(self.squares / self.pixels)


def sum_images(source: Source, indices: Iterable[int], to: PixelFormat, no_data: NoData | None = None) -> Sums:
    """Sums over all pixels of some images but those without a value. Unreadable images are left out and recorded."""
    sums = Sums.nothing(to.in_chans)
    for index in indices:
        try:
            parts = (_sums(*part) for part in _parts(source[index].image, to, no_data))
            sums += functools.reduce(operator.add, parts, Sums.nothing(to.in_chans))
        except ImageError as error:
            sums.unreadable.append(error)
    return sums


def count_images(
    source: Source,
    indices: Iterable[int],
    to: PixelFormat,
    no_data: NoData | None = None,
    upper: np.ndarray | None = None,
) -> tuple[Sums, np.ndarray]:
    """As :func:`sum_images`, and how often each value occurs: ``[C, 1, 256]``, or 65536 of float32's upper half.

    Args:
        upper: of float32 ``[C, K]``, counts the lower half where the upper half is one of these, ``[C, K, 65536]``.
    """
    sums = Sums.nothing(to.in_chans)
    bins = 256 if to.bit_depth == 8 and not to.is_float else HALF
    counts = np.zeros((to.in_chans, 1 if upper is None else upper.shape[1], bins), np.int64)
    for index in indices:
        image, found = Sums.nothing(to.in_chans), np.zeros_like(counts)
        try:
            for values, valid in _parts(source[index].image, to, no_data):
                image += _sums(values, valid)
                for channel, where in itertools.product(range(to.in_chans), range(counts.shape[1])):
                    given = None if upper is None else upper[channel, where]
                    chosen = _bins(values[channel][valid[channel]], given)
                    found[channel, where] += np.bincount(chosen, minlength=bins)
        except ImageError as error:
            sums.unreadable.append(error)
        else:
            sums, counts = sums + image, counts + found
    return sums, counts


def _bins(values: np.ndarray, upper: int | None) -> np.ndarray:
    """Where pixels ``[N]`` are counted."""
    if values.dtype != np.float32:
        return values
    bits = ascending(values)
    return bits >> 16 if upper is None else bits[bits >> 16 == upper] & (HALF - 1)


def ascending(values: np.ndarray) -> np.ndarray:
    """The bits of float32 as uint32 in the same order as the numbers; -0 counts as 0."""
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def from_ascending(bits: np.ndarray) -> np.ndarray:
    """The inverse of :func:`ascending`."""
    bits = bits.astype(np.uint32)
    return np.where(bits >> 31, bits & np.uint32(2**31 - 1), ~bits).astype(np.uint32).view(np.float32)


def ranks(pixels: np.ndarray, percentiles: Sequence[float]) -> np.ndarray:
    """``[C, P]``: which of so many ascending pixels, from 0, is the least that at least a percentage does not pass."""
    share = np.ceil(pixels[:, None] * np.array(percentiles)[None] / 100).astype(np.int64)
    return np.clip(share - 1, 0, pixels[:, None] - 1)


def locate_ranks(counts: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bins ``[C, P]`` of ``counts`` ``[C, bins]`` that hold the pixels of ranks ``[C, P]``, and their ranks there."""
    ends = counts.cumsum(1)
    bins = np.stack([np.searchsorted(end, rank, side="right") for end, rank in zip(ends, found, strict=True)])
    before = np.take_along_axis(ends - counts, bins, 1)
    return bins, found - before


def _parts(
    image: Encoded | Tensor | LazyImage, to: PixelFormat, no_data: NoData | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pixels ``[C, N]`` of an image, part by part, and which of them have a value."""
    for tile in _tiles(open_image(image, to)):
        for part in tile.flatten(1).split(PART, dim=1):
            valid = torch.ones(part.shape, dtype=torch.bool)
            valid = valid if no_data is None else no_data.valid(part[..., None])[..., 0]
            yield part.numpy(), valid.numpy()


def _sums(part: np.ndarray, valid: np.ndarray) -> Sums:
    """By NumPy, whose sums do not depend on the number of threads."""
    values = part.astype(np.float64) / white_of(part.dtype)
    count = valid.sum(1)
    mean = np.where(valid, values, 0.0).sum(1) / count.clip(min=1)
    squares = np.square(np.where(valid, values - mean[:, None], 0.0)).sum(1)
    least, most = np.where(valid, values, np.inf).min(1), np.where(valid, values, -np.inf).max(1)
    return Sums(count, mean, squares, least, most)


def white_of(dtype: np.dtype) -> int:
    """What counts as 1: the largest value of uint8 and uint16; 1 of other types, which keep their units."""
    return int(np.iinfo(dtype).max) if dtype.kind == "u" else 1


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
