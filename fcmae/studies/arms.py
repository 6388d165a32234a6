"""What a study compares: the arms, the numbers of labels, and the config of each training."""

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fcmae.config import (
    CLASSIFY,
    DataConfig,
    DataOverrides,
    EvaluateConfig,
    FinetuneConfig,
    ProbeConfig,
    StudyConfig,
    TrainerConfig,
)
from fcmae.config.commands import RANDOM
from fcmae.config.study import ALL, ARMS
from fcmae.config.unset import UnsetBackboneConfig
from fcmae.data.sources import Source, require_labels, some_images
from fcmae.data.sources.base import listing_digest
from fcmae.errors import ConfigError, UsageError
from fcmae.models.objective import Objective
from fcmae.plugins import create, is_ours
from fcmae.studies.compare import Budget
from fcmae.tasks.dense import sourced
from fcmae.tasks.initial import find_start, settle
from fcmae.tasks.objectives.per_image import signed

EPOCHS, LEAST_STEPS, MOST_STEPS = 100, 200, 2000
"""Length of every training: passes over its images, within limits."""
WARMUP = 0.1
"""Share of a training."""
UNEQUAL = 1.5
"""Classes are unbalanced if the largest has more than this many times as many training images as the smallest."""
PRETRAINED = "pretrained"


class Arm(NamedTuple):
    """``method``: probe, finetune or auto; ``weights``: random, pretrained, or a name of ``others``."""

    name: str
    method: str
    weights: str


class Cell(NamedTuple):
    """One measurement."""

    arm: Arm
    budget: Budget
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm.name}_{self.budget.label}_{self.seed}"


OF_NAME = {
    "random_probe": Arm("random_probe", "probe", RANDOM),
    "pretrained_probe": Arm("pretrained_probe", "probe", PRETRAINED),
    "scratch": Arm("scratch", "finetune", RANDOM),
    "finetuned": Arm("finetuned", "finetune", PRETRAINED),
    "auto": Arm("auto", "auto", PRETRAINED),
    "auto_scratch": Arm("auto_scratch", "auto", RANDOM),
}


def choose_arms(cfg: StudyConfig, classifies: bool) -> list[Arm]:
    """The arms of a study; without classes there is no ``auto``. Raises ConfigError."""
    names = list(ARMS[:-1]) if cfg.arms is None else cfg.arms
    unable = [name for name in names if OF_NAME[name].method == "auto" and not classifies]
    if unable and cfg.arms is not None:
        raise ConfigError(f"arms must be without {', '.join(unable)} with objective: {cfg.objective['_target_']}")
    arms = [OF_NAME[name] for name in names if name not in unable]
    methods = [arm.method for arm in arms if arm.weights == PRETRAINED]
    endings = {"probe": "probe", "finetune": "finetuned", "auto": "auto"}
    arms += [Arm(f"{other}_{endings[method]}", method, other) for other in cfg.others for method in methods]
    if cfg.init_from is None and any(arm.weights == PRETRAINED for arm in arms):
        raise ConfigError("init_from is not set; give the pretraining run that is studied, init_from=RUN")
    return arms


@dataclass
class Plan:
    """What a study measures, and with what."""

    cfg: StudyConfig
    """Settled: with a value for every key of ``data`` and ``model``."""
    arms: list[Arm]
    budgets: list[Budget]
    metric: str
    rule: str
    """Why this metric."""
    images: int
    """In all of ``data.path``."""
    listing: str | None
    """What :func:`~fcmae.data.sources.base.listing_digest` says of them."""
    val_images: int
    val_listing: str | None
    notes: list[str]

    @property
    def classifies(self) -> bool:
        """Whether every image has one class, so that budgets are per class and probes are logistic regressions."""
        return self.cfg.objective["_target_"] == CLASSIFY

    def cells(self) -> list[Cell]:
        """Seed by seed, the largest numbers of labels first: a study that is cut has whole seeds."""
        return [
            Cell(arm, budget, seed) for seed in self.cfg.seeds for budget in reversed(self.budgets) for arm in self.arms
        ]


