"""Boxes and instance masks."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fcmae.config import FinetuneConfig
from fcmae.config.checks import check_one_of
from fcmae.data.pixels.instances import coco_mask
from fcmae.data.sources import Source, Subset
from fcmae.data.sources.coco import CocoObjects
from fcmae.distributed import World
from fcmae.errors import ConfigError, UsageError, counted, first_of
from fcmae.evaluation.coco_metrics import NAMES, coco_metrics
from fcmae.models.detector import Detector
from fcmae.models.objective import BoxObjective, Predictions, Report

MODELS = ("faster_rcnn", "mask_rcnn")


class Detect(BoxObjective):
    """Boxes and instance masks, by torchvision's Faster R-CNN or Mask R-CNN; COCO's mean average precision.

    Args:
        model: ``faster_rcnn`` or ``mask_rcnn``; None = mask_rcnn if all training objects have masks.
        width: channels of the feature pyramid; the box head has four times as many.
        anchors: pixels per side of the square anchor of each level of the pyramid, one more than there are stages; None
            = 8 times the level's stride.
        detections: most that are found in an image.
        best: the metric whose best checkpoint is kept: ``map``, ``map50``, ``map75`` or ``map_CLASS``, of boxes, or of
            masks after ``mask_``.
    """

    def __init__(
        self,
        model: str | None = None,
        width: int = 256,
        anchors: Sequence[int] | None = None,
        detections: int = 100,
        best: str = "map",
    ) -> None:
        if model is not None:
            check_one_of("model", model, MODELS)
        for name, value, most in (("width", width, 2048), ("detections", detections, 10_000)):
            if type(value) is not int or not 0 < value <= most:
                raise ValueError(f"{name} must be an integer from 1 to {most}; got {value!r}")
        if anchors is not None and not all(type(side) is int and side > 0 for side in anchors):
            raise ValueError(f"anchors must be a list of positive integers, or null; got {anchors!r}")
        kind = best.removeprefix("mask_") if isinstance(best, str) else ""
        if kind not in NAMES and not kind.startswith("map_"):
            raise ValueError(f"best must be one of {', '.join(NAMES)} or map_CLASS, or after mask_; got {best!r}")
        coco_mask()
        self.model, self.width, self.anchors, self.detections, self.best = model, width, anchors, detections, best
        self.classes: list[str] = []
        self.category_ids: list[int] = []
        self.masks, self.most = model == "mask_rcnn", 0
        self._report = Report()

    def fit(self, source: Source, cfg: FinetuneConfig) -> None:
        source = source.source if isinstance(source, Subset) else source
        assert isinstance(source, CocoObjects)
        self.classes, self.category_ids, self.most = source.class_names, source.category_ids, source.most
        without = source.without_mask()
        if self.model == "mask_rcnn" and without:
            raise ConfigError(
                f"{source.key}: {source.file}: {counted(len(without), 'image')} with objects without a mask: "
                f"{first_of(without)}; objective.model=faster_rcnn takes boxes alone"
            )
        if not self.most:
            raise UsageError(f"{source.key}: {source.file} has no boxes to train with")
        self.masks = self.model == "mask_rcnn" or (self.model is None and not without)
        known = [*NAMES, *(f"map_{name}" for name in self.classes)]
        known += [f"mask_{name}" for name in known] if self.masks else []
        if self.best not in known:
            raise ConfigError(f"objective.best must be one of {', '.join(known)}; got {self.best!r}")

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes, "category_ids": self.category_ids, "masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.classes = state.get("classes") or []
        self.category_ids = state.get("category_ids") or []
        self.masks = bool(state.get("masks"))

    def validation(self, source: Source, key: str, whose: str) -> tuple[Source, list[str]]:
        assert isinstance(source, CocoObjects)
        without = source.without_mask()
        if self.masks and without:
            raise ConfigError(
                f"{source.key}: {source.file}: {counted(len(without), 'image')} with objects without a mask, "
                f"which {whose} has: {first_of(without)}"
            )
        return source, source.take_classes(self.classes, whose)

    def decoder(self, dims: list[int], strides: list[int]) -> Detector:
        return Detector(dims, strides, len(self.classes), self.masks, self.width, self.anchors, self.detections)

    def metrics(self, share: Iterable[Predictions], world: World) -> dict[str, float]:
        """``map``, ``map50``, ``map75`` and ``map_CLASS`` of boxes in percent; with masks the same after ``mask_``.

        COCO's own evaluation (pycocotools) of the images of all ranks, in the source's order.
        """
        found, self._report = coco_metrics(share, world, self.classes, self.masks, self.detections)
        return {**{self.best: math.nan}, **found}  # of a class without an object

    def report_boxes(self) -> Report:
        return self._report
