"""Images that are decoded once and kept in memory (``data.cache``). :mod:`fcmae.data.decoding` fills it."""

import numpy as np
import torch
from torch import Tensor

from fcmae.data.pixels.decode import LazyImage
from fcmae.data.sources.base import Sample, Source, Wrapper
from fcmae.errors import UsageError

SHARE = 0.8
"""Of the memory that is available, the images may take this much."""
ALIGN = 64
"""Images begin at multiples of so many bytes."""
GIB = 2**30


class KeptImage(LazyImage):
    """An image in memory, ``[C, H, W]`` with its channels last there. What it gives is a copy that may be changed."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__((kept.shape[1], kept.shape[2]), lambda _: kept.clone())
        self._kept = kept.permute(1, 2, 0)

    def part(self, top: int, left: int, height: int, width: int) -> tuple[Tensor, int, int]:
        copied = self._kept[top : top + height, left : left + width].clone()
        return copied.permute(2, 0, 1), top, left


class DecodedImages(Wrapper):
    """The images of another source, decoded. Those that cannot be read are read from it again, and raise its error.

    Args:
        memory: uint8, all pixels, channels last.
        offsets: int64 ``[N]``, the first byte of each image.
        sizes: int32 ``[N, 2]``, height and width; 0 for an image that cannot be read.
    """

    def __init__(
        self, source: Source, memory: np.ndarray, sizes: np.ndarray, channels: int, dtype: torch.dtype
    ) -> None:
        super().__init__(source)
        self.memory, self.sizes, self.channels, self.dtype = memory, sizes, channels, dtype
        self.offsets, self.bytes = places(sizes, channels * dtype.itemsize)

    def __getitem__(self, index: int) -> Sample:
        if not self.is_readable(index):
            return self.source[index]
        return self.unread(index)._replace(image=KeptImage(self._view(index)))

    def unread(self, index: int) -> Sample:
        """The sample without its pixels."""
        label = self.source.label(index) if self.values is None else self.values[index]
        return Sample(torch.empty(0), label)

    def is_readable(self, index: int) -> bool:
        return bool(self.sizes[index, 0])

    def size(self, index: int) -> tuple[int, int]:
        """Height and width."""
        height, width = self.sizes[index].tolist()
        return height, width

    def _view(self, index: int) -> Tensor:
        height, width = self.size(index)
        first = int(self.offsets[index])
        part = self.memory[first : first + height * width * self.channels * self.dtype.itemsize]
        return torch.from_numpy(part).view(self.dtype).view(height, width, self.channels).permute(2, 0, 1)

    def store(self, index: int, pixels: Tensor) -> None:
        """Raises UsageError if an image has another type or size than the others or than before."""
        view = self._view(index)
        if pixels.dtype != self.dtype or pixels.shape != view.shape:
            raise UsageError(
                f"data.cache needs one type of pixels, {list(view.shape)} {self.dtype} here; "
                f"{self.describe(index)} has {list(pixels.shape)} {pixels.dtype}"
            )
        view.copy_(pixels)


def places(sizes: np.ndarray, pixel: int) -> tuple[np.ndarray, int]:
    """The first byte of each image, and the bytes of all; ``pixel`` is the bytes of one."""
    lengths = -(-np.prod(sizes, axis=1, dtype=np.int64) * pixel // ALIGN) * ALIGN
    ends = np.cumsum(lengths)
    return ends - lengths, int(ends[-1])


def check_fits(needed: int, free: int, images: int, where: str, what: str) -> None:
    """Raises UsageError if images need more than :data:`SHARE` of what is free."""
    if needed > SHARE * free:
        raise UsageError(
            f"data.cache={where} needs {needed / GIB:.1f} GiB for {images:,} decoded images; {free / GIB:.1f} GiB of "
            f"{what} are available, of which it takes at most {SHARE:.0%}"
        )
