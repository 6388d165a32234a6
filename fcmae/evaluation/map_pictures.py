"""Pictures of predicted maps: a row per image, which is the input, the target and the prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
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
ACROSS = 4
"""Pictures in a row of a sheet."""
SIDE = 200
"""Pixels of its pictures' longer side."""
FONT, LINE = 12, 16
"""Pixels of the letters, and of a line."""
LEGEND = 40
"""Classes whose colours are named, at most."""


class MapPictures:
    """Collects the first images of an evaluation, to be drawn.

    Args:
        channels: of the input, as ``logger.channels``.
        most: rows.
    """

    def __init__(
        self, objective: DenseObjective, cfg: DataConfig, channels: Sequence[int] | None = None, most: int = ROWS
    ) -> None:
        self.objective, self.cfg, self.channels, self.most = objective, cfg, channels, most
        self.rows: list[list[Image.Image]] = []

    def __call__(self, image: Images, predicted: Tensor) -> None:
        """Takes an image, with its map, and what was predicted for it ``[K, H, W]``."""
        if len(self.rows) == self.most:
            return
        panels = self.objective.panels(image.labels[0], predicted)
        if panels:
            display = choose(image.imgs, self.cfg, self.channels)
            (shown,) = rgb(display, image.imgs, data=self.cfg)
            self.rows.append([panel(x) for x in (shown[0], *panels)])

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


def sheet(images: Sequence[tuple[Tensor, str]]) -> Image.Image:
    """Pictures ``[3, H, W]`` of values in 0..1, four in a row, with their captions."""
    font = ImageFont.load_default(size=FONT)
    panels = [F.to_pil_image(pixels.float().cpu()) for pixels, _ in images]
    factor = max(1, SIDE // max(max(panel.size) for panel in panels))
    panels = [panel.resize((factor * panel.width, factor * panel.height), Image.Resampling.NEAREST) for panel in panels]
    for panel in panels:
        panel.thumbnail((SIDE, SIDE))
    text = LINE * max(caption.count("\n") + 1 for _, caption in images)
    width, height = SIDE + GAP, max(panel.height for panel in panels) + text + 2 * GAP
    rows = -(-len(panels) // ACROSS)
    picture = Image.new("RGB", (min(len(panels), ACROSS) * width + GAP, rows * height), "white")
    pen = ImageDraw.Draw(picture)
    for place, (panel, (_, caption)) in enumerate(zip(panels, images, strict=True)):
        left, top = GAP + place % ACROSS * width, GAP + place // ACROSS * height
        lines = "\n".join(shortened(line, font) for line in caption.split("\n"))
        pen.multiline_text((left, top), lines, fill="black", font=font, spacing=LINE - FONT)
        picture.paste(panel, (left, top + text))
    return picture


def titled(picture: Image.Image, names: Sequence[str], legend: Mapping[str, Tensor]) -> Image.Image:
    """A picture of rows with the names of its columns above, and what colours mean, a line each, at the right."""
    font = ImageFont.load_default(size=FONT)
    if len(legend) > LEGEND:
        legend = {}
    beside = int(max((font.getlength(name) for name in legend), default=-5 * GAP)) + LINE + 5 * GAP
    height = max(picture.height, LINE * len(legend)) + LINE
    wide = Image.new("RGB", (picture.width + beside, height), "white")
    wide.paste(picture, (0, LINE))
    pen = ImageDraw.Draw(wide)
    for place, name in enumerate(names):
        pen.text((GAP + place * (picture.width - GAP) / len(names), 2), name, fill="black", font=font)
    for line, (name, colour) in enumerate(legend.items(), start=1):
        left, top = picture.width + GAP, line * LINE + GAP
        pen.rectangle((left, top, left + FONT, top + FONT), tuple((255 * colour).round().int().tolist()))
        pen.text((left + LINE + GAP, top), name, fill="black", font=font)
    return wide


def shortened(line: str, font: Any) -> str:
    """A line as far as it fits below a picture."""
    if font.getlength(line) <= SIDE:
        return line
    while line and font.getlength(line + "…") > SIDE:
        line = line[:-1]
    return line + "…"


def panel(pixels: Tensor) -> Image.Image:
    """An RGB image in 0..1 ``[3, H, W]``, not larger than a panel."""
    image = F.to_pil_image(pixels.float().cpu())
    image.thumbnail((MOST, MOST), Image.Resampling.NEAREST)
    return image
