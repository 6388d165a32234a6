"""What the objectives with target maps share."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fcmae.config import FinetuneConfig
from fcmae.config.checks import check_one_of, is_positive
from fcmae.data.sources import Source
from fcmae.data.sources.base import shuffled
from fcmae.errors import ImageError
from fcmae.models.dense_head import DenseHead
from fcmae.models.objective import DenseObjective
from fcmae.models.upernet import UPerNet

HEADS = {"unet": (DenseHead, 128), "upernet": (UPerNet, 512)}
"""The class of each head, and its width if it is not given."""
MEASURED = 1000
"""Target maps, of a fixed random order, from which an objective learns what classes and numbers are like."""
AUXILIARY_WEIGHT = 0.4
"""Of the auxiliary prediction's loss, as in MMSegmentation."""


class PerPixel(DenseObjective):
    """A head on the features of all stages, and a loss of what it gives.

    Args:
        channels: numbers per pixel.
        head: ``unet`` (:mod:`fcmae.models.dense_head`) or ``upernet`` (:mod:`fcmae.models.upernet`).
        width: channels of the head; None = 128 of ``unet``, 512 of ``upernet``.
    """

    best = ""

    def __init__(self, channels: int, width: int | None = None, head: str = "unet") -> None:
        check_one_of("head", head, HEADS)
        width = HEADS[head][1] if width is None else width
        if type(width) is not int or not 0 < width <= 2048:
            raise ValueError(f"width must be an integer from 1 to 2048; got {width!r}")
        self.channels, self.width, self.kind = channels, width, head
        self._copies: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def decoder(self, dims: list[int], strides: list[int]) -> nn.Module:
        return HEADS[self.kind][0](dims, strides, self.channels, self.width)

    def loss(self, output: Any, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`loss_of` the prediction; that of an auxiliary one is added with the weight 0.4."""
        if isinstance(output, Tensor):
            return self.loss_of(output, target)
        main, auxiliary = output
        losses, parts = self.loss_of(main, target)
        further, _ = self.loss_of(auxiliary, target)
        return losses + AUXILIARY_WEIGHT * further, {**parts, "auxiliary": further}

    def loss_of(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample ``[N]`` for a prediction ``[N, channels, H, W]``, and its parts."""
        raise NotImplementedError

    def some_targets(self, source: Source, cfg: FinetuneConfig) -> Iterator[Tensor]:
        """At most :data:`MEASURED` training targets. One that cannot be read is an ImageError, or left out."""
        for index in shuffled(source)[:MEASURED]:
            try:
                yield self.target(source[index], source, index)  # type: ignore[misc]  # a tensor, of maps
            except ImageError:
                if cfg.loader.on_error == "raise":
                    raise

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
    if not ok or not all(map(is_positive, terms.values())):
        raise ValueError(
            f"loss must be one or several of {', '.join(known)}, as A+B or with positive weights as {{A: 1, B: 0.5}}; "
            f"got {given!r}"
        )
    return {name: float(weight) for name, weight in terms.items()}