def make_plan(given: StudyConfig) -> Plan:
    """Reads the labels and the header of ``init_from``. Raises UsageError."""
    objective: Objective = create(given.objective, "objective", Objective)
    classifies = given.objective["_target_"] == CLASSIFY
    arms = choose_arms(given, classifies)
    cfg, notes = settle(given, find_start(given))
    assert isinstance(cfg, StudyConfig)
    for name, init_from in cfg.others.items():
        channels = find_start(replace(_finetuning(cfg), init_from=init_from, init_channels="repeat")).known["data"]
        if channels["in_chans"] != cfg.data.in_chans and classifies:
            arms = [arm for arm in arms if (arm.weights, arm.method) != (name, "probe")]
            notes.append(f"{name}_probe is left out: {init_from} has {channels['in_chans']} channels")
    source, more = sourced(cfg, objective, train=True)
    budgets, skipped = choose_budgets(cfg, source, classifies)
    if not classifies and getattr(source, "values", None) is not None:
        _check_budgets(cfg, objective, source, budgets)
    metric, rule = choose_metric(cfg, objective, source, classifies)
    uncached = replace(cfg, data=replace(cfg.data, cache=None))
    val, _ = sourced(uncached, objective, train=False)
    listings = len(source), listing_digest(source), len(val), listing_digest(val)
    return Plan(cfg, arms, budgets, metric, rule, *listings, [*notes, *more, *skipped])


def choose_budgets(cfg: StudyConfig, source: Source, classifies: bool) -> tuple[list[Budget], list[str]]:
    """The numbers of labels that the training images have, and a line for those that they do not."""
    budgets, too_many, notes = [], [], []
    counts = _counts(source) if classifies else {}
    smallest = min(counts, key=lambda name: counts[name], default="")
    most = counts[smallest] if classifies else len(source)
    for label in cfg.labels:
        if label == ALL:
            budgets.append(Budget(ALL, f"all {len(source)} images", len(source)))
        elif label > most:
            too_many.append(str(label))
        elif ALL in cfg.labels and label * max(1, len(counts)) >= len(source):
            notes.append(f"labels={label} left out: these are all images")
        elif classifies and label < 2:
            notes.append("labels=1 left out: cross-validation needs two images of a class")
        elif classifies:
            budgets.append(Budget(label, f"{label} per class", label * len(counts)))
        else:
            budgets.append(Budget(label, f"{label} images", label))
    has = f"class {smallest} has {most}" if classifies else f"data.path has {most} images"
    if too_many:
        notes.append(f"labels={','.join(too_many)} left out: {has}")
    if not budgets:
        raise UsageError(f"labels must have a number of images that there are, 2 or more per class, or all; {has}")
    return budgets, notes


def _check_budgets(cfg: StudyConfig, objective: Objective, source: Source, budgets: Sequence[Budget]) -> None:
    """Raises UsageError for drawn images that have no or equal numbers, before the measurements that come first."""
    for seed, budget in itertools.product(cfg.seeds, budgets):
        if budget.label != ALL:
            try:
                objective.fit(some_images(source, int(budget.label), seed), cfg)
            except UsageError as error:
                raise UsageError(f"labels={budget.label} is too small: with seed {seed}, {error}") from error


def _counts(source: Source) -> dict[str, int]:
    """Images of each class. Raises UsageError without classes."""
    classes = require_labels(source, "data.path")
    found = Counter(source.label(index) for index in range(len(source)))
    return {name: found[number] for number, name in enumerate(classes)}


def choose_metric(cfg: StudyConfig, objective: Objective, source: Source, classifies: bool) -> tuple[str, str]:
    """The metric and the reason for it; of classes that training images have in unequal numbers one that says so.

    Raises ConfigError for "-" before a metric of ours that should be high.
    """
    if cfg.metric is not None:
        name = cfg.metric.removeprefix("-")
        if is_ours(cfg.objective) and cfg.metric not in (name, signed(name)):
            raise ConfigError(f"metric must be {name}, of which more is better; got {cfg.metric}")
        return signed(cfg.metric), "metric"
    if not classifies or objective.best != "top1":
        return objective.best, "objective.best"
    counts = _counts(source).values()
    ratio = max(counts) / max(1, min(counts))
    rule = f"the largest class has {ratio:.1f} times the training images of the smallest"
    if ratio <= UNEQUAL:
        return "top1", rule
    return ("auroc" if len(counts) == 2 else "balanced_accuracy"), rule


def steps_of(cfg: StudyConfig, images: int) -> int:
    """Optimizer steps of a training on so many images."""
    batch = batch_of(cfg, images)
    return cfg.steps or min(max(round(EPOCHS * images / batch), LEAST_STEPS), MOST_STEPS)


def batch_of(cfg: StudyConfig, images: int) -> int:
    """Images per step; even where mixup needs pairs."""
    batch = min(cfg.optim.global_batch_size, images)
    return batch - batch % 2 if cfg.augment.mixup > 0 or cfg.augment.cutmix > 0 else batch


