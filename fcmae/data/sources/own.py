"""A source of one's own, by the name of its class."""

import operator
from typing import Any

import torch
from torch import Tensor

from fcmae.data.pixels.decode import Encoded, PixelFormat
from fcmae.data.sources.base import Sample, Source
from fcmae.errors import ImageError
from fcmae.plugins import create


class Own:
    """A source of somebody's, whose samples are checked against the data config.

    Raises ImageError naming a sample that is no :class:`Sample`, or has other channels, types or labels than it says.
    """

    def __init__(self, source: Source, to: PixelFormat) -> None:
        self.source = source
        self.to = to
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        problem = self._problem(sample)
        if problem:
            raise ImageError(self.describe(index), problem)
        return Sample(sample[0], sample[1] if self.classes is None else int(sample[1]))

    def label(self, index: int) -> int | None:
        return self.source.label(index)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def _problem(self, sample: Any) -> str:
        if not isinstance(sample, tuple) or len(sample) != 2:
            return f"the source gives a {type(sample).__name__}; allowed is Sample(image, label)"
        image, label = sample
        if self.classes is not None and not _is_index(label, len(self.classes)):
            return f"its label is {label!r}; allowed is 0 to {len(self.classes) - 1}"
        if isinstance(image, Encoded):
            return ""
        if not isinstance(image, Tensor):
            return f"its image is a {type(image).__name__}; allowed is a tensor or Encoded(bytes, name)"
        # a float tensor is normalised already
        integers = torch.uint8 if self.to.bit_depth == 8 else torch.uint16
        if image.dtype not in (integers, torch.float32):
            allowed = f"allowed with data.bit_depth={self.to.bit_depth} is {integers}"
            return f"its pixels are {image.dtype}; {allowed}, or torch.float32 of normalised values"
        if image.ndim != 3 or len(image) != self.to.in_chans or not image.numel():
            allowed = f"allowed is [C, H, W] with {self.to.in_chans} channels (data.in_chans)"
            return f"its shape is {list(image.shape)}; {allowed}"
        if image.dtype == torch.float32 and not image.isfinite().all():
            return "it has values that are infinite or not a number (NaN); replace them in the source"
        return ""


def gives_float(source: Source) -> bool | None:
    """Whether the first image is float32, which is normalised already; None if it cannot be read."""
    try:
        image = source[0].image
    except (ImageError, IndexError):
        return None
    return isinstance(image, Tensor) and image.is_floating_point()


def _is_index(value: Any, count: int) -> bool:
    """Whether it is an integer of whatever library, from 0 to before ``count``."""
    try:
        return 0 <= operator.index(value) < count
    except TypeError:
        return False


def create_own(given: dict[str, Any] | None, key: str, to: PixelFormat) -> Source:
    """The source that ``_target_`` names, its samples checked against ``to``. Raises ConfigError."""
    return Own(create(given, key, Source), to)
