"""Training samples that could not be read, counted over all ranks."""

import torch

from fcmae.config import LoaderConfig
from fcmae.data.loading import TrainBatches
from fcmae.data.unreadable import check_share
from fcmae.distributed import World


def count_bad_samples(batches: TrainBatches, step: int, cfg: LoaderConfig, world: World) -> dict[str, float]:
    """The metric ``bad_samples``, those since the last time, where they are skipped. Every rank calls this.

    Raises UsageError if they are more than ``loader.max_bad`` of an epoch (PeerError on all ranks but the first).
    """
    if cfg.on_error != "skip":
        return {}
    since, *epochs = world.sum(torch.tensor(batches.bad_samples(step))).tolist()
    samples = batches.plan.steps_per_epoch * batches.plan.global_batch_size
    world.on_main(lambda: check_share(max(epochs, default=0), samples, cfg.max_bad, "an epoch"))
    return {"bad_samples": since}
