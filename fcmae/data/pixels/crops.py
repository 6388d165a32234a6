"""Random resized crops and turns, distributed as torchvision's. An image is decoded only as far as its crop needs."""

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fcmae.config import DataConfig
from fcmae.data.pixels import jpeg
from fcmae.data.pixels.decode import Encoded, LazyImage, PixelFormat, StoredImage, open_image
from fcmae.data.pixels.foreground import Foreground
from fcmae.data.pixels.formats import MAX_PIXELS
from fcmae.data.pixels.nodata import NoData, padded, resized
from fcmae.data.pixels.own_scale import OwnScale
from fcmae.data.pixels.resampling import resize_numbers

GAP = 2
"""A JPEG is decoded at reduced size if its crop still has this many times the pixels per side of the result. That is
enough for the filter of the resize; docs/pixels.md states the largest difference."""
NARROW = 16
"""Ratio of sides from which an image is resized in two passes, since memory would grow with the ratio."""
MAX_SCALES = 100_000
"""Images of arrays whose mean and deviation are kept."""
TRIES = 10
"""Boxes that are drawn before the central one is taken."""

_resize_into = torch.ops.aten._upsample_bicubic2d_aa.out
"""What :func:`torch.nn.functional.interpolate` calls, with an output whose memory order we choose."""


