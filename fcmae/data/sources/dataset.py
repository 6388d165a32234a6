"""Datasets of PyTorch, given from Python as objects: anything with a length whose samples are read by index.

A config holds plain values, so it names a dataset (:func:`registered`), and this process knows the object by that name.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fcmae.data.pixels.decode import PixelFormat, explained, picture_pixels, to_tensor
from fcmae.data.sources.base import Sample
from fcmae.errors import ConfigError, ImageError, UsageError

IMAGE_KEYS = ("image", "img", "pixel_values", "pixels", "x")
LABEL_KEYS = ("label", "labels", "target", "y")
_datasets: dict[tuple[str, str], "_Known"] = {}


class _Known:
    """A dataset, and its labels once they are known."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        targets: Any = getattr(dataset, "targets", None)  # of torchvision's
        self._labels = [_plain(label) for label in targets] if _length(targets) == len(dataset) else None
        self.needs_labels = False

    def labels(self) -> list[Any] | None:
        """The label of every sample, if they are known or needed: for these all samples are read."""
        if self._labels is None and self.needs_labels and not _is_map(split(self.dataset[0])[1]):
            labels = [_plain(split(self.dataset[index])[1]) for index in range(len(self.dataset))]
            self._labels = None if None in labels else labels
        return self._labels


@contextlib.contextmanager
def registered(dataset: Any, key: str) -> Iterator[dict[str, Any]]:
    """Lets sources of this process read ``dataset`` in this block. Gives the value of ``data.source`` for it.

    Args:
        key: names the argument in messages, and tells training and validation images apart.

    Raises UsageError for what cannot be read by index.
    """
    if isinstance(dataset, DataLoader):
        raise UsageError(f"{key} must be a dataset; got a DataLoader; give its dataset: {key}=loader.dataset")
    if isinstance(dataset, IterableDataset) or _length(dataset) < 0 or not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"{key} must be a path, or a dataset with __len__ and __getitem__; got {type(dataset).__name__}. Without "
            "an index samples cannot be shuffled, shared among GPUs, or found again when a run resumes"
        )
    if len(dataset) == 0:
        raise UsageError(
            f"{key} must be a path, or a dataset of one sample or more; got an empty {type(dataset).__name__}"
        )
    name = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    identity = (key, name)
    _datasets[identity] = _Known(dataset)
    try:
        yield {"_target_": f"{__name__}.GivenDataset", "argument": key, "dataset": name, "length": len(dataset)}
    finally:
        del _datasets[identity]


def need_labels() -> None:
    """Lets the registered datasets be read for their labels, where they have no attribute ``targets``."""
    for known in _datasets.values():
        known.needs_labels = True


class GivenDataset:
    """A registered dataset as a source. Its samples are images, (image, label) or dicts with both.

    An image is a PIL image, a tensor ``[C, H, W]`` or ``[H, W]``, or a NumPy array, also ``[H, W, C]``; uint8, uint16
    above 8 bits, or float32. Labels are integers, which count as classes, or numbers.
    """

    def __init__(self, argument: str, dataset: str, length: int) -> None:
        known = _datasets.get((argument, dataset))
        if known is None:
            raise ConfigError(f"{argument} was a {dataset} that Python gave; call the function in Python with it again")
        self.name, self.dataset = dataset, known.dataset
        self.to = PixelFormat(3)
        """What PIL images are converted to; set by the reader of the config."""
        self.classes: list[str] | None = None
        self.unlabelled = f"samples of {dataset} must be (image, label) or dicts with a label"
        self.columns: list[str] = []
        self.values: Tensor | None = None
        self.labels = known.labels()
        if self.labels and all(isinstance(label, int) for label in self.labels):
            self.classes = self._classes(self.labels)
        elif self.labels:
            self.unlabelled = f"the labels of {dataset} are not integers"
            with contextlib.suppress(TypeError, ValueError):  # of other labels than numbers
                self.values = torch.tensor(self.labels, dtype=torch.float32).reshape(len(self.labels), -1)
                self.columns = [f"label_{number}" for number in range(self.values.shape[1])]

    def _classes(self, labels: list[int]) -> list[str]:
        least, most = min(labels), max(labels)
        if least < 0:
            raise UsageError(f"the labels of {self.name} must be classes counted from 0; got {least}")
        names: Any = getattr(self.dataset, "classes", None)
        named = isinstance(names, (list, tuple)) and len(names) > most
        return [str(name) for name in names] if named else [str(number) for number in range(most + 1)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, label = split(self.dataset[index])
        with explained(self.describe(index)):
            pixels = self._pixels(image)
        if self.values is not None:
            return Sample(pixels, self.values[index])
        if _is_map(label):
            return Sample(pixels, label if isinstance(label, Tensor) else torch.from_numpy(np.array(label)))
        return Sample(pixels, _plain(label) if self.classes is None else self.label(index))

    def _pixels(self, image: Any) -> Tensor:
        if isinstance(image, Image.Image):
            to = self.to
            return to_tensor(picture_pixels(image, to.in_chans, to.expected, to.is_float, to.exact), to)
        if isinstance(image, np.ndarray):
            last = image.ndim == 3 and image.shape[-1] == self.to.in_chans != image.shape[0]
            image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1) if last else image))
        if not isinstance(image, Tensor):
            raise ValueError(f"it must be a PIL image, a tensor or an array; got a {type(image).__name__}")
        return image[None] if image.ndim == 2 else image

    def label(self, index: int) -> Any:
        return self.labels[index] if self.labels is not None and self.values is None else None

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def listing_parts(self) -> Iterator[np.ndarray]:
        if self.classes is not None:
            yield np.asarray(self.labels)
        elif self.values is not None:
            yield self.values.numpy()


def split(item: Any) -> tuple[Any, Any]:
    """The image of a dataset's item, and its label or None. Raises ImageError."""
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
        if image is None:
            raise ImageError("of the dataset", f"a dict must have one of {', '.join(IMAGE_KEYS)}; got {list(item)}")
        return image, next((item[key] for key in LABEL_KEYS if key in item), None)
    if isinstance(item, (tuple, list)):
        return (item[0], item[1]) if len(item) > 1 else (item[0], None)
    return item, None


def _is_map(label: Any) -> bool:
    """Whether it has a class or numbers per pixel."""
    return isinstance(label, Image.Image) or getattr(label, "ndim", 0) > 1


def _plain(label: Any) -> Any:
    """A label as an integer, a number or a list of numbers, of whichever library; else as it is."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        return operator.index(label)
    to_list: Callable[[], Any] | None = getattr(label, "tolist", None)
    return label if to_list is None else to_list()


def _length(value: Any) -> int:
    """-1 for what has none."""
    try:
        return len(value)
    except TypeError:
        return -1
