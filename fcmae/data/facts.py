"""How many training images there are, and how large they are: which recipes for your own images start from."""

import statistics
from typing import Any

from fcmae.config import DataConfig, from_dict
from fcmae.data.pixels.decode import PixelFormat, open_image
from fcmae.data.sources.create import train_source
from fcmae.errors import FCMAEError, ImageError

LOOKED_AT = 32
"""Images whose size is read."""


def measure(values: dict[str, Any]) -> tuple[int, int, int] | None:
    """The number of training images, and the median height and width of some in pixels.

    Args:
        values: of a data config. None where they have mistakes or the source cannot be listed, which a command reports
            later.

    Raises ImageError where none of these images can be read.
    """
    sizes, unreadable = [], None
    try:
        cfg = from_dict(DataConfig, values, prefix="data")
        source = train_source(cfg)
        to = PixelFormat.of(cfg)
        for place in range(min(LOOKED_AT, len(source))):
            index = place * len(source) // min(LOOKED_AT, len(source))
            try:
                sizes.append(open_image(source[index].image, to).size)
            except ImageError as error:
                unreadable = unreadable or error
    except (FCMAEError, ValueError, OSError):
        return None
    if not sizes:
        if unreadable is not None:
            raise unreadable
        return None
    heights, widths = zip(*sizes, strict=True)
    return len(source), statistics.median_low(heights), statistics.median_low(widths)
