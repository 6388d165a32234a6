"""What a source is, and what can be said of any source."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fcmae.data.pixels.decode import Encoded
from fcmae.errors import UsageError
from fcmae.randomness import Stream, generator

LIKELY_CLASSES = 2**16
"""Classes that may be known by their numbers; more of them only if there are as many images."""


class Sample(NamedTuple):
    """``image``: uint8 ``[C, H, W]``, or a file not yet decoded. ``label``: the class's index, or None.

    A source without classes may give any label, for an objective of fine-tuning that knows it.
    """

    image: Tensor | Encoded
    label: Any


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


def class_names(largest: int, images: int) -> list[str] | None:
    """Names of classes known by numbers up to ``largest`` alone; None if there cannot be so many."""
    return [str(label) for label in range(largest + 1)] if largest <= max(images, LIKELY_CLASSES) else None


def require_labels(source: Source, key: str) -> list[str]:
    """The names of the classes. Raises UsageError if the source has none."""
    if source.classes is None:
        raise UsageError(f"{key} has no labels: {getattr(source, 'unlabelled', 'its source gives none')}")
    return source.classes


class Relabelled:
    """Another source with its labels counted in the order of ``classes``, which has all of its classes."""

    def __init__(self, source: Source, classes: list[str]) -> None:
        assert source.classes is not None
        numbers = {name: number for number, name in enumerate(classes)}
        self.source = source
        self.numbers = [numbers[name] for name in source.classes]
        self.classes: list[str] | None = classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.source[index]
        return Sample(image, None if label is None else self.numbers[label])

    def label(self, index: int) -> int | None:
        label = self.source.label(index)
        return None if label is None else self.numbers[label]

    def describe(self, index: int) -> str:
        return self.source.describe(index)


def with_classes(source: Source, key: str, expected: list[str], whose: str) -> tuple[Source, list[str]]:
    """The source with its labels counted in the order of ``expected``, and a line that names classes it lacks, if any.

    Args:
        key: names the source in messages.
        whose: has the expected classes.

    Raises UsageError if the source has no labels, or a class that is not expected.
    """
    classes = require_labels(source, key)
    if classes == expected:
        return source, []
    known, present = set(expected), set(classes)
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise UsageError(
            f"the {len(classes)} classes of {key} are not among the {len(expected)} of {whose}: {_some(unknown)}"
        )
    missing = [name for name in expected if name not in present]
    note = f"{key} lacks {len(missing)} of the {len(expected)} classes of {whose}: {_some(missing)}"
    return Relabelled(source, expected), [note] if missing else []


def _some(names: list[str]) -> str:
    """The first ten names."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
