"""Masked autoencoding of unlabelled images."""

import copy
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fcmae.checkpoints import encoder
from fcmae.config import PretrainConfig, to_dict
from fcmae.data.collate import collate
from fcmae.data.labels import Labels
from fcmae.data.pixels.extra import Extra
from fcmae.data.pixels.transforms import (
    CentreCrop,
    normalize_channels,
    normalized,
    pretrain_transform,
)
from fcmae.data.plan import BatchPlan
from fcmae.data.resident import Resident, innermost
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import Windows, train_source, val_source, with_classes
from fcmae.data.sources.base import shuffled
from fcmae.data.unreadable import ErrorsAside, readable
from fcmae.distributed import World
from fcmae.errors import ConfigError
from fcmae.evaluation.reconstruct import Picture, reconstruction_picture
from fcmae.loggers.logger import RunLogger
from fcmae.masks import create_mask
from fcmae.masks.patches import grid_size, random_mask
from fcmae.messages import say
from fcmae.models import FCMAE
from fcmae.models.build import build_fcmae
from fcmae.precision import FLOAT8
from fcmae.tasks.guards import Inputs, LossWatch, MeanPatch, mask_warnings
from fcmae.tasks.held_out import NO_EPOCH, HeldOutLoss
from fcmae.tasks.initial import Start, check_network, load_initial
from fcmae.tasks.label_targets import settle_labels
from fcmae.tasks.monitors import Collapse, Monitor, OnlineKnn, OnlineProbe, Wish, at_evaluations
from fcmae.tasks.task import Losses
from fcmae.tasks.teachers import attach, load_teachers

LARGE = 10**7
"""Parameters of heads that are mentioned, if the backbone has fewer."""


