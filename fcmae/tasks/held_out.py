"""The loss of pretraining on images that are not trained on, without labels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fcmae.config import PretrainConfig
from fcmae.data.samples import MaskedImages
from fcmae.distributed import World
from fcmae.evaluation.features import first_indices, share_of
from fcmae.loggers.logger import RunLogger
from fcmae.models import FCMAE
from fcmae.precision import autocast
from fcmae.tasks.monitors import Wish, evaluation_batch
from fcmae.tasks.task import Losses

NO_EPOCH = -1
"""Stands for the epoch in the randomness of held-out samples, which training never sees."""

Loss = Callable[[nn.Module, Sequence[Tensor]], Losses]
"""Takes the model and the parts of the samples of a batch: :meth:`fcmae.tasks.task.Task.loss`."""


class HeldOut(Dataset[Any]):
    """Samples whose crop and mask are the same at every look: functions of the seed and the image's index."""

    def __init__(self, samples: MaskedImages, count: int | None) -> None:
        self.samples = samples
        self.indices = first_indices(samples.source, count)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Any:
        return self.samples[NO_EPOCH, self.indices[place]]


class HeldOutLoss:
    """The mean over the images of ``val_loss``, and of its parts ``val_loss_NAME`` if there are several.

    Of the weights that are exported: the averaged ones where the run keeps an average. GRN's norm is taken over each
    image, with ``model.grn_scope=batch``, too: the result then depends neither on batches nor on ranks.
    """

    def __init__(self, model: FCMAE, cfg: PretrainConfig, samples: MaskedImages, loss: Loss) -> None:
        self.model = model
        self.cfg = cfg
        self.images = HeldOut(samples, cfg.monitor.val_images)
        self.loss = loss

    def __call__(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> float:
        """Returns the loss with the sign changed: the best checkpoint has the highest."""
        model = ema if isinstance(ema, FCMAE) else self.model
        losses = self.measure(model, world, stop)
        logger.log(step, losses)
        return -losses["val_loss"]

    @torch.no_grad()
    def measure(self, model: FCMAE, world: World, stop: Wish) -> dict[str, float]:
        """``val_loss`` and its parts, on all ranks."""
        was_training, scope = model.training, model.grn_scope
        model.eval()
        model.grn_scope = "image"
        try:
            sums = self._sums(model, world, stop)
        finally:
            model.train(was_training)
            model.grn_scope = scope
        *totals, images = world.sum(sums).tolist()
        names = ["val_loss", *(f"val_loss_{name}" for name in model.targets)]
        means = {name: total / images for name, total in zip(names, totals, strict=True)}
        return means if len(model.targets) > 1 else {"val_loss": means["val_loss"]}

    def _sums(self, model: FCMAE, world: World, stop: Wish) -> Tensor:
        """Sums over this rank's images of the loss and its parts, and the number of images: float64."""
        cfg = self.cfg
        sums = torch.zeros(len(model.targets) + 2, dtype=torch.float64, device=world.device)
        for batch in share_of(self.images, cfg.loader, evaluation_batch(cfg), world, stop):
            with autocast(world.device, cfg.precision):
                loss, parts = self.loss(model, batch)
            means = torch.stack([loss, *(parts[name] for name in model.targets), torch.ones_like(loss)])
            sums += means.double() * len(batch[0])
        return sums
