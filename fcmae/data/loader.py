"""From a source to batches: which samples make up which step, and how a sample is read.

The samples of optimizer step k are a function of the seed and k alone: a fresh random order of the source every epoch,
cut into global batches (a remainder is left out of that epoch). Ranks and micro-batches only divide a global batch.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fcmae import interrupt
from fcmae.data.sources import Source
from fcmae.data.transforms import Transform
from fcmae.errors import UsageError, WorkerError
from fcmae.processes import is_stopped
from fcmae.randomness import Stream, generator, seed_globals

SampleKey = tuple[int, int]
"""(epoch, index into the source)."""


@dataclass(frozen=True)
class BatchPlan:
    """Which samples every optimizer step and every rank gets.

    ``global_batch_size`` samples a step are cut into ``accum_steps`` micro-batches of ``micro_batch_size`` on each of
    ``world_size`` ranks.
    """

    num_samples: int
    global_batch_size: int
    micro_batch_size: int
    world_size: int = 1
    seed: int = 0

    @classmethod
    def create(
        cls, num_samples: int, global_batch_size: int, micro_batch_size: int | None, world_size: int, seed: int
    ) -> "BatchPlan":
        """A plan. Raises UsageError, naming the sizes that fit, where the parts don't divide the whole."""
        share, rest = divmod(global_batch_size, world_size)
        if rest:
            raise UsageError(
                f"trainer.global_batch_size is {global_batch_size}; with {world_size} ranks allowed is a multiple of "
                f"{world_size}"
            )
        micro = min(micro_batch_size or share, share)
        if share % micro:
            fits = max(m for m in range(1, micro + 1) if share % m == 0)
            raise UsageError(
                f"trainer.micro_batch_size is {micro_batch_size}; allowed is a divisor of a rank's share of {share} "
                f"samples a step, such as {fits}"
            )
        if num_samples < global_batch_size:
            raise UsageError(
                f"trainer.global_batch_size is {global_batch_size}; allowed with {num_samples} training images is at "
                f"most {num_samples}"
            )
        return cls(num_samples, global_batch_size, micro, world_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    @property
    def accum_steps(self) -> int:
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    def order(self, epoch: int) -> list[int]:
        """The order of the source in an epoch."""
        return torch.randperm(self.num_samples, generator=generator(self.seed, Stream.ORDER, epoch)).tolist()

    def global_batch(self, step: int) -> list[SampleKey]:
        """The samples of an optimizer step, the same for any number of ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch_size
        return [(epoch, index) for index in self.order(epoch)[first : first + self.global_batch_size]]


class MicroBatches(Sampler[list[SampleKey]]):
    """A rank's micro-batches from ``start_step`` to ``stop_step``; starting late costs no reading."""

    def __init__(self, plan: BatchPlan, rank: int, start_step: int, stop_step: int) -> None:
        self.plan = plan
        self.rank = rank
        self.start_step = start_step
        self.stop_step = stop_step

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.plan.accum_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        plan = self.plan
        current, order = -1, []
        for step in range(self.start_step, self.stop_step):
            epoch, position = divmod(step, plan.steps_per_epoch)
            if epoch != current:
                current, order = epoch, plan.order(epoch)
            for micro in range(plan.accum_steps):
                first = position * plan.global_batch_size
                first += (micro * plan.world_size + self.rank) * plan.micro_batch_size
                yield [(epoch, index) for index in order[first : first + plan.micro_batch_size]]


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Pretraining samples: (image, mask noise ``[L]``), functions of (seed, epoch, index)."""

    def __init__(self, source: Source, transform: Transform, num_patches: int, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.num_patches = num_patches
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        epoch, index = key
        seed_globals(self.seed, Stream.AUGMENT, epoch, index)
        image = self.transform(self.source[index].image)
        noise = torch.rand(self.num_patches, generator=generator(self.seed, Stream.MASK, epoch, index))
        return image, noise


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Fine-tuning samples: (image, label), functions of (seed, epoch, index)."""

    def __init__(self, source: Source, transform: Transform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        epoch, index = key
        seed_globals(self.seed, Stream.AUGMENT, epoch, index)
        image, label = self.source[index]
        assert label is not None
        return self.transform(image), label


class EvaluationImages(Dataset[tuple[Tensor, int]]):
    """Samples for evaluation in the source's order: (image, label or -1)."""

    def __init__(self, source: Source, transform: Transform) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return self.transform(image), -1 if label is None else label


class CroppedImages(Dataset[tuple[Tensor, int]]):
    """A source as training sees it in one epoch, in the source's order: (image, label), functions of the counters."""

    def __init__(self, source: Source, transform: Transform, seed: int, epoch: int) -> None:
        self.images = LabelledImages(source, transform, seed)
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[self.epoch, index]


def train_loader(
    dataset: Dataset,
    plan: BatchPlan,
    *,
    rank: int,
    start_step: int,
    stop_step: int,
    workers: int,
    pin_memory: bool,
    timeout: float = 0,
) -> DataLoader:
    """Micro-batches of one rank from ``start_step`` to ``stop_step``, in order.

    Waiting for a worker longer than ``timeout`` seconds is a RuntimeError; 0 = wait for ever.
    """
    batches = MicroBatches(plan, rank, start_step, stop_step)
    return _loader(dataset, workers, pin_memory, batch_sampler=batches, timeout=timeout if workers else 0)


def eval_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Every sample exactly once over all ranks: rank r reads r, r + world_size, ..."""
    return _loader(dataset, workers, pin_memory, batch_size=batch_size, sampler=range(rank, len(dataset), world_size))  # type: ignore[arg-type]


def _loader(dataset: Dataset, workers: int, pin_memory: bool, **kwargs) -> DataLoader:
    # Without a generator of its own the loader draws a seed from the global one, and a resumed run would differ.
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_start_worker,
        **kwargs,
    )


def _start_worker(_: int) -> None:
    interrupt.shield_worker()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """In this block a RuntimeError of a DataLoader becomes a WorkerError of one line; after an error no worker is left.

    torch raises some of them out of a signal handler, so wherever the block happens to be.
    """
    try:
        yield
    except BaseException as error:
        stopped = [child.pid for child in multiprocessing.active_children() if is_stopped(child.pid)]
        _end_workers()
        reason = str(error).strip()
        if isinstance(error, RuntimeError) and reason.startswith("DataLoader"):
            named = f" (stopped: process {', '.join(map(str, stopped))})" if stopped else ""
            raise WorkerError(reason.split("\n")[0] + named) from error
        if isinstance(error, (EOFError, ConnectionError)):  # what is left of a batch that was under way
            raise WorkerError(f"a data worker died while it sent a batch ({reason})") from error
        raise


def _end_workers() -> None:
    """SIGKILL for all workers: they ignore anything else, and one that hangs would keep this process from ending."""
    main = threading.current_thread() is threading.main_thread()
    # torch's handler would raise an error for each of them
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def default_workers(device: torch.device, local_world_size: int) -> int:
    """Loader processes a rank: the cores this process may use, shared by the ranks of this machine.

    On the CPU the cores are training's own, so the loader gets one process, or none where there is one core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu":
        return min(1, cores // local_world_size - 1) if cores > local_world_size else 0
    return max(1, min(16, cores // local_world_size - 1))
