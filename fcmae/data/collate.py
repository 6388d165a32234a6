"""Samples to batches."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate


def stack(samples: Sequence[tuple[Tensor, Any]]) -> list[Tensor]:
    """Samples (image, anything) as a batch, the images in the memory order that they come in.

    Decoders and the resize put the channels last; moving them would take a tenth of the time of decoding.
    """
    first = samples[0][0]
    if first.ndim != 3 or first.stride(0) != 1:
        return default_collate(list(samples))
    imgs, rest = default_collate([(image.permute(1, 2, 0), rest) for image, rest in samples])
    return [imgs.permute(0, 3, 1, 2), rest]
