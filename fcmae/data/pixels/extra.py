"""Further transforms of training crops, which ``data.transforms`` names."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from fcmae.errors import ConfigError, reason_of
from fcmae.plugins import NAMED_BY, create, failures_explained, is_named


class ImageTransform(Protocol):
    """A change of one crop, such as a transform of torchvision's v2 or a class of your own."""

    def __call__(self, image: Tensor) -> Tensor:
        """Takes and returns ``[C, H, W]`` of the same shape and type: uint8, uint16 above 8 bits, or float32.

        Draws from the global generators of torch, NumPy and Python, which are seeded for each crop.
        """
        ...


class Extra:
    """The transforms of ``data.transforms`` in their order. Raises ConfigError naming one that is wrong."""

    def __init__(self, given: Sequence[dict[str, Any]]) -> None:
        named = [(f"data.transforms[{number}]", transform) for number, transform in enumerate(given)]
        self.steps: list[tuple[str, ImageTransform]] = [
            (f"{key}: {transform['_target_']}", _created(transform, key)) for key, transform in named
        ]

    def __call__(self, crop: Tensor) -> Tensor:
        image = crop
        for name, step in self.steps:
            with blamed(name):
                image = step(image)
            if not isinstance(image, Tensor) or (image.shape, image.dtype) != (crop.shape, crop.dtype):
                got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
                raise ConfigError(f"{name} must return {crop.dtype} {list(crop.shape)}; got {got}")
        return image


@contextlib.contextmanager
def blamed(name: str) -> Iterator[None]:
    """Errors of a transform name it, in one line: the image is not to blame, and another one may fail, too."""
    with failures_explained(name):
        try:
            yield
        except (ValueError, OSError) as error:
            raise ConfigError(f"{name}: {reason_of(error)}") from error


def _created(given: dict[str, Any], key: str) -> ImageTransform:
    """A transform, with those that it is made of, such as the ``transforms`` of torchvision's ``RandomApply``."""
    if NAMED_BY not in given:  # which is refused, before anything that it names is called
        given = {name: _parts(value, f"{key}.{name}") for name, value in given.items()}
    return create(given, key, ImageTransform)


def _parts(value: Any, key: str) -> Any:
    if isinstance(value, (list, tuple)) and value and all(map(is_named, value)):
        return [_created(part, f"{key}[{number}]") for number, part in enumerate(value)]
    return value
