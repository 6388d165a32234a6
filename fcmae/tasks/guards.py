"""Warnings, a line each with the numbers, of what makes a pretraining run useless (docs/monitoring.md)."""

import math
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fcmae.config import PretrainConfig
from fcmae.distributed import World
from fcmae.loggers.logger import RunLogger
from fcmae.masks.patches import grid_size, upsample_mask
from fcmae.models import FCMAE
from fcmae.precision import autocast
from fcmae.targets import Pixels, Seen, part
from fcmae.tasks.monitors import Collapse, Wish

FEW_PATCHES, FEW_VISIBLE = 16, 4
"""An image with fewer patches, or a mask with fewer visible ones, gives the network little to learn from."""
IMAGES = 64
"""Training images on which the loss is compared with that of the mean patch."""
AS_MEAN = 0.97
"""A loss above this share of the mean patch's: nothing is learned."""
WINDOW_STEPS, WINDOW_LINES = 100, 5
"""A mean over fewer steps or lines of metrics is noise."""
RISE = 1.2
"""The loss rises if its mean is this many times its lowest mean."""
STALL = 0.01
"""The loss stalls if it falls by a smaller share than this from the warm-up to the middle of the schedule."""
LEAST_STEPS = 20
"""Before this step no network has learned anything."""
HELPS = "a lower optim.lr or a longer schedule.warmup_epochs usually helps"


def mask_warnings(cfg: PretrainConfig, grid: tuple[int, int], keep: int) -> list[str]:
    """Lines about too few patches per image, or visible in it."""
    patches = grid[0] * grid[1]
    height, width = cfg.data.size
    lines = []
    if patches < FEW_PATCHES:
        lines.append(
            f"warning: images of {height} x {width} px have {patches} patches of {height // grid[0]} px, fewer than "
            f"{FEW_PATCHES}; a smaller total stride gives more (model.strides, docs/network.md)"
        )
    if keep < FEW_VISIBLE:
        lines.append(
            f"warning: model.mask_ratio={cfg.model.mask_ratio:g} leaves {keep} of {patches} patches visible, fewer "
            f"than {FEW_VISIBLE}, which is little to predict the others from"
        )
    return lines


class LossWatch:
    """Looks at the lines of metrics for a loss that rises, is 0, or stalls in the first half of the schedule.

    Each is reported once. A process sees its own lines only.
    """

    def __init__(self, cfg: PretrainConfig) -> None:
        self.warmup, self.middle = cfg.schedule.warmup_epochs, cfg.schedule.epochs / 2
        lines = max(WINDOW_LINES, math.ceil(WINDOW_STEPS / cfg.trainer.log_every))
        self.window: deque[tuple[int, float, float]] = deque(maxlen=lines)
        self.lowest = math.inf
        self.first: tuple[int, float] | None = None
        self.told: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning, if there is one. ``metrics``: with ``loss``, ``lr`` and ``epoch``."""
        loss, epoch = metrics["loss"], metrics["epoch"]
        if not math.isfinite(loss):
            return None
        self.window.append((step, loss, epoch))
        if len(self.window) < (self.window.maxlen or 0):
            return None
        mean = sum(value for _, value, _ in self.window) / len(self.window)
        if not any(value for _, value, _ in self.window) and "zero" not in self.told:
            self.told.add("zero")
            return (
                f"warning: the loss is 0 up to step {step}: no hidden patch has a pixel with a value; take a smaller "
                "data.image_size or a larger model.mask_ratio (data.nodata, data.fit=pad)"
            )
        before, self.lowest = self.lowest, min(self.lowest, mean)
        lr = f"lr {metrics['lr']:.3g}"
        if 0 < RISE * before < mean and "rise" not in self.told:
            self.told.add("rise")
            return f"warning: the loss rose from {before:.4g} to {mean:.4g} by step {step} ({lr}); {HELPS}"
        start, _, of_start = self.window[0]
        if self.first is None and of_start > self.warmup:
            self.first = step, mean
        if self.first is None or epoch < self.middle or "stall" in self.told:
            return None
        self.told.add("stall")
        since, high = self.first
        if start <= since or high <= 0 or mean <= (1 - STALL) * high:
            return None
        return (
            f"warning: the loss stalls: {high:.4g} at step {since}, {mean:.4g} at step {step} ({lr}); another optim.lr "
            "may help, a lower one if the loss was falling before"
        )


Inputs = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Normalised images ``[N, C, H, W]``, their masks ``[N, L]``, and what targets need, as ``Seen`` calls it."""
Fixed = Callable[[int, torch.device], Inputs]
"""Gives so many training images, the same at every call."""


class MeanPatch:
    """Compares the loss of pixels with that of the mean patch, once, at the first evaluation after the warm-up.

    Where the run has no validation images it also looks for collapse, on the same images.
    """

    def __init__(self, model: FCMAE, cfg: PretrainConfig, fixed: Fixed) -> None:
        self.model, self.cfg, self.fixed = model, cfg, fixed
        self.warmup_steps = 0
        self.done = False

    def __call__(self, ema: nn.Module | None, step: int, logger: RunLogger, world: World, stop: Wish) -> None:
        if not world.is_main or self.done or step <= max(self.warmup_steps, LEAST_STEPS):
            return
        self.done = True
        was_training = self.model.training
        self.model.eval()
        try:
            for line in self.look(step, world.device):
                logger.warn(step, line)
        finally:
            self.model.train(was_training)

    @torch.no_grad()
    def look(self, step: int, device: torch.device) -> list[str]:
        """Warnings."""
        pixels = [name for name, target in self.model.targets.items() if isinstance(target, Pixels)]
        imgs, mask, seen = self.fixed(IMAGES, device)
        lines = []
        with autocast(device, self.cfg.precision):
            preds, _ = self.model.predict(imgs, mask)
            if not self.cfg.measures_val_loss:
                backbone = self.model.backbone
                features = backbone.forward_head(backbone.forward_features(imgs), pre_logits=True).float()
                features = features[features.isfinite().all(dim=1)]
                lines += Collapse.warnings(features, step) if len(features) > 1 else []
        for name in pixels:
            loss, constant = losses(self.model, name, Seen(imgs, **seen), mask, preds[name])
            if loss > AS_MEAN * constant:
                lines.append(
                    f"warning: at step {step} the loss of target.{name} is {loss:.3g}, that of the mean patch "
                    f"{constant:.3g}, on {len(imgs)} training images: nothing is learned yet; train longer; {HELPS}"
                )
        return lines


def losses(model: FCMAE, name: str, seen: Seen, mask: Tensor, pred: Tensor) -> tuple[float, float]:
    """The loss of a prediction ``[N, L, dim]`` of a target, and that of the mean of the masked patches."""
    target = model.targets[name]
    rows, cols = grid_size(seen.imgs.shape[-2], seen.imgs.shape[-1], model.mask_patch_size)
    grid = mask.view(-1, rows, cols)
    sites = upsample_mask(grid, rows, cols, model.mask_patch_size // model.pred_patch_size).flatten(1)
    wanted, valid = target(seen)
    counted = sites[..., None].expand_as(wanted) if valid is None else sites[..., None] & valid
    mean = torch.where(counted, wanted, 0).sum((0, 1)) / counted.sum((0, 1)).clamp(min=1)
    return part(target, seen, pred.float(), sites).item(), part(target, seen, mean.expand_as(pred), sites).item()
