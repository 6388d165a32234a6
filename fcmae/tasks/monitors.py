"""What is measured while a run trains."""

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.config import PretrainConfig, ProbeConfig, TrainerConfig
from fcmae.data.sources import Source
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.evaluation.collapse import Channels, effective_rank, mean_cosine
from fcmae.evaluation.features import Extractor, first, labelled_sources
from fcmae.evaluation.knn import check_neighbours, knn_accuracy, warn_of_copies
from fcmae.evaluation.probe import probe
from fcmae.loggers.logger import RunLogger
from fcmae.models import FCMAE
from fcmae.randomness import preserved

Wish: TypeAlias = Callable[[], bool]
"""Whether this rank wishes to stop."""

Look: TypeAlias = Callable[[nn.Module | None, int, RunLogger, World, Wish], float | None]
"""Takes the model with averaged weights (if the run keeps one), the step, the logger and the world; looks and logs.

All ranks call it. Returns what the best checkpoint is chosen by, the same on all ranks, if anything; leaves the model
in training mode and no trace in what is trained. Raises EvaluationStopped, on all ranks, if one of them wishes to stop.
"""


class Monitor(NamedTuple):
    """Something to look at every so many epochs, and at the end."""

    every_epochs: float
    look: Look
    patience: int | None = None
    """The run ends after so many looks without a better score; None = never."""


def at_evaluations(cfg: TrainerConfig, look: Look, patience: int | None = None) -> list[Monitor]:
    """One monitor that looks at every evaluation, or none where the run has no evaluations."""
    return [] if cfg.eval_every_epochs is None else [Monitor(cfg.eval_every_epochs, look, patience)]


MOST_IMAGES = 256
"""Of a batch that is only looked at. Images without gradients take little memory."""


def evaluation_batch(cfg: PretrainConfig) -> int:
    """Images per rank and batch of a look."""
    return min(cfg.trainer.micro_batch_size or MOST_IMAGES, MOST_IMAGES)


class Frozen:
    """Looks at the frozen features of an encoder in training: the weights that are exported, so the averaged ones
    where the run keeps an average."""

    def __init__(self, backbone: ConvNeXt, cfg: PretrainConfig) -> None:
        self.backbone = backbone
        self.cfg = cfg

    def extractor(self, ema: nn.Module | None, world: World, stop: Wish) -> Extractor:
        """What extracts the features."""
        cfg, backbone = self.cfg, ema.backbone if isinstance(ema, FCMAE) else self.backbone
        size = evaluation_batch(cfg)
        return Extractor(backbone, cfg.data, world, size, cfg.precision, stop=stop, loader=cfg.loader)


class Collapse(Frozen):
    """``effective_rank``, ``feature_cosine`` and ``dead_channels`` of validation images, and one warning.

    See :mod:`fcmae.evaluation.collapse`.
    """

    IMAGES = 1_000
    """At most; the singular values of more take long."""
    LEAST_RANK = 2.0
    MOST_COSINE = 0.999
    MOST_DEAD = 0.5
    """Beyond these the features have collapsed (docs/monitoring.md)."""

    def __init__(self, backbone: ConvNeXt, cfg: PretrainConfig, source: Source) -> None:
        super().__init__(backbone, cfg)
        self.images = first(source, self.IMAGES)
        self.warned = False

    def __call__(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> None:
        extract = self.extractor(ema, world, stop)
        channels = Channels(extract.backbone, world.device)
        with channels.watched():
            features = extract(self.images).values
        if len(features) < 2:
            return
        metrics = {"effective_rank": effective_rank(features), "feature_cosine": mean_cosine(features)}
        if (dead := channels.dead(world)) is not None:
            metrics["dead_channels"] = dead
        logger.log(step, metrics)
        lines = self._lines(metrics, step)
        for line in lines if world.is_main and not self.warned else ():
            logger.warn(step, line)
        self.warned |= bool(lines)

    @classmethod
    def warnings(cls, features: Tensor, step: int) -> list[str]:
        """A line if features ``[n, D]`` of different images have collapsed."""
        found = {"effective_rank": effective_rank(features), "feature_cosine": mean_cosine(features)}
        return cls._lines(found, step)

    @classmethod
    def _lines(cls, metrics: dict[str, float], step: int) -> list[str]:
        rank, cosine, dead = (metrics.get(name) for name in ("effective_rank", "feature_cosine", "dead_channels"))
        signs = []
        if rank is not None and rank < cls.LEAST_RANK:
            signs.append(f"effective_rank is {rank:.3g} (below {cls.LEAST_RANK:g})")
        if cosine is not None and cosine > cls.MOST_COSINE:
            signs.append(f"feature_cosine is {cosine:.6g} (above {cls.MOST_COSINE:g})")
        if dead is not None and dead > cls.MOST_DEAD:
            signs.append(f"dead_channels is {dead:.3g} (above {cls.MOST_DEAD:g})")
        collapse = f"warning: the features collapse at step {step}: {', '.join(signs)}; see docs/monitoring.md"
        return [collapse] if signs else []


class Labelled(Frozen):
    """Compares training with validation images, as many as ``monitor.knn_gallery`` and ``monitor.knn_queries`` say.

    Raises UsageError, before anything is trained, if either has no labels.
    """

    key: str

    def __init__(self, backbone: ConvNeXt, cfg: PretrainConfig) -> None:
        super().__init__(backbone, cfg)
        try:
            train, val, self.classes, self.notes = labelled_sources(cfg.data, cfg.loader, cfg.seed)
        except UsageError as error:
            raise UsageError(f"monitor.{self.key} is {getattr(cfg.monitor, self.key):g}, but {error}") from error
        self.gallery, self.queries = first(train, cfg.monitor.knn_gallery), first(val, cfg.monitor.knn_queries)


class OnlineKnn(Labelled):
    """k-NN accuracy, logged as ``knnK``. Raises UsageError if ``monitor.knn_k`` is too large, too."""

    key = "knn_every_epochs"

    def __init__(self, backbone: ConvNeXt, cfg: PretrainConfig) -> None:
        super().__init__(backbone, cfg)
        self.warned = False
        check_neighbours("monitor.knn_k", cfg.monitor.knn_k, len(self.gallery))

    def __call__(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> None:
        extract = self.extractor(ema, world, stop)
        gallery, queries = extract(self.gallery), extract(self.queries)
        result = knn_accuracy(gallery, queries, len(self.classes), world, ks=self.cfg.monitor.knn_k)
        if not self.warned:
            warn_of_copies(result, len(queries.labels), world)
        self.warned = True
        logger.log(step, {name: value for name, value in result.items() if name != "copies"})


class OnlineProbe(Labelled):
    """Accuracy of a short linear probe, logged as ``probe_top1`` and, with six classes or more, ``probe_top5``."""

    key = "probe_every_epochs"

    def __init__(self, backbone: ConvNeXt, cfg: PretrainConfig) -> None:
        super().__init__(backbone, cfg)
        self.recipe = ProbeConfig(
            "of this run", seed=cfg.seed, epochs=30, warmup_epochs=3, blr=[0.1, 0.3, 1.0], train_batch_size=512
        )

    def __call__(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> None:
        extract = self.extractor(ema, world, stop)
        train, val = extract(self.gallery), extract(self.queries)
        with preserved(world.device):
            results = probe(itertools.repeat(train), val, len(self.classes), self.recipe, world)
        best = max(results, key=lambda result: result["top1"])
        logger.log(step, {f"probe_{name}": value for name, value in best.items() if name.startswith("top")})
