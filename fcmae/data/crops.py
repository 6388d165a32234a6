"""Random resized crops, as torchvision draws them, of images that are decoded no further than the crop needs."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fcmae.config import DataConfig
from fcmae.data import jpeg
from fcmae.data.pixels import Encoded, LazyImage, PixelFormat, open_image

GAP = 2
"""A JPEG is decoded to a fraction of its size if the crop still has this many times the pixels a side that it becomes.
The resize then has enough to filter: the result differs from that of the whole by less than docs/pixels.md states."""


class Box(NamedTuple):
    """A part of an image in pixels, and whether it is then mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def divided(self, reduce: int) -> "Box":
        """The same part of an image of a fraction of the size."""
        top, left, height, width = (side // reduce for side in self[:4])
        return Box(top, left, height, width, self.flip)

    def aligned(self, reduce: int) -> "Box":
        """The box on the grid of an image of a fraction of the size."""
        top, left, height, width = (side - side % reduce for side in self[:4])
        return Box(top, left, height, width, self.flip)


class RandomCrop:
    """Random resized crop and horizontal flip: raw pixels ``[C, *cfg.size]``.

    The same pixels as torchvision's v2 transforms give from the same state of torch's global generator, but where a
    JPEG is so large that a fraction of its size is decoded: there the box is aligned to that fraction's grid.
    """

    def __init__(self, cfg: DataConfig) -> None:
        self.format = PixelFormat(cfg.in_chans, cfg.bit_depth)
        self.size = cfg.size
        self.pad = cfg.pad
        self.hflip = cfg.hflip
        self.exact = cfg.exact_decode
        self.crop = v2.RandomResizedCrop(
            list(cfg.size), scale=tuple(cfg.crop_scale), ratio=tuple(cfg.crop_ratio), antialias=True
        )

    def __call__(self, image: Tensor | Encoded | LazyImage) -> Tensor:
        image = open_image(image, self.format)
        if self.pad:
            padded = F.pad(image.pixels(1), [self.pad])
            image = LazyImage((padded.shape[-2], padded.shape[-1]), lambda _: padded)
        box, reduce = self.draw(image)
        if self.exact or reduce == 1:
            return cut(image.pixels(1), box, self.size)
        return cut(image.pixels(reduce), box.divided(reduce), self.size)

    def draw(self, image: LazyImage) -> tuple[Box, int]:
        """The part that torch's global generator chooses, and the fraction of the image that has enough pixels."""
        params = self.crop.make_params([torch.empty((1, *image.size), device="meta")])
        flip = bool(torch.rand(1) < self.hflip)
        box = Box(params["top"], params["left"], params["height"], params["width"], flip)
        reduce = reduction(box, self.size) if image.reducible else 1
        return box.aligned(reduce), reduce


def reduction(box: Box, size: tuple[int, int]) -> int:
    """The fraction of a JPEG's size, 1/8 to 1, that has enough pixels for a box that becomes ``size``."""
    ratio = min(box.height / size[0], box.width / size[1])
    return next((reduce for reduce in jpeg.REDUCTIONS if ratio >= GAP * reduce), 1)


def cut(pixels: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """A part of ``[C, H, W]``, on any device, resized by an antialiased bicubic filter and mirrored if asked."""
    part = pixels[..., box.top : box.top + box.height, box.left : box.left + box.width]
    resized = resize(part, list(size))
    return resized.flip(-1) if box.flip else resized


def resize(pixels: Tensor, size: list[int]) -> Tensor:
    """``[C, H, W]`` to ``[height, width]``, or to ``[short side]``, by an antialiased bicubic filter."""
    if pixels.dtype == torch.uint8 and len(size) == 2 and pixels.device.type == "cpu":
        # what torchvision's resize comes to, without what it does before
        return interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    if pixels.dtype != torch.uint16:
        return F.resize(pixels, size, v2.InterpolationMode.BICUBIC, antialias=True)
    resized = F.resize(pixels.float(), size, v2.InterpolationMode.BICUBIC, antialias=True)
    return resized.round_().clamp_(0, 65535).to(torch.uint16)
