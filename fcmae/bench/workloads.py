"""What training steps compute in benchmarks: pretraining, and fine-tuning on our kernels or by timm's forward."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae.bench.targets import CLASSES
from fcmae.engines import convnext, region
from fcmae.engines.dense import dense
from fcmae.masks.patches import grid_size, random_mask
from fcmae.models import FCMAE, create_backbone

SUPERVISED = "timm"
"""The yardstick: timm's own forward over whole images with a classifier, no masking at all."""
DENSE = "dense"
"""The same step on the kernels of :mod:`fcmae.engines.dense`."""
DISTINCT_BATCHES = 4
"""Batches that take turns, so that no step finds its data in a cache."""
PRETRAIN, FINETUNE = "pretrain", "finetune"
TASKS = (PRETRAIN, FINETUNE)
LABELS = 1000
"""Classes of fine-tuning."""


class Workload(NamedTuple):
    """A model in training, its loss and the batches that the loss takes."""

    model: nn.Module
    loss: Callable[..., Tensor]
    batches: list[list[Tensor]]


def pretraining(model: FCMAE, batch_size: int, image_size: int, compiled: bool, device: torch.device) -> Workload:
    """Random images and masks."""
    model.to(device)
    if compiled:
        model.compile()
    imgs = _images(batch_size, image_size, device)
    keep = model.len_keep(image_size, image_size)
    rows, cols = grid_size(image_size, image_size, model.mask_patch_size)
    labels = torch.randint(0, CLASSES, (batch_size,), device=device)
    batches = [
        [imgs, random_mask(torch.rand(batch_size, rows * cols, device=device), keep), labels]
        for _ in range(DISTINCT_BATCHES)
    ]
    return Workload(model, lambda imgs, mask, label: model(imgs, mask, keep, label=label).loss, batches)


def finetuning(
    model: ConvNeXt, engine: str, batch_size: int, image_size: int, compiled: bool, device: torch.device
) -> Workload:
    """Cross entropy with random labels, without drop path and mixup. ``engine``: DENSE or SUPERVISED."""
    model.to(device)
    if engine == SUPERVISED:
        model.to(memory_format=torch.channels_last)
    imgs = _images(batch_size, image_size, device)
    batches = [[imgs, torch.randint(0, LABELS, (batch_size,), device=device)] for _ in range(DISTINCT_BATCHES)]
    forward = forward_of(engine)
    return Workload(model, lambda imgs, labels: F.cross_entropy(forward(model, imgs, compiled), labels), batches)


def classifier(name: str, strides: list[int] | None = None) -> ConvNeXt:
    """A network to fine-tune."""
    return create_backbone(name, num_classes=LABELS, strides=strides)


def forward_of(engine: str) -> Callable[[ConvNeXt, Tensor, bool], Tensor]:
    """The logits of images by that engine, compiled or not."""
    return _supervised_forward if engine == SUPERVISED else _dense_forward


def _images(batch_size: int, image_size: int, device: torch.device) -> Tensor:
    return torch.randn(batch_size, 3, image_size, image_size, device=device)


def _supervised_forward(model: ConvNeXt, imgs: Tensor, compiled: bool) -> Tensor:
    between, block = region(_between, compiled), region(_block, compiled)
    x = between(model.stem, imgs.contiguous(memory_format=torch.channels_last))
    for stage in convnext.stages(model):
        x = between(stage.downsample, x)
        for layers in convnext.blocks(stage):
            x = block(layers, x)
    return between(model.head, x)


def _dense_forward(model: ConvNeXt, imgs: Tensor, compiled: bool) -> Tensor:
    return region(_between, compiled)(model.head, dense(model, imgs, compiled=compiled)[-1])


# Two functions, because torch compiles one for eight different shapes at most.
def _between(layers: nn.Module, x: Tensor) -> Tensor:
    return layers(x)


def _block(layers: nn.Module, x: Tensor) -> Tensor:
    return layers(x)
