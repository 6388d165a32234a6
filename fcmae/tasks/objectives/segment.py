"""A class per pixel."""

import math
from collections.abc import Iterable, Sequence
from typing import IO, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fcmae.config import FinetuneConfig
from fcmae.data.pixels.maps import IGNORED, MAX_CLASSES, class_map
from fcmae.data.sources import Sample, Source
from fcmae.data.sources.map_files import map_of
from fcmae.distributed import World
from fcmae.errors import ImageError, UsageError, counted
from fcmae.evaluation import reports
from fcmae.evaluation.box_pictures import colour
from fcmae.messages import print_once_rank0
from fcmae.models.objective import Predictions, Report
from fcmae.tasks.objectives.per_image import metric
from fcmae.tasks.objectives.per_pixel import PerPixel, loss_terms

SMOOTH = 1.0
"""Pixels added to both sides of the dice fraction."""


class Segment(PerPixel):
    """A class per pixel: cross entropy, dice or both; mIoU, dice and pixel accuracy.

    Args:
        classes: names, or how many there are.
        values: the number that stands for each class in the files; None = 0, 1, 2, ...
        ignore_index: the number of pixels that are left out of loss and metrics; None = there are none.
        reduce_zero_label: in the files 0 is left out, too, and 1 is the first class, as in ADE20K.
        loss: ``ce``, ``dice``, ``ce+dice``, or weights by name.
        class_weights: a factor of each class in the cross entropy; ``auto`` = inverse frequency, the mean over the
            pixels of at most 1000 maps being 1; None = none.
        width: channels of the head; None = 128 of ``unet``, 512 of ``upernet``.
        head: ``unet`` or ``upernet``.
        best: the metric whose best checkpoint is kept: ``miou``, ``dice``, ``accuracy``, ``iou_NAME`` or ``dice_NAME``.
    """

    ending = ".png"

    def __init__(
        self,
        classes: Any = None,
        values: Sequence[int] | None = None,
        ignore_index: int | None = 255,
        loss: Any = "ce",
        class_weights: Any = None,
        width: int | None = None,
        best: str = "miou",
        head: str = "unet",
        reduce_zero_label: bool = False,
    ) -> None:
        self.classes = _names(classes)
        listed = classes if isinstance(classes, (list, tuple)) else []
        self.unquoted = [str(name) for name in listed if type(name) not in (str, int)]
        """Names that YAML has read as something else: null, yes, 1e3."""
        super().__init__(len(self.classes), width, head)
        if type(reduce_zero_label) is not bool or (reduce_zero_label and values is not None):
            raise ValueError(f"reduce_zero_label must be true or false, false with values; got {reduce_zero_label!r}")
        self.left_out = [0] if reduce_zero_label else []
        first = int(reduce_zero_label)
        given = list(range(first, first + self.channels)) if values is None else list(values)
        different = all(type(value) is int for value in given) and len(set(given)) == len(given)
        if not different or len(given) != self.channels:
            raise ValueError(f"values must be {self.channels} different integers, one per class; got {values!r}")
        if ignore_index in given:
            name = self.classes[given.index(ignore_index)]
            raise ValueError(f"ignore_index is {ignore_index}, the number of class {name}")
        self.values = torch.tensor(given)
        self.left_out += [] if ignore_index is None else [ignore_index]
        self.terms = loss_terms(loss, ("ce", "dice"))
        self.auto = class_weights == "auto"
        self.weights = None if self.auto or class_weights is None else _weights(class_weights, self.channels)
        of_classes = (f"{kind}_{name}" for kind in ("iou", "dice") for name in self.classes)
        self.best = metric(best, ("miou", "dice", "accuracy", *of_classes))

    def fit(self, source: Source, cfg: FinetuneConfig) -> None:
        if self.unquoted:
            print_once_rank0(
                f"warning: objective.classes: YAML has read a name as {', '.join(self.unquoted)}, its name now; "
                "write names such as null, yes and 1e3 in quotes"
            )
        if not self.auto:
            return
        counts = torch.zeros(self.channels, dtype=torch.int64)
        for target in self.some_targets(source, cfg):
            counts += target[target != IGNORED].long().bincount(minlength=self.channels)
        present = counts > 0
        weights = counts.sum() / (present.sum() * counts.clamp(min=1).double())
        self.weights = torch.where(present, weights, weights[present].max()).float()

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state.get("weights")

    def target(self, sample: Sample, source: Source, index: int) -> Tensor:
        """int16 ``[H, W]``: the class, or ``IGNORED``."""
        given, name = map_of(sample, source, index)
        found = class_map(given, name, self.max_pixels)
        order = self.values.argsort()
        places = torch.searchsorted(self.values[order], found).clamp_(max=self.channels - 1)
        known = self.values[order][places] == found
        left_out = torch.isin(found, torch.tensor(self.left_out, dtype=torch.int64))
        unknown = found[~known & ~left_out]
        if len(unknown):
            raise ImageError(name, self._beyond(int(unknown[0]), len(unknown)))
        return torch.where(known, order[places], IGNORED).short()

    def _beyond(self, value: int, pixels: int) -> str:
        known = self.values.tolist()
        in_order = known == list(range(known[0], known[0] + self.channels))
        shown = f"{known[0]} to {known[-1]}" if in_order else str(known)
        ignored = f" or {' or '.join(map(str, self.left_out))} to leave out" if self.left_out else ""
        found = f"it has {counted(pixels, 'pixel')} of other classes, such as {value}"
        return f"{found}; {self.channels} classes are {shown}{ignored}"

    def loss_of(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Each term is a mean over the labelled pixels of a sample, 0 without one."""
        parts = {}
        if "ce" in self.terms:
            parts["ce"] = self._cross_entropy(output, target)
        if "dice" in self.terms:
            parts["dice"] = _dice(output, target)
        return sum(weight * parts[name] for name, weight in self.terms.items()), parts  # type: ignore[return-value]

    def _cross_entropy(self, output: Tensor, target: Tensor) -> Tensor:
        weights = None if self.weights is None else self.on_device("weights", output.device)
        rows = output.permute(0, 2, 3, 1).reshape(-1, self.channels)  # in two dimensions it is deterministic on GPUs
        losses = F.cross_entropy(rows, target.long().flatten(), weights, ignore_index=IGNORED, reduction="none")
        return losses.view(len(output), -1).sum(1) / (target != IGNORED).sum((1, 2)).clamp(min=1)

    def predict(self, output: Tensor) -> Tensor:
        """The probability of each class, ``[N, K, H, W]``."""
        return output.softmax(dim=1)

    def metrics(self, share: Iterable[Predictions], world: World) -> dict[str, float]:
        """``miou``, ``dice`` and ``accuracy`` of pixels in percent, ``iou_NAME`` and ``dice_NAME`` of each class.

        Means are over the classes that occur in the targets or the predictions. Values that are not finite count as
        wrong.
        """
        counts, images = confusion(share, world, self.channels)
        self.confusion = counts[:, :-1]
        return {self.best: math.nan} | scores(counts, images, self.classes)  # of a class that does not occur

    def report_maps(self) -> Report:
        return Report() if self.confusion is None else reports.of_pixels(self.confusion, self.classes)

    def error(self, target: Tensor, predicted: Tensor) -> float:
        """The share of labelled pixels that are wrong."""
        labelled = target != IGNORED
        wrong = (predicted.argmax(0) != target) & labelled
        return float(wrong.sum() / labelled.sum()) if labelled.any() else math.nan

    def final(self, predicted: Tensor) -> Tensor:
        """The number of the most likely class, as in the files of targets, ``[H, W]``."""
        return self.values[predicted.argmax(0).cpu()]

    def legend(self) -> dict[str, Tensor]:
        return {**dict(zip(self.classes, self._colours(), strict=True)), "(not labelled)": torch.full((3,), 0.5)}

    def _colours(self) -> Tensor:
        return torch.tensor([colour(k) for k in range(self.channels)])

    def panels(self, target: Tensor, predicted: Tensor) -> list[Tensor]:
        """A colour for each class, the same in all pictures; grey where there is no label."""
        colours = torch.cat([self._colours(), torch.full((1, 3), 0.5)])  # the last is that of IGNORED
        return [colours[classes.long().cpu()].permute(2, 0, 1) for classes in (target, predicted.argmax(0))]

    def write(self, final: Tensor, file: IO[bytes]) -> None:
        """A grey PNG of 8 bits, or of 16 where a number does not fit."""
        least, most = int(self.values.min()), int(self.values.max())
        if least < 0 or most > 65535:
            raise UsageError(f"predictions as PNG need objective.values of 0 to 65535; got {least} to {most}")
        wide = most > 255
        Image.fromarray(final.numpy().astype("uint16" if wide else "uint8")).save(file, "PNG")


def confusion(share: Iterable[Predictions], world: World, classes: int) -> tuple[Tensor, int]:
    """Pixels by true class (rows) and predicted class, int64 ``[K, K + 1]``, and the images of all ranks.

    The last column is of predictions that are not finite.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts = torch.zeros(classes + 1, classes + 1, dtype=torch.int64, device=world.device)
    images = torch.zeros((), dtype=torch.int64, device=world.device)
    for outputs, targets, _ in share:
        found = torch.where(outputs.isfinite().all(dim=1), outputs.argmax(dim=1), classes)
        counts += multiclass_confusion_matrix(
            found, targets.long(), classes + 1, ignore_index=IGNORED, validate_args=False
        )
        images += len(targets)
    return world.sum(counts)[:classes].cpu(), int(world.sum(images))


def scores(counts: Tensor, images: int, classes: Sequence[str]) -> dict[str, float]:
    """Metrics of a confusion matrix ``[K, K + 1]`` (rows are true classes) in percent."""
    counts = counts.double()
    right, truth, found = counts[:, :-1].diagonal(), counts.sum(1), counts[:, :-1].sum(0)
    iou, dice = 100 * right / (truth + found - right), 200 * right / (truth + found)
    means = {"miou": iou.nanmean(), "dice": dice.nanmean(), "accuracy": 100 * right.sum() / truth.sum()}
    each = {f"iou_{name}": value for name, value in zip(classes, iou, strict=True)}
    each |= {f"dice_{name}": value for name, value in zip(classes, dice, strict=True)}
    each = {name: value for name, value in each.items() if not value.isnan()}
    return {name: float(value) for name, value in (means | each).items()} | {"images": images}


def _dice(output: Tensor, target: Tensor) -> Tensor:
    """1 - the soft dice coefficient, the mean over the classes that occur in the target of a sample: ``[N]``."""
    valid = target != IGNORED
    share = output.softmax(dim=1) * valid[:, None]
    truth = target[:, None] == torch.arange(output.shape[1], device=output.device, dtype=target.dtype)[:, None, None]
    both, total = (share * truth).sum((2, 3)), share.sum((2, 3)) + truth.sum((2, 3))
    present = truth.any(dim=3).any(dim=2)
    losses = 1 - (2 * both + SMOOTH) / (total + SMOOTH)
    return torch.where(present, losses, 0).sum(1) / present.sum(1).clamp(min=1)


def _names(classes: Any) -> list[str]:
    if type(classes) is int and 1 < classes <= MAX_CLASSES:
        return [str(number) for number in range(classes)]
    names = [str(name) for name in classes] if isinstance(classes, (list, tuple)) else []
    if not 1 < len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise ValueError(f"classes must be a list of two or more names, or their number; got {classes!r}")
    return names


def _weights(given: Any, classes: int) -> Tensor:
    ok = isinstance(given, (list, tuple)) and len(given) == classes
    if not ok or not all(type(weight) in (int, float) and weight >= 0 for weight in given) or not sum(given):
        raise ValueError(f"class_weights must be {classes} numbers that are not negative, auto or null; got {given!r}")
    return torch.tensor(given, dtype=torch.float32)