def training(plan: Plan, cell: Cell) -> FinetuneConfig:
    """The config of a training: every arm of a budget has as many steps."""
    cfg, arm, images = plan.cfg, cell.arm, cell.budget.images
    batch = batch_of(cfg, images)
    steps_per_epoch = max(1, images // batch)
    epochs = steps_of(cfg, images) / steps_per_epoch
    few: dict[str, Any] = {"labels_per_class" if plan.classifies else "num_images": cell.budget.label}
    if cell.budget.label == ALL:
        few = dict.fromkeys(few)
    own: dict[str, Any] = {"init_from": cfg.init_from} if arm.weights == PRETRAINED else {"init_from": None}
    data, optim = replace(cfg.data, **few), replace(cfg.optim, global_batch_size=batch)
    model = cfg.model
    if arm.weights in cfg.others:
        data, model, own = _of_other(cfg, data, cfg.others[arm.weights])
    if arm.weights == RANDOM:
        optim.layer_decay = None  # it spares what pretraining has learned
    if arm.method == "probe":
        own["freeze"] = "encoder"
    if arm.method == "auto":
        own["recipe"] = "auto"
    schedule = replace(cfg.schedule, epochs=epochs, warmup_epochs=WARMUP * epochs)
    objective = {**cfg.objective, "best": plan.metric} if plan.classifies else cfg.objective
    own |= {"objective": objective, "trainer": _trainer(cfg.trainer, epochs), "seed": cell.seed}
    return _finetuning(cfg, data=data, model=model, optim=optim, schedule=schedule, **own)


def _trainer(given: TrainerConfig, epochs: float) -> TrainerConfig:
    return replace(given, checkpoint_every_epochs=epochs, keep_every_epochs=None)


def _of_other(cfg: StudyConfig, data: DataConfig, init_from: str) -> tuple[DataConfig, Any, dict[str, Any]]:
    """Data, network and weights of ``others``: the network is theirs; so is the normalisation of as many channels."""
    how = "repeat" if cfg.init_channels == "strict" else cfg.init_channels
    start = find_start(replace(_finetuning(cfg), init_from=init_from, init_channels=how))
    known = start.known
    if len(known["data"].get("mean") or ()) == data.in_chans:
        data = replace(data, mean=list(known["data"]["mean"]), std=list(known["data"]["std"]))
    given = {name: value for name, value in known["model"].items() if value is not None}
    blank = {"depths": None, "dims": None, "strides": None, "timm": None}
    return data, replace(cfg.model, **{**blank, **given}), {"init_from": init_from, "init_channels": how}


def _finetuning(cfg: StudyConfig, **changes: Any) -> FinetuneConfig:
    names = [field.name for field in dataclasses.fields(FinetuneConfig)]
    return FinetuneConfig(**{name: copy.deepcopy(getattr(cfg, name)) for name in names} | changes)


def probing(plan: Plan, cell: Cell, cache: str) -> ProbeConfig:
    """The config of a logistic regression on frozen features, on the images of a training of the same cell."""
    cfg = training(plan, cell)
    random = cell.arm.weights == RANDOM
    names = [field.name for field in dataclasses.fields(UnsetBackboneConfig)]
    network = {name: getattr(cfg.model, name) if random else None for name in names}
    return ProbeConfig(
        RANDOM if random else str(cfg.init_from),
        data=DataOverrides(**vars(cfg.data)),
        loader=cfg.loader,
        precision=cfg.precision,
        device=cfg.trainer.device,
        seed=cell.seed,
        solver="lbfgs",
        layer=plan.cfg.layer,
        l2=cfg.auto.l2,
        folds=cfg.auto.folds,
        cache=None if random else cache,
        class_weights=cfg.objective.get("class_weights"),
        model=UnsetBackboneConfig(**network),
    )


def evaluating(plan: Plan, run_dir: Any) -> EvaluateConfig:
    """The config of measuring a trained network on the validation images."""
    cfg = plan.cfg
    named = [cfg.objective["_target_"], *([cfg.data.val_source["_target_"]] if cfg.data.val_source else [])]
    own = cfg.data
    data = DataOverrides(
        val_source=own.val_source, val_path=own.val_path, val_target_path=getattr(own, own.val_maps_key)
    )
    return EvaluateConfig(
        f"{run_dir}@last",
        data=data,
        loader=cfg.loader,
        precision=cfg.precision,
        device=cfg.trainer.device,
        allow=named,
        report=None,
    )


def rivals(arms: Sequence[Arm]) -> tuple[str, list[str]]:
    """The arm that stands for pretraining, which no validation image has chosen, and those without it."""
    mine = [arm.name for arm in arms if arm.weights == PRETRAINED]
    ours = next((name for name in ("auto", "finetuned", "pretrained_probe") if name in mine), "")
    return ours, [arm.name for arm in arms if arm.weights == RANDOM]
