"""The config of each Hydra command, made of the groups."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from fcmae.config.checks import (
    L2,
    LAYERS,
    as_list,
    check,
    check_channels,
    check_class,
    check_class_weights,
    check_device,
    check_neighbours,
    check_not_negative,
    check_one_of,
    check_positive,
    check_positives,
    check_seed,
    check_stages,
    is_positive,
)
from fcmae.config.conflicts import check_auto, check_finetuning, check_pretraining
from fcmae.config.data import AugmentConfig, DataConfig, are_same_places
from fcmae.config.few_labels import AutoConfig
from fcmae.config.loader import LoaderConfig
from fcmae.config.model import DECODER_WIDTH, ClassifierConfig, ClassifierEngineConfig, EngineConfig, FCMAEConfig
from fcmae.config.normalize import without_derived
from fcmae.config.prepare import PrepareConfig
from fcmae.config.study import StudyKeys
from fcmae.config.training import LoggerConfig, MonitorConfig, OptimConfig, ScheduleConfig, TrainerConfig
from fcmae.config.typed import from_dict
from fcmae.config.unset import UnsetBackboneConfig, UnsetClassifierConfig, UnsetDataConfig, settled
from fcmae.messages import print_once_rank0
from fcmae.plugins import NAMED_BY, is_named
from fcmae.precision import FLOAT8, PRECISIONS
from fcmae.urls import PIPE, is_command

INIT_CHANNELS = ("strict", "repeat", "mean", "new")


@dataclass
class RunConfig:
    """Keys of every training run."""

    name: str = "default"
    """Names the run directory, runs/NAME/TIME."""
    seed: int = 0
    """Seeds everything random: initial weights, order, crops, masks, augmentation, drop path."""
    init_from: str | None = None
    """Initial weights: a run (RUN, RUN@best, RUN@last or RUN@STEP), a checkpoint, encoder.safetensors, a directory of
    timm's or Transformers', a file of the official code or of timm, or timm:NAME, which timm downloads. None = random
    weights. In fine-tuning it gives the keys of data and model whose default is null. Not read again once the run has a
    checkpoint."""
    init_channels: str = "strict"
    """The stem of ``init_from`` for another number of channels: ``strict`` = an error; ``repeat`` its channels in turn,
    or their ``mean`` for each, both scaled to keep the sum; ``new`` = initial weights."""
    precision: str = "auto"
    """``float32``, ``tf32``, ``bf16``, ``fp16``, in pretraining ``fp8`` (docs/engines.md); ``auto`` = what the run used
    so far; in a new one bf16 on a GPU that has it, fp16 on an older one, float32 on a CPU."""
    data: DataConfig = field(default_factory=DataConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_one_of("init_channels", self.init_channels, INIT_CHANNELS)
        check_one_of("precision", self.precision, (*PRECISIONS, FLOAT8))


@dataclass
class PretrainConfig(RunConfig):
    """``fcmae pretrain``."""

    model: FCMAEConfig = field(default_factory=FCMAEConfig)
    mask: Any = None
    """How the hidden patches are chosen (model.mask_ratio says how many): ``_target_``, a class, and its arguments;
    mask=random, block, grid or weighted (docs/plugins.md). None = random."""
    target: Any = None
    """What is predicted at the masked patches, one or several of NAME: ``_target_``, a class, its arguments, and
    ``weight``, its factor in the loss or ``learned`` (docs/targets.md). target.NAME=null leaves one out. None = the
    image's pixels."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask = {"_target_": "fcmae.masks.RandomMask"} if self.mask is None else self.mask
        self.target = _targets(self.target)
        if self.model.decoder_embed_dim is None:  # not earlier: model.decoder may be given after the defaults
            self.model.decoder_embed_dim = DECODER_WIDTH.get(self.model.decoder)
        check_class("mask", self.mask)
        found, scope = self.trainer.micro_batch_size == "auto", self.model.grn_scope
        allowed = "image with trainer.micro_batch_size=auto, because batch makes the micro-batch part of the recipe"
        check("model.grn_scope", scope, not (found and scope == "batch"), allowed)
        check_channels("logger.channels", self.logger.channels, self.data.in_chans)
        patience = self.monitor.patience
        expected = "null without val_loss (data.val_path, trainer.eval_every_epochs)"
        check("monitor.patience", patience, patience is None or self.measures_val_loss, expected)
        check_pretraining(self)

    @property
    def measures_val_loss(self) -> bool:
        """Whether the run measures its loss on validation images."""
        asked = self.monitor.val_loss
        given = self.data.val_path is not None or self.data.val_source is not None
        return self.trainer.eval_every_epochs is not None and (given if asked is None else asked)


