"""What a run is set up from: its batches, schedule and checkpoints, and whether it may resume."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fcmae import precision
from fcmae.checkpoints.checkpoint import CheckpointDir, State
from fcmae.config import CLASSIFY, FinetuneConfig, RunConfig, own
from fcmae.config.recipe import ALLOW, MICRO_BATCH, check_recipe
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.plan import BatchPlan
from fcmae.data.sources.base import LISTING, Source, balanced_labels, listing_digest
from fcmae.distributed import World
from fcmae.errors import CheckpointError, UsageError, counted, shown
from fcmae.files import nearest
from fcmae.models import FCMAE
from fcmae.models.build import mismatch, with_loss_weights
from fcmae.optim.schedule import Schedule
from fcmae.tasks.task import Task
from fcmae.training.state import TrainState
from fcmae.training.watchdog import Watchdog
from fcmae.version import versions


def create_plan(task: Task, world: World, micro_batch_size: int | None) -> BatchPlan:
    """The batches of a task. Raises UsageError where sizes do not fit."""
    cfg, images, batch = task.cfg, len(task.source), task.cfg.optim.global_batch_size
    try:
        plan = BatchPlan.create(
            images, batch, micro_batch_size, world.size, cfg.seed, cfg.data.crops_per_image, task.pairs
        )
    except UsageError as error:
        if images >= batch:
            raise
        raise UsageError(f"{error}; {_for_few_images(cfg, images)}") from error
    if cfg.data.sampling == "balanced":
        plan = replace(plan, labels=balanced_labels(task.source))
    task.prepare(plan)
    return plan


def _for_few_images(cfg: RunConfig, images: int) -> str:
    """What to give where a batch has more images than there are."""
    if not isinstance(cfg, FinetuneConfig):
        return "experiment=own/small takes one that fits"
    auto = " or, with few labels, recipe=auto" * (cfg.objective.get("_target_") == CLASSIFY)
    return f"give optim.global_batch_size={own.batch(own.Facts(images, 0, 0, gpu=True), 'small')}{auto}"


def create_schedule(cfg: RunConfig, plan: BatchPlan) -> Schedule:
    """The learning rate of each step."""
    warmup, total = (
        round(epochs * plan.steps_per_epoch) for epochs in (cfg.schedule.warmup_epochs, cfg.schedule.epochs)
    )
    return Schedule(cfg.optim.peak_lr, cfg.schedule.min_lr, warmup, max(1, total), cfg.schedule.decay)


def checkpoint_dir(run_dir: Path, cfg: RunConfig, plan: BatchPlan, watchdog: Watchdog) -> CheckpointDir:
    """The run's checkpoints."""
    every = cfg.trainer.keep_every_epochs
    keep_every = None if every is None else max(1, round(every * plan.steps_per_epoch))
    return CheckpointDir(run_dir, cfg.trainer.keep_checkpoints, keep_every, watchdog.beat)


def settle_precision(cfg: RunConfig, world: World, resumed: State | None, model: nn.Module) -> None:
    """``cfg.precision`` becomes what the run computes in, and what its config and checkpoints record."""
    recorded = None if resumed is None else resumed["config"].get("precision")
    cfg.precision = precision.settle(
        "precision", cfg.precision, world.device, recorded=recorded, smallest=world.smallest, main=world.is_main
    )
    if cfg.precision == precision.FLOAT8:  # which a resumed run may have been in, and its engine another
        assert isinstance(model, FCMAE)
        model.check_float8()


