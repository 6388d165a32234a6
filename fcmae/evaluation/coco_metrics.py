"""COCO's mean average precision, by pycocotools, exact over ranks."""

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fcmae.data.pixels.instances import coco_mask, encoded, mask_of, pasted
from fcmae.data.sources.coco import Objects
from fcmae.distributed import World
from fcmae.evaluation import plots
from fcmae.evaluation.box_pictures import LEAST_SCORE
from fcmae.models.detector import Found
from fcmae.models.objective import Plots, Predictions, Report

NAMES = ("map", "map50", "map75")
IOUS = (0.5, 0.75)
"""Thresholds that have metrics and curves of their own."""


class Image(NamedTuple):
    """An image in COCO's form: lists of dicts, and its size."""

    place: int
    size: tuple[int, int]
    truth: list[dict[str, Any]]
    found: list[dict[str, Any]]


def coco_metrics(
    share: Iterable[Predictions], world: World, classes: Sequence[str], masks: bool, detections: int
) -> tuple[dict[str, float], Report]:
    """``map`` (over IoU 0.50 to 0.95), ``map50``, ``map75``, ``map_CLASS`` in percent, and with masks ``mask_map``, ...

    Means are over the classes that occur in the annotations; without any the value is NaN. The report, with errors by
    place, is complete on the first rank and empty on others.

    Args:
        share: of this rank: lists of Found, and lists of Objects.
        detections: most per image that count.
    """
    images = [
        Image(place, objects.size, _truth(objects, masks), rows(found, objects.size))
        for outputs, targets, places in share
        for found, objects, place in zip(outputs, targets, places.tolist(), strict=True)
    ]
    everyone = sorted(world.gather(images), key=lambda image: image.place)
    reports = [Report()]

    def measure() -> dict[str, float]:
        metrics, report = _measured(everyone, classes, masks, detections)
        reports.append(report)
        return metrics

    return world.from_main(measure), reports[-1]


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


def _measured(
    images: list[Image], classes: Sequence[str], masks: bool, detections: int
) -> tuple[dict[str, float], Report]:
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
    per_class: dict[str, dict[str, float]] = {name: {} for name in classes}
    drawings: Plots = {}
    wrong: dict[int, tuple[int, int]] = {}
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
            for number, name in enumerate(classes):
                of_class = _averages(evaluation, evaluation.eval["precision"][:, :, number, 0, -1])
                per_class[name] |= {f"{prefix}{kind}": value for kind, value in of_class.items()}
            drawings |= {f"{prefix}{name}": draw for name, draw in _curves(evaluation, classes).items()}
            wrong = wrong or _wrong(evaluation)
    errors = torch.full((1 + max((image.place for image in images), default=-1),), math.nan)
    for place, numbers in wrong.items():
        errors[place] = sum(numbers) or math.nan
    report = Report(per_class, drawings, errors, lambda place: "{} missed, {} false".format(*wrong[place]))
    return {**result, "images": len(images)}, report


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
    scores = _averages(evaluation, precision)
    each = {f"map_{name}": _mean(precision[:, :, number]) for number, name in enumerate(classes)}
    return scores | {name: value for name, value in each.items() if not math.isnan(value)}


def _averages(evaluation: Any, precision: np.ndarray) -> dict[str, float]:
    """The means of a precision ``[IoU, recall, ...]`` over all thresholds, and at each of :data:`IOUS`."""
    at = {f"map{round(100 * iou)}": precision[np.isclose(evaluation.params.iouThrs, iou)] for iou in IOUS}
    return {name: _mean(values) for name, values in {"map": precision, **at}.items()}


def _curves(evaluation: Any, classes: Sequence[str]) -> Plots:
    """Precision over recall of the classes that are annotated, a plot for each of :data:`IOUS`."""
    drawings: Plots = {}
    for iou in IOUS:
        (precision,) = evaluation.eval["precision"][np.isclose(evaluation.params.iouThrs, iou), ..., 0, -1]
        curves = {name: precision[:, k] for k, name in enumerate(classes) if (precision[:, k] > -1).all()}
        if curves:
            how = {"recall": evaluation.params.recThrs, "curves": curves, "iou": iou}
            drawings[f"precision_recall_{round(100 * iou)}"] = partial(plots.box_precision_recall, **how)
    return drawings


def _wrong(evaluation: Any) -> dict[int, tuple[int, int]]:
    """By image the objects that are missed, and what is found in vain, at an IoU of 0.50.

    What is found with a score below :data:`LEAST_SCORE` does not count.
    """
    wrong = dict.fromkeys(evaluation.params.imgIds, (0, 0))
    everything = evaluation.params.areaRng[0]
    for each in evaluation.evalImgs:
        if each is None or each["aRng"] != everything:
            continue
        sure = (np.array(each["dtScores"]) >= LEAST_SCORE) & ~np.array(each["dtIgnore"][0], dtype=bool)
        right = int((sure & (each["dtMatches"][0] > 0)).sum())
        missed, false = wrong[each["image_id"]]
        objects = int((~np.array(each["gtIgnore"], dtype=bool)).sum())
        wrong[each["image_id"]] = missed + objects - right, false + int(sure.sum()) - right
    return wrong


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return 100 * float(values.mean()) if len(values) else math.nan
