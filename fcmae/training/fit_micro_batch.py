"""Finds the largest micro-batch that fits into every rank's memory (``trainer.micro_batch_size=auto``)."""

import bisect
import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fcmae import memory
from fcmae.config import PretrainConfig, RunConfig
from fcmae.data.collate import collate
from fcmae.data.plan import BatchPlan
from fcmae.data.unreadable import BadSamples, errors_aside
from fcmae.distributed import World
from fcmae.errors import OutOfMemory, UsageError
from fcmae.plugins import failures_explained
from fcmae.randomness import preserved
from fcmae.tasks.task import Task
from fcmae.training.state import TrainState
from fcmae.training.step import TrainingStep

AUTO = "auto"
LIMITED = ("cuda",)
"""Types of devices that report when memory runs out. Nothing is tried on a CPU, where the system kills the process."""
MARGIN = 0.06
"""Share of a device's memory that stays free for collectives, libraries and fragmentation."""


def find(task: Task, plan: Callable[[int | None], BatchPlan], state: TrainState, world: World) -> BatchPlan:
    """The plan of the largest micro-batch whose forward and backward passes fit, the same on all ranks.

    The passes run the real model, without torch.compile, beside what training will hold. They leave no trace in
    weights, gradients, generators, or the statistics of memory.

    Args:
        plan: makes the plan for micro-batches of at most this size, None = a rank's whole share. Raises UsageError for
            a size that does not do.

    Raises OutOfMemory if the smallest micro-batch does not fit on some rank.
    """
    if world.device.type not in LIMITED:
        return plan(None)
    sizes = candidates(plan)
    trial = world.together(lambda: Trial(task, plan(None), state, world))
    found = world.smallest(largest(sizes, trial) or 0)
    if not found:
        raise OutOfMemory(f"trainer.micro_batch_size={sizes[0]} does not fit on {memory.in_use(world.device)}")
    return plan(found)


def rehearse(task: Task, plan: BatchPlan, state: TrainState, world: World) -> None:
    """One pass of the first sample, without a trace. Raises UsageError if code that the config names fails."""
    with failures_explained("a pass of the first sample"):
        trial = Trial(task, plan, state, world)
        trial(plan.crops_per_image * (1 + task.pairs))


def candidates(plan: Callable[[int | None], BatchPlan]) -> list[int]:
    """Sizes that divide a rank's share of a step into equal parts, or nearly so, ascending."""
    share, sizes = plan(None).micro_batch_size, set()
    for size in {math.ceil(share / parts) for parts in range(1, share + 1)}:
        with contextlib.suppress(UsageError):
            sizes.add(plan(size).micro_batch_size)
    return sorted(sizes)


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending ``sizes`` that fits, None without any: doubled until one fails, then bisected."""
    good, bad, trial = -1, len(sizes), 0
    while good + 1 < bad:
        if fits(sizes[trial]):
            good = trial
        else:
            bad = trial
        doubled = min(bisect.bisect_left(sizes, 2 * sizes[good]), len(sizes) - 1)
        trial = doubled if bad == len(sizes) else (good + bad) // 2
    return sizes[good] if good >= 0 else None


def how_to_shrink(cfg: RunConfig, world: World, asked: int | str | None) -> str:
    """What to change if memory runs out."""
    share = math.ceil(cfg.optim.global_batch_size / world.size)
    size = cfg.trainer.micro_batch_size
    size = share if size in (None, AUTO) else min(size, share)
    if size > 1:
        hint = "" if asked == AUTO else ", or trainer.micro_batch_size=auto"
        return f"trainer.micro_batch_size is {size}; set a smaller one{hint}"
    if isinstance(cfg, PretrainConfig):
        return "trainer.micro_batch_size is 1; set engine.recompute_stages=[1,2,3,4], or take a smaller model"
    return "trainer.micro_batch_size is 1; take a smaller model or data.image_size"


class Trial:
    """Forward and backward passes of a task's model on copies of the first sample."""

    def __init__(self, task: Task, plan: BatchPlan, state: TrainState, world: World) -> None:
        self.task, self.state, self.device, self.crops = task, state, world.device, plan.crops_per_image
        loader, of_epoch = task.cfg.loader, plan.steps_per_epoch * plan.global_batch_size
        bad = BadSamples(loader.on_error == "skip", of_epoch, loader.max_bad)
        with preserved(self.device):
            item = errors_aside(task.dataset(), plan.num_samples, plan.seed, bad.skip)[0, 0]
            self.sample: list[Tensor] = bad.take(collate([item]), 0, replaced=True)
            self.sample += task.draw(0, range(1))
        weights = sum(p.nbytes for p in task.model.parameters() if p.requires_grad)
        self.step = TrainingStep(
            task.model, lambda batch: task.loss(task.model, batch), self.device, task.cfg.precision
        )
        # AdamW's moments come with the first step; the buffers of an exchange are beside the gradients.
        self.later = weights * (2 * (not state.optimizer.state) + (world.size > 1))
        if self.device.type == "cuda":
            self.later += int(MARGIN * torch.cuda.mem_get_info(self.device)[1])

    def __call__(self, size: int) -> bool:
        """Whether a micro-batch of that size fits."""
        with self._without_trace():
            try:
                self._run(size)
            except RuntimeError as error:
                if not memory.ran_out(error):
                    raise
            else:
                return True
        gc.collect()  # cycles that the error's traceback was in
        return False

    def _run(self, size: int) -> None:
        held = [torch.empty(self.later, dtype=torch.uint8, device=self.device)]
        batch = [torch.cat([part.to(self.device)] * (size // self.crops)) for part in self.sample]
        held += [part.clone() for part in batch]  # the next one is on its way
        self.step([batch])

    @contextlib.contextmanager
    def _without_trace(self) -> Iterator[None]:
        model, was_training = self.task.model, self.task.model.training
        try:
            with preserved(self.device):
                model.train()
                yield
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
