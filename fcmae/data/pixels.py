"""From the bytes of an image file to pixels.

Sources hand on undecoded bytes (:class:`Encoded`), the transforms decode them: so one place knows what files can hold,
and a transform may decode only what it needs.
"""

import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F

from fcmae.errors import ImageError, UsageError

EXTENSIONS = IMG_EXTENSIONS
"""File names that end so, in any case, are taken for images."""

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for a number of channels."""

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")
"""Pillow's modes whose conversion keeps the scale of brightness; it would clip 16-bit and float values."""


class Encoded(NamedTuple):
    """An image file's undecoded bytes, and what messages call it: its path."""

    data: bytes
    name: str


def read_file(path: str | Path) -> Encoded:
    """The bytes of an image file. Raises ImageError naming it."""
    try:
        return Encoded(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise ImageError(str(path), error.strerror or str(error)) from error


def decode(image: Encoded | Tensor, in_chans: int) -> Tensor:
    """An image as uint8 ``[in_chans, H, W]``; a tensor is returned as it is. Raises ImageError naming the file."""
    if isinstance(image, Tensor):
        return image
    if in_chans not in IMAGE_MODES:
        raise UsageError(f"data.in_chans is {in_chans}; image files can be read as {', '.join(map(str, IMAGE_MODES))}")
    try:
        with Image.open(io.BytesIO(image.data)) as opened:
            if opened.mode not in EIGHT_BIT_MODES:
                raise ImageError(image.name, f"its pixels are {opened.mode}, not 8 bits a channel")
            return F.pil_to_tensor(opened.convert(IMAGE_MODES[in_chans]))
    except UnidentifiedImageError as error:
        raise ImageError(image.name, "its bytes are of no image format that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(image.name, str(error)) from error
