"""Linear probing: linear classifiers on frozen features (MAE, He et al. 2021, arXiv 2111.06377, appendix A.1).

As there: a BatchNorm without affine parameters before the linear layer, LARS on its weights, warm-up and cosine. Unlike
there, by default, the features are those of the whole images without augmentation, extracted once; and several learning
rates train at once over the same batches, each a classifier of its own. For few labels, ``solver=lbfgs`` is logistic
regression (:mod:`fcmae.evaluation.logistic`). Nothing is chosen on the validation images.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from fcmae.config import ProbeConfig
from fcmae.data.plan import BatchPlan
from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.evaluation.class_metrics import NAMES, metrics_of
from fcmae.evaluation.features import Features
from fcmae.evaluation.logistic import cross_validate, fit, stratified_folds, weights_of
from fcmae.optim.adamw import set_lr
from fcmae.optim.schedule import Schedule
from fcmae.randomness import Stream, seed_globals

HEAD_STD = 0.01
"""Of the initial weights, as MAE's."""


class Heads(nn.Module):
    """Linear classifiers over one normalisation of the features: ``[N, D]`` to ``[H, N, classes]``.

    All start from the same weights.
    """

    def __init__(self, count: int, features: int, classes: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False, eps=1e-6) if norm is None else norm
        linear = nn.Linear(features, classes)
        nn.init.trunc_normal_(linear.weight, std=HEAD_STD)
        nn.init.zeros_(linear.bias)
        self.linears = nn.ModuleList(copy.deepcopy(linear) for _ in range(count))

    def forward(self, values: Tensor) -> Tensor:
        values = self.norm(values)
        return torch.stack([linear(values) for linear in self.linears])


class Epochs:
    """The features of the training images in each epoch, from the first again whenever it is iterated over."""

    def __init__(self, make: Callable[[int], Features]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Features]:
        return map(self.make, itertools.count())


class Standardise(nn.Module):
    """Subtracts the mean of the training features and divides by their standard deviation: ``[N, D]``."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", values.mean(0))
        self.register_buffer("std", values.std(0, correction=0).clamp(min=1e-6))

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


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
    schedule = Schedule(1.0, 0.0, cfg.warmup_epochs * steps, cfg.epochs * steps)
    heads = optimizer = None
    for epoch, train in zip(range(cfg.epochs), epochs, strict=False):
        if not lrs:
            continue
        if heads is None or optimizer is None:
            seed_globals(cfg.seed, Stream.INIT)
            norm = Standardise(train.values) if cfg.norm == "standardise" else None
            heads = Heads(len(lrs), train.values.shape[1], classes, norm).to(world.device)
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
def head_metrics(heads: Heads, val: Features) -> list[dict[str, float]]:
    """The metrics of each head, in percent (:func:`fcmae.evaluation.class_metrics.metrics_of`)."""
    normed = heads.norm(val.values)
    return [metrics_of(linear(normed), val.labels) for linear in heads.linears]


def probe(
    epochs: Iterable[Features], val: Features, classes: int, cfg: ProbeConfig, world: World
) -> list[dict[str, float]]:
    """``blr``, ``lr`` and metrics in percent on ``val`` for each rate of ``cfg.blr``; the ranks share the rates.

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
    mine = range(len(lrs))[world.rank :: world.size]
    heads = train_heads(itertools.chain([train], epochs), plan, [lrs[i] for i in mine], classes, cfg, world)
    of_mine = [] if heads is None else head_metrics(heads, val)
    return [
        {"blr": cfg.blr[i], "lr": lr, **metrics}
        for (i, lr), metrics in zip(enumerate(lrs), _shared(of_mine, mine, len(lrs), world), strict=True)
    ]


def _shared(of_mine: list[dict[str, float]], mine: Sequence[int], count: int, world: World) -> list[dict[str, float]]:
    """The metrics of all heads, of which this rank has those numbered ``mine``."""
    if world.size == 1:
        return of_mine
    names = world.from_main(lambda: list(of_mine[0]))  # the first rank always has a head
    table = torch.zeros(count, len(names), dtype=torch.float64, device=world.device)
    for i, metrics in zip(mine, of_mine, strict=True):
        table[i] = torch.tensor(list(metrics.values()), dtype=torch.float64)
    return [dict(zip(names, row, strict=True)) for row in world.sum(table).tolist()]


def choose_rate(epochs: Iterable[Features], classes: int, cfg: ProbeConfig, world: World) -> int:
    """The place in ``cfg.blr`` of the rate with the best top-1 on a stratified fifth of the training images, which the
    classifiers then have not seen; of equal ones the first.

    Args:
        epochs: can be iterated over again.
    """
    if len(cfg.blr) == 1:
        return 0
    train = next(iter(epochs))
    held = stratified_folds(train.labels, 5, cfg.seed).to(train.labels.device) == 0
    rest = (Features(each.values[~held], each.labels[~held]) for each in epochs)
    heads = probe(rest, Features(train.values[held], train.labels[held]), classes, cfg, world)
    return max(range(len(heads)), key=lambda i: heads[i]["top1"])


def probe_by_sgd(
    epochs: Iterable[Features], val: Features, classes: int, cfg: ProbeConfig, world: World
) -> dict[str, Any]:
    """The metrics on ``val`` of the classifier with the rate that :func:`choose_rate` took; ``all`` has all rates."""
    best = choose_rate(epochs, classes, cfg, world)
    heads = probe(epochs, val, classes, cfg, world)
    chosen = {name: value for name, value in heads[best].items() if name != "lr"}
    how = (
        "the only learning rate" if len(heads) == 1 else f"one of {len(heads)} rates, on a fifth of the training images"
    )
    return {**chosen, "chosen": how, "images": len(val.labels), "all": heads}


def probe_by_lbfgs(
    epochs: Iterable[Features], val: Features, classes: int, cfg: ProbeConfig, world: World
) -> dict[str, Any]:
    """The metrics on ``val`` of logistic regression, with the l2 that cross-validation on the training images took.

    ``all`` has the log loss of held-out training images for each l2. Only the first of ``epochs`` is used.
    """
    train = next(iter(epochs))

    def solve() -> dict[str, Any]:
        weights = weights_of(cfg.class_weights, train.labels, classes)
        how: dict[str, Any] = {"chosen": "the only l2", "all": []}
        l2 = cfg.l2[0]
        if len(cfg.l2) > 1:
            folds = stratified_folds(train.labels, cfg.folds, cfg.seed)
            found = cross_validate(train.values, train.labels, classes, folds, cfg.l2, weights)
            l2, losses = found.l2, [{"l2": each, "log_loss": loss} for each, loss in found.log_loss.items()]
            used = int(folds.max()) + 1  # of few images fewer than cfg.folds
            how = {"chosen": f"{used}-fold cross-validation on the training images", "all": losses}
        linear = fit(train.values, train.labels, classes, [l2], weights)[l2]
        return {**metrics_of(linear(val.values), val.labels), "l2": l2, "images": len(val.labels), **how}

    return world.from_main(solve)


def table(result: dict[str, Any]) -> str:
    """The metrics of a result, a line each."""
    metrics = {name: result[name] for name in NAMES if name in result}
    return "\n".join(f"{name:17} {value:6.2f}" for name, value in metrics.items())
