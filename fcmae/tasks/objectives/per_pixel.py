"""What the objectives with target maps share."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fcmae.models.dense_head import DenseHead
from fcmae.models.objective import DenseObjective


class PerPixel(DenseObjective):
    """A U-Net on the features of all stages (:class:`fcmae.models.dense_head.DenseHead`).

    Args:
        width: channels of the U-Net.
    """

    best = ""

    def __init__(self, channels: int, width: int) -> None:
        if type(width) is not int or not 0 < width <= 2048:
            raise ValueError(f"width must be an integer from 1 to 2048; got {width!r}")
        self.channels, self.width = channels, width
        self._copies: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def decoder(self, dims: list[int], strides: list[int]) -> nn.Module:
        return DenseHead(dims, strides, self.channels, self.width)

    def on_device(self, name: str, device: torch.device) -> Tensor:
        """An attribute on a device, copied once: a CUDA graph cannot record a copy from the host."""
        value = getattr(self, name)
        kept, copy = self._copies.get((name, device), (None, value))
        if kept is not value:
            with torch.inference_mode(False):  # an evaluation may copy it first, and training use it
                copy = value.to(device)
            self._copies[name, device] = value, copy
        return copy


def loss_terms(given: Any, known: Iterable[str]) -> dict[str, float]:
    """The weight of each term of a loss, given as ``A``, ``A+B`` or ``{A: weight, B: weight}``. Raises ValueError."""
    terms = dict.fromkeys(given.split("+"), 1.0) if isinstance(given, str) else given
    ok = isinstance(terms, dict) and bool(terms) and set(terms) <= set(known)
    if not ok or not all(type(weight) in (int, float) and 0 < weight < math.inf for weight in terms.values()):
        raise ValueError(
            f"loss must be one or several of {', '.join(known)}, as A+B or with positive weights as {{A: 1, B: 0.5}}; "
            f"got {given!r}"
        )
    return {name: float(weight) for name, weight in terms.items()}
