"""The interface of sources, and functions that suit every source."""

import bisect
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fcmae.data.pixels.decode import Encoded, LazyImage
from fcmae.errors import UsageError, first_of
from fcmae.randomness import Stream, generator
from fcmae.urls import tell_apart

PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
"""Names that folders of classes hardly have, but the folder above them does."""
LIKELY_CLASSES = 2**16
"""Numbered classes may be this many, or as many as there are images."""


class Sample(NamedTuple):
    """``image``: ``[C, H, W]``, or an image not yet decoded or read. ``label``: the class's index, or None.

    A source without classes may give any label, for an objective of fine-tuning that knows it.
    """

    image: Tensor | Encoded | LazyImage
    label: Any


class Source(Protocol):
    """Samples by index. Reading sample i gives the same sample in any process, at any time.

    ``listing_parts()``, which a source need not have, gives what :func:`listing_digest` is made of: bytes and arrays;
    ``earlier_listing_parts()`` what earlier versions made it of.
    """

    classes: list[str] | None
    """The names of the classes; None without labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def label(self, index: int) -> int | None:
        """The label without reading the image."""
        ...

    def describe(self, index: int) -> str:
        """The name of sample ``index`` in messages: its path."""
        ...


LISTING = "names, order and labels of the training images (of data=webdataset and hf their sizes in bytes, too)"
"""What :func:`listing_digest` is of, for messages."""


def innermost(source: Any, having: str = "") -> Any:
    """The source itself, which others may wrap.

    Args:
        having: the first that has this attribute instead, if one does.
    """
    while hasattr(source, "source") and not (having and hasattr(source, having)):
        source = source.source
    return source


def listing_digest(source: Source, earlier: bool = False) -> str | None:
    """Differs between sources that list other samples, in another order or with other labels.

    None of a source that cannot say. The samples may lie elsewhere, and the content of images is not read.

    Args:
        earlier: as earlier versions made it, if they made another one; otherwise None.
    """
    name = "earlier_listing_parts" if earlier else "listing_parts"
    parts = getattr(innermost(source, name), name, None)
    if parts is None:
        return None
    digest = hashlib.sha256()
    for part in parts():
        values = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else np.ascontiguousarray(part)
        digest.update(f"{values.dtype} {values.nbytes} ".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def relative_names(paths: Iterable[str], folder: str) -> bytes:
    """Paths below a folder, for :func:`listing_digest`."""
    start = folder.rstrip("/") + "/"
    return "\0".join(path.removeprefix(start) for path in paths).encode(errors="surrogatepass")


def distinct_names(places: Sequence[str]) -> bytes:
    """What tells several paths or URLs apart, for :func:`listing_digest`."""
    return "\0".join(tell_apart(places)).encode(errors="surrogatepass")


class Wrapper:
    """Another source, whose samples subclasses change, or choose by ``place``."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.classes = source.classes
        values = getattr(source, "values", None)
        self.values: Tensor | None = values if isinstance(values, Tensor) else None
        """The numbers of every sample ``[N, K]``, of sources that give numbers in ``columns``."""
        self.columns: list[str] | None = getattr(source, "columns", None)

    @property
    def unlabelled(self) -> str:
        """Why there are no classes; a source with classes may have no answer."""
        return why_unlabelled(self.source)

    def place(self, index: int) -> int:
        """The index of a sample in the other source."""
        return index

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.place(index)]

    def label(self, index: int) -> int | None:
        return self.source.label(self.place(index))

    def describe(self, index: int) -> str:
        return self.source.describe(self.place(index))


