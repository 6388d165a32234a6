"""Pictures of reconstructions by a pretrained model."""

import os
from collections.abc import Sequence
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

COLUMNS = ("original", "masked", "reconstruction", "pasted")
GREY = 0.5
MIN_TILE = 96
"""Smaller images are enlarged to this many pixels, so that the captions fit."""


@torch.no_grad()
def reconstruct(model: FCMAE, imgs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """The model's prediction in the scale of ``imgs``, of the first target that can be drawn; None if none can be.

    Args:
        imgs: normalised ``[N, C, H, W]``.
        mask: bool ``[N, L]``, or None for a random one.

    Returns:
        The prediction for every patch ``[N, C, H, W]`` and the mask, bool ``[N, 1, H, W]``, True = masked.
    """
    height, width = imgs.shape[-2:]
    preds, mask = model.predict(imgs, mask)
    rows, cols = grid_size(height, width, model.mask_patch_size)
    hidden = upsample_mask(mask, rows, cols, model.mask_patch_size).unsqueeze(1)
    for name, target in model.targets.items():
        pixels = target.to_pixels(preds[name].float(), imgs)
        if pixels is not None:
            return pixels, hidden
    return None


class Picture(NamedTuple):
    """A picture, and which channels it shows and how."""

    image: Image.Image
    display: Display


def reconstruction_picture(
    model: FCMAE, imgs: Tensor, data: DataConfig, mask: Tensor | None = None, channels: Sequence[int] | None = None
) -> Picture | None:
    """A row per image: original, masked, reconstruction, and the reconstruction with the visible patches pasted in.

    None if no target of the model can be drawn.

    Args:
        imgs: normalised ``[N, C, H, W]``.
        channels: one channel to show as grey or three as red, green and blue; None: see :func:`.display.choose`.
    """
    drawn = reconstruct(model, imgs, mask)
    if drawn is None:
        return None
    pred, hidden = drawn
    display = choose(imgs, data, channels)
    original, pred = rgb(display, imgs, pred, data=data)
    tiles = torch.stack(
        [original, torch.where(hidden, GREY, original), pred, torch.where(hidden, pred, original)], dim=1
    ).flatten(0, 1)
    scale = -(-MIN_TILE // max(tiles.shape[-2:]))
    tiles = tiles.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    grid = F.to_pil_image(make_grid(tiles.cpu(), nrow=len(COLUMNS), padding=4, pad_value=1.0))
    return Picture(_with_captions(grid), display)


def picture_format(key: str, path: str) -> str:
    """The format that a picture's name stands for, as Pillow calls it. Raises ConfigError."""
    suffix = os.path.splitext(path)[1].lower()
    kind = Image.registered_extensions().get(suffix, "")
    check(key, path, kind in Image.SAVE, "a file whose name says its format, such as .png or .jpg")
    return kind


def _with_captions(grid: Image.Image) -> Image.Image:
    height = 16
    picture = Image.new("RGB", (grid.width, grid.height + height), "white")
    picture.paste(grid, (0, height))
    draw = ImageDraw.Draw(picture)
    for column, caption in enumerate(COLUMNS):
        draw.text((column * grid.width / len(COLUMNS) + 4, 2), caption, fill="black")
    return picture
