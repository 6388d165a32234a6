"""Samples to batches."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from fcmae.data import shared
from fcmae.data.on_device import Undecoded, pack


def stack(samples: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Samples (image, anything) as a batch; or (several crops of an image, something of each), all in one row."""
    columns = list(zip(*samples, strict=True))
    images, rest = columns[0], [default_collate(list(column)) for column in columns[1:]]
    if any(isinstance(image, Undecoded) for image in images):
        return [pack(images), *(part.flatten(0, 1) for part in rest)]
    if isinstance(images[0], list):
        crops = [crop for crops in images for crop in crops]
        return [stack_images(crops), *(part.flatten(0, 1) for part in rest)]
    is_images = isinstance(images[0], Tensor) and images[0].ndim == 3
    return [stack_images(images) if is_images else default_collate(list(images)), *rest]


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """``[C, H, W]`` each to ``[N, C, H, W]``, in the memory order that they come in.

    Decoders and the resize put the channels last; moving them would take a tenth of the time of decoding.
    """
    if images[0].stride(0) != 1:
        return shared.stack(images)
    return shared.stack([image.movedim(0, -1) for image in images]).movedim(-1, 1)
