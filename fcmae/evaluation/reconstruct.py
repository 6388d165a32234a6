"""Pictures of reconstructions by a pretrained model."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from fcmae.config import DataConfig, check
from fcmae.evaluation.display import Display, choose, rgb
from fcmae.masks.patches import grid_size, upsample_mask
from fcmae.models import FCMAE
from fcmae.targets import NEEDS, Seen

COLUMNS = ("original", "masked", "reconstruction", "pasted")
GREY = 0.5
PADDING = 4
"""Pixels between tiles."""
MIN_TILE = 96
"""Smaller images are enlarged to this many pixels, so that the captions fit."""


class Drawn(NamedTuple):
    """What a target asks for and what the model predicts, ``[N, C, H, W]``."""

    name: str
    original: Tensor
    pred: Tensor
    of_image: bool
    """In the scale of the images; otherwise of channels that the encoder does not get."""


@torch.no_grad()
def reconstruct(
    model: FCMAE, imgs: Tensor, mask: Tensor | None = None, seen: Mapping[str, Tensor] | None = None
) -> tuple[list[Drawn], Tensor]:
    """The model's predictions of the targets that can be drawn.

    Args:
        imgs: normalised ``[N, C, H, W]``.
        mask: bool ``[N, L]``, or None for a random one.
        seen: what targets need beside the images, as :class:`fcmae.targets.Seen` calls it.

    Returns:
        The targets, for every patch, and the mask, bool ``[N, 1, H, W]``, True = masked.
    """
    height, width = imgs.shape[-2:]
    preds, mask = model.predict(imgs, mask)
    rows, cols = grid_size(height, width, model.mask_patch_size)
    hidden = upsample_mask(mask, rows, cols, model.mask_patch_size).unsqueeze(1)
    given = Seen(imgs, **(seen or {}))
    lacking = {name for need in NEEDS if getattr(given, need) is None for name in model.targets_that_need(need)}
    drawn = []
    for name, target in model.targets.items():
        pixels = None if name in lacking else target.to_pixels(preds[name].float(), imgs)
        if pixels is not None:
            original = target.to_pixels(target(given)[0], imgs)
            assert original is not None
            drawn.append(Drawn(name, original, pixels, name not in model.targets_that_need("channels")))
    return drawn, hidden


class Picture(NamedTuple):
    """A picture, and which channels it shows and how."""

    image: Image.Image
    display: Display


def reconstruction_picture(
    model: FCMAE,
    imgs: Tensor,
    data: DataConfig,
    mask: Tensor | None = None,
    channels: Sequence[int] | None = None,
    seen: Mapping[str, Tensor] | None = None,
) -> Picture | None:
    """A row per image: original, masked, reconstruction, and the reconstruction with the visible patches pasted in.

    Of several targets that can be drawn each has a row, with its name: the original is then what the target asks for.
    None if no target of the model can be drawn.

    Args:
        imgs: normalised ``[N, C, H, W]``.
        channels: one channel to show as grey or three as red, green and blue; None: see :func:`.display.choose`.
        seen: as :func:`reconstruct`.
    """
    drawn, hidden = reconstruct(model, imgs, mask, seen)
    if not drawn:
        return None
    displays, rows = [], []
    for _, wanted, pred, of_image in drawn:
        display = choose(wanted, data, channels) if of_image else choose(wanted, None)
        original, pred = rgb(display, wanted, pred, data=data if of_image else None)
        masked, pasted = torch.where(hidden, GREY, original), torch.where(hidden, pred, original)
        rows.append(torch.stack([original, masked, pred, pasted], dim=1))
        displays.append(display)
    tiles = torch.stack(rows, dim=1).flatten(0, 2)  # of each image the targets, of each target the columns
    scale = -(-MIN_TILE // max(tiles.shape[-2:]))
    tiles = tiles.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    grid = F.to_pil_image(make_grid(tiles.cpu(), nrow=len(COLUMNS), padding=PADDING, pad_value=1.0))
    names = [each.name for each in drawn] if len(drawn) > 1 else []
    return Picture(_with_captions(grid, names * len(imgs)), displays[0])


def picture_format(key: str, path: str) -> str:
    """The format that a picture's name stands for, as Pillow calls it. Raises ConfigError."""
    suffix = os.path.splitext(path)[1].lower()
    kind = Image.registered_extensions().get(suffix, "")
    check(key, path, kind in Image.SAVE, "a file whose name says its format, such as .png or .jpg")
    return kind


def _with_captions(grid: Image.Image, names: Sequence[str]) -> Image.Image:
    """With a line above that names the columns, and the name of the target on each row, if there are names."""
    height = 16
    picture = Image.new("RGB", (grid.width, grid.height + height), "white")
    picture.paste(grid, (0, height))
    draw = ImageDraw.Draw(picture)
    for column, caption in enumerate(COLUMNS):
        draw.text((column * grid.width / len(COLUMNS) + 4, 2), caption, fill="black")
    for row, name in enumerate(names):
        top = height + PADDING + row * (grid.height - PADDING) // len(names)
        box = draw.textbbox((PADDING + 2, top + 1), name)
        draw.rectangle((PADDING, top, box[2] + 2, box[3] + 2), fill="white")
        draw.text((PADDING + 2, top + 1), name, fill="black")
    return picture
