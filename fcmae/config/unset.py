"""Groups ``data`` and ``model`` of ``fcmae finetune``, where a key may be unset: then ``init_from`` says its value."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from fcmae.config.data import DataConfig
from fcmae.config.model import BackboneConfig, ClassifierConfig

UNSET: dict[str, tuple[str, ...]] = {
    "model": ("backbone", "depths", "dims", "stem_stride", "strides"),
    "data": ("in_chans", "bit_depth", "image_size", "mean", "std"),
}
"""The keys that may be unset, by group. Unset is None."""


@dataclass
class UnsetDataConfig(DataConfig):
    """Group ``data``, of whose keys some may be unset."""

    in_chans: int | None = None  # type: ignore[assignment]  # set by FinetuneConfig.settled, like the others
    bit_depth: int | None = None  # type: ignore[assignment]
    image_size: Any = None
    mean: list[float] | None = None  # type: ignore[assignment]
    std: list[float] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks what is set."""
        channels = self.in_chans or len(self.mean or self.std or range(3))
        checked = settled_data(self, {"in_chans": channels, "mean": [0.5] * channels, "std": [0.5] * channels})
        for name, value in _given(self, "data").items():
            setattr(self, name, getattr(checked, name) if value is not None else None)


@dataclass
class UnsetBackboneConfig(BackboneConfig):
    """Group ``model`` of commands on features, which set it for random weights only."""

    backbone: str | None = None  # type: ignore[assignment]  # set by settled_backbone, like the other
    stem_stride: int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks what is set."""
        settled_backbone(self)


@dataclass
class UnsetClassifierConfig(ClassifierConfig):
    """Group ``model`` in fine-tuning, of whose keys some may be unset."""

    backbone: str | None = None  # type: ignore[assignment]  # set by FinetuneConfig.settled, like the other
    stem_stride: int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Checks what is set."""
        settled_model(self, {})


def settled_data(given: DataConfig, known: dict[str, Any]) -> DataConfig:
    """What is given, else what is known, else the standard values. Raises ConfigError."""
    return DataConfig(**{**known, **_given(given, "data")})


def settled_backbone(given: BackboneConfig) -> BackboneConfig:
    """What is given, else the standard values. Raises ConfigError."""
    return BackboneConfig(**_given(given, "model"))


def settled_model(given: ClassifierConfig, known: dict[str, Any]) -> ClassifierConfig:
    """What is given, else what is known, else the standard values. Raises ConfigError."""
    return ClassifierConfig(**{**known, **_given(given, "model")})


def _given(cfg: Any, group: str) -> dict[str, Any]:
    """The keys that are set."""
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    return {name: value for name, value in values.items() if value is not None or name not in UNSET[group]}