class Box(NamedTuple):
    """A part of an image in pixels, and how it is turned after it is cut."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    """Mirrored left to right."""
    vflip: bool = False
    """Mirrored top to bottom."""
    turns: int = 0
    """Then turned to the left by this many times 90 degrees."""
    shown: tuple[int, int] | None = None
    """Height and width that it is resized to before it is padded, with data.fit=pad; None = its own."""

    def divided(self, reduce: int) -> "Box":
        """The same part of an image decoded at reduced size."""
        top, left, height, width = (side // reduce for side in self[:4])
        return self._replace(top=top, left=left, height=height, width=width)

    def aligned(self, reduce: int) -> "Box":
        """The box rounded to the pixels of an image decoded at reduced size."""
        top, left, height, width = (side - side % reduce for side in self[:4])
        return self._replace(top=top, left=left, height=height, width=width)


Uniform = Callable[[], float]
"""Gives random numbers in [0, 1)."""


class RandomCrop:
    """Random resized crop, flips and quarter turns: raw pixels ``[C, *cfg.size]``, normalised with normalize=image.

    Its pixels are those of torchvision's v2 transforms for the same box, unless a JPEG is so large that it is decoded
    at reduced size.

    Args:
        channels: :meth:`seen` gives the channels that only targets get, too.
    """

    def __init__(self, cfg: DataConfig, max_pixels: int = MAX_PIXELS, channels: bool = False) -> None:
        read, self.no_data = cfg.layout, NoData.of(cfg)
        self.input = read.input
        self.kinds: list[tuple[list[int], bool, NoData | None]] = []
        """Of the channels that only targets get: which, whether the nearest pixel is taken, and their no-data."""
        self.carries: tuple[str, ...] = () if self.no_data is None else ("valid",)
        """What :meth:`seen` gives beside the image, as :class:`fcmae.targets.Seen` calls it."""
        if channels:
            marks = [None] * len(read.extra) if read.nodata is None and cfg.fit == "pad" else read.nodata
            self.carries += ("channels",) if marks is None else ("channels", "channels_valid")
            count = len(read.target)
            for those, nearest, part in ((read.target, False, slice(count)), (read.classes, True, slice(count, None))):
                given = None if marks is None else NoData(marks[part], [0.0] * len(those), cfg.bit_depth)
                self.kinds += [(those, nearest, given)] if those else []
        self.format = PixelFormat.of(cfg, max_pixels)
        self.size = cfg.size
        self.pad = cfg.pad
        self.at_own_size = cfg.fit == "pad"
        self.hflip, self.vflip, self.rot90 = cfg.hflip, cfg.vflip, cfg.rot90
        self.by_image, self._scales = cfg.normalize == "image", dict[str, OwnScale]()
        self.exact = cfg.exact_decode or self.no_data is not None or read.nodata is not None or self.by_image
        # Otherwise the whole image is decoded, once for all crops.
        self.alone = cfg.crops_per_image == 1 and not self.by_image
        self.scale = (cfg.crop_scale[0], cfg.crop_scale[1])
        self.ratio = (cfg.crop_ratio[0], cfg.crop_ratio[1])
        self.zoom = cfg.crop_zoom  # with fit=pad None = 1
        self.foreground = None if cfg.foreground is None else Foreground(cfg)

    def __call__(self, image: Tensor | Encoded | LazyImage, uniform: Uniform = random.random) -> Tensor:
        """A crop drawn by ``uniform``, by default Python's global generator."""
        return self.seen(image, uniform)[0]

    def seen(self, image: Tensor | Encoded | LazyImage, uniform: Uniform = random.random) -> list[Tensor]:
        """A crop, and what :attr:`carries` names, cut and mirrored in the same way."""
        image = open_image(image, self.format)
        scale, image = self._scale(image), self._padded(image)
        no_data = self.no_data if scale is None else scale.filling(self.no_data)
        draw = functools.partial(self._seen, image, uniform, no_data)
        found = draw() if self.foreground is None else self.foreground.choose(draw)
        if scale is not None:
            found[0] = scale.apply(found[0], None if no_data is None else found[1])
        return found

    def _scale(self, image: LazyImage) -> OwnScale | None:
        """With normalize=image: the image's own; of an array read once per process, since each window needs it."""
        if not self.by_image:
            return None
        known = self._scales.get(image.name) if isinstance(image, StoredImage) else None
        if known is None:
            known = OwnScale.of(pick(image.pixels(1), self.input), self.no_data)
        if isinstance(image, StoredImage) and len(self._scales) < MAX_SCALES:
            self._scales[image.name] = known
        return known

    def _seen(self, image: LazyImage, uniform: Uniform, no_data: NoData | None) -> list[Tensor]:
        pixels, box = self._part(image, *self.draw(image, uniform))
        crops = [self._cut(pixels, box, self.input, False, no_data)]
        if self.kinds:
            found = [self._cut(pixels, box, *kind) for kind in self.kinds]
            crops.append([torch.cat(column) for column in zip(*found, strict=True)])
        return [tensor for crop in crops for tensor in crop]

    def _cut(
        self, pixels: Tensor, box: Box, channels: list[int] | None, nearest: bool, no_data: NoData | None
    ) -> list[Tensor]:
        """Some channels of a crop, and, where there may be no data, which pixels have a value."""
        how = cut_nearest if nearest else cut
        pixels = pick(pixels, channels)
        if no_data is None:
            return [how(pixels, box, self.size)]
        pixels = pixels[..., box.top : box.top + box.height, box.left : box.left + box.width]
        box = box._replace(top=0, left=0)
        valid = no_data.valid(pixels)
        pixels = no_data.replace(pixels, valid)
        if self.at_own_size:
            if box.shown is not None:
                pixels, valid = resize(pixels, list(box.shown)), resized(valid, box.shown)
            crop, valid = (padded(turned(x, box), self.size) for x in (pixels, valid))
            return [no_data.replace(crop, valid), valid]
        crop = how(pixels, box, self.size)
        valid = cut_nearest(valid, box, self.size) if nearest else turned(resized(valid, self.size), box)
        return [no_data.replace(crop, valid), valid]

    def with_box(self, image: Tensor | Encoded | LazyImage, uniform: Uniform = random.random) -> tuple[Tensor, Box]:
        """A crop, and the box in pixels of the padded image that it shows."""
        image = open_image(image, self.format)
        scale, image = self._scale(image), self._padded(image)
        box, reduce = self.draw(image, uniform)
        pixels, part = self._part(image, box, reduce)
        if scale is None:
            return self._cut(pixels, part, self.input, False, self.no_data)[0], box
        return scale.apply(*self._cut(pixels, part, self.input, False, scale.filling(self.no_data))), box

    def part(self, image: Tensor | Encoded | LazyImage, uniform: Uniform) -> tuple[Tensor, Box]:
        """The part of the image that is decoded, ``[C, H, W]``, and the box in it."""
        image = self._padded(image)
        return self._part(image, *self.draw(image, uniform))

    def _padded(self, image: Tensor | Encoded | LazyImage) -> LazyImage:
        image = open_image(image, self.format)
        if not self.pad:
            return image
        padded = F.pad(image.pixels(1), [self.pad])
        return LazyImage((padded.shape[-2], padded.shape[-1]), lambda _: padded)

    def _part(self, image: LazyImage, box: Box, reduce: int) -> tuple[Tensor, Box]:
        if reduce > 1 and not self.exact:
            return image.pixels(reduce), box.divided(reduce)
        in_parts = self.alone or isinstance(image, StoredImage)
        pixels, top, left = image.part(*box[:4]) if in_parts else (image.pixels(1), 0, 0)
        return pixels, box._replace(top=box.top - top, left=box.left - left)

    def draw(self, image: LazyImage, uniform: Uniform) -> tuple[Box, int]:
        """The box that ``uniform`` chooses, and the divisor of the size at which the image has enough pixels."""
        box = self.box(image.size, uniform)
        reduce = reduction(box, self.size) if image.reducible else 1
        return box.aligned(reduce), reduce

    def box(self, size: tuple[int, int], uniform: Uniform) -> Box:
        """The box that ``uniform`` chooses in an image of ``size``."""
        shown: tuple[int, int] | None = None
        if self.at_own_size:
            top, left, height, width, shown = padded_part(size, self.size, self.zoom, uniform)
        elif self.zoom is None:
            top, left, height, width = random_part(size, self.scale, self.ratio, uniform)
        else:
            top, left, height, width = zoomed_part(size, self.size, (self.zoom[0], self.zoom[1]), uniform)
        flip = uniform() < self.hflip
        # What is switched off draws nothing, so that it does not change what others draw.
        vflip = self.vflip > 0 and uniform() < self.vflip
        turns = int(4 * uniform()) if self.rot90 else 0
        return Box(top, left, height, width, flip, vflip, turns, shown)