class Subset(Wrapper):
    """Some samples of another source."""

    def __init__(self, source: Source, indices: list[int]) -> None:
        super().__init__(source)
        self.indices = indices
        self.values = None if self.values is None else self.values[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def place(self, index: int) -> int:
        return self.indices[index]


class Windows(Wrapper):
    """Another source with each image ``count`` times in turn: as many windows are drawn from it."""

    def __init__(self, source: Source, count: int) -> None:
        super().__init__(source)
        self.count = count
        self.values = None if self.values is None else self.values.repeat_interleave(count, dim=0)

    def __len__(self) -> int:
        return len(self.source) * self.count

    def place(self, index: int) -> int:
        return index // self.count


def why_unlabelled(source: Source) -> str:
    """Why a source has no classes, for messages."""
    return getattr(source, "unlabelled", "its source gives none")


def shuffled(source: Source, seed: int = 0) -> list[int]:
    """All indices of a source in a random order, a function of the seed."""
    return torch.randperm(len(source), generator=generator(seed, Stream.SUBSET)).tolist()


def few_labels(source: Source, per_class: int, seed: int) -> Subset:
    """``per_class`` samples of each class, drawn by ``seed``. Raises UsageError if a class has fewer."""
    assert source.classes is not None
    chosen: dict[int, list[int]] = {label: [] for label in range(len(source.classes))}
    for index in shuffled(source, seed):
        label = source.label(index)
        assert label is not None
        if len(chosen[label]) < per_class:
            chosen[label].append(index)
    for label, indices in chosen.items():
        if len(indices) < per_class:
            raise UsageError(
                f"data.labels_per_class must be at most {len(indices)}, the number of images of class "
                f"{source.classes[label]}; got {per_class}"
            )
    return Subset(source, sorted(index for indices in chosen.values() for index in indices))


def some_images(source: Source, count: int, seed: int) -> Subset:
    """``count`` samples, drawn by ``seed``; those of a smaller count are among them. Raises UsageError for too many."""
    if count > len(source):
        raise UsageError(f"data.num_images is {count}; data.path has {len(source)} images")
    return Subset(source, sorted(shuffled(source, seed)[:count]))


def balanced_labels(source: Source) -> tuple[int, ...]:
    """The label of every sample. Raises UsageError if one has none."""
    require_labels(source, "data.path (data.sampling=balanced)")
    labels = [source.label(index) for index in range(len(source))]
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        first = source.describe(labels.index(None))
        raise UsageError(f"data.sampling=balanced needs a label of every image; {first} has none")
    return tuple(known)


def locate(ends: list[int], index: int) -> tuple[int, int]:
    """The part that has sample ``index``, and the place there. Parts end before the samples ``ends``, ascending."""
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def class_names(largest: int, images: int) -> list[str] | None:
    """Names for classes numbered up to ``largest``; None if that is too many."""
    return [str(label) for label in range(largest + 1)] if largest <= max(images, LIKELY_CLASSES) else None


def require_labels(source: Source, key: str) -> list[str]:
    """The names of the classes. Raises UsageError if the source has none, or if they are parts of a data set."""
    if source.classes is None:
        raise UsageError(f"{key} has no labels: {why_unlabelled(source)}")
    if len(source.classes) > 1 and {name.lower() for name in source.classes} <= PARTS:
        raise UsageError(
            f"{key} has the classes {first_of(source.classes)}, which are parts of a data set; give one part, such as "
            f"{key}=FOLDER/{source.classes[0]}"
        )
    return source.classes


class Relabelled(Wrapper):
    """Another source whose labels are indices into ``classes``, which includes all of its classes."""

    def __init__(self, source: Source, classes: list[str]) -> None:
        super().__init__(source)
        assert source.classes is not None
        numbers = {name: number for number, name in enumerate(classes)}
        self.numbers = [numbers[name] for name in source.classes]
        self.classes = classes

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return sample if sample.label is None else sample._replace(label=self.numbers[sample.label])

    def label(self, index: int) -> int | None:
        label = self.source.label(index)
        return None if label is None else self.numbers[label]


def with_classes(source: Source, key: str, expected: list[str], whose: str) -> tuple[Source, list[str]]:
    """The source with labels that are indices into ``expected``, and a line that names missing classes, if any.

    Args:
        key: names the source in messages.
        whose: names what has the expected classes.

    Raises UsageError if the source has no labels, or an unexpected class.
    """
    classes = require_labels(source, key)
    if classes == expected:
        return source, []
    known, present = set(expected), set(classes)
    unknown = [name for name in classes if name not in known]
    if unknown:
        verb = "is" if len(unknown) == 1 else "are"
        raise UsageError(
            f"{len(unknown)} of the {len(classes)} classes of {key} {verb} not among the {len(expected)} of {whose}: "
            f"{first_of(unknown, 10)}; {whose} has {first_of(expected, 10)}"
        )
    missing = [name for name in expected if name not in present]
    note = f"{key} lacks {len(missing)} of the {len(expected)} classes of {whose}: {first_of(missing, 10)}"
    return Relabelled(source, expected), [note] if missing else []
