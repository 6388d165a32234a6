"""``trainer.budget``: as many epochs as fit into a time, by the speed of a few steps on this machine."""

import contextlib
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fcmae import interrupt
from fcmae.checkpoints.checkpoint import CheckpointDir, header
from fcmae.config import MonitorConfig, PretrainConfig, RunConfig, ScheduleConfig
from fcmae.config.training import TrainerConfig, seconds_of
from fcmae.data.plan import BatchPlan
from fcmae.distributed import World
from fcmae.errors import CheckpointError, Interrupted, UsageError
from fcmae.files import read_metrics
from fcmae.tasks.task import Task
from fcmae.training.agree_to_stop import StopAgreement
from fcmae.training.loop import train
from fcmae.training.watchdog import Watchdog

STEPS, LOG_EVERY = 60, 20
"""Steps whose speed is measured; the first third compiles and fills queues."""
SHARE = 0.25
"""Of the time, at most so much is for measuring; a slow machine does fewer steps."""
RESERVE = 0.1
"""Share of the time for checkpoints, evaluations, and a machine that becomes slower."""
PARTS = 4
"""Of a run that is shorter than the epochs between its checkpoints or evaluations: one at the end of each."""
FOLDER = "speed"
FEW_STEPS = 200
"""With fewer optimizer steps pretraining from random weights ends near the mean patch (docs/own_recipes.md)."""


def scaled(schedule: ScheduleConfig, epochs: float) -> ScheduleConfig:
    """The schedule with another number of epochs and the same share of warm-up."""
    epochs = round(epochs, 4)
    return replace(
        schedule, epochs=epochs, warmup_epochs=min(epochs, round(schedule.warmup_epochs * epochs / schedule.epochs, 4))
    )


def within(trainer: TrainerConfig, epochs: float) -> TrainerConfig:
    """With checkpoints and evaluations before the end of a run of ``epochs``."""
    part, evaluates = epochs / PARTS, trainer.eval_every_epochs
    return replace(
        trainer,
        checkpoint_every_epochs=part if trainer.checkpoint_every_epochs > epochs else trainer.checkpoint_every_epochs,
        eval_every_epochs=part if evaluates is not None and evaluates > epochs else evaluates,
    )


