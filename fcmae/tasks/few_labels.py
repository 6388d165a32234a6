"""Fine-tuning that begins with a linear classifier which a probe found on the frozen features."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fcmae.config import FinetuneConfig
from fcmae.data.sources import Subset
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.evaluation.features import Extractor, Features
from fcmae.evaluation.logistic import Linear
from fcmae.models.headed import backbone_of
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.initial import Start
from fcmae.tasks.monitors import Wish


class FromHead(Finetuning):
    """Fine-tuning on some of the training images, whose classifier begins as ``head()``. It has no notes.

    Args:
        head: called on the first rank, if the run does not resume.
        network: gave the features that ``head`` reads. Without ``init_from`` training begins with its weights, because
            a network with another head is made with other random weights.
        images: indices into the training images; None = all.
    """

    def __init__(
        self,
        cfg: FinetuneConfig,
        start: Start,
        head: Callable[[], Linear],
        network: nn.Module,
        images: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cfg, start)
        self.head, self.network = head, network
        self.notes = []
        if images is not None:
            self.source = Subset(self.source, list(images))

    def initialise(self) -> None:
        super().initialise()
        self.notes = []
        if self.start.path is None:
            found = backbone_of(self.network).state_dict()
            weights = {name: value for name, value in found.items() if not name.startswith("head.fc.")}
            mine = backbone_of(self.model)
            mine.load_state_dict(mine.state_dict() | weights)
        set_head(self.model, self.head())


@torch.no_grad()
def set_head(model: nn.Module, linear: Linear) -> None:
    """Gives a classifier the weights of ``linear`` on the features that it reads."""
    fc: nn.Linear = model.head.fc  # type: ignore[union-attr, assignment]  # of timm's head and of RowHead
    fc.weight.copy_(linear.weight)
    fc.bias.copy_(linear.bias)


def frozen_features(task: Finetuning, layer: str, batch_size: int, world: World, stop: Wish) -> Features:
    """The features of all training images by the weights that fine-tuning begins with, whole on every rank.

    Raises UsageError if an image cannot be read; EvaluationStopped.
    """
    cfg = task.cfg
    extract = Extractor(
        backbone_of(task.model).to(world.device),
        cfg.data,
        world,
        batch_size,
        cfg.precision,
        layer,
        stop=stop,
        loader=cfg.loader,
    )
    features = extract(task.source)
    if len(features.labels) < len(task.source):
        missing = len(task.source) - len(features.labels)
        raise UsageError(f"recipe=auto needs every training image of data.path; {missing} cannot be read")
    return features
