"""Pictures of predicted maps: a row per image, which is the input, the target and the prediction."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fcmae.config import DataConfig
from fcmae.evaluation.display import choose, rgb
from fcmae.evaluation.features import Images
from fcmae.models.objective import DenseObjective

ROWS = 4
MOST = 256
"""Pixels of a panel's longer side."""
GAP = 4


class MapPictures:
    """Collects the first images of an evaluation, to be drawn.

    Args:
        channels: of the input, as ``logger.channels``.
    """

    def __init__(self, objective: DenseObjective, cfg: DataConfig, channels: Sequence[int] | None = None) -> None:
        self.objective, self.cfg, self.channels = objective, cfg, channels
        self.rows: list[list[Image.Image]] = []

    def __call__(self, image: Images, predicted: Tensor) -> None:
        """Takes an image, with its map, and what was predicted for it ``[K, H, W]``."""
        if len(self.rows) == ROWS:
            return
        panels = self.objective.panels(image.labels[0], predicted)
        if panels:
            display = choose(image.imgs, self.cfg, self.channels)
            (shown,) = rgb(display, image.imgs, data=self.cfg)
            self.rows.append([_panel(x) for x in (shown[0], *panels)])

    def draw(self) -> Image.Image | None:
        """The picture, if there are rows."""
        if not self.rows:
            return None
        widths = [max(row[column].width for row in self.rows) for column in range(len(self.rows[0]))]
        heights = [max(panel.height for panel in row) for row in self.rows]
        picture = Image.new(
            "RGB", (sum(widths) + GAP * (len(widths) + 1), sum(heights) + GAP * (len(heights) + 1)), "white"
        )
        top = GAP
        for row, height in zip(self.rows, heights, strict=True):
            left = GAP
            for panel, width in zip(row, widths, strict=True):
                picture.paste(panel, (left, top))
                left += width + GAP
            top += height + GAP
        return picture


def _panel(pixels: Tensor) -> Image.Image:
    image = F.to_pil_image(pixels.float().cpu())
    image.thumbnail((MOST, MOST), Image.Resampling.NEAREST)
    return image
