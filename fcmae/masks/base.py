"""What a mask strategy is, how a config names one, and how its scores are checked."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fcmae.errors import ConfigError, UsageError
from fcmae.masks.random import RandomMask
from fcmae.plugins import class_name, create


class Mask(Protocol):
    """Scores the patches of one image; the patches with the lowest scores stay visible."""

    needs_pixels: bool
    """Whether :meth:`scores` reads the crop, which then cannot lie on the GPU alone (data.decode_on, data.cache)."""

    def scores(self, rng: torch.Generator, rows: int, cols: int, crop: Tensor | None) -> Tensor:
        """Scores of the patches in row-major order, floats ``[rows * cols]``, finite.

        Args:
            rng: the only source of randomness; a function of the seed, the epoch and the sample.
            crop: the image ``[C, H, W]`` before normalisation: uint8, uint16 or float32. None where it is on the GPU
                alone (data.decode_on, data.cache), and only if ``needs_pixels`` is False.

        Raises ValueError for an image that it cannot score.
        """
        ...


def create_mask(given: dict[str, Any] | None, on_device: str | None = None) -> Mask:
    """The strategy that ``mask._target_`` names. Raises ConfigError, also for one that needs pixels it cannot get.

    Args:
        on_device: the key by which images are only on the device, data.decode_on or data.cache.
    """
    mask: Mask = create(given, "mask", Mask)
    if mask.needs_pixels and on_device is not None:
        other = "cpu" if on_device == "data.decode_on" else "null or ram"
        raise ConfigError(
            f"{on_device} must be {other} with mask._target_={class_name(mask)}, which reads the pixels; got gpu"
        )
    return mask


def draw_scores(mask: Mask, rng: torch.Generator, grid: tuple[int, int], crop: Tensor | None) -> Tensor:
    """The scores of one image by ``mask``, checked: float32 ``[rows * cols]``. Raises UsageError.

    Args:
        grid: rows and columns of patches.
    """
    rows, cols = grid
    if type(mask) is RandomMask:  # needs no check, which would take most of the time
        return mask.scores(rng, rows, cols, crop)
    try:
        scores = mask.scores(rng, rows, cols, crop)
    except ValueError as error:
        raise UsageError(f"mask: {class_name(mask)} fails: {error}") from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != (rows * cols,):
        got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UsageError(f"mask: {class_name(mask)}.scores must return a float tensor [{rows * cols}]; got {got}")
    if not math.isfinite(scores.sum()) and not scores.isfinite().all():  # the sum alone takes a third of the time
        raise UsageError(f"mask: {class_name(mask)}.scores must return finite numbers; got infinity or NaN")
    return scores.float()
