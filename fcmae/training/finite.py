"""Losses and gradients that are infinite or NaN: noticed before the optimizer steps, reported with their samples."""

import json
from pathlib import Path

import torch
from torch import Tensor

from fcmae.data.loader import BatchPlan
from fcmae.errors import NonFiniteLossError
from fcmae.training.distributed import World
from fcmae.training.tasks import Task


class FiniteGuard:
    """Remembers, on the device, the first step whose gradient was not finite; from then on no step changes anything.

    The gradient is the mean over ranks, so all ranks agree, and asking costs no synchronisation with the device until
    :meth:`first_bad_step` is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._step = torch.full((), -1, dtype=torch.int64, device=device)

    def check(self, finite: Tensor, step: int) -> Tensor:
        """float32 1 if this or an earlier step was not finite, else 0."""
        bad_now = ~finite & (self._step < 0)
        self._step = torch.where(bad_now, step, self._step)
        return (self._step >= 0).float()

    def first_bad_step(self, world: World) -> int | None:
        """The step, on every rank if it was seen on one; waits for the device."""
        step = int(world.max(self._step))
        return step if step >= 0 else None


def stop_if_not_finite(guard: FiniteGuard, task: Task, plan: BatchPlan, run_dir: Path, world: World) -> None:
    """Raises NonFiniteLossError if a step since the start was not finite, after listing that step's samples."""
    step = guard.first_bad_step(world)
    if step is None:
        return
    path = run_dir / f"nonfinite_step_{step:08d}.json"
    if world.is_main:
        samples = [
            {"epoch": epoch, "index": index, "sample": task.source.describe(index)}
            for epoch, index in plan.global_batch(step)
        ]
        path.write_text(json.dumps({"step": step, "samples": samples}, indent=1))
    raise NonFiniteLossError(
        f"the loss or gradient of step {step} is not finite; the weights are those before it. Its samples: {path}"
    )
