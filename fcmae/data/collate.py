"""Samples to batches."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from fcmae.data import shared_memory as shared
from fcmae.data.pixels.on_device import Undecoded, pack


def stack(samples: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Samples (image, anything) as a batch; or (several crops of an image, something of each), all in one row."""
    images, *rest = zip(*samples, strict=True)
    if any(isinstance(image, Undecoded) for image in images):
        return [pack(images), *(_stack(_flat(column)) for column in rest)]
    if isinstance(images[0], list):
        return [_stack(_flat(images)), *(_stack(_flat(column)) for column in rest)]
    return [_stack(column) for column in (images, *rest)]


def _flat(column: Sequence[Sequence[Any]]) -> list[Any]:
    return [crop for crops in column for crop in crops]


def _stack(column: Sequence[Any]) -> Any:
    return shared.stack(column) if isinstance(column[0], Tensor) else default_collate(list(column))
