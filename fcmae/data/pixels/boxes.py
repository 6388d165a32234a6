"""Images on a canvas of one size, with boxes and masks that follow: for detection."""

import functools
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import clamp_bounding_boxes

from fcmae.config import AugmentConfig, DataConfig
from fcmae.data.pixels.crops import Box, Uniform, cut, pick, reduction
from fcmae.data.pixels.decode import Encoded, LazyImage, PixelFormat, open_image
from fcmae.data.pixels.extra import Extra, blamed
from fcmae.data.pixels.formats import MAX_PIXELS
from fcmae.data.pixels.instances import SIDE, boxed_mask, mask_of, pasted
from fcmae.data.pixels.transforms import normalized
from fcmae.data.sources.coco import Objects
from fcmae.errors import ConfigError

LEAST = 1.0
"""Pixels per side of a box on the canvas; what is smaller after a crop is left out."""
PLAIN = {"pad": 0, "fit": "crop", "nodata": None, "foreground": None, "rot90": False, "crop_zoom": None}
"""Keys of group ``data`` that must have these values."""


class Boxed(NamedTuple):
    """An image on a canvas and its n objects.

    ``image``: normalised float32 ``[C, *data.image_size]``. ``boxes``: float32 ``[n, 4]``, left, top, right, bottom in
    pixels of the canvas. ``classes``: int64 ``[n]``. ``extent``: int64 ``[2]``, height and width of the image, at the
    upper left of the canvas. ``masks``: uint8 ``[n, SIDE, SIDE]`` inside the boxes; ``[n, 1, 1]`` without masks.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor
    extent: Tensor
    masks: Tensor

    def filled(self, most: int) -> "Boxed":
        """With ``most`` objects: those that were added have the class -1."""
        more = most - len(self.boxes)
        boxes = torch.cat([self.boxes, self.boxes.new_zeros(more, 4)])
        classes = torch.cat([self.classes, self.classes.new_full((more,), -1)])
        masks = torch.cat([self.masks, self.masks.new_zeros(more, *self.masks.shape[1:])])
        return self._replace(boxes=boxes, classes=classes, masks=masks)


class Canvas:
    """Puts images on a canvas of ``cfg.size`` whose other pixels have the mean value. Raises ConfigError."""

    def __init__(self, cfg: DataConfig, max_pixels: int = MAX_PIXELS) -> None:
        for name, value in PLAIN.items():
            given = getattr(cfg, name)
            if given != value:
                raise ConfigError(f"data.{name} must be {value} with objective=detect; got {given!r}")
        if cfg.normalize == "image":
            raise ConfigError("data.normalize must not be image with objective=detect")
        self.size = cfg.size
        self.format = PixelFormat.of(cfg, max_pixels)
        self.channels = cfg.layout.input
        self.mean = cfg.mean or [0.0] * cfg.in_chans
        self.normalize = functools.partial(normalized, cfg=cfg)

    def put(self, pixels: Tensor) -> Tensor:
        """Raw ``[C, h, w]`` at the upper left of a raw canvas ``[C, *size]``."""
        white = 1 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
        mean = torch.tensor([white * value for value in self.mean])
        fill = mean if pixels.is_floating_point() else mean.round()
        canvas = fill.to(pixels.dtype).view(-1, 1, 1).repeat(1, *self.size)
        canvas[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        return canvas


class WholeOnCanvas(Canvas):
    """Whole images for evaluation, as large as the canvas allows: raw ``[C, *size]``."""

    def __call__(self, image: Tensor | Encoded | LazyImage) -> tuple[Tensor, Tensor]:
        """The canvas, and int64 ``[4]``: the image's height and width there, and in its file."""
        opened = open_image(image, self.format)
        inside = fitted(opened.size, self.size)
        pixels = pick(opened.pixels(1), self.channels)
        resized = cut(pixels, Box(0, 0, *opened.size, flip=False), inside)
        return self.put(resized), torch.tensor([*inside, *opened.size])


