"""Fine-tuning that begins with a linear classifier which a probe found on the frozen features."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fcmae.config import FinetuneConfig
from fcmae.data.sources import Subset
from fcmae.distributed import World
from fcmae.errors import UsageError, counted, shown
from fcmae.evaluation.features import Extractor, Features
from fcmae.evaluation.logistic import Linear
from fcmae.models.headed import backbone_of
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.initial import Start
from fcmae.tasks.monitors import Wish

UNBALANCED = 3
"""Times as many images as in the smallest class, from which a line names another metric than top-1."""


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


def class_lines(labels: Tensor, classes: Sequence[str], folds: int, best: str) -> list[str]:
    """Lines about classes of few images: fewer than there are folds, or so few that ``top1`` may overlook them.

    Args:
        labels: int64 ``[n]``.
        best: ``objective.best``.
    """
    counts = labels.bincount(minlength=len(classes)).tolist()
    ranked = sorted((count, label) for label, count in enumerate(counts) if count)
    (least, label), (most, largest) = ranked[0], ranked[-1]
    rare, frequent = shown(classes[label]), shown(classes[largest])
    lines = []
    if least < folds:
        held = f"in {least} of them" if least > 1 else "never"
        lines.append(f"auto.folds is {folds}; class {rare} has {counted(least, 'image')} and is held out {held}")
    if best == "top1" and most > UNBALANCED * least:
        other = "auroc" if len(ranked) == 2 else "balanced_accuracy"
        lines.append(
            f"recipe=auto chooses by top1, and class {frequent} has {most / least:.3g} times the images of class "
            f"{rare}: {frequent} as the answer for every image is {100 * most / len(labels):.0f} % right; "
            f"objective.best={other} counts all classes alike"
        )
    return lines
