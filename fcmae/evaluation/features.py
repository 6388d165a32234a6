"""Running a model over every sample of a source, on any number of ranks."""

import contextlib
from collections.abc import Iterator

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae.config import DataConfig
from fcmae.data.bad_samples import readable
from fcmae.data.cores import default_workers
from fcmae.data.loader import EvaluationImages, eval_loader
from fcmae.data.sources import Source
from fcmae.data.transforms import eval_transform, normalize
from fcmae.training.distributed import World

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast to ``bf16`` or ``fp16``; nothing for ``float32`` and ``tf32``."""
    if precision not in DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def batches(source: Source, cfg: DataConfig, batch_size: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the source, on the device: normalised images, and labels or -1. Ranks share no sample.

    What cannot be read is left out with ``data.on_error=skip``.
    """
    workers = default_workers(world.device, world.local_size) if cfg.workers is None else cfg.workers
    loader = eval_loader(
        EvaluationImages(source, eval_transform(cfg)),
        batch_size,
        rank=world.rank,
        world_size=world.size,
        workers=workers,
        pin_memory=world.device.type == "cuda",
        prefetch=cfg.prefetch,
    )
    for imgs, labels in readable(loader, len(source), cfg.on_error == "skip", cfg.max_bad):
        imgs = imgs.to(world.device, non_blocking=True)
        yield normalize(imgs, cfg.mean, cfg.std), labels.to(world.device, non_blocking=True)


@torch.inference_mode()
def pooled_features(
    backbone: ConvNeXt, source: Source, cfg: DataConfig, batch_size: int, precision: str, world: World
) -> tuple[Tensor, Tensor]:
    """Pooled features ``[n, D]`` (float32, after the head's norm) and labels ``[n]`` of this rank's samples."""
    backbone.eval()
    features, labels = [], []
    for imgs, batch_labels in batches(source, cfg, batch_size, world):
        with autocast(world.device, precision):
            pooled = backbone.forward_head(backbone.forward_features(imgs), pre_logits=True)
        features.append(pooled.float())
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)
