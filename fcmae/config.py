"""The schema of conf/: one dataclass a group, every range check, and how a Hydra config becomes one of them.

Hydra composes, OmegaConf checks names and types against these classes, ``__post_init__`` checks ranges. Nothing past
:func:`to_typed` sees a DictConfig.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcmae.errors import ConfigError

T = TypeVar("T")

SOURCES = ("imagefolder", "fashion_mnist", "synthetic")
PRECISIONS = ("float32", "tf32", "bf16", "fp16")
WANDB_MODES = ("auto", "online", "offline", "disabled")


def check(key: str, value: Any, ok: bool, allowed: str) -> None:
    """Raises ConfigError unless ``ok``: names the full key, what was given and what is allowed."""
    if not ok:
        raise ConfigError(f"{key} is {value!r}; allowed is {allowed}")


def _check_one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    check(key, value, value in allowed, "one of " + ", ".join(allowed))


def _check_ratio(key: str, value: float) -> None:
    check(key, value, 0 <= value <= 1, "a number from 0 to 1")


def _check_positive(key: str, value: float | None) -> None:
    check(key, value, value is None or value > 0, "a positive number")


def _check_not_negative(key: str, value: float | None) -> None:
    check(key, value, value is None or value >= 0, "a number that is not negative")


@dataclass
class BackboneConfig:
    """Group ``model``, what both tasks share: the timm ConvNeXt."""

    backbone: str = "convnextv2_atto"
    """A timm model name."""
    depths: list[int] | None = None
    """Blocks in each of the four stages; None = the named model's."""
    dims: list[int] | None = None
    """Width of each of the four stages; None = the named model's."""
    stem_stride: int = 4
    """timm's ``patch_size``; 4 gives the total stride 32, 1 gives 8."""

    def __post_init__(self) -> None:
        for name in ("depths", "dims"):
            value = getattr(self, name)
            ok = value is None or (len(value) == 4 and min(value) > 0)
            check(f"model.{name}", value, ok, "four positive integers, one a stage, or null")
        check("model.stem_stride", self.stem_stride, self.stem_stride in (1, 2, 4), "1, 2 or 4")

    def backbone_kwargs(self) -> dict[str, Any]:
        """The arguments for timm that differ from the named model's."""
        kwargs = {"depths": self.depths, "dims": self.dims, "patch_size": self.stem_stride}
        return {name: value for name, value in kwargs.items() if value is not None}


@dataclass
class FCMAEConfig(BackboneConfig):
    """Group ``model`` in pretraining."""

    mask_ratio: float = 0.6
    mask_patch_size: int | None = None
    """Pixels a side; a multiple of the total stride, which is the default."""
    decoder_embed_dim: int = 512
    decoder_depth: int = 1
    norm_pix_loss: bool = True
    init: str = "timm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("model.mask_ratio", self.mask_ratio, 0 <= self.mask_ratio < 1, "a number in [0, 1)")
        _check_positive("model.mask_patch_size", self.mask_patch_size)
        _check_positive("model.decoder_embed_dim", self.decoder_embed_dim)
        _check_positive("model.decoder_depth", self.decoder_depth)
        _check_one_of("model.init", self.init, ("timm", "official"))


@dataclass
class ClassifierConfig(BackboneConfig):
    """Group ``model`` in fine-tuning."""

    num_classes: int | None = None
    """None = as many as the training data has."""
    drop_path_rate: float = 0.0
    head_init_scale: float = 1.0
    """Factor on the initial weights and bias of the classifier; 0.001 of timm's std 0.02 is the paper's 2e-5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("model.num_classes", self.num_classes, self.num_classes is None or self.num_classes > 1, "2 or more")
        check("model.drop_path_rate", self.drop_path_rate, 0 <= self.drop_path_rate < 1, "a number in [0, 1)")
        _check_positive("model.head_init_scale", self.head_init_scale)


@dataclass
class EngineConfig:
    """Group ``engine``: how the backbone runs over visible patches."""

    name: str = "packed"
    grn_scope: str = "image"
    """``batch`` is the official code's, for parity."""
    recompute_stages: list[int] = field(default_factory=list)
    """Stages, 1 to 4, whose activations are recomputed instead of kept; `fcmae bench step` prints the cost."""

    def __post_init__(self) -> None:
        ok = set(self.recompute_stages) <= {1, 2, 3, 4}
        check("engine.recompute_stages", self.recompute_stages, ok, "some of 1, 2, 3, 4")
        _check_one_of("engine.name", self.name, ("packed", "masked", "minkowski"))
        _check_one_of("engine.grn_scope", self.grn_scope, ("image", "batch"))


