"""Crops, flips and transforms that change an image and its target map alike."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from fcmae.config import AugmentConfig, DataConfig
from fcmae.data.pixels.crops import Box, RandomCrop, cut, cut_nearest, turned
from fcmae.data.pixels.decode import Encoded, open_image
from fcmae.data.pixels.extra import Extra, blamed
from fcmae.data.pixels.formats import MAX_PIXELS
from fcmae.data.pixels.maps import IGNORED
from fcmae.data.pixels.nodata import is_all, resized
from fcmae.data.pixels.transforms import WholeImage, normalized
from fcmae.errors import ConfigError

INSIDE = 7919
"""Marks the pixels of a map: a transform fills what comes from outside of it with another number."""


class PairTransform:
    """Makes a training sample of an image and its map: normalised float32 ``[C, *cfg.size]``, and the map of that size.

    Maps of classes ``[H, W]`` are cut by nearest neighbours, maps of numbers ``[K, H, W]`` by the filter of images: a
    pixel for which it reads a NaN is NaN. Pixels that a transform takes from outside of the image are left out:
    ``IGNORED``, or NaN.

    Raises ConfigError for augmentation that cannot change a map.
    """

    def __init__(self, cfg: DataConfig, augment: AugmentConfig, max_pixels: int = MAX_PIXELS) -> None:
        if augment.auto_augment is not None:
            raise ConfigError(
                f"augment.auto_augment is {augment.auto_augment!r}; must be null with target maps, which it would not "
                "turn; use data.transforms"
            )
        if cfg.pad:
            raise ConfigError(f"data.pad must be 0 with target maps; got {cfg.pad}")
        self.crop = RandomCrop(cfg, max_pixels)
        self.transforms = [(name, _both(name, step)) for name, step in Extra(cfg.transforms).steps]
        self.normalize = functools.partial(normalized, cfg=cfg)
        erasing = augment.random_erasing
        self.erase = RandomErasing(erasing, mode="pixel", device="cpu") if erasing > 0 else None

    def __call__(self, image: Tensor | Encoded, target: Tensor) -> tuple[Tensor, Tensor]:
        """Raises ValueError if the map has another size than the image."""
        opened = open_image(image, self.crop.format)
        check_size(opened.size, target)
        crop, box = self.crop.with_box(opened)
        target = self._cut(target, box)
        for name, step in self.transforms:
            shapes = [(part.shape, part.dtype) for part in (crop, target)]
            with blamed(name):
                crop, target = step(crop, target)
            if [(part.shape, part.dtype) for part in (crop, target)] != shapes:
                raise ConfigError(f"{name} must return an image and a map of the same shapes and types")
        crop = self.normalize(crop)
        return crop if self.erase is None else self.erase(crop), target

    def _cut(self, target: Tensor, box: Box) -> Tensor:
        """The part of a map that a crop shows; what the crop has beyond the image is left out."""
        size = self.crop.size
        if self.crop.at_own_size:
            rows, cols = box.shown or (box.height, box.width)
            size = rows, cols
        found = (
            _cut_numbers(target, box, size) if target.is_floating_point() else cut_nearest(target[None], box, size)[0]
        )
        more = [side - shown for side, shown in zip(self.crop.size, found.shape[-2:], strict=True)]
        return F.pad(found, (0, more[1], 0, more[0]), value=_left_out(found)) if any(more) else found


def _cut_numbers(target: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """A part of numbers ``[K, H, W]``, resized and turned. NaN where the filter reads one, as images' no-data."""
    part = target[..., box.top : box.top + box.height, box.left : box.left + box.width]
    box, valid = box._replace(top=0, left=0), ~part.isnan()
    if is_all(valid):
        return cut(part, box, size)
    # The resize multiplies pixels far away by 0, which would not remove a NaN.
    found = cut(torch.where(valid, part, 0), box, size)
    return found.masked_fill_(~turned(resized(valid, size), box), torch.nan)


def _left_out(target: Tensor) -> float:
    """What marks the pixels of a map that are left out."""
    return torch.nan if target.is_floating_point() else IGNORED


class WholePair(WholeImage):
    """Whole images for evaluation, and their maps as they are."""

    def __call__(self, image: Tensor | Encoded, target: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Raises ValueError if the map has another size than the image."""
        pixels = super().__call__(image)
        check_size((pixels.shape[-2], pixels.shape[-1]), target)
        return pixels, target


def check_size(image: tuple[int, int], target: Tensor) -> None:
    """Raises ValueError unless a map has the image's height and width."""
    height, width = target.shape[-2:]
    if (height, width) != image:
        raise ValueError(f"its target map has {width}x{height} pixels; the image has {image[1]}x{image[0]}")


def _both(name: str, step: Any) -> Any:
    """``step`` for an image and a map: ``(crop, target) -> (crop, target)``."""
    if isinstance(step, v2.Transform):
        return functools.partial(_transformed, step)
    pair = getattr(step, "pair", None)
    if not callable(pair):
        raise ConfigError(f"{name} must have a method pair(image, target) with target maps (docs/dense.md)")
    return pair


def _transformed(step: v2.Transform, crop: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """By torchvision, which changes images, and masks by nearest neighbours where a transform moves pixels."""
    inside = torch.full(target.shape[-2:], INSIDE, dtype=torch.int32)
    image, moved, inside = step(tv_tensors.Image(crop), tv_tensors.Mask(target), tv_tensors.Mask(inside))
    moved = moved.as_subclass(Tensor).masked_fill(inside.as_subclass(Tensor) != INSIDE, _left_out(target))
    return image.as_subclass(Tensor), moved
