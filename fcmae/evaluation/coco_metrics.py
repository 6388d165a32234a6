"""COCO's mean average precision, by pycocotools, exact over ranks."""

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from fcmae.data.pixels.instances import coco_mask, encoded, mask_of, pasted
from fcmae.data.sources.coco import Objects
from fcmae.distributed import World
from fcmae.models.detector import Found
from fcmae.models.objective import Predictions

NAMES = ("map", "map50", "map75")


class Image(NamedTuple):
    """An image in COCO's form: lists of dicts, and its size."""

    place: int
    size: tuple[int, int]
    truth: list[dict[str, Any]]
    found: list[dict[str, Any]]


def coco_metrics(
    share: Iterable[Predictions], world: World, classes: Sequence[str], masks: bool, detections: int
) -> dict[str, float]:
    """``map`` (over IoU 0.50 to 0.95), ``map50``, ``map75``, ``map_CLASS`` in percent, and with masks ``mask_map``, ...

    Means are over the classes that occur in the annotations; without any the value is NaN.

    Args:
        share: of this rank: lists of Found, and lists of Objects.
        detections: most per image that count.
    """
    images = [
        Image(place, objects.size, _truth(objects, masks), rows(found, objects.size))
        for outputs, targets, places in share
        for found, objects, place in zip(outputs, targets, places.tolist(), strict=True)
    ]
    everyone = sorted(_gathered(images, world), key=lambda image: image.place)
    return world.from_main(lambda: _measured(everyone, classes, masks, detections))


def rows(found: Found, size: tuple[int, int]) -> list[dict[str, Any]]:
    """What was found in an image of ``size``, as COCO's results have it; the class's number instead of its id."""
    result = []
    boxes, classes, scores = (part.tolist() for part in found[:3])
    for number, (left, top, right, bottom) in enumerate(boxes):
        row: dict[str, Any] = {"category_id": classes[number], "score": scores[number]}
        row["bbox"] = [left, top, right - left, bottom - top]
        if found.masks is not None:
            row["segmentation"] = encoded(pasted(found.masks[number], boxes[number], size))
        result.append(row)
    return result


def _truth(objects: Objects, masks: bool) -> list[dict[str, Any]]:
    result = []
    for number, (left, top, right, bottom) in enumerate(objects.boxes.tolist()):
        row: dict[str, Any] = {
            "category_id": int(objects.classes[number]),
            "iscrowd": int(objects.crowd[number]),
            "area": float(objects.areas[number]),
            "bbox": [left, top, right - left, bottom - top],
        }
        if masks:
            segment = objects.segments[number]
            size = objects.size
            row["segmentation"] = encoded(_filled(row["bbox"], size) if segment is None else mask_of(segment, size))
        result.append(row)
    return result


def _filled(box: Sequence[float], size: tuple[int, int]) -> Any:
    """A crowd without a mask: its box."""
    left, top, width, height = box
    return mask_of([[left, top, left + width, top, left + width, top + height, left, top + height]], size)


def _gathered(images: list[Image], world: World) -> list[Image]:
    if world.size == 1:
        return images
    parts: list[list[Image]] = [[]] * world.size
    dist.all_gather_object(parts, images)
    return [image for part in parts for image in part]


def _measured(images: list[Image], classes: Sequence[str], masks: bool, detections: int) -> dict[str, float]:
    coco_mask()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = {
        "images": [{"id": image.place, "height": image.size[0], "width": image.size[1]} for image in images],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes)],
        "annotations": _numbered(images, "truth"),
    }
    result: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth.createIndex()
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": _numbered(images, "found")}
        found.createIndex()
        for kind, prefix in (("bbox", ""), *((("segm", "mask_"),) if masks else ())):
            evaluation = COCOeval(truth, found, kind)
            evaluation.params.maxDets = [1, 10, max(100, detections)]
            evaluation.evaluate()
            evaluation.accumulate()
            result |= {f"{prefix}{name}": value for name, value in _scores(evaluation, classes).items()}
    return {**result, "images": len(images)}


def _numbered(images: Sequence[Image], name: str) -> list[dict[str, Any]]:
    """The dicts of all images with ids, and with areas for what was found."""
    result: list[dict[str, Any]] = []
    for image in images:
        for row in getattr(image, name):
            area = row["bbox"][2] * row["bbox"][3]
            if name == "found" and "segmentation" in row:
                area = float(coco_mask().area(row["segmentation"]))
            result.append({"iscrowd": 0, "area": area, **row, "id": len(result) + 1, "image_id": image.place})
    return result


def _scores(evaluation: Any, classes: Sequence[str]) -> dict[str, float]:
    """Averages of the precision ``[IoU, recall, class, area, detections]``, which is -1 where nothing was annotated."""
    precision = evaluation.eval["precision"][..., 0, -1]
    thresholds = evaluation.params.iouThrs
    of = {"map": precision}
    of |= {f"map{round(100 * iou)}": precision[np.isclose(thresholds, iou)] for iou in (0.5, 0.75)}
    scores = {name: _mean(values) for name, values in of.items()}
    each = {f"map_{name}": _mean(precision[:, :, number]) for number, name in enumerate(classes)}
    return scores | {name: value for name, value in each.items() if not math.isnan(value)}


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return 100 * float(values.mean()) if len(values) else math.nan
