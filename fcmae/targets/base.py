"""What a target is, how a config names one, and its part of the loss."""

import math
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.errors import ConfigError, UsageError
from fcmae.plugins import class_name, create


class Seen(NamedTuple):
    """What targets are made of: N images, and what belongs to them. None where it is not given."""

    imgs: Tensor
    """Normalised ``[N, C, H, W]``, as the encoder gets them before patches are hidden. Pixels without a value are 0."""
    valid: Tensor | None = None
    """bool ``[N, 1, H, W]`` or ``[N, C, H, W]``: which pixels have a value; None = all."""
    channels: Tensor | None = None
    """``[N, K, H, W]``: channels that the encoder does not get. What has no value is 0."""
    channels_valid: Tensor | None = None
    """bool ``[N, K, H, W]``: which values of ``channels`` are given; None = all."""
    label: Tensor | None = None
    """Of each image: int64 ``[N]``, the index of its class or -1; or float32 ``[N]`` or ``[N, K]``, numbers or NaN."""


NEEDS = ("channels", "label")
"""What a target may need beyond the images."""


class Target(Protocol):
    """What a linear head on the decoder predicts at every patch of an image, and how the prediction is judged.

    The class is called with ``patch_size``, the pixels per side of a predicted patch, ``in_chans``, and the arguments
    that the config gives. L patches are in row-major order. A class that needs more than the images has an attribute
    ``needs``, names of :data:`NEEDS`.
    """

    dim: int
    """Values predicted per patch."""

    def __call__(self, seen: Seen) -> tuple[Tensor, Tensor | None]:
        """The values to predict: float32 ``[N, L, dim]``, and which are valid, bool ``[N, L, dim]``.

        Without validity, None, all values of a patch are valid if one of its pixels is. A patch without a valid value
        is not in the loss.
        """
        ...

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor, valid: Tensor | None) -> Tensor:
        """The error of each patch, float32 ``[N, L]``; the loss is its mean over the masked patches.

        Args:
            pred: float32 ``[N, L, dim]``.
            target, valid: what calling the target returned.
            mask: bool ``[N, L]``, True = masked. Errors of visible patches are ignored.
        """
        ...

    def to_pixels(self, pred: Tensor, imgs: Tensor) -> Tensor | None:
        """The prediction for pictures, ``[N, C, H, W]`` in the scale of ``imgs``; None if it cannot be drawn.

        A target that needs ``channels`` gives them in any number and scale.

        Args:
            pred: float32 ``[N, L, dim]``.
        """
        ...


def create_target(given: dict[str, Any], key: str, patch_size: int, in_chans: int) -> Target:
    """The target that ``_target_`` names. Raises ConfigError.

    Args:
        key: full key of the config, for errors.
    """
    arguments = {name: value for name, value in given.items() if name != "weight"}
    target: Target = create(arguments, key, Target, patch_size=patch_size, in_chans=in_chans)
    if type(target.dim) is not int or target.dim < 1:
        raise ConfigError(f"{key}: {class_name(target)}.dim must be a positive integer; got {target.dim!r}")
    unknown = [name for name in getattr(target, "needs", ()) if name not in NEEDS]
    if unknown:
        raise ConfigError(f"{key}: {class_name(target)}.needs must be some of {', '.join(NEEDS)}; got {unknown[0]!r}")
    return target


def part(target: Target, seen: Seen, pred: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean error of ``pred`` ``[N, L, dim]`` over the masked patches: float32 scalar, 0 if nothing is masked.

    An image with invalid patches counts as much as one without.

    Args:
        mask: bool ``[N, L]``, True = masked.
        weight: ``[N]``, a factor on the error of each image.

    Raises UsageError if the target does not return what :class:`Target` says.
    """
    if has_own_errors(target, seen, pred):
        errors, valid = target.errors(seen, pred, mask), None
    else:
        errors, valid = _errors(target, seen, pred, mask)
    # Selecting instead of multiplying keeps a non-finite prediction of a visible patch out of the loss.
    if valid is None:
        errors = torch.where(mask, errors, 0.0)
    else:
        counted = mask & valid.any(dim=-1)
        scale = mask.sum(dim=1) / counted.sum(dim=1).clamp(min=1)
        errors = torch.where(counted, errors, 0.0) * scale[:, None]
    if weight is not None:
        errors = errors * weight[:, None]
    return errors.sum() / mask.sum().clamp(min=1)


def _errors(target: Target, seen: Seen, pred: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """The error of each patch ``[N, L]``, and which values are valid."""
    given = target(seen)
    if not isinstance(given, tuple) or len(given) != 2:
        raise UsageError(f"target: {class_name(target)} must return (target, valid); got {type(given).__name__}")
    wanted, valid = given
    _check_shape(target, "target", wanted, pred)
    if valid is not None:
        _check_shape(target, "validity", valid, pred)
    elif seen.valid is not None:
        valid = patches_with(seen.valid, pred.shape[1])[..., None].expand_as(pred)
    errors = target.loss(pred.float(), wanted, mask, valid)
    _check_shape(target, "loss", errors, mask)
    return errors, valid


@runtime_checkable
class OneOperation(Protocol):
    """A target of ours that may have a kernel for what calling it and its loss compute."""

    def has_errors(self, seen: Seen, pred: Tensor) -> bool:
        """Whether :meth:`errors` computes it for these tensors."""
        ...

    def errors(self, seen: Seen, pred: Tensor, mask: Tensor) -> Tensor:
        """The error of each masked patch, float32 ``[N, L]``; all values count."""
        ...


def has_own_errors(target: Target, seen: Seen, pred: Tensor) -> TypeGuard[OneOperation]:
    """Whether a kernel computes the errors. Not for a class derived from one of ours, which may differ."""
    ours = type(target).__module__.startswith("fcmae.targets.") and not torch.compiler.is_compiling()
    return ours and isinstance(target, OneOperation) and target.has_errors(seen, pred)


def patches_with(valid: Tensor, patches: int) -> Tensor:
    """Whether each of L square patches has a valid pixel: bool ``[N, L]``."""
    side = math.isqrt(valid.shape[-2] * valid.shape[-1] // patches)
    return F.max_pool2d(valid.any(dim=1, keepdim=True).float(), side).flatten(1) > 0


def _check_shape(target: Target, what: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise UsageError(
            f"target: the {what} of {class_name(target)} must be {list(like.shape)}; got {list(value.shape)}"
        )
