"""Pixels without a value: those that hold ``data.nodata``, or NaN."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fcmae.config import DataConfig

SUPPORT = 2
"""Pixels to each side that the bicubic filter reads, of the coarser of the two images."""


class NoData:
    """Finds and replaces values that are no data.

    Args:
        values: per channel, in units of ``bit_depth`` bits; ``nan``, or None = none; NaN of float32 pixels always is.
        fill: per channel what replaces them, in 0..1; in float32 pixels 0 does.
        dtype: with float32, values and fill are in the units of the pixels.
    """

    def __init__(
        self, values: Sequence[float | str | None], fill: Sequence[float], bit_depth: int, dtype: str = "uint"
    ) -> None:
        most = 2**bit_depth - 1
        white = 255 if bit_depth == 8 else 65535
        given = [float("nan") if value in (None, "nan") else float(value) for value in values]
        self.floats = torch.tensor(given).view(-1, 1, 1)
        # As pixels are decoded. A number that they cannot have marks none.
        whole = [x == x and 0 <= x <= most and x == int(x) for x in given]
        stored = [(int(x) * white + most // 2) // most if ok else -1 for x, ok in zip(given, whole, strict=True)]
        self.integers, self.marks_integers = (
            torch.tensor(stored, dtype=torch.int32).view(-1, 1, 1),
            max(stored, default=-1) >= 0,
        )
        self.float_fill = torch.tensor(fill if dtype == "float32" else [0.0] * len(given)).view(-1, 1, 1)
        self.fill = torch.tensor([round(white * min(max(x, 0), 1)) for x in fill], dtype=torch.int32).view(-1, 1, 1)

    @classmethod
    def of(cls, cfg: DataConfig) -> "NoData | None":
        """In the channels of the network; None if all pixels have a value."""
        marks = cfg.marks if cfg.marks is not None or cfg.fit == "crop" else [None] * cfg.in_chans
        return None if marks is None else cls(marks, cfg.mean or [0.0] * cfg.in_chans, cfg.bit_depth, cfg.dtype)

    def valid(self, pixels: Tensor) -> Tensor:
        """Which of ``[C, H, W]`` have a value, bool."""
        if pixels.is_floating_point():
            return (pixels != self.floats) & ~pixels.isnan()
        if not self.marks_integers:
            return all_valid(pixels.shape)
        return pixels.to(torch.int32) != self.integers

    def replace(self, pixels: Tensor, valid: Tensor) -> Tensor:
        """The pixels with the fill where they are not ``valid``; copied if there are such."""
        if is_all(valid):
            return pixels
        if pixels.is_floating_point():
            return torch.where(valid, pixels, self.float_fill)
        return torch.where(valid, pixels.to(torch.int32), self.fill).to(pixels.dtype)

    def replaced(self, pixels: Tensor) -> Tensor:
        """The pixels, with the fill where they have no value."""
        return self.replace(pixels, self.valid(pixels))


def all_valid(shape: Sequence[int]) -> Tensor:
    """A bool tensor of true values, which are one value in memory."""
    return torch.ones((), dtype=torch.bool).expand(*shape)


def is_all(valid: Tensor) -> bool:
    """Whether all of a bool tensor in host memory are true, in a twentieth of the time of torch's ``all``."""
    one = valid.numel() and not any(valid.stride())
    return bool(valid[(0,) * valid.ndim] if one else valid.numpy().all())


def middle_of(size: tuple[int, int], most: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the middle of an image, of at most ``most``."""
    rows, cols = min(size[0], most[0]), min(size[1], most[1])
    return (size[0] - rows) // 2, (size[1] - cols) // 2, rows, cols


def padded(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """``[C, H, W]`` with zeros at the right and at the bottom up to ``size``."""
    height, width = pixels.shape[-2:]
    if (height, width) == size:
        return pixels
    out = pixels.new_zeros(len(pixels), *size)
    out[:, :height, :width] = pixels
    return out


def resized(valid: Tensor, size: Sequence[int]) -> Tensor:
    """Which pixels have a value after a resize of bool ``[C, H, W]`` to ``size``: those made of such pixels alone.

    Every pixel that the antialiased bicubic filter of torch reads counts, whatever its factor.
    """
    if is_all(valid):
        return all_valid((len(valid), *size))
    invalid = ~valid
    for dim, side in ((1, size[0]), (2, size[1])):
        invalid = _any_read(invalid, dim, side)
    return ~invalid


def _any_read(invalid: Tensor, dim: int, side: int) -> Tensor:
    """Along one dimension: whether the filter reads an invalid pixel for each of ``side`` new ones."""
    before = invalid.shape[dim]
    if before == side:  # the filter is 1 at the pixel itself and 0 at all others
        return invalid
    scale = before / side
    centre, reach = scale * (torch.arange(side, dtype=torch.float64) + 0.5), SUPPORT * max(scale, 1.0)
    first = (centre - reach + 0.5).long().clamp(min=0)
    end = (centre + reach + 0.5).long().clamp(max=before)
    counts = torch.nn.functional.pad(invalid.movedim(dim, -1).cumsum(-1, dtype=torch.int32), (1, 0))
    return (counts[..., end] > counts[..., first]).movedim(-1, dim)
