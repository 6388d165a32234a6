"""Errors of predictions, by name: one value per patch, the mean over its valid values."""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Takes ``pred``, ``target`` (float32 ``[N, L, dim]``) and ``valid`` (bool ``[N, L, dim]``, or None if all values are);
returns the error of each patch, float32 ``[N, L]``.

A patch without a valid value has the error 0. What ``target`` holds where it is not valid, NaN too, changes nothing.
"""


def mse(pred: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """The mean squared error."""
    return _mean((pred - _known(target, valid)).square(), valid)


def l1(pred: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """The mean absolute error."""
    return _mean((pred - _known(target, valid)).abs(), valid)


def smooth_l1(pred: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Half the squared error below 1, the absolute error less 0.5 above (Fast R-CNN, arXiv 1504.08083, equation 3)."""
    return _mean(F.smooth_l1_loss(pred, _known(target, valid), reduction="none"), valid)


def bce(pred: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """The binary cross-entropy of logits; ``target`` holds probabilities, 0 to 1."""
    return _mean(F.binary_cross_entropy_with_logits(pred, _known(target, valid), reduction="none"), valid)


def ce(pred: Tensor, target: Tensor, valid: Tensor | None, classes: int | None = None) -> Tensor:
    """The cross-entropy of logits; ``target`` holds the probability of each class, such as 1 and zeros.

    Args:
        classes: the patch holds ``dim / classes`` values of so many classes each, with the classes of a value next to
            each other; None = one value of ``dim`` classes. A value counts where all of its classes are valid.
    """
    size = (-1, classes or pred.shape[-1])
    chances = F.log_softmax(pred.unflatten(-1, size), dim=-1)
    errors = -(_known(target, valid).unflatten(-1, size) * chances).sum(dim=-1)
    return _mean(errors, None if valid is None else valid.unflatten(-1, size).all(dim=-1))


def cosine(pred: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """1 less the cosine of the angle between the valid values of ``pred`` and of ``target``."""
    if valid is None:
        return 1 - F.cosine_similarity(pred, target, dim=-1)
    errors = 1 - F.cosine_similarity(torch.where(valid, pred, 0.0), _known(target, valid), dim=-1)
    return torch.where(valid.any(dim=-1), errors, 0.0)


LOSSES: dict[str, Loss] = {"mse": mse, "l1": l1, "smooth_l1": smooth_l1, "ce": ce, "bce": bce, "cosine": cosine}
OF_NUMBERS = ("mse", "l1", "smooth_l1")
"""Losses whose predictions have the scale of the target."""


def get_loss(name: str, allowed: Collection[str] = tuple(LOSSES)) -> Loss:
    """The loss of that name. Raises ValueError if it is not one of ``allowed``."""
    if name not in allowed:
        raise ValueError(f"loss must be one of {', '.join(allowed)}; got {name!r}")
    return LOSSES[name]


def _known(target: Tensor, valid: Tensor | None) -> Tensor:
    """``target`` with 0 for what is not valid. A NaN there would make the gradient NaN although its factor is 0."""
    return target if valid is None else torch.where(valid, target, 0.0)


def _mean(errors: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return errors.mean(dim=-1)
    return torch.where(valid, errors, 0.0).sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)
