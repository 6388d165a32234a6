"""How one sample is read: datasets of a source's images for pretraining, fine-tuning and evaluation.

A training sample is a function of (seed, epoch, index), whichever process reads it and when.
"""

import _random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.labels import Labels
from fcmae.data.pixels.boxes import JitteredScale, WholeOnCanvas
from fcmae.data.pixels.crops import RandomCrop, Uniform
from fcmae.data.pixels.decode import Encoded, LazyImage, explained, open_image
from fcmae.data.pixels.extra import Extra
from fcmae.data.pixels.nodata import is_all
from fcmae.data.pixels.on_device import Undecoded, is_for_device
from fcmae.data.pixels.transforms import Transform
from fcmae.data.plan import SampleKey
from fcmae.data.resident import Resident, Window
from fcmae.data.sources.base import Sample, Source
from fcmae.data.sources.coco import CocoImages
from fcmae.errors import ImageError
from fcmae.masks import Mask, RandomMask, draw_scores
from fcmae.randomness import Stream, derive, preserved, seed_globals


class MaskedImages(Dataset[tuple[Any, ...]]):
    """Samples for pretraining: (image, mask noise ``[L]``), what the crop carries, and the label if asked.

    With several crops per image: (list of k crops, noise ``[k, L]``, others ``[k, ...]``). With ``on_device`` the image
    may be an :class:`~fcmae.data.pixels.on_device.Undecoded`, or is a :class:`~fcmae.data.resident.Window`.

    Args:
        crop: makes a sample of an image.
        grid: rows and columns of the L patches.
        crops_per_image: k.
        on_device: leave the decoding of JPEGs to the device; or the source's images, which lie there.
        mask: scores the patches; the noise is its scores.
        extra: transforms of the crops.
        labels: makes the tensor of a label.
    """

    def __init__(
        self,
        source: Source,
        crop: RandomCrop,
        grid: tuple[int, int],
        seed: int,
        crops_per_image: int = 1,
        on_device: bool | Resident = False,
        mask: Mask | None = None,
        extra: Extra | None = None,
        labels: Labels | None = None,
    ) -> None:
        self.source = source
        self.crop = crop
        self.grid = grid
        self.seed = seed
        self.crops_per_image = crops_per_image
        self.on_device = on_device
        self.mask = RandomMask() if mask is None else mask
        self.extra = extra
        self.labels = labels
        self._rng = torch.Generator()

    def __getitem__(self, key: SampleKey) -> tuple[Any, ...]:
        draws = [key, *((*key, crop) for crop in range(1, self.crops_per_image))]
        if isinstance(self.on_device, Resident):
            return self._window(self.on_device, key[1], draws)
        sample = self.source[key[1]]
        image = sample.image
        opened = open_image(image, self.crop.format)
        one = self.crops_per_image == 1 and not self.on_device
        label = [] if self.labels is None else [self.labels(sample, key[1])]
        if not one:
            label = [part.expand(len(draws), *part.shape) for part in label]
        if self.on_device and isinstance(image, Encoded) and is_for_device(image, opened):
            noise = torch.stack([self._noise(counters, None) for counters in draws])
            boxes = [self.crop.draw(opened, self._uniform(counters))[0] for counters in draws]
            return Undecoded(image, boxes, self.crop.size), noise, *label
        crops = [self._crop(opened, counters) for counters in draws]
        if one:
            return *crops[0], *label
        imgs, *more = zip(*crops, strict=True)
        return list(imgs), *(torch.stack(part) for part in more), *label

    def _window(self, resident: Resident, index: int, draws: Sequence[tuple[int, ...]]) -> tuple[Any, ...]:
        """The boxes that are cut on the device, drawn as for an image in memory."""
        images = resident.images
        if not images.is_readable(index):
            open_image(images[index].image, self.crop.format).pixels(1)  # raises why
            raise ImageError(images.describe(index), "it could not be read when data.cache was filled, and now it can")
        noise = [self._noise(counters, None) for counters in draws]
        boxes = [self.crop.box(resident.size_of(index), self._uniform(counters)) for counters in draws]
        if self.labels is None:
            return Window(resident.number, index, boxes), noise
        label = self.labels(images.unread(index), index)
        return Window(resident.number, index, boxes), noise, label.expand(len(draws), *label.shape)

    def _crop(self, image: LazyImage, counters: tuple[int, ...]) -> list[Tensor]:
        """A crop, its mask noise, and what the crop carries."""
        crop, *more = self.crop.seen(image, self._uniform(counters))
        if self.extra is not None and self.extra.steps:
            with preserved(crop.device):
                seed_globals(self.seed, Stream.TRANSFORM, *counters)
                # In the memory layout that all crops of a batch have, not in the memory: it may be the image's own.
                crop = torch.empty_like(crop).copy_(self.extra(crop.clone()))
        noise = self._noise(counters, crop)
        if "valid" in self.crop.carries:
            noise = hidden_without_data(noise, more[0], self.grid)
        return [crop, noise, *more]

    def _uniform(self, counters: tuple[int, ...]) -> Uniform:
        # The numbers of random.Random, whose own constructor takes twice the time.
        return _random.Random(derive(self.seed, Stream.AUGMENT, *counters)).random

    def _noise(self, counters: tuple[int, ...], crop: Tensor | None) -> Tensor:
        rng = self._rng.manual_seed(derive(self.seed, Stream.MASK, *counters))
        return draw_scores(self.mask, rng, self.grid, crop)


