"""What is measured while a run trains."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from timm.models.convnext import ConvNeXt
from torch import nn

from fcmae.config import PretrainConfig, TrainerConfig
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.evaluation.features import Extractor, first, labelled_sources
from fcmae.evaluation.knn import check_neighbours, knn_accuracy, warn_of_copies
from fcmae.loggers.logger import RunLogger
from fcmae.models import FCMAE

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


class OnlineKnn:
    """k-NN accuracy of an encoder in training, logged as ``knnK``: validation images against training images.

    Raises UsageError, before anything is trained, if either has no labels or ``monitor.knn_k`` is too large.
    """

    def __init__(self, backbone: ConvNeXt, cfg: PretrainConfig) -> None:
        self.backbone = backbone
        self.cfg = cfg
        monitor = cfg.monitor
        try:
            train, val, self.classes, self.notes = labelled_sources(cfg.data, cfg.loader, cfg.seed)
        except UsageError as error:
            raise UsageError(f"monitor.knn_every_epochs is {monitor.knn_every_epochs:g}, but {error}") from error
        self.warned = False
        self.gallery, self.queries = first(train, monitor.knn_gallery), first(val, monitor.knn_queries)
        check_neighbours("monitor.knn_k", monitor.knn_k, self.gallery)

    def __call__(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> None:
        """Looks at the weights that are exported: the averaged ones where the run keeps an average."""
        backbone = ema.backbone if isinstance(ema, FCMAE) else self.backbone
        cfg = self.cfg
        extract = Extractor(
            backbone, cfg.data, world, evaluation_batch(cfg), cfg.precision, stop=stop, loader=cfg.loader
        )
        gallery, queries = extract(self.gallery), extract(self.queries)
        result = knn_accuracy(gallery, queries, len(self.classes), world, ks=self.cfg.monitor.knn_k)
        if not self.warned:
            warn_of_copies(result, len(queries.labels), world)
        self.warned = True
        logger.log(step, {name: value for name, value in result.items() if name != "copies"})