class Pretraining:
    """FCMAE pretraining (ConvNeXt V2, arXiv 2301.00808, section 3)."""

    name = "pretrain"
    pairs = False
    PICTURES = 8

    def __init__(self, cfg: PretrainConfig, start: Start | None = None) -> None:
        self.cfg = cfg
        self.start = Start() if start is None else start
        check_network(cfg, self.start)
        read = functools.partial(train_source, cfg.data, cfg.loader)
        teachers, said = load_teachers(cfg)
        source = settle_labels(cfg, read)
        self.model: FCMAE = build_fcmae(cfg)
        if cfg.precision == FLOAT8:
            self.model.check_float8()
        attach(self.model, teachers)
        self.model.backbone.head.requires_grad_(False)  # no part of pretraining
        self.source = read() if source is None else source
        if cfg.data.windows_per_image > 1:
            self.source = Windows(self.source, cfg.data.windows_per_image)
        self.extra = Extra(cfg.data.transforms)
        keys = [f"data.{key}" for key in ("cache", "decode_on") if getattr(cfg.data, key) == "gpu"]
        self.mask = create_mask(cfg.mask, *keys)
        self.labels = self._labels()
        self.crop = pretrain_transform(cfg.data, cfg.loader.max_pixels, self._channels())
        self.carried = (*self.crop.carries, *(() if self.labels is None else ("label",)))
        """What a batch has beside images and noise, as :class:`fcmae.targets.Seen` calls it."""
        self.grid = grid_size(*cfg.data.size, self.model.mask_patch_size)
        self.keep = self.model.len_keep(*cfg.data.size)
        self.notes = [*self.start.notes, *said, *self._large_heads(), *mask_warnings(cfg, self.grid, self.keep)]
        self.loss_watch = LossWatch(cfg)
        self.mean_patch = MeanPatch(self.model, cfg, self._fixed)
        self._told = False
        self.mixes_micro_batch = cfg.model.grn_scope == "batch"
        self.monitors = at_evaluations(cfg.trainer, self._log_picture)
        if cfg.data.decode_on == "cpu":
            self.monitors += at_evaluations(cfg.trainer, self.mean_patch)
        if cfg.measures_val_loss:
            held_out = HeldOutLoss(self.model, cfg, self._held_out(), self.loss)
            collapse = Collapse(self.model.backbone, cfg, held_out.images.samples.source)
            self.monitors += at_evaluations(cfg.trainer, collapse)
            self.monitors += at_evaluations(cfg.trainer, held_out, cfg.monitor.patience)
        for kind in (OnlineKnn, OnlineProbe):
            every = getattr(cfg.monitor, kind.key)
            if every is not None:
                labelled = kind(self.model.backbone, cfg)
                self.notes += [note for note in labelled.notes if note not in self.notes]
                self.monitors.append(Monitor(every, labelled))

    def _large_heads(self) -> list[str]:
        """A line if the decoder's heads have more parameters than the backbone, and many."""
        decoder = self.model.decoder
        of_heads = (getattr(decoder, name).parameters() for name in decoder.heads.values())
        heads = sum(value.numel() for values in of_heads for value in values)
        backbone = sum(value.numel() for value in self.model.backbone.parameters())
        if heads <= max(backbone, LARGE):
            return []
        key = "pred_patch_size" if decoder.all_stages else "decoder_embed_dim"
        return [
            f"the decoder's heads have {heads / 1e6:.1f} M parameters, the backbone {backbone / 1e6:.1f} M; a smaller "
            f"model.{key} makes them smaller"
        ]

    def _labels(self) -> Labels | None:
        """Labels for the targets that need them; None without such a target. Raises ConfigError."""
        asking = self.model.targets_that_need("label")
        return Labels(self.source, f"target.{asking[0]}") if asking else None

    def _channels(self) -> bool:
        """Whether targets need channels that the encoder does not get. Raises ConfigError if there are none."""
        asking, given = self.model.targets_that_need("channels"), self.cfg.data.layout.extra
        if asking and not given:
            raise ConfigError(f"target.{asking[0]} needs data.channels with target or classes; got none")
        for name in asking:
            asked = getattr(self.model.targets[name], "channels", [])
            if max(asked, default=0) >= len(given):
                raise ConfigError(
                    f"target.{name}.channels must be below {len(given)}, the number of channels that data.channels "
                    f"gives to targets; got {asked}"
                )
        return bool(asking)

    def initialise(self) -> None:
        if self.start.path is not None:
            self.notes.append(load_initial(self.model, self.start.path, self.cfg.init_channels))

    def dataset(self) -> Dataset:
        data = self.cfg.data
        crops, seed = data.crops_per_image, self.cfg.seed
        on_device: bool | Resident = data.decode_on == "gpu"
        if data.cache == "gpu":
            on_device = Resident(innermost(self.source), self.crop.input, data.size, data.pad)
        return MaskedImages(
            self.source, self.crop, self.grid, seed, crops, on_device, self.mask, self.extra, self.labels
        )

    def _held_out(self) -> MaskedImages:
        """Validation images as training sees them, with the central crop; labels where a target needs some."""
        cfg, labels = self.cfg, copy.copy(self.labels)
        source = val_source(cfg.data, cfg.loader)
        if labels is not None:
            if None not in (source.classes, self.source.classes):
                source, notes = with_classes(source, "data.val_path", self.source.classes or [], "data.path")
                self.notes += notes
            labels.source = source
        return MaskedImages(source, self._central(), self.grid, cfg.seed, mask=self.mask, labels=labels)

    def _central(self) -> CentreCrop:
        """What evaluation shows of an image, with what targets need of it."""
        return CentreCrop(self.cfg.data, self.cfg.loader.max_pixels, "channels" in self.crop.carries)

    def prepare(self, plan: BatchPlan) -> None:
        self.mean_patch.warmup_steps = round(self.cfg.schedule.warmup_epochs * plan.steps_per_epoch)
        if self.mixes_micro_batch and plan.padding:
            size, ranks = plan.global_batch_size, plan.world_size
            fit = f"trainer.micro_batch_size must divide the {size // ranks} samples of a rank"
            if size % ranks:
                fit = f"optim.global_batch_size={size} must be a multiple of the {ranks} ranks"
            raise ConfigError(f"model.grn_scope=batch allows no padding in its statistics over a micro-batch; {fit}")

    def warning(self, step: int, metrics: dict[str, float]) -> str | None:
        return self.loss_watch(step, metrics)

    def compile(self) -> None:
        self.model.compile()

    def draw(self, step: int, positions: range) -> list[Tensor]:
        return []

    def loss(self, model: nn.Module, batch: Sequence[Tensor], weight: Tensor | None = None) -> Losses:
        imgs, mask, seen = self._inputs(batch)
        out = model(imgs, mask, self.keep, weight, **seen)
        return out.loss, {name: value.detach() for name, value in out.parts.items()}

    def _inputs(self, batch: Sequence[Tensor]) -> Inputs:
        """Normalised images, their mask, and what targets need."""
        (imgs, noise, *more), data = batch, self.cfg.data
        seen = dict(zip(self.carried, more, strict=True))
        if "channels" in seen:
            seen["channels"] = normalize_channels(seen["channels"], data.layout, data.bit_depth, data.dtype)
        return normalized(imgs, data), random_mask(noise, self.keep), seen

    def _log_picture(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> None:
        if world.is_main:
            picture = self.picture(world.device)
            if picture is None:
                return
            if picture.display.stretched and not self._told:
                say(f"reconstruction pictures show {picture.display} (logger.channels chooses)")
            self._told = True
            logger.picture(step, "reconstruction", picture.image)

    def _fixed(self, count: int, device: torch.device) -> Inputs:
        """The first images of a fixed random order, with fixed masks."""
        cfg, loader = self.cfg, self.cfg.loader
        images = MaskedImages(self.source, self._central(), self.grid, cfg.seed, mask=self.mask, labels=self.labels)
        samples = ErrorsAside(images)
        order = shuffled(self.source, cfg.seed)
        batches = (collate([samples[NO_EPOCH, i]]) for i in order)
        singles = readable(batches, len(order), loader.on_error == "skip", loader.max_bad)
        columns = zip(*itertools.islice(singles, count), strict=True)
        return self._inputs([torch.cat(column).to(device) for column in columns])

    @torch.no_grad()
    def picture(self, device: torch.device) -> Picture | None:
        """The first images of a fixed random order, with fixed masks, reconstructed; None if no target can be drawn."""
        cfg = self.cfg
        imgs, mask, seen = self._fixed(self.PICTURES, device)
        was_training = self.model.training
        picture = reconstruction_picture(self.model.eval(), imgs, cfg.data, mask, cfg.logger.channels, seen)
        self.model.train(was_training)
        return picture

    def extra_metrics(self) -> dict[str, float]:
        return {f"weight_{name}": weight for name, weight in self.model.learned_weights().items()}

    def extra_state(self) -> dict[str, Any]:
        return self.start.state()

    def finish(self, run_dir: Path, ema: nn.Module | None, step: int) -> None:
        """The encoder alone, averaged if the run keeps an average, as ``encoder.safetensors`` with timm's names."""
        weights = (ema or self.model).state_dict()
        state = {"task": self.name, "model": weights, "config": to_dict(self.cfg), "step": step}
        encoder.write(run_dir / encoder.ENCODER_FILE, state)