def random_part(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], uniform: Uniform
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box in an image of ``size``, distributed as torchvision's RandomResizedCrop.

    Among the boxes that fit, the share of the area is uniform in ``scale``, and the logarithm of the aspect ratio is
    uniform. torchvision's own function is seven times as slow: its numbers are tensors.
    """
    height, width = size
    least, most = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform())
        aspect = math.exp(least + (most - least) * uniform())
        rows, cols = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < cols <= width:
            return int((height - rows + 1) * uniform()), int((width - cols + 1) * uniform()), rows, cols
    # None fits: take the largest central box of an allowed aspect ratio.
    rows, cols = min(height, max(1, round(width / ratio[0]))), min(width, max(1, round(height * ratio[1])))
    return (height - rows) // 2, (width - cols) // 2, rows, cols


def zoomed_part(
    size: tuple[int, int], crop: tuple[int, int], zoom: tuple[float, float], uniform: Uniform
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box in an image of ``size`` that a crop shows enlarged by a factor.

    The factor's logarithm is uniform between those of ``zoom``. It is larger where the box would not fit the image.
    """
    height, width = size
    factor = _factor(zoom, uniform)
    factor = max(factor, crop[0] / height, crop[1] / width)
    rows, cols = (min(side, max(1, round(part / factor))) for side, part in zip(size, crop, strict=True))
    return int((height - rows + 1) * uniform()), int((width - cols + 1) * uniform()), rows, cols


def padded_part(
    size: tuple[int, int], crop: tuple[int, int], zoom: Sequence[float] | None, uniform: Uniform
) -> tuple[int, int, int, int, tuple[int, int] | None]:
    """As :func:`zoomed_part`, but the whole of a side that is too small: the crop shows it in fewer pixels.

    The last of the results is how many rows and columns show the box; None = as many as it has.
    """
    factor = 1.0 if zoom is None or zoom[0] == zoom[1] == 1 else _factor(zoom, uniform)
    sides = [min(side, max(1, round(most / factor))) for side, most in zip(size, crop, strict=True)]
    places = [int((side - part + 1) * uniform()) for side, part in zip(size, sides, strict=True)]
    if factor == 1.0:
        return places[0], places[1], sides[0], sides[1], None
    shown = [min(most, max(1, round(part * factor))) for part, most in zip(sides, crop, strict=True)]
    return places[0], places[1], sides[0], sides[1], (shown[0], shown[1])


def _factor(zoom: Sequence[float], uniform: Uniform) -> float:
    """A factor whose logarithm is uniform between those of ``zoom``."""
    return zoom[0] * (zoom[1] / zoom[0]) ** uniform()


def reduction(box: Box, size: tuple[int, int]) -> int:
    """The largest divisor of a JPEG's size, 8 to 1, that leaves enough pixels for a box that is resized to ``size``."""
    ratio = min(box.height / size[0], box.width / size[1])
    return next((reduce for reduce in jpeg.REDUCTIONS if ratio >= GAP * reduce), 1)


def pick(pixels: Tensor, channels: list[int] | None) -> Tensor:
    """Some channels of ``[C, H, W]``; None = all."""
    return pixels if channels is None else pixels[channels]