@dataclass
class DataConfig:
    """Group ``data``: where samples come from and how they become tensors."""

    name: str = "imagefolder"
    path: str | None = None
    """Folder of the training images; for fashion_mnist the folder with the four .gz files, or None to look for them."""
    val_path: str | None = None
    """Folder of the validation images; fashion_mnist has its own."""
    in_chans: int = 3
    image_size: Any = 224
    """Pixels a side, or [height, width]."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Of pixel values in 0..1, one number a channel."""
    pad: int = 0
    """Pixels added on each side before anything else."""
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Share of the area that a training crop covers."""
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Aspect ratio (width / height) of a training crop before it is resized."""
    hflip: float = 0.5
    crop_pct: float = 0.875
    """Evaluation below 384 px: the short side is resized to image_size / crop_pct and the centre cropped. From 384 px
    on the image is resized straight to the square, as the official code does."""
    workers: int | None = None
    """Loader processes a rank; None = from the cores this process may use; 0 = load in the training process."""
    labels_per_class: int | None = None
    """Train on that many labelled images of each class only, chosen by the seed."""
    length: int = 1024
    """Images in the synthetic source."""

    def __post_init__(self) -> None:
        _check_one_of("data.name", self.name, SOURCES)
        sides = self.image_size if isinstance(self.image_size, (list, tuple)) else [self.image_size] * 2
        ok = len(sides) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides)
        check("data.image_size", self.image_size, ok, "a positive integer, or [height, width]")
        self.image_size = (sides[0], sides[1])
        _check_positive("data.in_chans", self.in_chans)
        for name in ("mean", "std"):
            value = getattr(self, name)
            ok = len(value) == self.in_chans and (name == "mean" or min(value) > 0)
            check(f"data.{name}", value, ok, f"{self.in_chans} numbers, one a channel (data.in_chans)")
        ok = len(self.crop_scale) == 2 and 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        check("data.crop_scale", self.crop_scale, ok, "[least, most] with 0 < least <= most <= 1")
        ok = len(self.crop_ratio) == 2 and 0 < self.crop_ratio[0] <= self.crop_ratio[1]
        check("data.crop_ratio", self.crop_ratio, ok, "[least, most] with 0 < least <= most")
        _check_ratio("data.hflip", self.hflip)
        check("data.crop_pct", self.crop_pct, 0 < self.crop_pct <= 1, "a number in (0, 1]")
        for name in ("pad", "workers"):
            _check_not_negative(f"data.{name}", getattr(self, name))
        for name in ("labels_per_class", "length"):
            _check_positive(f"data.{name}", getattr(self, name))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        height, width = self.image_size
        return height, width


@dataclass
class AugmentConfig:
    """Group ``augment``: what fine-tuning does to images and labels beyond crop and flip; timm's implementations."""

    auto_augment: str | None = None
    """A timm policy, the paper's is ``rand-m9-mstd0.5-inc1``."""
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("random_erasing", "label_smoothing"):
            _check_ratio(f"augment.{name}", getattr(self, name))
        for name in ("mixup", "cutmix"):
            _check_not_negative(f"augment.{name}", getattr(self, name))


