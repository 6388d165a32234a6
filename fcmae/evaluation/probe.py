"""Linear probing: linear classifiers on frozen features (MAE, He et al. 2021, arXiv 2111.06377, appendix A.1).

As there: a BatchNorm without affine parameters before the linear layer, LARS on its weights, warm-up and cosine. Unlike
there, by default, the features are those of the whole images without augmentation, extracted once; and several learning
rates train at once over the same batches, each a classifier of its own.
"""

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from fcmae.config import ProbeConfig
from fcmae.data.plan import BatchPlan
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.evaluation.classify import TOP5_FROM
from fcmae.evaluation.features import Features
from fcmae.optim.adamw import set_lr
from fcmae.optim.schedule import CosineSchedule
from fcmae.randomness import Stream, seed_globals

HEAD_STD = 0.01
"""Of the initial weights, as MAE's."""


class Heads(nn.Module):
    """Linear classifiers over one normalisation of the features: ``[N, D]`` to ``[H, N, classes]``.

    All start from the same weights.
    """

    def __init__(self, count: int, features: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False, eps=1e-6)
        linear = nn.Linear(features, classes)
        nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
        nn.init.zeros_(linear.bias)
        self.linears = nn.ModuleList(copy.deepcopy(linear) for _ in range(count))

    def forward(self, values: Tensor) -> Tensor:
        values = self.norm(values)
        return torch.stack([linear(values) for linear in self.linears])


def create_optimizer(heads: Heads, lrs: Sequence[float], cfg: ProbeConfig) -> torch.optim.Optimizer:
    """timm's LARS, SGD or AdamW, each head with a learning rate of its own; LARS adapts weights, not biases."""
    groups: list[dict[str, Any]] = []
    for linear, lr in zip(heads.linears, lrs, strict=True):
        adapt = {"always_adapt": True} if cfg.optimizer == "lars" else {}  # by default it would only with weight decay
        groups.append({"params": [linear.weight], "lr_scale": lr, "weight_decay": cfg.weight_decay, **adapt})
        groups.append({"params": [linear.bias], "lr_scale": lr, "weight_decay": 0.0})
    momentum: dict[str, Any] = {} if cfg.optimizer == "adamw" else {"momentum": cfg.momentum}
    name = "momentum" if cfg.optimizer == "sgd" else cfg.optimizer  # timm's "sgd" has Nesterov's momentum
    return create_optimizer_v2(groups, name, lr=0.0, **momentum)


def train_heads(
    epochs: Iterable[Features], plan: BatchPlan, lrs: Sequence[float], classes: int, cfg: ProbeConfig, world: World
) -> Heads | None:
    """Trains a head for each learning rate on this rank; without one, it only takes part in making features.

    ``epochs`` are the features of the training images in each epoch, ``plan`` the batches.
    """
    steps = plan.steps_per_epoch
    schedule = CosineSchedule(1.0, 0.0, cfg.warmup_epochs * steps, cfg.epochs * steps)
    heads = optimizer = None
    for epoch, train in zip(range(cfg.epochs), epochs, strict=False):
        if not lrs:
            continue
        if heads is None or optimizer is None:
            seed_globals(cfg.seed, Stream.INIT)
            heads = Heads(len(lrs), train.values.shape[1], classes).to(world.device)
            optimizer = create_optimizer(heads, lrs, cfg)
        order = torch.as_tensor(plan.order(epoch), device=world.device)
        for position in range(steps):
            chosen = order[position * plan.global_batch_size :][: plan.global_batch_size]
            set_lr(optimizer, schedule(epoch * steps + position))
            labels = train.labels[chosen]
            # A sum over the heads, so that none feels the others.
            loss = torch.stack([F.cross_entropy(logits, labels) for logits in heads(train.values[chosen])]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return None if heads is None else heads.eval()


@torch.no_grad()
def accuracies(heads: Heads, val: Features) -> Tensor:
    """Top-1 and top-5 in percent of each head, float64 ``[H, 2]``."""
    right = torch.zeros(len(heads.linears), 2, dtype=torch.float64, device=val.values.device)
    for values, labels in zip(val.values.split(4096), val.labels.split(4096), strict=True):
        logits = heads(values)
        hits = logits.topk(min(5, logits.shape[2]), dim=2).indices == labels[:, None]
        right += torch.stack([hits[..., 0].sum(1), hits.any(2).sum(1)], dim=1)
    return 100 * right / len(val.labels)


def probe(
    epochs: Iterable[Features], val: Features, classes: int, cfg: ProbeConfig, world: World
) -> list[dict[str, float]]:
    """``blr``, ``lr``, ``top1`` and ``top5`` on ``val`` for each rate of ``cfg.blr``; the ranks share them.

    Accuracies are in percent. Fewer than six classes have no ``top5``.

    Args:
        epochs: the features of the training images in each epoch, whole on every rank.
        classes: how many labels there are.
    """
    epochs = iter(epochs)
    train = next(epochs)
    images = len(train.labels)
    if images < 2:
        raise UsageError(f"data.path has {images} image that can be read; a linear probe needs two or more")
    plan = BatchPlan.create(images, min(cfg.train_batch_size, images), None, 1, cfg.seed)
    lrs = [blr * plan.global_batch_size / 256 for blr in cfg.blr]
    mine = slice(world.rank, None, world.size)
    heads = train_heads(itertools.chain([train], epochs), plan, lrs[mine], classes, cfg, world)
    result = torch.zeros(len(lrs), 2, dtype=torch.float64, device=world.device)
    if heads is not None:
        result[mine] = accuracies(heads, val)
    measured = world.sum(result).tolist()
    return [
        {"blr": blr, "lr": lr, "top1": top1, **({"top5": top5} if classes >= TOP5_FROM else {})}
        for blr, lr, (top1, top5) in zip(cfg.blr, lrs, measured, strict=True)
    ]
