"""A picture of many images side by side, with their names."""

import os
from collections.abc import Sequence

from PIL import Image, ImageDraw

from fcmae.data.pixels.look import as_picture, look, small
from fcmae.data.sources import Source
from fcmae.errors import ImageError

SHOWN = 40
"""Images drawn at random."""
COLUMNS, SIDE, TEXT, GAP = 8, 128, 24, 6
"""Images in a row, pixels of an image, of its text and between images."""
CHARACTERS = SIDE // 6
"""Of a line of text."""
RED, BLACK, WHITE = (200, 0, 0), (0, 0, 0), (255, 255, 255)


def draw(source: Source, images: Sequence[int], odd: Sequence[int], max_pixels: int) -> Image.Image:
    """The images of a source, then on new rows the odd ones with a red edge, each with its size and its name, without
    the folders that all have in common.

    Images of other types than uint8 are stretched.
    """
    rows = [images[i : i + COLUMNS] for i in range(0, len(images), COLUMNS)]
    others = [odd[i : i + COLUMNS] for i in range(0, len(odd), COLUMNS)]
    cell = (SIDE + GAP, SIDE + TEXT + GAP)
    columns = max(map(len, [*rows, *others]))
    sheet = Image.new("RGB", (columns * cell[0] + GAP, (len(rows) + len(others)) * cell[1] + GAP), WHITE)
    canvas = ImageDraw.Draw(sheet)
    names = [source.describe(index) for index in (*images, *odd)]
    folder = os.path.dirname(os.path.commonprefix(names))  # noqa: RUF071 - names need not be paths
    for row, places in enumerate([*rows, *others]):
        for column, index in enumerate(places):
            left, top = GAP + column * cell[0], GAP + row * cell[1]
            try:
                found = look(source[index].image, source.describe(index), max_pixels)
            except ImageError:
                continue
            thumbnail = Image.fromarray(as_picture(small(found.pixels, 4 * SIDE)))
            thumbnail.thumbnail((SIDE, SIDE))
            size = thumbnail.size
            at = left + (SIDE - size[0]) // 2, top + (SIDE - size[1]) // 2
            sheet.paste(thumbnail, at)
            if row >= len(rows):
                canvas.rectangle((at[0] - 2, at[1] - 2, at[0] + size[0] + 1, at[1] + size[1] + 1), outline=RED, width=2)
            name = source.describe(index).removeprefix(folder).removeprefix("/")
            name = name if len(name) <= CHARACTERS else f"...{name[3 - CHARACTERS :]}"
            told = f"{name}\n{found.size[1]}x{found.size[0]}"
            canvas.multiline_text((left, top + SIDE + 2), told, fill=BLACK, font_size=10, spacing=1)
    return sheet
