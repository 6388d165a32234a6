"""What fine-tuning trains for: the seam between a network and a kind of target."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from fcmae.config import FinetuneConfig, LoaderConfig
from fcmae.data.sources import Sample, Source
from fcmae.distributed import World
from fcmae.models.detector import Detector


class Predictions(NamedTuple):
    """A batch of an evaluation: what the head gave, in float32; the targets; int64 places in the source ``[N]``."""

    outputs: Any
    targets: Tensor
    places: Tensor


Plots = dict[str, Callable[[Any], None]]
"""By the name of a picture's file, what draws it into a matplotlib ``Figure``."""


class Report(NamedTuple):
    """What an evaluation tells beside its metrics: what ``report(results: Predictions)`` of an objective returns.

    An objective need not have this method. It gets all images in the order of the source, on the CPU.
    """

    per_class: dict[str, dict[str, float]] = {}  # noqa: RUF012  # read only
    """Numbers of each class, label or column, by name."""
    plots: Plots = {}  # noqa: RUF012
    errors: Tensor | None = None
    """How wrong each image is, float ``[n]``; NaN = it does not count."""
    caption: Callable[[int], str] = str
    """What is said of the picture of image 0..n-1."""


def sign_and_name(best: str) -> tuple[float, str]:
    """The metric that :attr:`Objective.best` names: -1.0 where less is better, else 1.0; and its name."""
    return (-1.0 if best.startswith("-") else 1.0), best.removeprefix("-")


def score(best: str, metrics: Mapping[str, float | None]) -> float:
    """The value of the metric that :attr:`Objective.best` names, so signed that more is better.

    NaN for None, as JSON files have a metric that is not defined.
    """
    sign, name = sign_and_name(best)
    value = metrics[name]
    return math.nan if value is None else sign * value


class Objective(Protocol):
    """The head, target, loss and metrics of fine-tuning. A class of your own may inherit from it.

    It is created with the entries of ``objective`` in the config. Then :meth:`fit` is called in training, or
    :meth:`load_state_dict` for a checkpoint; all else comes after.
    """

    best: str
    """The metric whose best checkpoint is kept; ``-NAME`` where less is better."""
    outputs: int | None
    """How many numbers per image timm's head gives: mean over the image, norm, linear. None = :meth:`head` is used."""
    num_classes: int | None
    """K, where targets are indices of classes, which mixup turns into shares ``[N, K]``; else None."""

    def fit(self, source: Source, cfg: FinetuneConfig) -> None:
        """Learns what it needs from the training samples and the config. Raises UsageError where they do not fit."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`fit` learned, as plain values and tensors. ``classes`` are names of classes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what a checkpoint holds of :meth:`state_dict`."""

    def validation(self, source: Source, key: str, whose: str) -> tuple[Source, list[str]]:
        """Validation samples that suit the training samples, and notes for the user, a line each.

        Args:
            key: names the source in messages.
            whose: names the training samples in messages.

        Raises UsageError where they do not fit.
        """
        return source, []

    def target(self, sample: Sample, source: Source, index: int) -> float | Tensor:
        """The target of a sample: a number, or a tensor whose shape is the same for all samples.

        It runs in the loader's processes. Raises ImageError for a sample whose target cannot be read.
        """
        raise NotImplementedError

    def head(self, widths: list[int]) -> nn.Module:
        """A module that takes the list of feature maps ``[N, D, h, w]`` of all stages, whose D are ``widths``."""
        raise NotImplementedError

    def loss(self, output: Any, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each sample ``[N]``, and parts of it by name, each ``[N]``; a single part may be left out.

        It may be recorded in a CUDA graph, so it must not read values on the host.

        Args:
            output: what the head gives, in float32.
            target: a batch of :meth:`target`; shares of classes ``[N, K]`` after mixup.
        """
        raise NotImplementedError

    def predict(self, output: Any) -> Any:
        """What ``fcmae predict`` writes for the images of an output of the head, e.g. probabilities ``[N, K]``."""
        return output

    def metrics(self, share: Iterable[Predictions], world: World) -> dict[str, float]:
        """What evaluations log, by name, exact over the samples of all ranks; ``images`` is how many there were.

        Every rank calls it with its own share and must return the same: see ``world.sum`` and ``evaluation.gather``.
        """
        raise NotImplementedError


class DenseObjective(Objective):
    """An objective whose target is a map that has a class or numbers for each pixel.

    :meth:`target` returns the map of the whole image, int16 classes ``[H, W]`` with ``IGNORED`` or float32 numbers
    ``[K, H, W]`` with NaN for what is left out, which the package crops with the image. :meth:`metrics` gets whole
    images, one by one: what :meth:`predict` makes of the outputs, averaged over overlapping windows.
    """

    outputs = None
    num_classes = None
    max_pixels = LoaderConfig.max_pixels
    """Of a map; the package sets it to ``loader.max_pixels``."""
    confusion: Tensor | None = None
    """What the last :meth:`metrics` counted, ``[K, K]`` pixels by true class (rows) and predicted class, if any."""
    ending = ".npy"
    """Of the files that ``fcmae predict`` writes."""

    def decoder(self, dims: list[int], strides: list[int]) -> nn.Module:
        """A module that takes the feature maps ``[N, dims[i], H / strides[i], W / strides[i]]`` of all stages.

        It gives ``[N, K, H, W]``.
        """
        raise NotImplementedError

    def final(self, predicted: Tensor) -> Tensor:
        """What ``fcmae predict`` writes for an image, of averaged predictions ``[K, H, W]``."""
        return predicted

    def write(self, final: Tensor, file: IO[bytes]) -> None:
        """Writes what :meth:`final` returns to a file with the name's ending :attr:`ending`."""
        np.save(file, final.numpy())

    def report_maps(self) -> Report:
        """What ``fcmae evaluate`` writes beside what the last :meth:`metrics` returned; no errors and captions."""
        return Report()

    def error(self, target: Tensor, predicted: Tensor) -> float:
        """How wrong an image is, for pictures of the worst; NaN = it does not count. Arguments as of :meth:`panels`."""
        return math.nan

    def legend(self) -> dict[str, Tensor]:
        """What the colours of :meth:`panels` mean, RGB in 0..1 ``[3]``."""
        return {}

    def panels(self, target: Tensor, predicted: Tensor) -> list[Tensor]:
        """Target and prediction to be looked at, RGB in 0..1 ``[3, H, W]``; none if they cannot be drawn.

        Args:
            target: the map of an image.
            predicted: averaged predictions ``[K, H, W]``.
        """
        return []


class BoxObjective(Objective):
    """An objective whose target is the boxes, and perhaps the masks, of the objects in an image.

    The head is a :class:`fcmae.models.detector.Detector`, which has losses of its own, so :meth:`loss` is not called.
    :meth:`metrics` gets what it found in whole images: outputs are lists of :class:`fcmae.models.detector.Found` in
    pixels of the image, targets lists of :class:`fcmae.data.sources.coco.Objects`.
    """

    outputs = None
    num_classes = None
    classes: list[str]
    """Names of the classes of objects."""
    masks: bool
    """Whether masks are predicted, too."""
    most: int
    """Most objects of a training image."""

    def report_boxes(self) -> Report:
        """What ``fcmae evaluate`` writes beside what the last :meth:`metrics` returned; errors and captions by place in
        the source."""
        return Report()

    def decoder(self, dims: list[int], strides: list[int]) -> Detector:
        """A detector on the feature maps ``[N, dims[i], H / strides[i], W / strides[i]]`` of all stages."""
        raise NotImplementedError