def median_speed(run_dir: Path) -> float:
    """Images per second: the median of the lines in the second half of a run's metrics; 0 before the first step."""
    file = run_dir / "metrics.jsonl"
    lines = read_metrics(file) if file.exists() else ()
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median_low(speeds[len(speeds) // 2 :]) if speeds else 0.0


def fit_schedule(
    cfg: RunConfig,
    run_dir: Path,
    create: Callable[[World], Task],
    world: World,
    watchdog: Watchdog,
    stop: StopAgreement,
) -> list[str]:
    """``cfg.schedule`` gets the epochs that fit into ``trainer.budget``; of a run that resumes, those that it began
    with, so that it ends as if it had not been stopped. ``cfg.trainer`` gets what is :func:`within` them.

    Returns:
        Notes for the task: what the user should know.

    Raises UsageError where the time is over before training begins; Interrupted.
    """
    recorded = world.from_main(lambda: _recorded(run_dir)) if cfg.trainer.resume else None
    if recorded is not None:
        cfg.schedule, before = recorded
        cfg.trainer = within(cfg.trainer, cfg.schedule.epochs)
        if before == cfg.trainer.budget:
            return []
        given = f" of trainer.budget={before}" if before else ""
        return [
            f"trainer.budget={cfg.trainer.budget} is not used: {run_dir} keeps schedule.epochs="
            f"{cfg.schedule.epochs:g}{given}; another hydra.run.dir starts a run that takes it"
        ]
    budget = seconds_of(cfg.trainer.budget or "")
    world.say(
        f"trainer.budget={cfg.trainer.budget}: measures the speed of {STEPS} steps first, or of fewer in "
        f"{SHARE * budget:.0f} s"
    )
    short = StopAgreement(world, (time.monotonic() - interrupt.STARTED + SHARE * budget) / 3600)
    speed, images = _measure(cfg, run_dir / FOLDER, create, world, watchdog, short)
    stop.before_training(None)
    spent = world.from_main(lambda: time.monotonic() - interrupt.STARTED)
    left = (1 - RESERVE) * (budget - spent)
    if left * speed < cfg.optim.global_batch_size:
        more = f"; give {_enough(cfg, speed, spent)}" if speed else ""
        raise UsageError(
            f"trainer.budget={cfg.trainer.budget} leaves no time to train: "
            f"starting and measuring took {spent:.0f} s{more}"
        )
    plan = BatchPlan(images, cfg.optim.global_batch_size, cfg.optim.global_batch_size)
    cfg.schedule = scaled(cfg.schedule, left * speed / (plan.steps_per_epoch * plan.global_batch_size))
    cfg.trainer = within(cfg.trainer, cfg.schedule.epochs)
    world.say(
        f"trainer.budget={cfg.trainer.budget}: {speed:.0f} images/s, so schedule.epochs={cfg.schedule.epochs:g} "
        f"schedule.warmup_epochs={cfg.schedule.warmup_epochs:g} in the {left:.0f} s that are left"
    )
    return _few_steps(cfg, speed, left, spent)


def _few_steps(cfg: RunConfig, speed: float, left: float, spent: float) -> list[str]:
    """A line where ``left`` seconds of pretraining from random weights are too few, with the budget that suffices."""
    batch = cfg.optim.global_batch_size
    steps = int(left * speed / batch)
    if not isinstance(cfg, PretrainConfig) or cfg.init_from is not None or steps >= FEW_STEPS:
        return []
    return [
        f"warning: {steps} steps of {batch} images fit, and fewer than {FEW_STEPS} teach a network little; give "
        f"{_enough(cfg, speed, spent)}, or a smaller optim.global_batch_size"
    ]


def _enough(cfg: RunConfig, speed: float, spent: float) -> str:
    """A budget in which ``FEW_STEPS`` steps fit."""
    needed = spent + (STEPS + FEW_STEPS / (1 - RESERVE)) * cfg.optim.global_batch_size / speed
    return f"trainer.budget={math.ceil(needed / 60)}min or more"


def _recorded(run_dir: Path) -> tuple[ScheduleConfig, str | None] | None:
    """The schedule in the newest checkpoint that can be read, and the budget that gave it."""
    for path in reversed(CheckpointDir(run_dir).paths()):
        with contextlib.suppress(CheckpointError, KeyError, TypeError):
            config = header(path)["config"]
            return ScheduleConfig(**config["schedule"]), config["trainer"].get("budget")
    return None


def _measure(
    cfg: RunConfig,
    folder: Path,
    create: Callable[[World], Task],
    world: World,
    watchdog: Watchdog,
    stop: StopAgreement,
) -> tuple[float, int]:
    """Images per second of some steps, which leave nothing behind, and the number of training images."""
    given = dict(vars(cfg))
    trainer = replace(cfg.trainer, max_steps=STEPS, log_every=LOG_EVERY, eval_every_epochs=None, profile_steps=None)
    cfg.trainer = replace(trainer, checkpoint_every_epochs=cfg.schedule.epochs, keep_every_epochs=None, resume=False)
    cfg.logger = replace(cfg.logger, wandb="disabled", tensorboard=False, progress=False, sinks={})
    if isinstance(cfg, PretrainConfig):
        cfg.monitor = MonitorConfig()
    try:
        task = world.together(lambda: create(world))
        task.notes.clear()
        images = len(task.source)
        with contextlib.suppress(Interrupted):  # at max_steps or late; after a signal the caller stops
            train(task, folder, world, watchdog, stop)
        return world.from_main(lambda: median_speed(folder)), images
    finally:
        vars(cfg).update(given)
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