def hidden_without_data(scores: Tensor, valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """Scores ``[L]``, raised above all others for patches without a valid pixel, so that they are hidden first.

    Args:
        valid: bool ``[C, H, W]``.
    """
    if is_all(valid):
        return scores
    rows, cols = grid
    patches = valid.any(dim=0).unflatten(1, (cols, -1)).unflatten(0, (rows, -1)).any(dim=3).any(dim=1).flatten()
    return torch.where(patches, scores, scores + (scores.max() - scores.min() + 1))


Target = Callable[[Sample, Source, int], float | Tensor]
"""Takes a sample, its source and its index; returns the target of the sample."""


def label_of(sample: Sample, source: Source, index: int) -> int:
    """The index of the class, or -1 without one."""
    return -1 if sample.label is None or source.classes is None else sample.label


def _with_target(source: Source, index: int, transform: Transform, target: Target) -> tuple[Any, Any]:
    sample = source[index]
    image, value = transform(sample.image), target(sample, source, index)
    # A batch of Python's floats would be float64.
    return image, torch.tensor(value, dtype=torch.float32) if isinstance(value, float) else value


class LabelledImages(Dataset[tuple[Any, Any]]):
    """Samples for fine-tuning: (image, target). With augment.on=gpu an image is what :class:`.Draw` gives."""

    def __init__(self, source: Source, transform: Transform, seed: int, target: Target = label_of) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.target = target

    def __getitem__(self, key: SampleKey) -> tuple[Any, Any]:
        epoch, index = key
        seed_globals(self.seed, Stream.AUGMENT, epoch, index)
        return _with_target(self.source, index, self.transform, self.target)


class EvaluationImages(Dataset[tuple[Tensor, Any]]):
    """Samples for evaluation, in the order of the source: (image, target)."""

    def __init__(self, source: Source, transform: Transform, target: Target = label_of) -> None:
        self.source = source
        self.transform = transform
        self.target = target

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return _with_target(self.source, index, self.transform, self.target)


PairOf = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""Makes a sample of an image and its target map; raises ValueError where these do not fit."""


def _pair(source: Source, index: int, transform: PairOf, target: Target) -> tuple[Tensor, Tensor]:
    sample = source[index]
    found = target(sample, source, index)
    assert isinstance(found, Tensor)
    with explained(source.describe(index)):
        return transform(sample.image, found)


class PairedImages(Dataset[tuple[Tensor, Tensor]]):
    """Samples for fine-tuning with target maps: (image, map)."""

    def __init__(self, source: Source, transform: PairOf, seed: int, target: Target) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.target = target

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        epoch, index = key
        seed_globals(self.seed, Stream.AUGMENT, epoch, index)
        return _pair(self.source, index, self.transform, self.target)


class WholePairs(Dataset[tuple[Tensor, Tensor]]):
    """Samples for evaluation with target maps, whole, in the order of the source: (image, map)."""

    def __init__(self, source: Source, transform: PairOf, target: Target) -> None:
        self.source = source
        self.transform = transform
        self.target = target

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return _pair(self.source, index, self.transform, self.target)


class BoxedImages(Dataset[tuple[Tensor, ...]]):
    """Samples for detection: the parts of :class:`fcmae.data.pixels.boxes.Boxed`, with ``most`` objects each."""

    def __init__(self, source: Source, transform: JitteredScale, seed: int, most: int, masks: bool) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.most = most
        self.masks = masks

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, ...]:
        epoch, index = key
        image, objects = self.source[index]
        seed_globals(self.seed, Stream.AUGMENT, epoch, index)
        with explained(self.source.describe(index)):
            return tuple(self.transform(image, objects, self.masks).filled(self.most))


class CanvasImages(Dataset[tuple[Tensor, Tensor]]):
    """Whole images on a canvas, in the order of the source, for evaluation: (image, sizes ``[4]``)."""

    def __init__(self, source: Source, transform: WholeOnCanvas) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, _ = self.source[index]
        with explained(self.source.describe(index)):
            canvas, sizes = self.transform(image)
            if isinstance(self.source, CocoImages) and tuple(sizes[2:].tolist()) != self.source.size(index):
                height, width = self.source.size(index)
                raise ValueError(f"it has {sizes[3]}x{sizes[2]} pixels; its annotations say {width}x{height}")
            return canvas, sizes


class CroppedImages(Dataset[tuple[Tensor, int]]):
    """Samples as training sees them in one epoch, in the order of the source: (image, label)."""

    def __init__(self, source: Source, transform: Transform, seed: int, epoch: int) -> None:
        self.images = LabelledImages(source, transform, seed)
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[self.epoch, index]
