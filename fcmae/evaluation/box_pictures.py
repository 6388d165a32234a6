"""Pictures of what a detector finds: a row per image, which is the input, the true objects and those found."""

import colorsys
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from fcmae.config import DataConfig
from fcmae.data.pixels.instances import mask_of, pasted
from fcmae.data.sources.coco import Objects
from fcmae.evaluation.display import choose, rgb
from fcmae.evaluation.map_pictures import ROWS, MapPictures, panel
from fcmae.models.detector import Found

GOLDEN = 0.618034
"""Of a turn, between the hues of two classes."""
LEAST_SCORE = 0.5
"""Of objects that are drawn."""


class BoxPictures(MapPictures):
    """Collects the first images of an evaluation, to be drawn with a colour for each class.

    Args:
        channels: of the input, as ``logger.channels``.
        most: rows.
    """

    def __init__(self, cfg: DataConfig, channels: Sequence[int] | None = None, most: int = ROWS) -> None:
        self.cfg, self.channels, self.most = cfg, channels, most
        self.rows = []

    def take(self, canvas: Tensor, sizes: Sequence[int], found: Found, objects: Objects) -> None:
        """Takes an image on its canvas, normalised ``[C, H, W]``; its height and width there and in its file; and what
        was found and what is true in pixels of the file."""
        if len(self.rows) == self.most:
            return
        rows, cols, height, width = sizes
        (shown,) = rgb(choose(canvas[None], self.cfg, self.channels), canvas[None], data=self.cfg)
        image = (255 * shown[0, :, :rows, :cols].cpu()).to(torch.uint8)
        scale = torch.tensor([cols / width, rows / height] * 2)
        kept = found.scores >= LEAST_SCORE
        boxes = found.boxes[kept] * scale
        masks = []
        if found.masks is not None:
            masks = [pasted(m, b, (rows, cols)) for m, b in zip(found.masks[kept], boxes.tolist(), strict=True)]
        true = []
        if found.masks is not None and all(segment is not None for segment in objects.segments):
            whole = [mask_of(segment, objects.size)[None, None].float() for segment in objects.segments]
            true = [torch.nn.functional.interpolate(m, (rows, cols))[0, 0] for m in whole]
        panels = (
            image,
            _drawn(image, objects.boxes * scale, objects.classes, true),
            _drawn(image, boxes, found.classes[kept], masks),
        )
        self.rows.append([panel(x.float() / 255) for x in panels])


def colour(kind: int) -> tuple[float, float, float]:
    """Red, green and blue in 0..1 of a class."""
    return colorsys.hsv_to_rgb(GOLDEN * kind % 1, 0.65, 0.95)


def _drawn(image: Tensor, boxes: Tensor, classes: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """uint8 ``[3, H, W]`` with boxes and masks."""
    if not len(boxes):
        return image
    hues = [colour(kind) for kind in classes.tolist()]
    colours: list[tuple[int, int, int]] = [(int(255 * r), int(255 * g), int(255 * b)) for r, g, b in hues]
    if masks:
        image = draw_segmentation_masks(image, torch.stack(list(masks)).bool(), alpha=0.4, colors=colours)
    return draw_bounding_boxes(image, boxes, colors=colours)
