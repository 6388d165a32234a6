"""Plots of evaluations. Each function draws into a matplotlib ``Figure`` that it is given."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fcmae.errors import shown
from fcmae.evaluation.class_metrics import BINS

NAMED = 40
"""Classes up to which a confusion matrix names them."""
NUMBERED = 12
"""Classes up to which it has numbers."""
CURVES = 10
"""Curves in one plot."""
POINTS = 1000
"""Of a curve."""
LETTERS = 24
"""Of a name."""


def _text(name: str) -> str:
    """A name as matplotlib draws it: not as a formula ($) and not left out of a legend (_)."""
    name = shown(name)
    name = name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def confusion(figure: Any, counts: Tensor, classes: Sequence[str]) -> None:
    """The matrix ``[K, K]`` of true (rows) and predicted classes, each row as shares of its sum."""
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, max(4.0, 0.35 * min(len(classes), NAMED) + 2))
    figure.set_size_inches(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= NAMED:
        names = list(map(_text, classes))
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
    if len(classes) <= NUMBERED:
        for row, of_row in enumerate(shares.tolist()):
            for column, share in enumerate(of_row):
                axes.text(
                    column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "black"
                )


def roc(figure: Any, truths: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """ROC curves by name, of scores ``[n]`` and truth bool ``[n]``; of many those with the least area."""
    from torchmetrics.functional.classification import binary_auroc, binary_roc

    chosen, areas = _least(truths, binary_auroc)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for name, (score, truth) in chosen.items():
        wrong, right, _ = binary_roc(score, truth.long())
        axes.plot(*_thinned(wrong, right), label=f"{_text(name)}: {areas[name]:.3f}")
    axes.set(
        xlabel="false positive rate",
        ylabel="true positive rate",
        title=_title("ROC curve and its area", chosen, truths),
    )
    axes.legend(loc="lower right", fontsize=8)


def precision_recall(figure: Any, truths: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Precision against recall, for arguments see :func:`roc`."""
    from torchmetrics.functional.classification import binary_average_precision, binary_precision_recall_curve

    chosen, areas = _least(truths, binary_average_precision)
    axes = figure.subplots()
    for name, (score, truth) in chosen.items():
        precision, recall, _ = binary_precision_recall_curve(score, truth.long())
        axes.plot(*_thinned(recall, precision), label=f"{_text(name)}: {areas[name]:.3f}")
    axes.set(
        xlabel="recall",
        ylabel="precision",
        ylim=(0, 1.02),
        title=_title("average precision", chosen, truths),
    )
    axes.legend(loc="lower left", fontsize=8)


def box_precision_recall(figure: Any, recall: Any, curves: Mapping[str, Any], iou: float) -> None:
    """Precision over ``recall`` of each class of objects; of many those with the least mean."""
    areas = {name: float(curve.mean()) for name, curve in curves.items()}
    chosen = sorted(areas, key=lambda name: areas[name])[:CURVES]
    axes = figure.subplots()
    for name in curves:
        if name in chosen:
            axes.plot(recall, curves[name], label=f"{_text(name)}: {areas[name]:.3f}")
    title = _title(f"average precision, IoU {iou:.2f}", chosen, curves)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.legend(loc="lower left", fontsize=8)


def _least(truths: Mapping[str, tuple[Tensor, Tensor]], area: Any) -> tuple[dict[str, tuple[Tensor, Tensor]], dict]:
    """The curves that are drawn, in their order, and the area under each."""
    areas = {name: float(area(score, truth.long())) for name, (score, truth) in truths.items()}
    least = sorted(areas, key=lambda name: areas[name])[:CURVES]
    return {name: both for name, both in truths.items() if name in least}, areas


def _title(what: str, chosen: Collection[str], truths: Collection[str]) -> str:
    return what if len(chosen) == len(truths) else f"{what}, the {len(chosen)} lowest of {len(truths)} classes"


def _thinned(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    step = max(1, len(x) // POINTS)
    return (torch.cat([each[:-1:step], each[-1:]]).numpy() for each in (x, y))  # type: ignore[return-value]


def reliability(figure: Any, confidence: Tensor, right: Tensor, error: float) -> None:
    """Accuracy against confidence ``[n]`` in 15 bins, and how many predictions each bin has.

    Args:
        right: bool ``[n]``.
        error: the calibration error in percent.
    """
    figure.set_size_inches(5, 6)
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    count = bins.bincount(minlength=BINS).double()
    accuracy = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right.double()) / count
    middles = (torch.arange(BINS) + 0.5) / BINS
    above.plot([0, 1], [0, 1], color="grey", linestyle=":")
    above.bar(middles.numpy(), accuracy.nan_to_num(0).numpy(), 1 / BINS, edgecolor="white")
    above.set(ylabel="accuracy", ylim=(0, 1), title=f"calibration error {error:.1f} %")
    below.bar(middles.numpy(), count.numpy(), 1 / BINS, edgecolor="white", color="grey")
    below.set(xlabel="confidence", ylabel="predictions", xlim=(0, 1))


def scatter(figure: Any, columns: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Predicted against true numbers of each column, for those that have a value."""
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    figure.set_size_inches(4 * across, 4 * down)
    for number, (name, (predicted, truth)) in enumerate(columns.items(), start=1):
        axes = figure.add_subplot(down, across, number)
        both = torch.cat([predicted, truth]) if len(truth) else torch.zeros(1)
        ends = [float(both.min()), float(both.max())]
        axes.plot(ends, ends, color="grey", linestyle=":")
        axes.scatter(truth.numpy(), predicted.numpy(), s=8, alpha=0.5, linewidths=0)
        axes.set(xlabel="true", ylabel="predicted", title=_text(name))
