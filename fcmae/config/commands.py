"""What each Hydra command takes, made of the groups."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fcmae.config.checks import check, check_not_negative, check_one_of, check_positive
from fcmae.config.data import AugmentConfig, DataConfig
from fcmae.config.model import ClassifierConfig, EngineConfig, FCMAEConfig
from fcmae.config.prepare import PrepareConfig
from fcmae.config.training import PRECISIONS, LoggerConfig, OptimConfig, ScheduleConfig, TrainerConfig
from fcmae.config.typed import from_dict


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
        check_not_negative("seed", self.seed)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        crops, device = self.data.crops_per_image, self.data.decode_on
        check("data.crops_per_image", crops, crops == 1, "1 in fine-tuning")
        check("data.decode_on", device, device == "cpu", "cpu in fine-tuning")


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
        check_positive("batch_size", self.batch_size)
        check_one_of("precision", self.precision, PRECISIONS)
        check_one_of("device", self.device, ("auto", "cpu", "cuda"))

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
        check_positive("k", self.k)
        check_positive("temperature", self.temperature)
        check_positive("gallery", self.gallery)


COMMANDS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "knn": KnnConfig,
    "prepare": PrepareConfig,
}
"""The Hydra commands and their schemas; conf/COMMAND.yaml is the primary config of each."""
