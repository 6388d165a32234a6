"""Logistic regression on frozen features by L-BFGS, its regularisation chosen by cross-validation.

The loss is the mean cross entropy plus ``l2 / 2`` times the sum of squared weights, in float64, on features that are
standardised by the training images. The result is folded: it is a linear layer on the features themselves.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.config.checks import L2, check
from fcmae.errors import EvaluationStopped, UsageError
from fcmae.evaluation.features import never
from fcmae.files import read_result, write_result
from fcmae.randomness import Stream, generator
from fcmae.threads import one_thread

MAX_ITERATIONS = 300
"""Of L-BFGS, which mostly converges in fewer than 100."""
SMALL = 2**22
"""Products in a pass over the features, up to which the CPU is faster: on a GPU any pass takes at least 3 ms."""


class Linear(NamedTuple):
    """A linear classifier: float64 ``weight`` ``[K, D]`` and ``bias`` ``[K]``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Logits, float64 ``[n, K]``."""
        return values.double() @ self.weight.T + self.bias


class Chosen(NamedTuple):
    """The result of a cross-validation: ``l2``, and for each l2 the mean log loss of held-out images."""

    l2: float
    log_loss: dict[float, float]
    logits: Tensor
    """Of every image, by the classifier with ``l2`` that has not seen it, ``[n, K]``; NaN if never held out."""


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """Weights of classes by inverse frequency, float64 ``[K]``, whose mean over the images is 1; 0 without images."""
    counts = labels.bincount(minlength=classes).double()
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0)


def weights_of(given: Any, labels: Tensor, classes: int, key: str = "class_weights") -> Tensor | None:
    """The factors ``[K]`` on the loss that a config gives: None, ``auto`` or a list.

    Raises ConfigError for a list of another length.
    """
    if given is None or given == "auto":
        return None if given is None else class_shares(labels, classes)
    check(key, given, len(given) == classes, f"{classes} numbers, one per class")
    return torch.tensor(given, dtype=torch.float64, device=labels.device)


def fit(
    values: Tensor,
    labels: Tensor,
    classes: int,
    l2s: Sequence[float],
    class_weights: Tensor | None = None,
    stop: Callable[[], bool] = never,
) -> dict[float, Linear]:
    """A classifier for each l2, a function of the arguments alone.

    Args:
        values: ``[n, D]``, with ``labels`` int64 ``[n]``.
        class_weights: ``[K]``, a factor on the loss of each image by its class.
        stop: asked before every pass over the features. Raises EvaluationStopped if it is true.
    """
    device = values.device
    small = values.numel() * classes <= SMALL
    if small:
        values, labels = values.cpu(), labels.cpu()
    # Several processes of a study, each with a thread per core, would mostly wait for each other.
    with one_thread() if small else contextlib.nullcontext():
        return _fit(values.double(), labels, classes, l2s, class_weights, device, stop)


def _fit(
    values: Tensor,
    labels: Tensor,
    classes: int,
    l2s: Sequence[float],
    class_weights: Tensor | None,
    device: torch.device,
    stop: Callable[[], bool],
) -> dict[float, Linear]:
    """:func:`fit` where ``values`` are, with results on ``device``."""
    mean, std = values.mean(0), values.std(0, correction=0)
    std = torch.where(std > 1e-9 * (1 + mean.abs()), std, 1)
    values = (values - mean) / std
    per_image = torch.ones(len(labels), device=values.device, dtype=torch.float64)
    if class_weights is not None:
        per_image = class_weights.to(values)[labels]
    weight = torch.zeros(classes, values.shape[1], device=values.device, dtype=torch.float64)
    bias = torch.zeros(classes, device=values.device, dtype=torch.float64)
    result = {}
    for l2 in sorted(l2s, reverse=True):  # each begins with the result of the one before
        weight, bias = _minimum(values, labels, per_image, l2, weight, bias, stop)
        folded = weight / std
        result[l2] = Linear(folded.to(device), (bias - folded @ mean).to(device))
    return result


def _minimum(
    values: Tensor,
    labels: Tensor,
    per_image: Tensor,
    l2: float,
    weight: Tensor,
    bias: Tensor,
    stop: Callable[[], bool],
) -> tuple[Tensor, Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        losses = F.cross_entropy(values @ weight.T + bias, labels, reduction="none")
        return (losses * per_image).mean() + l2 / 2 * weight.square().sum()

    def closure() -> float:
        if stop():
            raise EvaluationStopped
        with torch.enable_grad():
            value = loss()
        weight.grad, bias.grad = torch.autograd.grad(value, (weight, bias))
        return float(value.detach())

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """The fold in which each image is held out, int64 ``[n]``; -1 for the only image of a class, which never is.

    A function of the labels and the seed. Folds differ by at most one image per class, and by one in all.

    Raises UsageError if no class has two images.
    """
    labels = labels.cpu()
    result = torch.full_like(labels, -1)
    rng, placed = generator(seed, Stream.FOLDS), 0
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        if len(members) > 1:
            members = members[torch.randperm(len(members), generator=rng)]
            result[members] = (placed + torch.arange(len(members))) % folds
            placed += len(members)
    if not placed:
        raise UsageError(
            "data.path has no class with two images, so none can be held out; give a single value of blr or l2"
        )
    return result


def cross_validate(
    values: Tensor,
    labels: Tensor,
    classes: int,
    folds: Tensor,
    l2s: Sequence[float] = L2,
    class_weights: Tensor | None = None,
    stop: Callable[[], bool] = never,
    folder: Path | None = None,
) -> Chosen:
    """The largest l2 whose log loss of held-out images is within one standard error of the least.

    Of few images the least log loss is mostly chance, and too small an l2 costs more than too large a one. The error is
    that of the differences per image (the rule of one standard error, Breiman et al. 1984, on pairs).

    Args:
        folds: of :func:`stratified_folds`.
        stop: as :func:`fit` has it.
        folder: keeps the result of each fold in a file, and reads those that a stopped process left.
    """
    folds = folds.to(labels.device)
    logits = {l2: torch.full((len(labels), classes), math.nan, dtype=torch.float64, device=values.device) for l2 in l2s}
    for fold in folds.unique().tolist():
        held = folds == fold
        if fold < 0 or held.all():
            continue
        file = None if folder is None else folder / f"fold{fold + 1}.json"
        kept = None if file is None else read_result(file, of=dict, logits=list)
        asked = {
            "l2": list(l2s),
            "held_out": held.nonzero()[:, 0].tolist(),
        }  # trainer.allow_changed_recipe may change them
        if kept is None or kept["of"] != asked:
            found = fit(values[~held], labels[~held], classes, l2s, class_weights, stop)
            of_held = torch.stack([found[l2](values[held]) for l2 in l2s])
            if file is not None:
                write_result(file, {"of": asked, "logits": of_held.tolist()})
        else:
            of_held = torch.from_numpy(np.array(kept["logits"], np.float64)).to(values.device)  # null is NaN
        for l2, rows in zip(l2s, of_held, strict=True):
            logits[l2][held] = rows
    known = folds >= 0
    weights = torch.ones(classes) if class_weights is None else class_weights
    per_image = weights.to(values.device).double()[labels[known]]
    of = {l2: F.cross_entropy(each[known], labels[known], reduction="none") * per_image for l2, each in logits.items()}
    losses = {l2: float(each.mean()) for l2, each in of.items()}
    least = min(sorted(l2s, reverse=True), key=lambda l2: losses[l2])

    def is_as_good(l2: float) -> bool:
        worse = of[l2] - of[least]
        return float(worse.mean()) <= float(worse.std(correction=0)) / math.sqrt(len(worse))

    best = max(l2 for l2 in l2s if l2 >= least and is_as_good(l2))
    return Chosen(best, losses, logits[best])