def check_fits(resumed: State, task: Task, config: State, run_dir: Path, plan: BatchPlan, total_steps: int) -> None:
    """Raises CheckpointError or UsageError, unless a run with ``config`` may continue from a checkpoint's state."""
    if "optimizer" not in resumed:
        held = f"the newest checkpoint in {run_dir / 'checkpoints'} holds weights without an optimizer's state"
        raise CheckpointError(f"{held}, so no run resumes from it; move it elsewhere, e.g. for init_from")
    if resumed["task"] != task.name:
        held = f"{run_dir} holds a run of fcmae {resumed['task']}"
        raise CheckpointError(f"{held}; give fcmae {task.name} another hydra.run.dir")
    if not task.cfg.trainer.allow_changed_recipe:
        numbers: dict[str, tuple[Any, Any]] = {"training images": (resumed.get("num_samples"), plan.num_samples)}
        numbers |= changed_classes(resumed.get("classes"), task.extra_state().get("classes"))
        numbers |= changed_listing(resumed.get("num_samples"), resumed.get("listing"), task.source)
        if task.mixes_micro_batch:
            numbers[MICRO_BATCH] = resumed.get("micro_batch_size"), plan.micro_batch_size
        misfit = mismatch(task.model, with_loss_weights(resumed["model"], task.model))
        other = f"start from its weights, which do not fit these: init_from={run_dir} and another hydra.run.dir"
        check_recipe(resumed["config"], config, numbers, other if misfit else ALLOW)
    if resumed["step"] > total_steps:
        epochs = f"schedule.epochs={task.cfg.schedule.epochs:g} ends at step {total_steps}"
        raise UsageError(f"{epochs}; the run in {run_dir} is at step {resumed['step']}")


def changed_classes(old: Sequence[str] | None, new: Sequence[str] | None) -> dict[str, tuple[str, str]]:
    """For check_recipe, names of classes if they differ: the weights of one would be taken for another."""
    if not old or not new or list(old) == list(new):
        return {}
    place = next((index for index, (before, now) in enumerate(zip(old, new, strict=False)) if before != now), -1)
    return {"classes": (f"{len(old)}, such as {shown(old[place])}", f"{len(new)}, such as {shown(new[place])}")}


def changed_listing(images: int | None, listing: str | None, source: Source) -> dict[str, tuple[Any, Any]]:
    """For check_recipe, the digest of as many samples: others, or in another order, a run would silently mix up."""
    if images != len(source) or listing in (None, listing_digest(source, earlier=True)):
        return {}
    return {LISTING: (shown(str(listing)[:40]), listing_digest(source))}  # of a file that may be anybody's


def load_batches(task: Task, plan: BatchPlan, world: World, steps: range) -> TrainBatches:
    """This rank's micro-batches of ``steps``."""
    cfg = task.cfg
    timeout = cfg.trainer.hang_timeout + Watchdog.GRACE / 2  # the watchdog, which leaves stacks, comes first
    workers = Workers.of(cfg.loader, world, timeout)
    skip, max_bad = cfg.loader.on_error == "skip", cfg.loader.max_bad
    return TrainBatches(task.dataset(), plan, world.rank, steps, workers, skip, max_bad)


def event(task: Task, plan: BatchPlan, state: TrainState, world: World) -> dict[str, Any]:
    """What ``events.jsonl`` says of a process that begins to train."""
    device = world.device
    return {
        "step": state.step,
        "images": len(task.source),
        "parameters": _trained(task),
        "batch": str(plan),
        "ranks": world.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": task.cfg.precision,
        "versions": versions(),
        "notes": list(task.notes),
    }


def _trained(task: Task) -> int:
    """The parameters that are trained."""
    return sum(p.numel() for p in task.model.parameters() if p.requires_grad)


def check_space(run_dir: Path, state: TrainState) -> None:
    """Raises UsageError if the disk has no room for a checkpoint: weights, two moments of each and their average."""
    weights = sum(p.nbytes for p in state.model.parameters())
    needed = weights * (3 + (state.ema is not None)) / 2**20
    free = shutil.disk_usage(nearest(run_dir)).free / 2**20
    if free < needed:
        raise UsageError(
            f"hydra.run.dir={run_dir} has {free:,.1f} MiB free, and a checkpoint needs {needed:,.1f}; remove files or "
            "choose a folder on another disk"
        )


def summary(task: Task, plan: BatchPlan, state: TrainState, total_steps: int, world: World) -> str:
    """The line that a run begins with."""
    images = counted(len(task.source), "image")
    start = f"resumed at step {state.step}" if state.step else "from the start"
    start += ", the last: nothing is left to train" * (state.step == total_steps)
    most = task.cfg.trainer.max_steps
    part = "" if most is None or most >= total_steps else f"{most:,} of "
    return (
        f"{task.name}: {_trained(task) / 1e6:.1f} M parameters, {images}, {part}{counted(total_steps, 'step')}, "
        f"batch {plan} (ranks x micro-batch x accumulation), {world.device.type}, {task.cfg.precision}, {start}"
    )
