"""The objectives of fine-tuning that a config's ``objective`` names (see :mod:`fcmae.models.objective`)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.config import LAYERS, FinetuneConfig
from fcmae.config.checks import check_class_weights, check_one_of
from fcmae.data.samples import label_of
from fcmae.data.sources import Sample, Source, require_labels, with_classes
from fcmae.distributed import World
from fcmae.errors import ConfigError, UsageError
from fcmae.evaluation import class_metrics, logistic, reports
from fcmae.evaluation.classify import TOP5_FROM
from fcmae.evaluation.features import gather_in_order
from fcmae.models.objective import Objective, Predictions, Report
from fcmae.models.pooled import RowHead

LEAST_SPREAD = 1e-5
"""Of numbers to learn, as a share of the largest: float32 has steps of 1e-7."""
ERRORS = ("mae", "rmse", "r2")
"""Metrics of numbers."""
LESS = ("mae", "rmse", "ece")
"""Metrics where less is better."""


def signed(best: str) -> str:
    """``best`` after "-" if less of it is better, of a column too: the largest error is nobody's best."""
    return f"-{best}" if best.split("_")[0] in LESS else best


def metric(best: str, names: Sequence[str], of_columns: bool = False) -> str:
    """``best`` if it is a metric, or a metric of a column, after "-" if less is better. Raises ValueError."""
    name = best.removeprefix("-") if isinstance(best, str) else ""
    known = name in names or (of_columns and name.split("_")[0] in names)
    if not known or best not in (name, signed(name)):
        more = f", but more of {name} is better" if known else ""
        raise ValueError(f"best must be one of {', '.join(names)}, after - where less is better; got {best!r}{more}")
    return signed(name)


class Classify(Objective):
    """One class per image: cross entropy with ``augment.label_smoothing``.

    Args:
        best: the metric whose best checkpoint is kept: ``top1``, ``top5``, ``balanced_accuracy``, ``precision``,
            ``recall``, ``f1``, ``auroc``, ``average_precision`` or ``-ece``.
        class_weights: a factor on the loss of each class, in the order of the classes; ``auto``: by inverse frequency,
            with a mean of 1 over the training images. None = none.
        layer: what the linear layer reads: ``pooled``, as timm's classifier; or ``mean``, ``stages`` or ``stages_std``
            (:mod:`fcmae.models.pooled`), which only fcmae can run.
    """

    def __init__(
        self, best: str = "top1", class_weights: Sequence[float] | str | None = None, layer: str = "pooled"
    ) -> None:
        self.best = metric(best, class_metrics.NAMES)
        check_class_weights("class_weights", class_weights)
        check_one_of("layer", layer, LAYERS)
        self.class_weights, self.layer = class_weights, layer
        self.weights: Tensor | None = None
        self.smoothing = 0.0
        self._set_classes([])

    def _set_classes(self, classes: list[str]) -> None:
        self.classes = classes
        self.num_classes = len(classes)
        self.outputs = len(classes) if self.layer == "pooled" or not classes else None

    def fit(self, source: Source, cfg: FinetuneConfig) -> None:
        self._set_classes(require_labels(source, "data.path"))
        if self.num_classes < 2:
            raise UsageError(
                f"data.path has one class only, {self.classes[0]!r}, so there is nothing to learn; give a folder (or, "
                "with data.label_column, a name) for each of two or more classes"
            )
        self.smoothing = cfg.augment.label_smoothing
        if self.best == "top5" and self.num_classes < TOP5_FROM:
            raise ConfigError(
                f"objective.best must not be top5 with fewer than {TOP5_FROM} classes: all would be right"
            )
        given = cfg.model.num_classes
        if given not in (None, self.num_classes):
            raise ConfigError(f"model.num_classes is {given}; the data has {self.num_classes} classes")
        if self.class_weights == "auto" and cfg.data.labels_per_class is not None:
            return  # as many of each class
        labels = [source.label(i) for i in range(len(source))] if self.class_weights == "auto" else []
        known = torch.tensor([label for label in labels if label is not None], dtype=torch.int64)
        weights = logistic.weights_of(self.class_weights, known, self.num_classes, "objective.class_weights")
        self.weights = None if weights is None else weights.float()

    def head(self, widths: list[int]) -> nn.Module:
        return RowHead(widths, self.num_classes, self.layer)

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set_classes(state.get("classes") or [])

    def validation(self, source: Source, key: str, whose: str) -> tuple[Source, list[str]]:
        most = class_metrics.MOST_SCORES
        if self.best.removeprefix("-") in class_metrics.AREAS and len(source) * self.num_classes > most:
            raise ConfigError(
                f"objective.best={self.best} is computed for at most {most:,} scores; {key} has {len(source):,} images "
                f"of {self.num_classes:,} classes. Set objective.best=balanced_accuracy, or give fewer images"
            )
        return with_classes(source, key, self.classes, whose)

    def target(self, sample: Sample, source: Source, index: int) -> int:
        return label_of(sample, source, index)

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.weights is not None and self.weights.device != output.device:
            self.weights = self.weights.to(output.device)  # once, not in a CUDA graph
        how: dict[str, Any] = {"weight": self.weights, "label_smoothing": self.smoothing, "reduction": "none"}
        return F.cross_entropy(output, target, **how), {}

    def predict(self, output: Tensor) -> Tensor:
        """The probability of each class."""
        return output.softmax(dim=1)

    def metrics(self, share: Iterable[Predictions], world: World) -> dict[str, float]:
        return class_metrics.class_metrics(share, world, len(self.classes))

    def report(self, results: Predictions) -> Report:
        return reports.of_classes(results.outputs, results.targets, self.classes)


