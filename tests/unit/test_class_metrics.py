"""Metrics of classifiers, against their definitions."""

import math

import pytest
import torch
from torchmetrics.functional import classification as of

from fcmae.distributed import World
from fcmae.evaluation.class_metrics import NAMES, class_metrics, metrics_of
from fcmae.models.objective import Predictions

CPU = World(0, 1, 0, 1, torch.device("cpu"))


def outputs(count, classes):
    rng = torch.Generator().manual_seed(count)
    labels = torch.randint(classes, (count,), generator=rng)
    return torch.randn(count, classes, generator=rng) + 2 * torch.eye(classes)[labels], labels


def auroc(score, truth):
    """The share of pairs of a positive and a negative in which the positive has the higher score."""
    pairs = score[truth][:, None] - score[~truth][None]
    return float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())


def precision(score, truth):
    """The mean precision at the positives."""
    ranked = truth[score.argsort(descending=True)].double()
    return float((ranked.cumsum(0) / torch.arange(1, len(ranked) + 1))[ranked == 1].mean())


def test_every_metric_is_its_definition():
    logits, labels = outputs(200, 7)
    got, predicted = metrics_of(logits, labels), logits.argmax(1)
    recalls = [(predicted[labels == k] == k).double().mean() for k in range(7)]
    precisions = [(labels[predicted == k] == k).double().mean() for k in range(7)]
    f1 = [2 * r * p / (r + p) for r, p in zip(recalls, precisions, strict=True)]
    scores = logits.double().softmax(1).T
    areas = [(auroc(score, labels == k), precision(score, labels == k)) for k, score in enumerate(scores)]
    assert list(got) == list(NAMES)
    assert got["top1"] == pytest.approx(100 * float((predicted == labels).double().mean()))
    assert got["balanced_accuracy"] == pytest.approx(100 * float(sum(recalls) / 7))
    assert got["f1"] == pytest.approx(100 * float(sum(f1) / 7))
    assert [got["auroc"], got["average_precision"]] == pytest.approx(
        [100 * sum(c) / 7 for c in zip(*areas, strict=True)]
    )


def test_they_are_those_of_torchmetrics():
    logits, labels = outputs(150, 8)
    labels[labels == 3] = 4  # a class without images, which is predicted
    got, macro = metrics_of(logits, labels), {"num_classes": 8, "average": "macro"}
    assert got["precision"] == pytest.approx(100 * float(of.multiclass_precision(logits, labels, **macro)))
    assert got["recall"] == pytest.approx(100 * float(of.multiclass_recall(logits, labels, **macro)))
    assert got["f1"] == pytest.approx(100 * float(of.multiclass_f1_score(logits, labels, **macro)))
    error = of.multiclass_calibration_error(logits.double().softmax(1), labels, 8, n_bins=15)
    assert got["ece"] == pytest.approx(100 * float(error))
    assert got["balanced_accuracy"] > got["recall"]


def test_classes_without_images_do_not_count():
    """Their recall and areas are undefined; predicted, they lower F1."""
    logits = torch.tensor([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 2, 5, 0]])
    got = metrics_of(logits, torch.tensor([0, 1, 1]))
    assert got["balanced_accuracy"] == pytest.approx(75)
    assert got["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert got["auroc"] == 100
    assert math.isnan(metrics_of(logits, torch.tensor([1, 1, 1]))["auroc"])


def test_a_majority_vote_has_no_balanced_accuracy():
    """Top-1 hides what unbalanced classes cost."""
    logits = torch.stack([torch.ones(10), torch.zeros(10)], 1)
    got = metrics_of(logits, torch.tensor([0] * 9 + [1]))
    assert (got["top1"], got["balanced_accuracy"], got["auroc"]) == (90, 50, 50)


def test_batches_in_any_order_give_the_same():
    """Unlabelled images and outputs that are not finite: the first are left out, the second are wrong."""
    logits, labels = outputs(40, 3)
    labels[3], logits[5] = -1, math.nan
    places = torch.randperm(40)
    parts = [Predictions(logits[i], labels[i], i) for i in places.split(7)]
    known = labels >= 0
    got = class_metrics(parts, CPU, 3)
    assert got.pop("images") == 39
    assert got == pytest.approx(metrics_of(logits[known], labels[known]))
    again = class_metrics([Predictions(logits[i], labels[i], i) for i in places.flip(0).split(11)], CPU, 3)
    assert again.pop("images") == 39
    assert again == got


def test_areas_are_left_out_for_many_scores(monkeypatch):
    monkeypatch.setattr("fcmae.evaluation.class_metrics.MOST_SCORES", 100)
    logits, labels = outputs(40, 3)
    parts = [Predictions(logits[i], labels[i], i) for i in torch.arange(40).split(7)]
    assert "auroc" not in class_metrics(parts, CPU, 3)
    assert "auroc" not in metrics_of(logits, labels)
    assert "auroc" in class_metrics(parts[:4], CPU, 3)
