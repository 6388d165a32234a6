"""Finds losses and gradients that are infinite or NaN before the optimizer steps, and reports their samples."""

import json
from pathlib import Path

import torch
from torch import Tensor

from fcmae.data.collate import collate
from fcmae.data.plan import BatchPlan, MicroBatches
from fcmae.data.unreadable import errors_aside
from fcmae.distributed import World
from fcmae.errors import NonFiniteLossError, counted, reason_of
from fcmae.files import replacing
from fcmae.loggers.logger import RunLogger
from fcmae.messages import say
from fcmae.tasks.task import Task


class FiniteGuard:
    """Keeps the optimizer from stepping with a gradient that is not finite, without a synchronisation per step.

    The gradient is the mean over ranks, so all ranks agree. Only reading the guard waits for the device.

    Args:
        skip: leave out such steps only; otherwise no later step changes anything either.
    """

    def __init__(self, device: torch.device, skip: bool = False) -> None:
        self.skip = skip
        self._first = torch.full((), -1, dtype=torch.int64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def check(self, finite: Tensor, step: int) -> Tensor:
        """float32 1 if the optimizer must leave everything as it is, else 0."""
        bad = ~finite
        self._count += bad
        self._first = torch.where(bad & (self._first < 0), step, self._first)
        return (bad if self.skip else self._first >= 0).float()

    def first_bad_step(self, world: World) -> int | None:
        """The first step that was not finite (when skipping: since last asked), on every rank; waits for the device."""
        step = int(world.max(self._first))
        if self.skip:
            self._first.fill_(-1)
        return step if step >= 0 else None

    def count(self, world: World) -> int:
        """Steps that were not finite since the start of the process."""
        return int(world.max(self._count))


def act_on_non_finite(
    guard: FiniteGuard, task: Task, plan: BatchPlan, run_dir: Path, world: World, logger: RunLogger
) -> dict[str, float]:
    """Reports the first step since last asked that was not finite, and does what ``trainer.on_nonfinite`` says.

    Returns:
        The metric ``skipped_steps``, of this process so far, if steps were skipped.

    Raises NonFiniteLossError if the run is to stop, or skipped more than ``trainer.max_skipped`` steps.
    """
    cfg = task.cfg.trainer
    step = guard.first_bad_step(world)
    skipped = guard.count(world) if guard.skip else 0
    metrics = {"skipped_steps": float(skipped)} if skipped else {}
    if step is None:
        return metrics
    listed = _report(step, task, plan, run_dir, world)
    problem = f"the loss or gradient of step {step} is not finite"
    if not guard.skip:
        raise NonFiniteLossError(f"{problem}; the weights are those before it. Its samples: {listed}")
    if skipped > cfg.max_skipped:
        raise NonFiniteLossError(
            f"{problem}; {counted(skipped, 'step')} skipped so far, trainer.max_skipped is {cfg.max_skipped}. "
            f"Its samples: {listed}"
        )
    if world.is_main:
        logger.warn(step, f"{problem}: skipped ({skipped} so far). Its samples: {listed}")
    return metrics


def infectious(loss: Tensor) -> Tensor:
    """``loss``, the same to the bit, whose gradient is NaN throughout if it is not finite.

    A sum may overflow while its gradient does not; so all ranks learn of it from the gradient that they share.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def _report(step: int, task: Task, plan: BatchPlan, run_dir: Path, world: World) -> Path:
    """Lists the samples of a step, and saves this rank's micro-batches, which are read again."""
    listed = run_dir / f"nonfinite_step_{step:08d}.json"
    dataset = errors_aside(task.dataset(), plan.num_samples, plan.seed, task.cfg.loader.on_error == "skip")
    try:
        if world.is_main:
            samples = [
                {"epoch": epoch, "index": index, "sample": task.source.describe(index)}
                for epoch, index in plan.global_batch(step)
            ]
            with replacing(listed) as file:
                file.write(json.dumps({"step": step, "samples": samples}, indent=1).encode())
        keys = list(MicroBatches(plan, world.rank, step, step + 1))
        batches = [collate([dataset[key] for key in micro]).parts for micro in keys]
        with replacing(run_dir / f"nonfinite_step_{step:08d}_rank_{world.rank}.pt") as file:
            torch.save({"step": step, "samples": keys, "micro_batches": batches}, file)
    except (OSError, RuntimeError) as error:  # torch's own, e.g. on a full disk
        say(f"rank {world.rank}: the batch of step {step} was not saved: {reason_of(error)}")
    return listed
