"""A source of one's own, by the name of its class."""

import operator
import pkgutil
from typing import Any

import torch
from torch import Tensor

from fcmae.config import NAMED_BY
from fcmae.data.pixels.decode import Encoded, PixelFormat
from fcmae.data.sources.base import Sample, Source
from fcmae.errors import ConfigError, ImageError, UsageError

METHODS = ("__len__", "__getitem__", "label", "describe")


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
        return Sample(sample[0], None if self.classes is None else int(sample[1]))  # type: ignore[arg-type]  # checked

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
    """Calls ``_target_``, a class that Python can import, with the other entries.

    What is not a class with the methods of a source is not called, and neither is what a checkpoint names.

    Raises ConfigError if it is missing, cannot be imported, does not take the arguments or is not a source.
    """
    if given is None:
        raise ConfigError(f"{key} is not set; give {key}._target_=PACKAGE.CLASS and its arguments")
    arguments = dict(given)
    target = arguments.pop("_target_")
    if NAMED_BY in arguments:
        named = ascii(target)[1:-1]
        raise ConfigError(
            f"{arguments[NAMED_BY]} names the class {named} as its {key}; code that a file names is not run. Give your "
            f"own images, or if you trust this class: allow=[{named}]"
        )
    try:
        create = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}._target_ is {target!r}; allowed is a class that Python finds, PACKAGE.CLASS ({error})"
        ) from error
    kind = "is a class" if isinstance(create, type) else f"is a {type(create).__name__}"
    lacking = [name for name in METHODS if not callable(getattr(create, name, None))]
    if not isinstance(create, type) or lacking:
        raise ConfigError(
            f"{key}._target_ is {target!r}, which must be a class with the methods {', '.join(METHODS)}; "
            f"it {kind}{' without ' + ', '.join(lacking) if lacking else ''}"
        )
    try:
        source = create(**arguments)
    except UsageError:
        raise
    except TypeError as error:
        raise ConfigError(f"{key}: {target} does not take these arguments: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {target} refuses these arguments: {error}") from error
    if not hasattr(source, "classes"):
        raise ConfigError(f"{key}: {target} must have the attribute classes: names, or None without labels")
    return Own(source, to)