@dataclass
class OptimConfig:
    """Group ``optim``: AdamW."""

    blr: float = 1.5e-4
    """Base learning rate: lr = blr * global_batch_size / 256."""
    lr: float | None = None
    """The learning rate itself, instead of blr."""
    weight_decay: float = 0.05
    """On weights with two or more dimensions; never on biases, norms, GRN or the mask token."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    layer_decay: float | None = None
    """Factor on the learning rate for each layer further from the head; None = none."""
    layer_decay_type: str = "single"
    """``single``: every block is a layer; ``group``: three blocks of stage 3 are one, as for Base and larger."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None = no clipping."""

    def __post_init__(self) -> None:
        _check_positive("optim.blr", self.blr)
        _check_positive("optim.lr", self.lr)
        _check_not_negative("optim.weight_decay", self.weight_decay)
        check("optim.betas", self.betas, len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two in [0, 1)")
        ok = self.layer_decay is None or 0 < self.layer_decay <= 1
        check("optim.layer_decay", self.layer_decay, ok, "a number in (0, 1], or null")
        _check_one_of("optim.layer_decay_type", self.layer_decay_type, ("single", "group"))
        _check_positive("optim.clip_grad", self.clip_grad)

    def peak_lr(self, global_batch_size: int) -> float:
        """The learning rate after warm-up, before layer decay."""
        return self.lr if self.lr is not None else self.blr * global_batch_size / 256


@dataclass
class ScheduleConfig:
    """Group ``schedule``: linear warm-up, then half a cosine to ``min_lr``, per step."""

    epochs: float = 800
    warmup_epochs: float = 40
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("schedule.epochs", self.epochs)
        ok = 0 <= self.warmup_epochs <= self.epochs
        check("schedule.warmup_epochs", self.warmup_epochs, ok, f"from 0 to schedule.epochs ({self.epochs:g})")
        _check_not_negative("schedule.min_lr", self.min_lr)


@dataclass
class TrainerConfig:
    """Group ``trainer``: how the recipe runs on the hardware at hand."""

    global_batch_size: int = 4096
    """Samples an optimizer step over all ranks: part of the recipe."""
    micro_batch_size: int | None = None
    """Samples a rank processes at once; None = a rank's whole share. The rest is accumulated."""
    precision: str = "float32"
    compile: bool | None = None
    """torch.compile; None = on a GPU only."""
    cuda_graph: bool | None = None
    """Replay pretraining steps from a CUDA graph; None = where it can be: one GPU, not fp16."""
    device: str = "auto"
    """``auto`` = cuda if there is one, else cpu."""
    deterministic: bool = False
    """Only deterministic algorithms (``torch.use_deterministic_algorithms``)."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every_epochs: float = 1.0
    keep_checkpoints: int = 2
    """The newest that stay; in fine-tuning the best stays too."""
    keep_every_epochs: float | None = None
    """Checkpoints after multiples of so many epochs stay for good; None = none."""
    on_save_error: str = "stop"
    """When a checkpoint cannot be written, e.g. on a full disk: ``stop``, or ``continue`` without it."""
    on_nonfinite: str = "stop"
    """At a loss or gradient that is infinite or NaN: ``stop`` before the step, or ``skip`` the step."""
    max_skipped: int = 10
    """Steps that may be skipped before the run stops after all."""
    hang_timeout: float = 1800.0
    """Seconds without a finished step, evaluation or save (the first step compiles) after which the run ends, leaving
    the stacks of every rank; also how long ranks and data workers are waited for."""
    eval_every_epochs: float = 1.0
    """Fine-tuning: evaluation; pretraining: a reconstruction picture."""
    resume: bool = True
    """Continue from the newest valid checkpoint of the run directory, if there is one."""
    max_steps: int | None = None
    """Stop (resumable) after that many optimizer steps of the schedule."""
    allow_changed_recipe: bool = False
    """Resume although keys of the recipe changed (``fcmae/training/recipe.py`` lists those that are not)."""
    max_hours: float | None = None
    """Save and stop (resumable) so long after the start of the process; None = never."""
    ema_decay: float | None = None
    """Decay of the exponential moving average of the weights; None = none."""

    def __post_init__(self) -> None:
        _check_one_of("trainer.precision", self.precision, PRECISIONS)
        _check_one_of("trainer.device", self.device, ("auto", "cpu", "cuda"))
        positive = ["global_batch_size", "micro_batch_size", "log_every", "keep_checkpoints", "max_steps"]
        positive += ["checkpoint_every_epochs", "keep_every_epochs", "eval_every_epochs", "max_hours", "hang_timeout"]
        for name in positive:
            _check_positive(f"trainer.{name}", getattr(self, name))
        _check_one_of("trainer.on_save_error", self.on_save_error, ("stop", "continue"))
        _check_one_of("trainer.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        _check_not_negative("trainer.max_skipped", self.max_skipped)
        ok = self.ema_decay is None or 0 < self.ema_decay < 1
        check("trainer.ema_decay", self.ema_decay, ok, "a number in (0, 1), or null")


@dataclass
class LoggerConfig:
    """Group ``logger``; metrics.jsonl is always written."""

    wandb: str = "auto"
    """``auto`` = online with an API key, offline without."""
    project: str = "fcmae"
    tensorboard: bool = False
    progress: bool = True
    """A progress bar on a terminal; a line every ``trainer.log_every`` steps elsewhere."""

    def __post_init__(self) -> None:
        _check_one_of("logger.wandb", self.wandb, WANDB_MODES)


@dataclass
class RunConfig:
    """What every training run has."""

    name: str = "default"
    """Names the run directory, runs/NAME/TIME."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        _check_not_negative("seed", self.seed)


@dataclass
class PretrainConfig(RunConfig):
    """``fcmae pretrain``."""

    model: FCMAEConfig = field(default_factory=FCMAEConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class FinetuneConfig(RunConfig):
    """``fcmae finetune``."""

    init_from: str | None = None
    """A pretraining run's directory or checkpoint; None = random weights."""
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


DataOverrides = dataclasses.make_dataclass(
    "DataOverrides",
    [(f.name, Any, field(default=None)) for f in dataclasses.fields(DataConfig)],
    namespace={"__doc__": "Group ``data`` where a checkpoint brings its own: what is not None replaces it."},
)


@dataclass
class EvaluateConfig:
    """``fcmae evaluate`` and ``fcmae knn``: a checkpoint, and what differs from its own data config."""

    checkpoint: str = ""
    """A run's directory or a checkpoint file."""
    data: DataOverrides = field(default_factory=DataOverrides)  # type: ignore[valid-type]  # made above
    batch_size: int = 256
    precision: str = "float32"
    device: str = "auto"
    out: str | None = None
    """A JSON file for the result."""

    def __post_init__(self) -> None:
        check("checkpoint", self.checkpoint, bool(self.checkpoint), "a run's directory or a checkpoint file")
        _check_positive("batch_size", self.batch_size)
        _check_one_of("precision", self.precision, PRECISIONS)
        _check_one_of("device", self.device, ("auto", "cpu", "cuda"))

    def merge_data(self, own: DataConfig) -> DataConfig:
        """The checkpoint's data config with what was given on the command line."""
        given = {k: v for k, v in dataclasses.asdict(self.data).items() if v is not None}
        return from_dict(DataConfig, {**dataclasses.asdict(own), **given}, prefix="data")


@dataclass
class KnnConfig(EvaluateConfig):
    """``fcmae knn``."""

    k: int = 10
    temperature: float = 0.07
    """Neighbours vote with exp(cosine similarity / temperature)."""
    gallery: int | None = 20_000
    """Training images to compare with, the first of a fixed random order; None = all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("k", self.k)
        _check_positive("temperature", self.temperature)
        _check_positive("gallery", self.gallery)


COMMANDS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "knn": KnnConfig,
}
"""The Hydra commands and their schemas; conf/COMMAND.yaml is the primary config of each."""


def to_typed(cfg: DictConfig, schema: type[T]) -> T:
    """The composed config as an instance of its schema. Raises ConfigError for a value missing or out of range."""
    try:
        typed = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(typed, schema)
    return typed


def from_dict(schema: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """A schema's instance from a nested dict, names and types checked. Raises ConfigError naming the full key."""
    try:
        return to_typed(OmegaConf.merge(OmegaConf.structured(schema), values), schema)  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise ConfigError(describe(error, prefix)) from error


def to_dict(cfg: Any) -> dict[str, Any]:
    """A typed config as a nested dict of plain values, for config.yaml and checkpoints."""
    values = OmegaConf.to_container(OmegaConf.structured(cfg))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def describe(error: Exception, prefix: str = "") -> str:
    """One line for an error of OmegaConf: the full key, what was given, and what is allowed."""
    key = ".".join(part for part in (prefix, getattr(error, "full_key", None) or "") if part)
    reason = str(error).split("\n")[0]
    owner = getattr(error, "object_type", None)
    if "not in" in reason and owner is not None and dataclasses.is_dataclass(owner):
        names = ", ".join(f.name for f in dataclasses.fields(owner))
        return f"{key}: unknown key; allowed is one of {names}"
    return f"{key}: {reason}" if key else reason


def conf_dir() -> Path:
    """The folder of YAML files: conf/ at the top of a checkout, fcmae/conf in an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise ConfigError(f"the package's conf/ is missing beside {package}; install it again")


def register_schemas() -> None:
    """Makes the schemas known to Hydra as ``schema/COMMAND``."""
    from hydra.core.config_store import ConfigStore

    for name, schema in COMMANDS.items():
        ConfigStore.instance().store(name=name, node=schema, group="schema", package="_global_")


def compose(command: str, overrides: list[str] | None = None) -> Any:
    """The typed config of a command, as the command line would get it. Raises ConfigError."""
    import hydra
    from hydra.errors import HydraException

    register_schemas()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return to_typed(hydra.compose(command, overrides or []), COMMANDS[command])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def explain(error: Exception) -> str:
    """One line for whatever Hydra or OmegaConf raised while composing."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OmegaConfBaseException) and getattr(cause, "full_key", None)):
        cause = cause.__cause__
    if isinstance(cause, Exception):
        return describe(cause)
    message = str(error).split("Config search path:")[0]
    return " ".join(line.strip() for line in message.splitlines() if line.strip())
