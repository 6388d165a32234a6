"""What :class:`fcmae.targets.Labels` must know of the training images: how many classes, how large the numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fcmae.config import PretrainConfig
from fcmae.data.labels import Labels
from fcmae.data.sources import Source
from fcmae.errors import ConfigError
from fcmae.targets.labels import OF_CLASSES
from fcmae.targets.losses import OF_NUMBERS

LABELS = "fcmae.targets.Labels"


def settle_labels(cfg: PretrainConfig, read: Callable[[], Source]) -> Source | None:
    """Sets ``dim``, ``mean`` and ``std`` of each target of labels in ``cfg``.

    Args:
        read: makes the source of the training images, which may take long; called only if there is such a target.

    Returns:
        The source if it was made.

    Raises ConfigError naming the key, if the images have no such labels as the loss needs.
    """
    # The class refuses other losses.
    settled = {
        name: given
        for name, given in cfg.target.items()
        if given["_target_"] == LABELS and given.get("loss", "ce") in (*OF_CLASSES, *OF_NUMBERS)
    }
    if not settled:
        return None
    source = read()
    for name, given in settled.items():
        cfg.target[name] = {**given, **_found(source, f"target.{name}", given.get("loss", "ce"))}
    return source


def _found(source: Source, key: str, loss: str) -> dict[str, Any]:
    missing = Labels(source, key).missing
    if loss in OF_CLASSES and missing.ndim == 0 and not missing.is_floating_point():
        return {"dim": _count(source, key)}
    if loss == "ce":
        what = f"{missing.numel()} numbers each" if missing.ndim else "a number each"
        raise ConfigError(
            f"{key}.loss=ce needs classes; the training images have {what}. Give mse, l1 or smooth_l1, or bce for "
            "labels of 0 and 1"
        )
    if source.classes is not None and loss not in OF_CLASSES:
        raise ConfigError(
            f"{key}.loss={loss} needs numbers; the training images have {len(source.classes)} classes. Give ce or bce, "
            "or a list of columns of numbers as data.label_column"
        )
    return _of_numbers(source, missing, key, loss)


def _count(source: Source, key: str) -> int:
    """The number of classes."""
    if source.classes is not None:
        return len(source.classes)
    labels = [label for label in map(source.label, range(len(source))) if label is not None]
    if min(labels) < -1:
        raise ConfigError(f"{key}: classes must be integers from 0, or -1 if missing; got {min(labels)}")
    return max(1, *(int(label) + 1 for label in labels))


def _of_numbers(source: Source, missing: Tensor, key: str, loss: str) -> dict[str, Any]:
    values = _all(source, missing)
    names = getattr(source, "columns", None) or [str(column) for column in range(values.shape[1])]

    def refuse(wrong: Tensor, what: str) -> None:
        if wrong.any():
            columns = ", ".join(name for name, bad in zip(names, wrong.tolist(), strict=True) if bad)
            raise ConfigError(f"{key}: column {columns} of the labels {what}")

    refuse(values.isnan().all(dim=0), "is empty")
    if loss in OF_CLASSES:
        refuse(((values < 0) | (values > 1)).any(dim=0), f"must be from 0 to 1 for {key}.loss={loss}")
        return {"dim": values.shape[1]}
    mean = values.nanmean(dim=0)
    std = (values - mean).square().nanmean(dim=0).sqrt()
    refuse(std == 0, "has one value only")
    return {"dim": values.shape[1], "mean": mean.tolist(), "std": std.tolist()}


def _all(source: Source, missing: Tensor) -> Tensor:
    """The numbers of all images, float64 ``[n, K]``, NaN if missing."""
    values: Tensor | None = getattr(source, "values", None)
    if values is None:
        labels = (source.label(index) for index in range(len(source)))
        values = torch.stack([missing if label is None else torch.as_tensor(label).to(missing) for label in labels])
    if not values.is_floating_point():
        values = torch.where(values == -1, torch.nan, values.double())
    return values.double().view(len(values), -1)