class _Columns(Objective):
    """Numbers per image that a source gives in named columns, NaN where there is none."""

    num_classes = None

    def __init__(self) -> None:
        self._set_columns([])

    def _set_columns(self, columns: list[str]) -> None:
        self.columns = columns
        self.outputs = len(columns)

    def fit(self, source: Source, cfg: FinetuneConfig) -> None:
        self._set_columns(_columns(source, "data.path"))
        values: Tensor = source.values  # type: ignore[attr-defined]  # checked
        empty = [name for name, column in zip(self.columns, values.T, strict=True) if column.isnan().all()]
        if empty:
            raise UsageError(f"data.label_column: the column {', '.join(empty)} of data.path is empty")
        self._fit(values)

    def _fit(self, values: Tensor) -> None:
        """Learns from the training targets ``[n, K]``. Raises UsageError."""

    def validation(self, source: Source, key: str, whose: str) -> tuple[Source, list[str]]:
        theirs = _columns(source, key)
        if theirs != self.columns:
            raise UsageError(f"the columns of {key} are {', '.join(theirs)}; {whose} has {', '.join(self.columns)}")
        return source, []

    def target(self, sample: Sample, source: Source, index: int) -> Tensor:
        return sample.label

    def state_dict(self) -> dict[str, Any]:
        return {"classes": self.columns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set_columns(state.get("classes") or [])


def _columns(source: Source, key: str) -> list[str]:
    columns = getattr(source, "columns", None)
    if not columns or getattr(source, "values", None) is None:
        raise UsageError(
            f"{key} has no numbers; give data.name=table and data.label_column=[COLUMN,...], or labels of type float"
        )
    return columns


def _mean_of_valid(losses: Tensor, valid: Tensor) -> Tensor:
    """``[N, K]`` to ``[N]``: the mean over the columns that have a value."""
    return torch.where(valid, losses, 0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


class Multilabel(_Columns):
    """Several labels per image, each 0 or 1 or missing (empty): binary cross entropy per label.

    Args:
        best: the metric whose best checkpoint is kept: ``map`` (mean average precision), ``auroc``, ``f1``,
            ``precision`` or ``recall``.
    """

    def __init__(self, best: str = "map") -> None:
        super().__init__()
        self.best = metric(best, ("map", "auroc", "f1", "precision", "recall"))

    def _fit(self, values: Tensor) -> None:
        wrong = ((values != 0) & (values != 1) & ~values.isnan()).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise UsageError(
                f"data.label_column: {self.columns[column]} must be 0, 1 or empty; image {row + 1} of data.path has "
                f"{values[row, column]:g}"
            )

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        valid = ~target.isnan()
        target = torch.where(valid, target, 0)
        return _mean_of_valid(F.binary_cross_entropy_with_logits(output, target, reduction="none"), valid), {}

    def predict(self, output: Tensor) -> Tensor:
        """The probability of each label."""
        return output.sigmoid()

    def metrics(self, share: Iterable[Predictions], world: World) -> dict[str, float]:
        """Means over the labels that have both values among the images: exact over the images of all ranks."""
        from torchmetrics.functional import classification as of

        kinds: dict[str, Any] = {"map": of.binary_average_precision, "auroc": of.binary_auroc, "f1": of.binary_f1_score}
        kinds |= {"precision": of.binary_precision, "recall": of.binary_recall}
        outputs, targets = _all(share, world, self.outputs)
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for output, target in zip(outputs.sigmoid().T, targets.T, strict=True):
            valid = ~target.isnan() & output.isfinite()
            score, truth = output[valid], target[valid].long()
            if 0 < truth.sum() < len(truth):
                for name, kind in kinds.items():
                    found[name].append(min(float(kind(score, truth)), 1.0))  # rounding may exceed 1
        means = {name: 100 * sum(values) / len(values) if values else math.nan for name, values in found.items()}
        return {**means, "images": len(outputs)}

    def report(self, results: Predictions) -> Report:
        return reports.of_labels(results.outputs, results.targets, self.columns)


class Regress(_Columns):
    """One or more numbers per image, standardised by the training images, reported in their own units.

    Args:
        loss: ``mse``, ``l1`` or ``smooth_l1``, on the standardised numbers.
        best: the metric whose best checkpoint is kept: ``-mae``, ``-rmse`` or ``r2``, means over the columns.
    """

    LOSSES: ClassVar = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}

    def __init__(self, loss: str = "mse", best: str = "-mae") -> None:
        super().__init__()
        if loss not in self.LOSSES:
            raise ValueError(f"loss must be one of {', '.join(self.LOSSES)}; got {loss!r}")
        self.best = metric(best, ERRORS, of_columns=True)
        self.kind = loss
        self.mean, self.std = torch.zeros(0), torch.ones(0)

    def _fit(self, values: Tensor) -> None:
        self.mean = values.nanmean(dim=0)
        self.std = (values - self.mean).square().nanmean(dim=0).sqrt()
        least, most = values.nan_to_num(math.inf).amin(0), values.nan_to_num(-math.inf).amax(0)
        constant = [name for name, same in zip(self.columns, least == most, strict=True) if same]
        if constant:
            raise UsageError(f"data.label_column: the column {', '.join(constant)} of data.path has one value only")
        known = list(ERRORS)
        known += [f"{kind}_{name}" for kind in ERRORS for name in self.columns] if len(self.columns) > 1 else []
        if self.best.removeprefix("-") not in known:
            raise ConfigError(f"objective.best must be one of {', '.join(known)}; got {self.best!r}")
        for name, low, high in zip(self.columns, least.tolist(), most.tolist(), strict=True):
            if high - low < LEAST_SPREAD * max(abs(low), abs(high)):
                raise UsageError(
                    f"data.label_column: the column {name} of data.path goes from {low:.9g} to {high:.9g}, closer than "
                    "float32 can tell apart; subtract its mean in the table"
                )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": self.mean, "std": self.std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean, self.std = state["mean"], state["std"]

    def target(self, sample: Sample, source: Source, index: int) -> Tensor:
        return (sample.label - self.mean) / self.std

    def loss(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        valid = ~target.isnan()
        target = torch.where(valid, target, 0)
        return _mean_of_valid(self.LOSSES[self.kind](output, target, reduction="none"), valid), {}

    def predict(self, output: Tensor) -> Tensor:
        """The numbers in their own units."""
        return output * self.std.to(output) + self.mean.to(output)

    def metrics(self, share: Iterable[Predictions], world: World) -> dict[str, float]:
        outputs, targets = _all(share, world, self.outputs)
        result: dict[str, float] = {}
        columns = zip(self.columns, self.predict(outputs).double().T, self.predict(targets).double().T, strict=True)
        for name, output, target in columns:
            result |= {f"{kind}_{name}": value for kind, value in _errors(output, target).items()}
        means = {}
        for kind in ERRORS:
            of_kind = [result[f"{kind}_{name}"] for name in self.columns]
            known = [value for value in of_kind if not math.isnan(value)]  # not of a column without values
            means[kind] = sum(known) / len(known) if known else math.nan
        return {**means, **(result if len(self.columns) > 1 else {}), "images": len(outputs)}

    def report(self, results: Predictions) -> Report:
        found, truth = (self.predict(values.double()) for values in (results.outputs, results.targets))
        rows = {
            name: _errors(*column)
            for name, column in zip(self.columns, zip(found.T, truth.T, strict=True), strict=True)
        }
        return reports.of_numbers(found, truth, self.std, rows)


def _errors(output: Tensor, target: Tensor) -> dict[str, float]:
    """Mean absolute error, root of the mean squared one, and R² of a column, of the images that have a value."""
    valid = ~target.isnan()
    error, target = (output - target)[valid], target[valid]
    spread = (target - target.mean()).square().sum()
    r2 = 1 - error.square().sum() / torch.where(spread > 0, spread, math.nan)
    values = error.abs().mean(), error.square().mean().sqrt(), r2
    return dict(zip(ERRORS, map(float, values), strict=True))


def _all(share: Iterable[Predictions], world: World, columns: int) -> tuple[Tensor, Tensor]:
    """Outputs and targets of the images of all ranks ``[n, K]``, in the source's order, so that sums have one order."""
    blank = torch.empty(0, columns, device=world.device)
    none = (blank, blank, torch.empty(0, dtype=torch.int64, device=world.device))
    outputs, targets, _ = gather_in_order([none, *share], world)
    return outputs, targets
