"""Made-up images with target maps: squares of two colours, with a class map, or with the image in grey."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_squares(folder: Path, count: int = 6, height: int = 40, width: int = 56, seed: int = 0) -> Path:
    """``images/s/N.png`` and ``masks/s/N.png``: 0 background, 1 red, 2 green, the first rows 255."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind / "s").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        for kind, colour in ((1, (200, 40, 40)), (2, (40, 200, 40))):
            top, left = rng.integers(0, height - 16), rng.integers(0, width - 16)
            image[top : top + 16, left : left + 16] = colour
            mask[top : top + 16, left : left + 16] = kind
        mask[:2] = 255
        Image.fromarray(image).save(folder / "images" / "s" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / "s" / f"{number}.png")
    return folder
