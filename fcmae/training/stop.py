"""When to stop: every rank may wish to, and all of them do so after the same step."""

import time
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fcmae import interrupt
from fcmae.distributed import World
from fcmae.errors import Interrupted


class Verdict(IntEnum):
    """What the ranks agreed upon; of different wishes the largest counts."""

    GO_ON = 0
    STOP = 1
    """Save and end, to be resumed."""
    FAIL = 2
    """A checkpoint cannot be written."""


class StopAgreement:
    """Asks all ranks, after every step, whether one of them wants to stop.

    The question is a collective between the hosts that nobody waits for: its answer is read one step later, when it has
    long arrived. So the ranks agree on the step, and neither they nor their GPUs wait for each other.

    Args:
        max_hours: wish to stop so long after the start of the process; None = never.
    """

    def __init__(self, world: World, max_hours: float | None = None) -> None:
        self.world = world
        self.deadline = None if max_hours is None else interrupt.STARTED + 3600 * max_hours
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def at_once(self) -> Verdict:
        """The verdict on the wishes of this moment; the ranks wait for each other."""
        return Verdict(int(self.world.max(torch.tensor(self._wish(failed=False)))))

    def before_training(self, run_dir: Path) -> None:
        """Between two phases of the set-up: raises Interrupted, on all ranks, if one of them wishes to stop."""
        if self.at_once() != Verdict.GO_ON:
            again = f"the same command with hydra.run.dir={run_dir} goes on"
            raise Interrupted(f"stopped before the first step ({self.reason()}); {again}")

    def wished(self) -> bool:
        """Whether this rank wishes to stop; the others may not know."""
        return self._wish(failed=False) == Verdict.STOP

    def after_step(self, failed: bool) -> Verdict:
        """Asks anew, and returns the verdict on the wishes after the step before (on one rank: of this moment)."""
        wish = torch.tensor(self._wish(failed))
        if self.world.size == 1:
            return Verdict(int(wish))
        verdict = self.close()
        self._pending = (wish, dist.all_reduce(wish, dist.ReduceOp.MAX, async_op=True))
        return verdict

    def close(self) -> Verdict:
        """Reads the answer that is still under way. Call on all ranks after the last step."""
        if self._pending is None:
            return Verdict.GO_ON
        answer, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return Verdict(int(answer))

    def reason(self) -> str:
        """Why this rank wishes to stop, for the message."""
        if signal := interrupt.received():
            return signal
        return "trainer.max_hours" if self._late() else "another rank was asked to"

    def _wish(self, failed: bool) -> Verdict:
        if failed:
            return Verdict.FAIL
        return Verdict.STOP if interrupt.received() or self._late() else Verdict.GO_ON

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline
