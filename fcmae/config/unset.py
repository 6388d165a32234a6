"""Groups ``data`` and ``model`` of ``fcmae finetune``, where a key may be unset: ``init_from`` then gives its value."""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from fcmae.config.data import DataConfig
from fcmae.config.model import BackboneConfig, ClassifierConfig
from fcmae.config.normalize import without_derived

T = TypeVar("T")
UNSET: dict[str, tuple[str, ...]] = {
    "model": ("backbone", "depths", "dims", "stem_stride", "strides", "timm"),
    "data": ("in_chans", "bit_depth", "dtype", "image_size", "normalize", "low", "high", "mean", "std", "nodata"),
}
"""The keys that may be unset, by group. Unset is None."""


@dataclass
class UnsetDataConfig(DataConfig):
    """Group ``data``, some of whose keys may be unset."""

    in_chans: int | None = None  # type: ignore[assignment]  # set by FinetuneConfig.settled, like the others
    bit_depth: int | None = None  # type: ignore[assignment]
    dtype: str | None = None  # type: ignore[assignment]
    image_size: Any = None
    normalize: str | None = None  # type: ignore[assignment]
    mean: list[float] | None = None  # type: ignore[assignment]
    std: list[float] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks what is set."""
        given = self.channels.get("input") if isinstance(self.channels, dict) else self.channels
        listed = given if isinstance(given, (list, tuple)) else None
        channels = self.in_chans or len(self.mean or self.std or listed or range(3))
        known: dict[str, Any] = {"in_chans": channels}
        if self.normalize in (None, "dataset"):
            known |= {"mean": [0.5] * channels, "std": [0.5] * channels}
        checked = settled(DataConfig, self, known)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                setattr(self, field.name, getattr(checked, field.name))


@dataclass
class UnsetBackboneConfig(BackboneConfig):
    """Group ``model`` of commands on features, which set it for random weights only."""

    backbone: str | None = None  # type: ignore[assignment]  # set by settled, like the other
    stem_stride: int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks what is set."""
        settled(BackboneConfig, self)


@dataclass
class UnsetClassifierConfig(ClassifierConfig):
    """Group ``model`` in fine-tuning, some of whose keys may be unset."""

    backbone: str | None = None  # type: ignore[assignment]  # set by FinetuneConfig.settled, like the other
    stem_stride: int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks what is set."""
        settled(ClassifierConfig, self)


def settled(schema: type[T], given: Any, known: dict[str, Any] | None = None) -> T:
    """A value for every key: what is given, else what is known, else the default of ``schema``. Raises ConfigError."""
    may_be_unset = [name for names in UNSET.values() for name in names]
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    set_values = {name: value for name, value in values.items() if value is not None or name not in may_be_unset}
    return schema(**{**without_derived(known or {}, set_values), **set_values})
