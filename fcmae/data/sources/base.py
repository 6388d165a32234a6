"""What a source is, and what can be said of any source."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fcmae.data.pixels import Encoded
from fcmae.errors import UsageError
from fcmae.randomness import Stream, generator


class Sample(NamedTuple):
    """``image``: uint8 ``[C, H, W]``, or a file not yet decoded. ``label``: the class's index, or None."""

    image: Tensor | Encoded
    label: int | None


class Source(Protocol):
    """Samples by index. Reading sample i gives the same sample in any process, at any time."""

    classes: list[str] | None
    """Names of the classes; None without labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def label(self, index: int) -> int | None:
        """The label without reading the image."""
        ...

    def describe(self, index: int) -> str:
        """What a message calls sample ``index``: its path."""
        ...


class Subset:
    """Some samples of another source."""

    def __init__(self, source: Source, indices: list[int]) -> None:
        self.source = source
        self.indices = indices
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def label(self, index: int) -> int | None:
        return self.source.label(self.indices[index])

    def describe(self, index: int) -> str:
        return self.source.describe(self.indices[index])


def few_labels(source: Source, per_class: int, seed: int) -> Subset:
    """``per_class`` samples of each class, drawn by ``seed``. Raises UsageError if a class has fewer."""
    assert source.classes is not None
    order = torch.randperm(len(source), generator=generator(seed, Stream.SUBSET)).tolist()
    chosen: dict[int, list[int]] = {label: [] for label in range(len(source.classes))}
    for index in order:
        label = source.label(index)
        assert label is not None
        if len(chosen[label]) < per_class:
            chosen[label].append(index)
    for label, indices in chosen.items():
        if len(indices) < per_class:
            raise UsageError(
                f"data.labels_per_class is {per_class}; class {source.classes[label]} has {len(indices)} images"
            )
    return Subset(source, sorted(index for indices in chosen.values() for index in indices))


def require_labels(source: Source, key: str) -> list[str]:
    """The names of the classes. Raises UsageError if the source has none."""
    if source.classes is None:
        raise UsageError(f"{key} has no labels: {getattr(source, 'unlabelled', 'its source gives none')}")
    return source.classes


def require_classes(source: Source, key: str, expected: list[str], whose: str) -> None:
    """Raises UsageError if the classes of the source that ``key`` names are not those expected, which are another's."""
    classes = require_labels(source, key)
    if classes == expected:
        return
    alone = [(name, key) for name in classes if name not in expected]
    alone += [(name, whose) for name in expected if name not in classes]
    which = f"{alone[0][0]} is in {alone[0][1]} only" if alone else "they are in another order"
    raise UsageError(f"the {len(classes)} classes of {key} are not the {len(expected)} of {whose}: {which}")
