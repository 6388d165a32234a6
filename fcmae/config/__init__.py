"""The schema of conf/: one dataclass per group, with its range checks.

Hydra composes, OmegaConf checks names and types against these classes, ``__post_init__`` checks ranges. Nothing after
:func:`to_typed` sees a DictConfig.
"""

from fcmae.config.checks import LAYERS, check, check_channels, check_stages, mistaken
from fcmae.config.commands import (
    CLASSIFY,
    COMMANDS,
    CheckpointConfig,
    DataOverrides,
    EvaluateConfig,
    FeaturesConfig,
    FinetuneConfig,
    KnnConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    StudyConfig,
)
from fcmae.config.compose import compose, conf_dir, every_mistake, help_text, misread, quoted, register_schema
from fcmae.config.conflicts import check_cuda_graph, graph_obstacles
from fcmae.config.data import AugmentConfig, DataConfig
from fcmae.config.loader import LoaderConfig
from fcmae.config.model import BackboneConfig, ClassifierConfig, EngineConfig, FCMAEConfig
from fcmae.config.places import check_outputs, check_places, not_set
from fcmae.config.plain import check_plain, portable, without_arguments
from fcmae.config.prepare import PrepareConfig
from fcmae.config.renamed import upgraded
from fcmae.config.training import (
    LoggerConfig,
    MonitorConfig,
    OptimConfig,
    ScheduleConfig,
    TrainerConfig,
)
from fcmae.config.typed import explain, from_dict, from_dotlist, to_dict, to_typed

__all__ = [
    "CLASSIFY",
    "COMMANDS",
    "LAYERS",
    "AugmentConfig",
    "BackboneConfig",
    "CheckpointConfig",
    "ClassifierConfig",
    "DataConfig",
    "DataOverrides",
    "EngineConfig",
    "EvaluateConfig",
    "FCMAEConfig",
    "FeaturesConfig",
    "FinetuneConfig",
    "KnnConfig",
    "LoaderConfig",
    "LoggerConfig",
    "MonitorConfig",
    "OptimConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ProbeConfig",
    "RunConfig",
    "ScheduleConfig",
    "StudyConfig",
    "TrainerConfig",
    "check",
    "check_channels",
    "check_cuda_graph",
    "check_outputs",
    "check_places",
    "check_plain",
    "check_stages",
    "compose",
    "conf_dir",
    "every_mistake",
    "explain",
    "from_dict",
    "from_dotlist",
    "graph_obstacles",
    "help_text",
    "misread",
    "mistaken",
    "not_set",
    "portable",
    "quoted",
    "register_schema",
    "to_dict",
    "to_typed",
    "upgraded",
    "without_arguments",
]
