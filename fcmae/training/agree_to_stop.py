"""When to stop: any rank may ask to, and all ranks stop after the same step."""

import time
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fcmae import interrupt
from fcmae.distributed import World
from fcmae.errors import Interrupted


class Verdict(IntEnum):
    """What the ranks agreed on: the largest of their wishes."""

    GO_ON = 0
    STOP = 1
    """Save and end, to be resumed."""
    FAIL = 2
    """A checkpoint cannot be written."""


class StopAgreement:
    """Asks all ranks, after every step, whether one of them wants to stop.

    The question is an asynchronous all_reduce between the hosts, whose answer is read one step later. So the ranks
    agree on the step, and neither they nor their GPUs wait for each other.

    Args:
        max_hours: stop this long after the start of the process; None = never.
    """

    def __init__(self, world: World, max_hours: float | None = None) -> None:
        self.world = world
        self.deadline = None if max_hours is None else interrupt.STARTED + 3600 * max_hours
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def at_once(self) -> Verdict:
        """The verdict on the current wishes; the ranks wait for each other."""
        return Verdict(int(self.world.max(torch.tensor(self._wish(failed=False)))))

    def before_training(self, run_dir: Path | None) -> None:
        """Between two phases of the set-up: raises Interrupted on all ranks if one of them wants to stop.

        Args:
            run_dir: None where nothing of the run is in its folder yet.
        """
        if self.at_once() != Verdict.GO_ON:
            self.raise_before_training(run_dir)

    def at_a_failed_first_step(self, run_dir: Path) -> None:
        """Raises Interrupted on this rank alone if a signal has reached it; the others may wait for its gradients."""
        if interrupt.received():
            self.raise_before_training(run_dir)

    def raise_before_training(self, run_dir: Path | None) -> NoReturn:
        """Raises Interrupted on this rank alone, which wants to stop."""
        again = "" if run_dir is None else f"; the same command with hydra.run.dir={run_dir} continues"
        raise Interrupted(f"stopped before the first step ({self.reason()}){again}")

    def wished(self) -> bool:
        """Whether this rank wants to stop; the others may not know."""
        return self._wish(failed=False) == Verdict.STOP

    def after_step(self, failed: bool) -> Verdict:
        """Asks again, and returns the verdict on the wishes of the previous step (with one rank: of this one)."""
        wish = torch.tensor(self._wish(failed))
        if self.world.size == 1:
            return Verdict(int(wish))
        verdict = self.close()
        self._pending = (wish, dist.all_reduce(wish, dist.ReduceOp.MAX, async_op=True))
        return verdict

    def close(self) -> Verdict:
        """Reads the pending answer. Call on all ranks after the last step."""
        if self._pending is None:
            return Verdict.GO_ON
        answer, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return Verdict(int(answer))

    def reason(self) -> str:
        """Why this rank wants to stop, for the message."""
        if signal := interrupt.received():
            return signal
        return "trainer.max_hours" if self._late() else "another rank was asked to"

    def _wish(self, failed: bool) -> Verdict:
        if failed:
            return Verdict.FAIL
        return Verdict.STOP if interrupt.received() or self._late() else Verdict.GO_ON

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline
