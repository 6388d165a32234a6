"""The user's own source, given by the name of its class."""

import operator
from typing import Any

import torch
from torch import Tensor

from fcmae.data.pixels.decode import Encoded, PixelFormat
from fcmae.data.pixels.scientific import TYPES
from fcmae.data.sources.base import Sample, Source, Wrapper
from fcmae.data.sources.dataset import GivenDataset
from fcmae.errors import ImageError
from fcmae.plugins import create


class Own(Wrapper):
    """The user's own source, whose samples are checked against the data config.

    Raises ImageError naming a sample that is no :class:`Sample`, or has a wrong shape, type or label.
    """

    def __init__(self, source: Source, to: PixelFormat) -> None:
        super().__init__(source)
        self.to = to

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        problem = self._problem(sample)
        if problem:
            raise ImageError(self.describe(index), problem)
        return Sample(sample[0], sample[1] if self.classes is None else int(sample[1]))

    def _problem(self, sample: Any) -> str:
        if not isinstance(sample, tuple) or len(sample) != 2:
            return f"the source must give Sample(image, label); got a {type(sample).__name__}"
        image, label = sample
        if self.classes is not None and not _is_index(label, len(self.classes)):
            return f"its label must be 0 to {len(self.classes) - 1}; got {label!r}"
        if isinstance(image, Encoded):
            return ""
        if not isinstance(image, Tensor):
            return f"its image must be a tensor or Encoded(bytes, name); got a {type(image).__name__}"
        expected = self._expected(image)
        if expected:
            return f"its pixels must be {expected}; got {image.dtype}"
        if image.ndim != 3 or len(image) != self.to.in_chans or not image.numel():
            return f"its shape must be [C, H, W] ({self.to.expected}); got {list(image.shape)}"
        if image.is_floating_point() and not image.isfinite().all():
            found = (
                where.flatten(1).any(dim=1).nonzero().flatten().tolist() for where in (image.isnan(), image.isinf())
            )
            return self.to.problem(*found)
        return ""

    def _expected(self, image: Tensor) -> str:
        """What the pixels must be instead; empty if they are right. Without ``data.dtype``, float is normalised."""
        if self.to.is_float:
            names = TYPES[self.to.dtype]
            return "" if str(image.dtype).removeprefix("torch.") in names else f"{', '.join(names)} (data.dtype)"
        integers = torch.uint8 if self.to.bit_depth == 8 else torch.uint16
        if image.dtype in (integers, torch.float32):
            return ""
        return f"{integers} (data.bit_depth={self.to.bit_depth}), or torch.float32 of normalised values"


def gives_float(source: Source) -> bool | None:
    """Whether the first image is float32, which is normalised already; None if it cannot be read."""
    try:
        image = source[0].image
    except (ImageError, IndexError):
        return None
    return isinstance(image, Tensor) and image.is_floating_point()


def _is_index(value: Any, count: int) -> bool:
    """Whether it is an integer, of any library, from 0 to ``count - 1``."""
    try:
        return 0 <= operator.index(value) < count
    except TypeError:
        return False


def create_own(given: dict[str, Any] | None, key: str, to: PixelFormat) -> Source:
    """The source that ``_target_`` names, whose samples are checked as :class:`Own` says. Raises ConfigError."""
    source = create(given, key, Source)
    if isinstance(source, GivenDataset):
        source.to = to
    return Own(source, to)
