"""A made-up COCO data set: squares of two colours, with boxes, and masks as polygons and run lengths."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {3: (220, 40, 40), 7: (40, 220, 40)}
"""By the id of the category; ids are not consecutive, as COCO's."""


def write_coco(folder: Path, count: int = 6, size: tuple[int, int] = (40, 56), masks: bool = True) -> dict[str, Any]:
    """``images/N.png`` and ``objects.json``, whose content is returned: two squares each, a crowd; none in the last."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        pixels = rng.integers(0, 60, (*size, 3), dtype=np.uint8)
        image = {"id": 10 + number, "file_name": f"{number}.png", "height": size[0], "width": size[1]}
        images.append(image)
        for kind, colour in COLOURS.items() if number < count - 1 else ():
            side = int(rng.integers(10, 18))
            top, left = int(rng.integers(0, size[0] - side)), int(rng.integers(0, size[1] - side))
            pixels[top : top + side, left : left + side] = colour
            annotations.append(_annotation(len(annotations), image, kind, (left, top, side, side), masks))
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    crowd = _annotation(len(annotations), images[0], 3, (0, 0, 30, 8), masks)
    annotations.append({**crowd, "iscrowd": 1})
    categories = [{"id": 7, "name": "green"}, {"id": 3, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder, content)
    return content


def write_json(folder: Path, content: Any, name: str = "objects.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def _annotation(number: int, image: dict[str, Any], kind: int, box: tuple[int, ...], masks: bool) -> dict[str, Any]:
    left, top, width, height = box
    given = {"id": number + 1, "image_id": image["id"], "category_id": kind, "bbox": list(box), "iscrowd": 0}
    given["area"] = width * height
    if not masks:
        return given
    if number % 2:
        right, bottom = left + width, top + height
        return {**given, "segmentation": [[left, top, right, top, right, bottom, left, bottom]]}
    mask = np.zeros((image["height"], image["width"]), np.uint8)
    mask[top : top + height, left : left + width] = 1
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    counts = counts if flat[0] == 0 else [0, *counts]
    return {**given, "segmentation": {"size": [image["height"], image["width"]], "counts": counts}}
