"""The two things that are trained. A task knows its model, samples, loss and evaluation; the loop knows the rest."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.utils.data import Dataset

from fcmae.checkpoints import encoder
from fcmae.checkpoints.resume import say
from fcmae.config import FinetuneConfig, PretrainConfig, RunConfig, TrainerConfig, to_dict
from fcmae.data.loader import BatchPlan, EvaluationImages, LabelledImages, MaskedImages
from fcmae.data.pixels.transforms import eval_transform, finetune_transform, normalize, pretrain_transform
from fcmae.data.sources import Source, few_labels, gives_float, require_labels, train_source, val_source, with_classes
from fcmae.data.unreadable import ErrorsAside, collate, readable
from fcmae.distributed import World
from fcmae.engines.dense import dense
from fcmae.errors import ConfigError, UsageError
from fcmae.evaluation.classify import accuracy, classified
from fcmae.evaluation.reconstruct import Picture, reconstruction_picture
from fcmae.loggers.logger import RunLogger
from fcmae.masks.patches import grid_size, random_mask
from fcmae.models import FCMAE
from fcmae.models.build import build_classifier, build_fcmae
from fcmae.models.drop_path import draw_paths_by_sample
from fcmae.randomness import Stream, generator, sample_keys, step_generator
from fcmae.tasks.initial import Start, find_start, load_backbone, settle
from fcmae.tasks.mixup import Mixup
from fcmae.tasks.monitors import Look, Monitor, OnlineKnn, Wish


class Task(Protocol):
    """What the training loop asks of a task."""

    name: str
    source: Source
    monitors: list[Monitor]
    """What is looked at while training goes on, in this order."""
    notes: list[str]
    """What the user should know before training starts, a line each."""
    pairs: bool
    """Whether the samples at positions 2i and 2i + 1 of a global batch need each other."""
    mixes_micro_batch: bool
    """Whether a sample's loss depends on all others of its micro-batch."""

    @property
    def cfg(self) -> RunConfig: ...

    @property
    def model(self) -> nn.Module: ...

    def initialise(self) -> None:
        """Loads the weights that a new run begins with, on the first rank; a resumed run does without."""
        ...

    def dataset(self) -> Dataset:
        """Training samples by (epoch, index)."""
        ...

    def prepare(self, plan: BatchPlan) -> None:
        """Checks what depends on the sizes of batches, before the first is read."""
        ...

    def compile(self) -> None:
        """Has the network compiled by torch, for training."""
        ...

    def draw(self, step: int, positions: range) -> list[Tensor]:
        """What is random in an optimizer step for the samples at these positions of its global batch.

        Tensors ``[n, ...]`` on the CPU; functions of the seed, the step and the position.
        """
        ...

    def loss(self, model: nn.Module, batch: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
        """The mean loss of a micro-batch on the device, by ``model``, which is :attr:`model`.

        Args:
            batch: the parts of the samples of :meth:`dataset`, then those of :meth:`draw`.
            weight: ``[N]``, a factor on the loss of each sample.
        """
        ...

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds beyond the loop's own."""
        ...

    def finish(self, run_dir: Path, ema: nn.Module | None, step: int) -> None:
        """What the first rank leaves in the run directory at the end of the schedule."""
        ...


class Pretraining:
    """FCMAE pretraining (ConvNeXt V2, arXiv 2301.00808, section 3)."""

    name = "pretrain"
    pairs = False
    PICTURES = 8

    def __init__(self, cfg: PretrainConfig) -> None:
        self.cfg = cfg
        self.model: FCMAE = build_fcmae(cfg)
        self.model.backbone.head.requires_grad_(False)  # no part of pretraining
        self.source = train_source(cfg.data)
        rows, cols = grid_size(*cfg.data.size, self.model.mask_patch_size)
        self.num_patches = rows * cols
        self.keep = self.model.len_keep(*cfg.data.size)
        self.notes: list[str] = []
        self._told = False
        self.mixes_micro_batch = cfg.engine.grn_scope == "batch"
        self.monitors = _at_evaluations(cfg.trainer, self._log_picture)
        if cfg.monitor.knn_every_epochs is not None:
            knn = OnlineKnn(self.model.backbone, cfg)
            self.notes += knn.notes
            self.monitors.append(Monitor(cfg.monitor.knn_every_epochs, knn))

    def initialise(self) -> None:
        pass

    def dataset(self) -> Dataset:
        data = self.cfg.data
        crop, undecoded = pretrain_transform(data), data.decode_on == "gpu"
        return MaskedImages(self.source, crop, self.num_patches, self.cfg.seed, data.crops_per_image, undecoded)

    def prepare(self, plan: BatchPlan) -> None:
        if self.mixes_micro_batch and plan.padding:
            size, ranks = plan.global_batch_size, plan.world_size
            fit = f"trainer.micro_batch_size must divide the {size // ranks} samples of a rank"
            if size % ranks:
                fit = f"trainer.global_batch_size={size} must be a multiple of the {ranks} ranks"
            raise ConfigError(f"engine.grn_scope=batch allows no padding in its statistics over a micro-batch; {fit}")

    def compile(self) -> None:
        self.model.compile()

    def draw(self, step: int, positions: range) -> list[Tensor]:
        return []

    def loss(self, model: nn.Module, batch: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
        imgs, noise = batch
        imgs = normalize(imgs, self.cfg.data.mean, self.cfg.data.std)
        return model(imgs, random_mask(noise, self.keep), self.keep, weight).loss

    def _log_picture(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> None:
        if world.is_main:
            picture = self.picture(world.device)
            if picture.display.stretched and not self._told:
                say(f"reconstruction pictures show {picture.display} (logger.channels chooses)")
            self._told = True
            logger.picture(step, "reconstruction", picture.image)

    @torch.no_grad()
    def picture(self, device: torch.device) -> Picture:
        """The first images of a fixed random order, with fixed masks, reconstructed."""
        data = self.cfg.data
        samples = ErrorsAside(EvaluationImages(self.source, eval_transform(data)))
        rng = generator(self.cfg.seed, Stream.SUBSET)
        order = torch.randperm(len(self.source), generator=rng).tolist()
        singles = readable((collate([samples[i]]) for i in order), len(order), data.on_error == "skip", data.max_bad)
        imgs = torch.cat([imgs for imgs, _ in itertools.islice(singles, self.PICTURES)]).to(device)
        mask = random_mask(torch.rand(len(imgs), self.num_patches, generator=rng), self.keep).to(device)
        imgs = normalize(imgs, data.mean, data.std)
        was_training = self.model.training
        picture = reconstruction_picture(self.model.eval(), imgs, data, mask, self.cfg.logger.channels)
        self.model.train(was_training)
        return picture

    def extra_state(self) -> dict[str, Any]:
        return {}

    def finish(self, run_dir: Path, ema: nn.Module | None, step: int) -> None:
        """The encoder alone, averaged if the run keeps an average, as ``encoder.safetensors`` with timm's names."""
        weights = (ema or self.model).state_dict()
        state = {"task": self.name, "model": weights, "config": to_dict(self.cfg), "step": step}
        encoder.write(run_dir / encoder.ENCODER_FILE, state)


class Finetuning:
    """Supervised training of the dense classifier, from pretrained or random weights."""

    name = "finetune"
    mixes_micro_batch = False

    def __init__(self, cfg: FinetuneConfig, start: Start | None = None) -> None:
        self.start = find_start(cfg) if start is None else start
        cfg, self.notes = settle(cfg, self.start)
        self.cfg = cfg
        self.transform = finetune_transform(cfg.data, cfg.augment)
        self.source = train_source(cfg.data)
        policy = cfg.augment.auto_augment
        if policy is not None and cfg.data.source is not None and gives_float(self.source):
            raise ConfigError(f"augment.auto_augment is {policy!r}; must be null for a source of float32 (data.source)")
        self.classes = require_labels(self.source, "data.path")
        self.monitors: list[Monitor] = []
        if cfg.trainer.eval_every_epochs is not None:
            self.val_source, notes = _validation(cfg, self.classes)
            self.notes += notes
            self.monitors = _at_evaluations(cfg.trainer, self._log_accuracy)
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
            load_backbone(self.model, self.start.path)

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
            pairs = (self.cfg.trainer.global_batch_size + 1) // 2
            mixes = self.mixup.draw(step_generator(self.cfg.seed, step), pairs)
            drawn.append(mixes[torch.tensor(positions) // 2])
        return drawn

    def loss(self, model: nn.Module, batch: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
        imgs, targets, self.keys.values, *mixes = batch
        if mixes:
            imgs, targets = self.mixup(imgs, targets, *mixes)
        smoothing = self.cfg.augment.label_smoothing
        losses = F.cross_entropy(self._logits(model, imgs), targets, label_smoothing=smoothing, reduction="none")
        return losses.mean() if weight is None else (losses * weight).mean()

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
            trainer = self.cfg.trainer
            batch_size = trainer.micro_batch_size or max(1, trainer.global_batch_size // world.size)
            share = classified(network, self.val_source, self.cfg.data, batch_size, trainer.precision, world, stop)
            result = accuracy(share, world)
            metrics |= {f"{prefix}{name}": value for name, value in result.items() if name != "images"}
            network.train(was_training)
        logger.log(step, metrics)
        return metrics.get("ema_top1", metrics["top1"])

    def extra_state(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def finish(self, run_dir: Path, ema: nn.Module | None, step: int) -> None:
        pass


def _at_evaluations(cfg: TrainerConfig, look: Look) -> list[Monitor]:
    return [] if cfg.eval_every_epochs is None else [Monitor(cfg.eval_every_epochs, look)]


def _check_batch(images: int, cfg: FinetuneConfig) -> None:
    """Raises ConfigError if ``data.labels_per_class`` leaves fewer images than a batch has."""
    batch, fits = cfg.trainer.global_batch_size, max(1, images - images % 2)  # mixup needs pairs
    if images < batch:
        raise ConfigError(
            f"data.labels_per_class={cfg.data.labels_per_class} leaves {images} training images, fewer than "
            f"trainer.global_batch_size={batch}; give trainer.global_batch_size={fits}"
        )


def _validation(cfg: FinetuneConfig, classes: list[str]) -> tuple[Source, list[str]]:
    """The validation images, of some or all of the classes, and a line for the user. Raises UsageError."""
    try:
        source = val_source(cfg.data)
    except UsageError as error:
        if cfg.data.val_path is not None:
            raise
        raise UsageError(f"{error}; or train without evaluating: trainer.eval_every_epochs=null") from error
    return with_classes(source, "data.val_path", classes, "data.path")
