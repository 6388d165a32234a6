"""Metrics of a classifier of one class per image, exact over the images of all ranks."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fcmae.distributed import World
from fcmae.evaluation.classify import TOP5_FROM, accuracy
from fcmae.evaluation.features import gather_in_order
from fcmae.models.objective import Predictions

NAMES = ("top1", "top5", "balanced_accuracy", "precision", "recall", "f1", "auroc", "average_precision", "ece")
AREAS = ("auroc", "average_precision")
"""Areas under the ROC curve and under precision over recall."""
BINS = 15
"""Of confidence, for the calibration error."""
MOST_SCORES = 2**24
"""Images times classes up to which areas under curves are computed: 16,777 images of 1,000 classes."""


def of_counts(counts: Tensor) -> dict[str, float]:
    """``balanced_accuracy``, the mean recall of the classes that have images, and ``precision``, ``recall`` and ``f1``,
    the means over the classes that have images or were predicted, in percent.

    Args:
        counts: ``[3, K]``, the images of each class that were recognised, that there are, and predictions of it.
    """
    right, images, predicted = counts.double()
    present, either = images > 0, images + predicted > 0
    recall = (right / images.clamp(min=1))[present]
    means = {"precision": predicted, "recall": images, "f1": (images + predicted) / 2}
    return {"balanced_accuracy": 100 * _mean(recall)} | {
        name: 100 * _mean((right / of.clamp(min=0.5))[either]) for name, of in means.items()
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def counts_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """What :func:`of_counts` takes, for logits ``[n, K]``; those that are not finite predict nothing."""
    classes = outputs.shape[1]
    finite, predicted = outputs.isfinite().all(1), outputs.argmax(1)
    right = labels[finite & (predicted == labels)]
    return torch.stack([part.bincount(minlength=classes) for part in (right, labels, predicted[finite])])


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """The expected calibration error in percent: confidence of a prediction against accuracy, in 15 bins.

    Args:
        confidence, right: of :func:`confidences`.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    return 100 * float(binary_calibration_error(confidence, right.long(), BINS)) if len(right) else math.nan


def confidences(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of the predicted class and whether it is right, of the outputs that are finite."""
    finite = outputs.isfinite().all(1)
    confidence, predicted = outputs[finite].double().softmax(1).max(1)
    return confidence, predicted == labels[finite]


def areas(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """``auroc`` and ``average_precision`` in percent: the means of :func:`areas_of_classes`."""
    found = areas_of_classes(outputs, labels).values()
    return {kind: 100 * sum(each[kind] for each in found) / len(found) if found else math.nan for kind in AREAS}


def areas_of_classes(outputs: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    """``auroc`` and ``average_precision`` of each class against all others, of those that have images and are not all.

    Args:
        outputs: logits ``[n, K]``, with ``labels`` int64 ``[n]``.
    """
    scores, labels = outputs.double().cpu().softmax(1).nan_to_num(0), labels.cpu()
    found: dict[int, dict[str, float]] = {}
    for label in labels.unique().tolist():
        truth = labels == label
        if truth.all():
            continue
        found[label] = binary_areas(scores[:, label], truth)
    return found


def binary_areas(score: Tensor, truth: Tensor) -> dict[str, float]:
    """:data:`AREAS`, at best 1, from scores ``[n]`` and a truth of 0 and 1 ``[n]``."""
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    areas: Any = zip(AREAS, (binary_auroc, binary_average_precision), strict=True)
    # Rounding may exceed 1.
    return {name: min(float(area(score, truth.long(), validate_args=False)), 1.0) for name, area in areas}


def metrics_of(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics of logits ``[n, K]``, but for the areas of many scores (:data:`MOST_SCORES`)."""
    ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & outputs.isfinite().all(1)[:, None]
    result = {"top1": 100 * float(hits[:, 0].double().mean())}
    if outputs.shape[1] >= TOP5_FROM:
        result["top5"] = 100 * float(hits.any(1).double().mean())
    result |= of_counts(counts_of(outputs, labels))
    result |= areas(outputs, labels) if outputs.numel() <= MOST_SCORES else {}
    return result | {"ece": calibration_error(*confidences(outputs, labels))}


class _Kept:
    """Passes predictions on, and keeps what the metrics need."""

    def __init__(self, share: Iterable[Predictions], classes: int, device: torch.device) -> None:
        self.share = share
        self.counts = torch.zeros(3, classes, dtype=torch.int64, device=device)
        self.scores = 0
        empty = torch.empty(0, dtype=torch.int64, device=device)
        self.parts = [(torch.empty(0, classes, device=device), empty, empty)]
        self.calibration = [(torch.empty(0, dtype=torch.float64, device=device), empty.bool(), empty)]

    def __iter__(self) -> Iterator[Predictions]:
        for each in self.share:
            known = each.targets >= 0
            outputs, labels, places = (part[known] for part in each)
            self.counts += counts_of(outputs, labels)
            self.scores += outputs.numel()
            if self.scores <= MOST_SCORES:
                self.parts.append((outputs, labels, places))
            finite = outputs.isfinite().all(1)
            self.calibration.append((*confidences(outputs, labels), places[finite]))
            yield each


def class_metrics(
    share: Iterable[Predictions], world: World, classes: int, confusion: Tensor | None = None
) -> dict[str, float]:
    """:func:`fcmae.evaluation.classify.accuracy`, with the other metrics. Images without a label do not count.

    Args:
        share: the predictions of this rank; outputs are logits ``[N, K]``.
        classes: K.
        confusion: int64 ``[K, K]``, to which this rank's predictions are added.
    """
    kept = _Kept(share, classes, world.device)
    result = accuracy(kept, world, confusion=confusion)
    images = result.pop("images")
    result |= of_counts(world.sum(kept.counts))
    if int(world.sum(torch.tensor(kept.scores))) <= MOST_SCORES:
        outputs, labels, _ = gather_in_order(kept.parts, world)
        result |= areas(outputs, labels)
    confidence, right, _ = gather_in_order(kept.calibration, world)
    result["ece"] = calibration_error(confidence, right)
    return {**result, "images": images}