def fitted(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest height and width of an image of ``size`` that fit a canvas."""
    ratio = min(most / side for side, most in zip(size, canvas, strict=True))
    height, width = (min(most, max(1, round(side * ratio))) for side, most in zip(size, canvas, strict=True))
    return height, width


class JitteredScale(Canvas):
    """Makes a training sample: large-scale jitter (arXiv 2012.07177), then flips.

    The image is resized to fit the canvas times a factor from ``cfg.scale_jitter``, whose logarithm is uniform. Of one
    that is larger than the canvas then, a random part is taken.

    Args:
        masks: whether objects have masks.
    """

    def __init__(self, cfg: DataConfig, augment: AugmentConfig, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(cfg, max_pixels)
        for name, value in (("auto_augment", None), ("random_erasing", 0.0)):
            given = getattr(augment, name)
            if given != value:
                raise ConfigError(f"augment.{name} must be {value} with objective=detect; got {given!r}")
        self.transforms = Extra(cfg.transforms).steps
        for name, step in self.transforms:
            if not isinstance(step, v2.Transform):
                raise ConfigError(f"{name} must be a transform of torchvision's v2 with objective=detect")
        self.jitter = cfg.scale_jitter or [1.0, 1.0]
        self.hflip, self.vflip = cfg.hflip, cfg.vflip
        self.exact = cfg.exact_decode

    def __call__(
        self,
        image: Tensor | Encoded | LazyImage,
        objects: Objects,
        masks: bool,
        uniform: Uniform = random.random,
    ) -> Boxed:
        """A sample drawn by ``uniform``, with ``masks`` or without.

        Raises ValueError if the image has another size than its objects say, or a mask is wrong.
        """
        opened, size = open_image(image, self.format), objects.size
        if opened.size != size:
            raise ValueError(
                f"it has {opened.size[1]}x{opened.size[0]} pixels; its annotations say {size[1]}x{size[0]}"
            )
        box, extent = self.draw(size, uniform)
        reduce = reduction(box, extent) if opened.reducible and not self.exact else 1
        box = box.aligned(reduce)
        pixels, part = self._decoded(opened, box, reduce)
        raw = self.put(cut(pick(pixels, self.channels), part, extent))
        sample = Boxed(raw, *_moved(objects, box, extent, masks))
        for name, step in self.transforms:
            sample = _transformed(name, step, sample, masks)
        return sample._replace(image=self.normalize(sample.image))

    def draw(self, size: tuple[int, int], uniform: Uniform) -> tuple[Box, tuple[int, int]]:
        """The part of an image of ``size`` that is shown, and its height and width on the canvas."""
        least, most = self.jitter
        ratio = min(side / own for side, own in zip(self.size, size, strict=True)) * least * (most / least) ** uniform()
        height, width = (min(own, max(1, round(side / ratio))) for side, own in zip(self.size, size, strict=True))
        top, left = int((size[0] - height + 1) * uniform()), int((size[1] - width + 1) * uniform())
        rows, cols = (
            min(side, max(1, round(part * ratio))) for side, part in zip(self.size, (height, width), strict=True)
        )
        flip = uniform() < self.hflip
        return Box(top, left, height, width, flip, self.vflip > 0 and uniform() < self.vflip), (rows, cols)

    @staticmethod
    def _decoded(image: LazyImage, box: Box, reduce: int) -> tuple[Tensor, Box]:
        """What is decoded of an image, and the box in it."""
        if reduce > 1:
            return image.pixels(reduce), box.divided(reduce)
        pixels, top, left = image.part(*box[:4])
        return pixels, box._replace(top=box.top - top, left=box.left - left)


def _transformed(name: str, step: Any, sample: Boxed, masks: bool) -> Boxed:
    """By torchvision. An object with a mask gets the box of its mask: the box of a turned box would be too large."""
    size = sample.image.shape[-2], sample.image.shape[-1]
    boxes: Tensor = tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=size)
    # By these names torchvision finds what belongs to a box that a transform removes.
    given = {"image": tv_tensors.Image(sample.image), "boxes": boxes, "labels": sample.classes}
    if masks:
        whole = [pasted(mask / 255, box, size) for mask, box in zip(sample.masks, sample.boxes.tolist(), strict=True)]
        given["masks"] = tv_tensors.Mask(torch.stack(whole) if whole else torch.zeros(0, *size, dtype=torch.uint8))
    with blamed(name):
        moved = step(given)
        image, boxes = moved["image"].as_subclass(Tensor), clamp_bounding_boxes(moved["boxes"]).as_subclass(Tensor)
    if (image.shape, image.dtype) != (sample.image.shape, sample.image.dtype):
        raise ConfigError(f"{name} must return {sample.image.dtype} {list(sample.image.shape)} with objective=detect")
    counts = {part: len(moved[part]) for part in given if part != "image"}
    if len(set(counts.values())) > 1:
        left_over = ", ".join(f"{count} {part}" for part, count in counts.items())
        raise ConfigError(
            f"{name} must remove the label and the mask of a box with it; it leaves {left_over} "
            "(SanitizeBoundingBoxes: leave out labels_getter)"
        )
    cells = sample.masks[: len(boxes)]
    if masks and len(boxes):
        found = moved["masks"].as_subclass(Tensor)
        left = found.flatten(1).bool().any(dim=1)
        boxes = torch.zeros(len(found), 4)
        boxes[left] = masks_to_boxes(found[left]) + torch.tensor([0.0, 0, 1, 1])
        cells = torch.stack([boxed_mask(mask, box) for mask, box in zip(found, boxes.tolist(), strict=True)])
    seen = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST).all(dim=1)
    # What is turned may lie anywhere on the canvas.
    return Boxed(image, boxes[seen].float(), moved["labels"][seen], torch.tensor(size), cells[seen])


def _moved(objects: Objects, box: Box, extent: tuple[int, int], masks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, classes, extent and masks of the objects that a part of an image shows; no crowds."""
    corner = torch.tensor([box.left, box.top, box.left, box.top], dtype=torch.float32)
    sides = torch.tensor([box.width, box.height] * 2, dtype=torch.float32)
    inside = torch.minimum((objects.boxes - corner).clamp(min=0), sides)
    scale = torch.tensor([extent[1], extent[0]] * 2, dtype=torch.float32) / sides
    boxes = inside * scale
    seen = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST).all(dim=1) & ~objects.crowd
    boxes = boxes[seen]
    cells = torch.zeros(len(boxes), *([SIDE] * 2 if masks else [1] * 2), dtype=torch.uint8)
    if masks and len(boxes):
        shown = (inside + corner)[seen].tolist()
        segments = [objects.segments[index] for index in seen.nonzero()[:, 0].tolist()]
        cells = torch.stack([boxed_mask(mask_of(s, objects.size), b) for s, b in zip(segments, shown, strict=True)])
    if box.flip:
        boxes = torch.stack([extent[1] - boxes[:, 2], boxes[:, 1], extent[1] - boxes[:, 0], boxes[:, 3]], dim=1)
        cells = cells.flip(2)
    if box.vflip:
        boxes = torch.stack([boxes[:, 0], extent[0] - boxes[:, 3], boxes[:, 2], extent[0] - boxes[:, 1]], dim=1)
        cells = cells.flip(1)
    return boxes, objects.classes[seen], torch.tensor(extent), cells
