"""The reports of each kind of target: numbers of each class, plots, and how wrong each image is."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.evaluation import plots
from fcmae.evaluation.class_metrics import (
    AREAS,
    MOST_SCORES,
    areas_of_classes,
    binary_areas,
    calibration_error,
    confidences,
)
from fcmae.models.objective import Plots, Report

Curves = Mapping[str, tuple[Tensor, Tensor]]


def of_classes(outputs: Tensor, labels: Tensor, classes: Sequence[str]) -> Report:
    """One class per image.

    Args:
        outputs: logits ``[n, K]``.
        labels: int64 ``[n]``, -1 without one.
    """
    known, finite = labels >= 0, outputs.isfinite().all(1)
    counted = known & finite
    predicted = outputs.argmax(1)
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels[counted], predicted[counted]), torch.ones(1, dtype=torch.int64), accumulate=True)
    images = labels[known].bincount(minlength=len(classes))
    drawings: Plots = {"confusion": partial(plots.confusion, counts=counts, classes=classes)}
    areas: dict[int, dict[str, float]] = {}
    if outputs[known].numel() <= MOST_SCORES:
        areas = areas_of_classes(outputs[known], labels[known])
        shares = outputs[known].double().softmax(1).nan_to_num(0)
        curves = {classes[k]: (shares[:, k], labels[known] == k) for k in areas}
        if len(classes) == 2:  # both are the same curve
            curves = {classes[1]: curves[classes[1]]} if classes[1] in curves else {}
        drawings |= _curves(curves)
    if counted.any():
        how = dict(zip(("confidence", "right"), confidences(outputs[counted], labels[counted]), strict=True))
        error = calibration_error(**how)
        drawings["reliability"] = partial(plots.reliability, error=error, **how)
    per_class = {
        name: {"images": float(images[k]), "predicted": float(counts[:, k].sum())}
        | _rates(counts[k, k], images[k], counts[:, k].sum())
        | {kind: 100 * areas.get(k, {}).get(kind, math.nan) for kind in AREAS}
        for k, name in enumerate(classes)
    }
    losses = F.cross_entropy(outputs.double(), labels.clamp(min=0), reduction="none")
    errors = torch.where(known, losses.nan_to_num(math.inf), math.nan)

    def caption(row: int) -> str:
        share = float(outputs[row].double().softmax(0)[predicted[row]])
        return f"true: {classes[int(labels[row])]}\npredicted: {classes[int(predicted[row])]} ({100 * share:.0f} %)"

    wrong = torch.where(predicted != labels, errors, math.nan)
    return Report(per_class, drawings, wrong.masked_fill(wrong.isinf(), math.nan), caption)


def _rates(right: Tensor, images: Tensor, predicted: Tensor) -> dict[str, float]:
    """In percent; NaN where there is nothing to divide by."""
    values = {"precision": predicted, "recall": images, "f1": (images + predicted) / 2}
    return {name: 100 * float(right) / float(of) if of else math.nan for name, of in values.items()}


def _curves(curves: Curves) -> Plots:
    if not curves:
        return {}
    return {
        "roc": partial(plots.roc, truths=curves),
        "precision_recall": partial(plots.precision_recall, truths=curves),
    }


def of_labels(outputs: Tensor, targets: Tensor, columns: Sequence[str]) -> Report:
    """Several labels per image.

    Args:
        outputs: logits ``[n, K]``.
        targets: 0, 1, or NaN if missing.
    """
    shares, valid = outputs.double().sigmoid(), ~targets.isnan() & outputs.isfinite()
    per_class: dict[str, dict[str, float]] = {}
    curves: dict[str, tuple[Tensor, Tensor]] = {}
    for k, name in enumerate(columns):
        score, truth = shares[valid[:, k], k], targets[valid[:, k], k] > 0.5
        found = score > 0.5
        both = bool(truth.any()) and not bool(truth.all())
        curves |= {name: (score, truth)} if both else {}
        areas = binary_areas(score, truth) if both else dict.fromkeys(AREAS, math.nan)
        per_class[name] = {
            "images": float(len(truth)),
            "positive": float(truth.sum()),
            **_rates((found & truth).sum(), truth.sum(), found.sum()),
            **{kind: 100 * area for kind, area in areas.items()},
        }
    drawings = _curves(curves)
    score, truth = shares[valid], targets[valid] > 0.5
    if len(score):
        sure = torch.where(score > 0.5, score, 1 - score)
        right = (score > 0.5) == truth
        error = calibration_error(sure, right)
        drawings["reliability"] = partial(plots.reliability, confidence=sure, right=right, error=error)
    losses = F.binary_cross_entropy_with_logits(outputs.double(), targets.double().nan_to_num(0), reduction="none")
    wrong = valid & ((shares > 0.5) != (targets > 0.5))
    errors = torch.where(wrong, losses, 0).sum(1)

    def caption(row: int) -> str:
        return "\n".join(
            f"{columns[k]}: {targets[row, k]:.0f}, predicted {float(shares[row, k]):.2f}"
            for k in wrong[row].nonzero()[:3, 0].tolist()
        )

    return Report(per_class, drawings, torch.where(wrong.any(1), errors, math.nan), caption)


def of_numbers(predicted: Tensor, truth: Tensor, std: Tensor, rows: Mapping[str, Mapping[str, float]]) -> Report:
    """Numbers per image, in their own units.

    Args:
        predicted: ``[n, K]``.
        truth: NaN if missing.
        std: of each column, ``[K]``.
        rows: numbers of each column, by name.
    """
    valid = ~truth.isnan()
    columns = {name: (predicted[valid[:, k], k], truth[valid[:, k], k]) for k, name in enumerate(rows)}
    away = torch.where(valid, (predicted - truth).abs() / std, 0)
    errors = torch.where(valid.any(1), away.sum(1) / valid.sum(1).clamp(min=1), math.nan)

    def caption(row: int) -> str:
        k = int(away[row].argmax())
        return f"{list(rows)[k]}: {float(truth[row, k]):.4g}\npredicted: {float(predicted[row, k]):.4g}"

    return Report({n: dict(row) for n, row in rows.items()}, {"scatter": partial(plots.scatter, columns=columns)},
                  errors, caption)  # fmt: skip


def of_pixels(counts: Tensor, classes: Sequence[str]) -> Report:
    """A class per pixel, of a confusion matrix ``[K, K]`` of pixels by true class (rows)."""
    right, truth, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    per_class = {}
    for k, name in enumerate(classes):
        union = float(truth[k] + found[k] - right[k])
        rates = _rates(right[k], truth[k], found[k])
        rates["dice"] = rates.pop("f1")
        per_class[name] = {
            "pixels": float(truth[k]),
            "iou": 100 * float(right[k]) / float(union) if union else math.nan,
        }
        per_class[name] |= rates
    return Report(per_class, {"confusion": partial(plots.confusion, counts=counts, classes=classes)})
