"""Samples to batches, together with the errors of samples that could not be read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import default_collate

from fcmae.data.pixels.augmented import Augmented, Drawn, pack_drawn
from fcmae.data.pixels.on_device import Undecoded, pack
from fcmae.data.resident import Window, pack_windows
from fcmae.data.shared_memory import Placed, stack
from fcmae.errors import FCMAEError


class Item(NamedTuple):
    """The parts of a sample, None if it could not be read, and the errors met on the way."""

    parts: Any
    errors: list[FCMAEError]


class Batch(NamedTuple):
    """The parts of all readable samples, None without any; all errors; the number of samples left out."""

    parts: Any
    errors: list[FCMAEError]
    left_out: int

    def opened(self) -> "Batch":
        """With the tensors themselves instead of their places in shared memory."""
        opened = [part.opened() if isinstance(part, Augmented) else part for part in self.parts or []]
        parts = [part.tensor() if isinstance(part, Placed) else part for part in opened]
        return self._replace(parts=parts or None)


def collate(items: Sequence[Item]) -> Batch:
    """A batch of samples (image, ...), or of (several crops of an image, something for each), all in one row."""
    readable = [item.parts for item in items if item.parts is not None]
    errors = [error for item in items for error in item.errors]
    return Batch(_columns(readable) if readable else None, errors, len(items) - len(readable))


def _columns(samples: Sequence[tuple[Any, ...]]) -> list[Any]:
    columns: list[Sequence[Any]] = list(zip(*samples, strict=True))
    images = columns[0]
    windows = isinstance(images[0], Window)
    undecoded = windows or any(isinstance(image, Undecoded) for image in images)
    if undecoded or isinstance(images[0], list):
        columns = [[crop for crops in column for crop in crops] for column in columns[undecoded:]]
    parts = [_part(column) for column in columns]
    if not undecoded:
        return parts
    return [pack_windows(images) if windows else pack(images), *parts]


def _part(column: Sequence[Any]) -> Any:
    if isinstance(column[0], Drawn):
        return pack_drawn(column)
    return stack(column) if isinstance(column[0], Tensor) else default_collate(list(column))
