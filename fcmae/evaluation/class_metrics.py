"""Metrics of a classifier of one class per image, exact over the images of all ranks."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fcmae.distributed import World
from fcmae.evaluation.classify import TOP5_FROM, accuracy
from fcmae.evaluation.features import gather
from fcmae.models.objective import Predictions

NAMES = ("top1", "top5", "balanced_accuracy", "f1", "auroc", "average_precision")
MOST_SCORES = 2**24
"""Images times classes up to which areas under curves are computed: 16,777 images of 1,000 classes."""


def of_counts(counts: Tensor) -> dict[str, float]:
    """``balanced_accuracy``, the mean recall of the classes that have images, and ``f1``, the mean over the classes
    that have images or were predicted, in percent.

    Args:
        counts: ``[3, K]``, the images of each class that were recognised, that there are, and predictions of it.
    """
    right, images, predicted = counts.double()
    present, either = images > 0, images + predicted > 0
    recall = (right / images.clamp(min=1))[present]
    f1 = (2 * right / (images + predicted).clamp(min=1))[either]
    return {"balanced_accuracy": 100 * _mean(recall), "f1": 100 * _mean(f1)}


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def counts_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """What :func:`of_counts` takes, for logits ``[n, K]``; those that are not finite predict nothing."""
    classes = outputs.shape[1]
    finite, predicted = outputs.isfinite().all(1), outputs.argmax(1)
    right = labels[finite & (predicted == labels)]
    return torch.stack([part.bincount(minlength=classes) for part in (right, labels, predicted[finite])])


def areas(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """``auroc`` and ``average_precision`` in percent: each class against all others, and the mean over the classes that
    have images and are not all.

    Args:
        outputs: logits ``[n, K]``, with ``labels`` int64 ``[n]``.
    """
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    scores, labels = outputs.double().cpu().softmax(1).nan_to_num(0), labels.cpu()
    found: dict[str, list[Tensor]] = {"auroc": [], "average_precision": []}
    for label in labels.unique().tolist():
        truth = (labels == label).long()
        if truth.all():
            continue
        found["auroc"].append(binary_auroc(scores[:, label], truth, validate_args=False))
        found["average_precision"].append(binary_average_precision(scores[:, label], truth, validate_args=False))
    return {name: 100 * _mean(torch.stack(each).double()) if each else math.nan for name, each in found.items()}


def metrics_of(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics of logits ``[n, K]``, but for the areas of many scores (:data:`MOST_SCORES`)."""
    ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
    hits = (ranked == labels[:, None]) & outputs.isfinite().all(1)[:, None]
    result = {"top1": 100 * float(hits[:, 0].double().mean())}
    if outputs.shape[1] >= TOP5_FROM:
        result["top5"] = 100 * float(hits.any(1).double().mean())
    result |= of_counts(counts_of(outputs, labels))
    return result | (areas(outputs, labels) if outputs.numel() <= MOST_SCORES else {})


class _Kept:
    """Passes predictions on, and keeps what the metrics need."""

    def __init__(self, share: Iterable[Predictions], classes: int, device: torch.device) -> None:
        self.share = share
        self.counts = torch.zeros(3, classes, dtype=torch.int64, device=device)
        self.scores = 0
        empty = torch.empty(0, dtype=torch.int64, device=device)
        self.parts = [(torch.empty(0, classes, device=device), empty, empty)]

    def __iter__(self) -> Iterator[Predictions]:
        for each in self.share:
            known = each.targets >= 0
            outputs, labels, places = (part[known] for part in each)
            self.counts += counts_of(outputs, labels)
            self.scores += outputs.numel()
            if self.scores <= MOST_SCORES:
                self.parts.append((outputs, labels, places))
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
        outputs, labels, places = (gather(torch.cat(part), world) for part in zip(*kept.parts, strict=True))
        order = places.argsort()
        result |= areas(outputs[order], labels[order])
    return {**result, "images": images}