def cut_nearest(pixels: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """As :func:`cut`, with the pixel whose area holds the centre of the new one instead of a filter."""
    rows, cols = (
        start + ((torch.arange(count) + 0.5) * (side / count)).long().clamp(max=side - 1)
        for start, side, count in zip(box[:2], box[2:4], size, strict=True)
    )
    return turned(pixels[:, rows][:, :, cols], box)


def cut(pixels: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """A part of ``[C, H, W]``, on any device, resized by an antialiased bicubic filter and turned as the box says."""
    part = pixels[..., box.top : box.top + box.height, box.left : box.left + box.width]
    if _is_numbers(part) and (box.height, box.width) != size:
        resized = _by_products(part, size, box.vflip, box.flip)
        return turned(resized, box._replace(vflip=False, flip=False))
    return turned(resize(part, list(size)), box)


def turned(pixels: Tensor, box: Box) -> Tensor:
    """``[C, H, W]`` as the box says, in the same order in memory; with an odd number of turns it must be square."""
    if not (box.flip or box.vflip or box.turns):
        return pixels
    if not any(pixels.stride()):  # all values are the same one
        return pixels.transpose(1, 2) if box.turns % 2 else pixels
    if pixels.dtype == torch.uint16:  # torch 2.11 does not mirror these
        return turned(pixels.view(torch.int16), box).view(torch.uint16)
    channels_last = pixels.stride(0) == 1  # torch is fast where these are last in memory and in shape
    image = pixels.permute(1, 2, 0) if channels_last else pixels
    rows, cols = (0, 1) if channels_last else (1, 2)
    image = image.flip([cols] * box.flip + [rows] * box.vflip)
    if box.turns:
        strides = image.stride()
        order = sorted(range(3), key=lambda axis: -strides[axis])  # the outermost in memory first
        rotated = image.rot90(box.turns, (rows, cols)).permute(order).contiguous()
        image = rotated.permute([order.index(axis) for axis in range(3)])
    return image.permute(2, 0, 1) if channels_last else image


def resize(pixels: Tensor, size: list[int]) -> Tensor:
    """``[C, H, W]`` to ``[height, width]``, or to ``[short side]``, by an antialiased bicubic filter.

    uint8 of three or four channels on the CPU comes back with its channels last in memory.
    """
    height, width = pixels.shape[-2:]
    if _is_numbers(pixels):
        if len(size) == 1:
            size = [int(size[0] * side / min(height, width)) for side in (height, width)]
        return pixels if [height, width] == size else _by_products(pixels, (size[0], size[1]))
    if len(size) == 2 and height > NARROW * size[0] and size[1] > NARROW * width:
        pixels = _by_torchvision(pixels, [size[0], width])  # torch would resize all rows to their new width first
    if pixels.device.type != "cpu" or len(size) != 2:
        return _by_torchvision(pixels, size)
    # What torchvision's resize comes to, without its preliminaries.
    if pixels.shape[0] not in (3, 4):
        return interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    # And without the rearrangement of channels, which would take as long as the filter.
    out = torch.empty((*size, len(pixels)), dtype=torch.uint8).permute(2, 0, 1)
    # From contiguous RGB to channels last, torch 2.14 writes past the end of its buffer.
    source = pixels[None].contiguous(memory_format=torch.channels_last) if pixels.is_contiguous() else pixels[None]
    _resize_into(source, size, False, None, None, out=out[None])
    return out


def _is_numbers(pixels: Tensor) -> bool:
    """Whether pixels are in host memory and not uint8, for which torch has vector code."""
    return pixels.device.type == "cpu" and pixels.dtype != torch.uint8


def _by_products(pixels: Tensor, size: tuple[int, int], vflip: bool = False, flip: bool = False) -> Tensor:
    resized = resize_numbers(pixels, size, vflip, flip)
    return resized.round_().clamp_(0, 65535).to(torch.uint16) if pixels.dtype == torch.uint16 else resized


def _by_torchvision(pixels: Tensor, size: list[int]) -> Tensor:
    return F.resize(pixels, size, v2.InterpolationMode.BICUBIC, antialias=True)


def middle(pixels: Tensor, height: int, width: int) -> Tensor:
    """``[C, H, W]`` without the ends of a long image, which a centre crop of ``height`` x ``width`` does not need."""
    ratio = min(pixels.shape[-2] / height, pixels.shape[-1] / width)
    rows = _shortened(pixels.shape[-2], math.ceil(NARROW * height * ratio))
    cols = _shortened(pixels.shape[-1], math.ceil(NARROW * width * ratio))
    top, left = (pixels.shape[-2] - rows) // 2, (pixels.shape[-1] - cols) // 2
    return pixels[..., top : top + rows, left : left + cols]


def _shortened(side: int, most: int) -> int:
    """At most ``most``, or one more to keep the same centre."""
    return side if side <= most else most + (side - most) % 2