def _targets(given: Any) -> dict[str, dict[str, Any]]:
    """The targets of pretraining by name, each with its weight. A mistake where it cannot be that."""
    if given is None:
        given = {"pixels": {"_target_": "fcmae.targets.Pixels", "norm": "patch"}}
    left = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    check("target", given, bool(left), "one or several of NAME: _target_: PACKAGE.CLASS and its arguments")
    targets = {}
    for name, value in left.items():
        ok = str(name).isidentifier() and is_named(value)
        if check(f"target.{name}", value, ok, "a name and _target_: PACKAGE.CLASS and its arguments"):
            weight = value.get("weight", 1.0)
            ok = weight == "learned" or is_positive(weight)
            check(f"target.{name}.weight", weight, ok, "a positive number or learned")
            targets[name] = {**value, "weight": weight}
    return targets


@dataclass
class FinetuneConfig(RunConfig):
    """``fcmae finetune``."""

    data: DataConfig = field(default_factory=UnsetDataConfig)
    model: ClassifierConfig = field(default_factory=UnsetClassifierConfig)
    objective: Any = None
    """What is trained for: ``_target_``, a class, and its arguments (docs/plugins.md). None = objective=classify."""
    init_decoder: bool = True
    """Begin with the head of ``init_from`` where shapes are equal: with target maps its U-Net (or that of pretraining
    with model.decoder=unet); in detection its layers, with other classes all but the last ones."""
    freeze: str = "none"
    """Weights that stay as they are: ``none``; ``encoder``, all but the head's; ``stages:N``, the stem and the first N
    stages."""
    recipe: str | None = None
    """``auto`` = for few labels: the better of probe and fine-tuning from it (docs/few_labels.md), group ``auto``."""
    auto: AutoConfig = field(default_factory=AutoConfig)
    engine: ClassifierEngineConfig = field(default_factory=ClassifierEngineConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective = {"_target_": CLASSIFY} if self.objective is None else self.objective
        check_class("objective", self.objective)
        ok = re.fullmatch(r"none|encoder|stages:[1-9]", self.freeze) is not None
        check("freeze", self.freeze, ok, "none, encoder or stages:N, such as stages:2")
        check_finetuning(self)
        check_auto(self, CLASSIFY)

    def settled(self, known: dict[str, dict[str, Any]]) -> "FinetuneConfig":
        """With a value for every key of ``data`` and ``model``; ``known`` holds values by group and key.

        Raises ConfigError.
        """
        data = settled(DataConfig, self.data, known.get("data"))
        return dataclasses.replace(self, data=data, model=settled(ClassifierConfig, self.model, known.get("model")))


@dataclass
class StudyConfig(StudyKeys, FinetuneConfig):
    """``fcmae study``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_study()
        check("recipe", self.recipe, self.recipe is None, "null in a study, which has the arm auto")
        every, budget = self.trainer.eval_every_epochs, self.trainer.budget
        check("trainer.budget", budget, budget is None, "null in a study; set steps")
        check("trainer.eval_every_epochs", every, every is None, "null in a study, which chooses nothing by val_path")


DataOverrides = dataclasses.make_dataclass(
    "DataOverrides",
    [(f.name, Any, field(default=None)) for f in dataclasses.fields(DataConfig)],
    namespace={"__doc__": "Group ``data`` where a checkpoint brings its own: what is not None replaces it."},
)


CLASSIFY = "fcmae.tasks.objectives.Classify"
"""The objective without which a config means this one."""
RANDOM = "random"
"""The checkpoint that means random weights."""
CHANNELS = (
    *("in_chans", "channels", "nodata", "bit_depth", "dtype", "normalize", "low", "high", "mean", "std"),
    *("fit", "pad", "decode_on"),
)
"""Keys of group ``data`` whose values must fit each other."""


@dataclass
class CheckpointConfig:
    """Keys of all commands that take a checkpoint."""

    checkpoint: str = ""
    """A checkpoint file, or a run's directory: RUN, RUN@best, RUN@last or RUN@STEP. ``knn`` and ``probe`` also take
    ``random``: random weights of the network of group ``model``."""
    data: DataOverrides = field(default_factory=DataOverrides)  # type: ignore[valid-type]  # made above
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    batch_size: int | None = None
    """Images per rank at once. null = 256; 16 whole images or windows where a network predicts maps or boxes."""
    precision: str = "auto"
    """``float32``, ``tf32``, ``bf16``, ``fp16``; ``auto`` = as in a new run."""
    device: str = "auto"
    """``auto`` = cuda if there is one, else cpu."""
    out: str | None = None
    """A JSON file for the result."""
    allow: list[str] = field(default_factory=list)
    """Classes, PACKAGE.CLASS or FILE.py:CLASS, that may be called although only the checkpoint names them, as its
    data.source or objective."""

    def __post_init__(self) -> None:
        check("checkpoint", self.checkpoint, bool(self.checkpoint), "a run's directory or a checkpoint file")
        check_positive("batch_size", self.batch_size)
        check_one_of("precision", self.precision, PRECISIONS)
        check_device("device", self.device)
        # Before the checkpoint is read; what depends on its channels or its kind of source is checked with them.
        given = self._given()
        known = (*CHANNELS, *(() if "name" in given else ("label_column",)))
        alone = {name: value for name, value in given.items() if name not in known}
        from_dict(DataConfig, alone, prefix="data")

    def at_once(self, dense: bool = False) -> int:
        """Images per rank at once; ``dense`` if the network predicts maps or boxes, which take more memory."""
        return self.batch_size or (16 if dense else 256)

    def merge_data(self, own: DataConfig | dict[str, Any]) -> DataConfig:
        """The checkpoint's data config, or the keys that it knows, overridden by the command line.

        A path or a source on the command line replaces the checkpoint's images, whichever of the two named them, and
        their target maps. The class of a checkpoint's own source must be in ``allow``; its commands are dropped.
        """
        given, values = self._given(), dataclasses.asdict(own) if isinstance(own, DataConfig) else dict(own)
        for source, path, maps in (("source", "path", "target_path"), ("val_source", "val_path", "val_target_path")):
            if path in given and not are_same_places(given[path], values.get(path)):
                values[maps] = None
            if not given.keys().isdisjoint({"name", path}):
                values[source] = None
            elif source in given or values.get(source) is not None:
                values[path] = None
            if values.get(source) is not None and values[source]["_target_"] in self.allow:
                values[source].pop(NAMED_BY, None)
        values["cache"] = None  # pays off over many epochs
        for path in ("path", "val_path"):
            if path not in given and any(is_command(str(one)) for one in as_list(values.get(path))):
                values[path] = None
                print_once_rank0(
                    f"data.{path} of the checkpoint is a command ({PIPE}), which is not run; give it yourself"
                )
        if given.get("name", "table") != "table" and isinstance(values.get("label_column"), (list, tuple)):
            values["label_column"] = None  # other sources have no columns of numbers
        return from_dict(DataConfig, {**without_derived(values, given), **given}, prefix="data")

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self.data).items() if value is not None}


@dataclass
class EvaluateConfig(CheckpointConfig):
    """``fcmae evaluate``."""

    labels: str | None = None
    """A JSON or CSV file with the accepted classes of each image, instead of the folders (docs/evaluation.md)."""
    per_class: str | None = None
    """A .json or .csv file for the accuracy of each class."""
    confusion: str | None = None
    """A .json or .csv file for the confusion matrix: one row per true class, one column per predicted class."""
    report: str | None = "run"
    """A folder for metrics, numbers of each class, plots and the worst images (docs/evaluation.md); ``run`` = the
    folder ``evaluation`` of the checkpoint's run; None = none."""
    wandb: bool = False
    """Add the report to the run's wandb run: metrics, a table of the classes, and pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("labels", "per_class", "confusion"):
            value = getattr(self, name)
            check(name, value, value is None or value.endswith((".json", ".csv")), "a file named .json or .csv")


@dataclass
class FeaturesConfig(CheckpointConfig):
    """Keys of all commands on frozen features."""

    layer: str = "pooled"
    """``pooled``: mean over the last map, then the head's LayerNorm, as the classifier's; ``mean``: the mean alone;
    ``stages``: the means of stages one after another; ``stages_std``: their means and standard deviations."""
    stages: list[int] | None = None
    """Stages, from 1, of ``layer=stages`` and ``stages_std``; None = all."""
    cache: str | None = "run"
    """Where features are kept: ``run`` = the folder ``features`` of the checkpoint's run; a folder; None = nowhere."""
    seed: int = 0
    """Seeds the images of data.labels_per_class, the weights of checkpoint=random, and in ``probe`` initial weights,
    order and crops."""
    model: UnsetBackboneConfig = field(default_factory=UnsetBackboneConfig)
    """The network of checkpoint=random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("layer", self.layer, LAYERS)
        check_stages("stages", self.stages, self.layer)
        check_seed(self.seed)
        given = {f"model.{name}": value for name, value in vars(self.model).items() if value is not None}
        if self.checkpoint == RANDOM:
            example = "a network, such as model=convnextv2_atto, with checkpoint=random"
            check("model.backbone", self.model.backbone, self.model.backbone is not None, example)
        for name, value in given.items():
            check(name, value, self.checkpoint == RANDOM, "unset unless checkpoint=random")


@dataclass
class KnnConfig(FeaturesConfig):
    """``fcmae knn``."""

    k: Any = field(default_factory=lambda: [10, 20])
    """Number of neighbours that vote: one number or several."""
    temperature: float = 0.07
    """Neighbours vote with exp(cosine similarity / temperature)."""
    gallery: int | None = 20_000
    """Training images to compare with, the first of a fixed random order; None = all."""
    queries: int | None = None
    """Validation images to classify, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.k = check_neighbours("k", self.k, "gallery", self.gallery)
        for name in ("temperature", "gallery", "queries"):
            check_positive(name, getattr(self, name))


@dataclass
class ProbeConfig(FeaturesConfig):
    """``fcmae probe``: linear classifiers on frozen features; ``experiment=in1k/probe`` is MAE's recipe."""

    solver: str = "sgd"
    """``sgd``: steps of ``optimizer`` over batches; ``lbfgs``: logistic regression by L-BFGS, for few labels."""
    norm: str = "batchnorm"
    """Before the linear layer of solver=sgd: ``batchnorm``, without affine parameters, or ``standardise``, by the mean
    and deviation of all training features, which solver=lbfgs always does."""
    l2: Any = field(default_factory=lambda: list(L2))
    """lbfgs: strengths of the penalty l2 / 2 * sum of squared weights; cross-validation (``folds``) chooses one."""
    folds: int = 5
    """lbfgs: parts of the training images; each is held out once to choose l2."""
    class_weights: Any = None
    """lbfgs: factors on the loss, one per class; ``auto`` = by inverse frequency; None = none."""
    optimizer: str = "sgd"
    """``sgd`` with momentum, ``lars`` as MAE, or ``adamw``."""
    blr: Any = field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0])
    """Base learning rates, lr = blr * train_batch_size / 256; each trains a classifier of its own, all at once."""
    train_batch_size: int = 1024
    """Features per step; at most as many as there are training images."""
    epochs: int = 90
    """Times that every feature is seen."""
    warmup_epochs: int = 10
    """Epochs in which the learning rate rises linearly; half a cosine to zero follows."""
    weight_decay: float = 0.0
    """On the classifier's weights, not its bias."""
    momentum: float = 0.9
    """Momentum of lars and sgd."""
    random_crops: bool = False
    """Features of a new random crop and flip every epoch (data.crop_scale, data.hflip), which cannot be kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("solver", self.solver, ("sgd", "lbfgs"))
        check_one_of("norm", self.norm, ("batchnorm", "standardise"))
        check_one_of("optimizer", self.optimizer, ("lars", "sgd", "adamw"))
        self.blr, self.l2 = check_positives("blr", self.blr), check_positives("l2", self.l2)
        check("folds", self.folds, self.folds > 1, "2 or more")
        self.class_weights = check_class_weights("class_weights", self.class_weights)
        crops, sgd = self.random_crops, self.solver == "sgd"
        check("random_crops", crops, sgd or not crops, "false with solver=lbfgs, which sees every image once")
        check("train_batch_size", self.train_batch_size, self.train_batch_size > 1, "2 or more")
        check_positive("epochs", self.epochs)
        check("warmup_epochs", self.warmup_epochs, 0 <= self.warmup_epochs <= self.epochs, "from 0 to epochs")
        for name in ("weight_decay", "momentum"):
            check_not_negative(name, getattr(self, name))


COMMANDS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "knn": KnnConfig,
    "probe": ProbeConfig,
    "prepare": PrepareConfig,
    "study": StudyConfig,
}
"""The Hydra commands and their schemas; conf/COMMAND.yaml is the primary config of each."""
