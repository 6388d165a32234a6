"""Labels of samples as tensors of one shape and type, for the targets of pretraining that need them."""

import math

import torch
from torch import Tensor

from fcmae.data.sources import Sample, Source
from fcmae.data.sources.base import why_unlabelled
from fcmae.errors import ConfigError, ImageError


class Labels:
    """The label of each sample: int64 ``[]``, a class or -1; or float32 ``[]`` or ``[K]``, numbers or NaN.

    Args:
        key: names the target that needs labels, for errors.

    Raises ConfigError if the source gives no labels.
    """

    def __init__(self, source: Source, key: str) -> None:
        self.source = source
        values = getattr(source, "values", None)
        first = values[0] if values is not None else _first(source)
        if first is None:
            why = why_unlabelled(source)
            raise ConfigError(f"{key} needs labels, but the training images have none: {why}")
        like = torch.as_tensor(first)
        kind = torch.float32 if like.is_floating_point() else torch.int64
        self.missing = torch.full(like.shape, math.nan if kind == torch.float32 else -1, dtype=kind)

    def __call__(self, sample: Sample, index: int) -> Tensor:
        """Raises ImageError for a label of another shape than the first one's."""
        if sample.label is None:
            return self.missing
        label = torch.as_tensor(sample.label).to(self.missing.dtype)
        if label.shape != self.missing.shape:
            name, shapes = self.source.describe(index), (list(self.missing.shape), list(label.shape))
            raise ImageError(name, "its label must have the shape {} of the first one; got {}".format(*shapes))
        return label


def _first(source: Source) -> object:
    """The first label that is given; None without any."""
    if source.classes is not None:
        return -1
    return next((label for label in map(source.label, range(len(source))) if label is not None), None)
