"""What the images of a run are like: some examples, as their files have them, kept in the run's folder."""

import base64
import io
import json
import os
import time
from pathlib import Path
from typing import Any

from PIL import Image

from fcmae.data.pixels.look import as_picture, look, small
from fcmae.data.sources import Source
from fcmae.files import replacing

SHEET_FILE = "data_sheet.json"
EXAMPLES, SIDE = 12, 128
"""Images, evenly spaced, and pixels of the longer side of their pictures."""
SECONDS = 5.0
"""After which no further image is read: large ones take long."""


def keep_sheet(source: Source, run_dir: Path, max_pixels: int) -> None:
    """Writes :data:`SHEET_FILE`, unless a run that resumes has it. Images that cannot be read are counted.

    Raises OSError.
    """
    if os.path.lexists(run_dir / SHEET_FILE):
        return
    began, examples, unreadable = time.monotonic(), [], 0
    most = min(EXAMPLES, len(source))
    for place in range(most):
        index = place * len(source) // most
        try:
            examples.append(_example(source, index, max_pixels))
        except Exception:  # of an image, or of a source of the user's own: training will say why
            unreadable += 1
        if time.monotonic() - began > SECONDS:
            break
    classes = None if source.classes is None else len(source.classes)
    sheet = {"images": len(source), "classes": classes, "unreadable": unreadable, "examples": examples}
    with replacing(run_dir / SHEET_FILE) as file:
        file.write(json.dumps(sheet).encode())


def _example(source: Source, index: int, max_pixels: int) -> dict[str, Any]:
    name = source.describe(index)
    found = look(source[index].image, name, max_pixels)
    picture = Image.fromarray(as_picture(small(found.pixels, 4 * SIDE)))
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return {
        "name": name,
        "size": list(found.size),
        "kind": found.kind,
        "channels": len(found.pixels),
        "type": str(found.pixels.dtype),
        "picture": base64.b64encode(buffer.getvalue()).decode(),
    }
