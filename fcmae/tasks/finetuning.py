"""Supervised training of a whole network, from pretrained or random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.utils.data import Dataset

from fcmae.config import FinetuneConfig
from fcmae.data.pixels.transforms import finetune_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.samples import LabelledImages
from fcmae.data.sources import Source, few_labels, gives_float, require_labels, train_source, val_source, with_classes
from fcmae.distributed import World
from fcmae.engines.dense import dense
from fcmae.errors import ConfigError, UsageError
from fcmae.evaluation.classify import accuracy, classified
from fcmae.loggers.logger import RunLogger
from fcmae.models.build import build_classifier
from fcmae.models.drop_path import draw_paths_by_sample
from fcmae.randomness import sample_keys, step_generator
from fcmae.tasks.initial import Start, find_start, load_initial, settle
from fcmae.tasks.mixup import Mixup
from fcmae.tasks.monitors import Monitor, Wish, at_evaluations
from fcmae.tasks.task import Losses


class Finetuning:
    """Supervised training of the dense classifier, from pretrained or random weights."""

    name = "finetune"
    mixes_micro_batch = False

    def __init__(self, cfg: FinetuneConfig, start: Start | None = None) -> None:
        self.start = find_start(cfg) if start is None else start
        cfg, self.notes = settle(cfg, self.start)
        self.cfg = cfg
        self.transform = finetune_transform(cfg.data, cfg.augment, cfg.loader.max_pixels)
        self.source = train_source(cfg.data, cfg.loader)
        policy = cfg.augment.auto_augment
        if policy is not None and cfg.data.source is not None and gives_float(self.source):
            raise ConfigError(f"augment.auto_augment is {policy!r}; must be null for a source of float32 (data.source)")
        self.classes = require_labels(self.source, "data.path")
        self.monitors: list[Monitor] = []
        if cfg.trainer.eval_every_epochs is not None:
            self.val_source, notes = _validation(cfg, self.classes)
            self.notes += notes
            self.monitors = at_evaluations(cfg.trainer, self._log_accuracy)
        if cfg.model.num_classes not in (None, len(self.classes)):
            raise ConfigError(f"model.num_classes is {cfg.model.num_classes}; the data has {len(self.classes)} classes")
        if cfg.data.labels_per_class is not None:
            self.source = few_labels(self.source, cfg.data.labels_per_class, cfg.seed)
            _check_batch(len(self.source), cfg)
        self.model: ConvNeXt = build_classifier(cfg.model, cfg.data.in_chans, len(self.classes), cfg.seed)
        self.keys = draw_paths_by_sample(self.model)
        self._compiled = False
        self.pairs = cfg.augment.mixup > 0 or cfg.augment.cutmix > 0
        self.mixup = Mixup(cfg.augment.mixup, cfg.augment.cutmix, len(self.classes), cfg.data.size)

    def initialise(self) -> None:
        if self.start.path is not None:
            self.notes.append(load_initial(self.model, self.start.path, self.cfg.init_channels))

    def dataset(self) -> Dataset:
        return LabelledImages(self.source, self.transform, self.cfg.seed)

    def prepare(self, plan: BatchPlan) -> None:
        pass

    def compile(self) -> None:
        if self.cfg.engine.name == "dense":
            self._compiled = True
        else:
            self.model.compile()

    def draw(self, step: int, positions: range) -> list[Tensor]:
        drawn = [sample_keys(self.cfg.seed, step, positions)]
        if self.pairs:
            pairs = (self.cfg.optim.global_batch_size + 1) // 2
            mixes = self.mixup.draw(step_generator(self.cfg.seed, step), pairs)
            drawn.append(mixes[torch.tensor(positions) // 2])
        return drawn

    def loss(self, model: nn.Module, batch: Sequence[Tensor], weight: Tensor | None = None) -> Losses:
        imgs, targets, self.keys.values, *mixes = batch
        if mixes:
            imgs, targets = self.mixup(imgs, targets, *mixes)
        smoothing = self.cfg.augment.label_smoothing
        losses = F.cross_entropy(self._logits(model, imgs), targets, label_smoothing=smoothing, reduction="none")
        return (losses.mean() if weight is None else (losses * weight).mean()), {}

    def _logits(self, model: nn.Module, imgs: Tensor) -> Tensor:
        engine = self.cfg.engine
        if engine.name == "timm":
            return model(imgs)
        assert isinstance(model, ConvNeXt)
        maps = dense(model, imgs, compiled=self._compiled, recompute_stages=engine.recompute_stages)
        return model.forward_head(maps[-1])

    def _log_accuracy(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> float:
        metrics: dict[str, float] = {}
        for prefix, network in (("", self.model), ("ema_", ema)):
            if network is None:
                continue
            was_training = network.training
            cfg = self.cfg
            batch_size = cfg.trainer.micro_batch_size or max(1, cfg.optim.global_batch_size // world.size)
            share = classified(network, self.val_source, cfg.data, cfg.loader, batch_size, cfg.precision, world, stop)
            result = accuracy(share, world)
            metrics |= {f"{prefix}{name}": value for name, value in result.items() if name != "images"}
            network.train(was_training)
        logger.log(step, metrics)
        return metrics.get("ema_top1", metrics["top1"])

    def extra_state(self) -> dict[str, Any]:
        return {"classes": self.classes, **self.start.state()}

    def finish(self, run_dir: Path, ema: nn.Module | None, step: int) -> None:
        pass


def _check_batch(images: int, cfg: FinetuneConfig) -> None:
    """Raises ConfigError if ``data.labels_per_class`` leaves fewer images than a batch has."""
    batch, fits = cfg.optim.global_batch_size, max(1, images - images % 2)  # mixup needs pairs
    if images < batch:
        raise ConfigError(
            f"data.labels_per_class={cfg.data.labels_per_class} leaves {images} training images, fewer than "
            f"optim.global_batch_size={batch}; give optim.global_batch_size={fits}"
        )


def _validation(cfg: FinetuneConfig, classes: list[str]) -> tuple[Source, list[str]]:
    """The validation images, of some or all of the classes, and a line for the user. Raises UsageError."""
    try:
        source = val_source(cfg.data, cfg.loader)
    except UsageError as error:
        if cfg.data.val_path is not None:
            raise
        raise UsageError(f"{error}; or train without evaluating: trainer.eval_every_epochs=null") from error
    return with_classes(source, "data.val_path", classes, "data.path")
