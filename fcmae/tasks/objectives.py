"""The objectives of fine-tuning that a config's ``objective`` names (see :mod:`fcmae.models.objective`)."""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fcmae.config import FinetuneConfig
from fcmae.data.samples import label_of
from fcmae.data.sources import Sample, Source, require_labels, with_classes
from fcmae.distributed import World
from fcmae.errors import ConfigError
from fcmae.evaluation.classify import accuracy
from fcmae.models.objective import Objective, Predictions


class Classify(Objective):
    """One class per image: cross entropy with ``augment.label_smoothing``; top-1 and top-5.

    Args:
        best: the metric whose best checkpoint is kept.
    """

    def __init__(self, best: str = "top1") -> None:
        self.best = best
        self.smoothing = 0.0
        self._set_classes([])

    def _set_classes(self, classes: list[str]) -> None:
        self.classes = classes
        self.outputs = self.num_classes = len(classes)

    def fit(self, source: Source, cfg: FinetuneConfig) -> None:
        self._set_classes(require_labels(source, "data.path"))
        self.smoothing = cfg.augment.label_smoothing
        given = cfg.model.num_classes
        if given not in (None, self.num_classes):
            raise ConfigError(f"model.num_classes is {given}; the data has {self.num_classes} classes")

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set_classes(state.get("classes") or [])

    def validation(self, source: Source, key: str, whose: str) -> tuple[Source, list[str]]:
        return with_classes(source, key, self.classes, whose)

    def target(self, sample: Sample, source: Source, index: int) -> int:
        return label_of(sample, source, index)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(output, target, label_smoothing=self.smoothing, reduction="none"), {}

    def metrics(self, share: Iterable[Predictions], world: World) -> dict[str, float]:
        return accuracy(share, world)
