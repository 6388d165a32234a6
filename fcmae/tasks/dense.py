"""The samples of fine-tuning: images with labels, or with target maps or boxes that are checked first."""

from fcmae.config import FinetuneConfig
from fcmae.data.sources import Source, train_source, val_source
from fcmae.data.sources.check_maps import check_maps
from fcmae.data.sources.create import boxed_source
from fcmae.data.sources.map_files import map_key, mapped_source
from fcmae.errors import ConfigError
from fcmae.models.objective import BoxObjective, DenseObjective, Objective


def sourced(cfg: FinetuneConfig, objective: Objective, train: bool) -> tuple[Source, list[str]]:
    """The training or validation samples, and what the user should know of their targets, a line each.

    Raises UsageError, a ConfigError for targets that do not fit.
    """
    if not isinstance(objective, DenseObjective):
        for name in ("target_path", "val_target_path", "target_column"):
            value = getattr(cfg.data, name)
            if value is not None:
                of = f"objective: {cfg.objective['_target_']}, which reads no maps"
                raise ConfigError(f"data.{name} must be null with {of}; got {value!r}")
        if isinstance(objective, BoxObjective):
            boxed = boxed_source(cfg.data, cfg.loader, train)
            return boxed, boxed.notes
        return (train_source if train else val_source)(cfg.data, cfg.loader), []
    objective.max_pixels = cfg.loader.max_pixels
    source = mapped_source(cfg.data, cfg.loader, train)
    return source, check_maps(source, map_key(cfg.data, train), objective.target, getattr(objective, "classes", ()))
