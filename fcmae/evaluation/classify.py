"""Top-1 and top-5 accuracy over exactly the validation set."""

from collections.abc import Callable

import torch
from torch import nn

from fcmae.config import DataConfig
from fcmae.data.sources import Source
from fcmae.evaluation.features import autocast, batches, never
from fcmae.training.distributed import World


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    source: Source,
    cfg: DataConfig,
    batch_size: int,
    precision: str,
    world: World,
    stop: Callable[[], bool] = never,
) -> dict[str, float]:
    """``top1`` and ``top5`` in percent and the number of ``images``; every image counts once on any number of ranks.

    ``stop`` is asked before every batch. Raises EvaluationStopped on all ranks if it was true on one of them.
    """
    model.eval()
    counts = torch.zeros(3, dtype=torch.float64, device=world.device)
    for imgs, labels in batches(source, cfg, batch_size, world, stop=stop):
        with autocast(world.device, precision):
            logits = model(imgs).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack([ranked[:, 0].sum(), ranked.any(dim=1).sum(), torch.tensor(len(labels)).to(labels)])
    top1, top5, images = world.sum(counts).tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": images}
