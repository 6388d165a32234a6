"""From a source to batches: how a sample is read, and the loader of what a plan wants."""

import atexit
import contextlib
import functools
import gc
import multiprocessing.util
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fcmae import interrupt
from fcmae.data import shared_memory as shared
from fcmae.data.pixels.crops import Box, RandomCrop, Uniform
from fcmae.data.pixels.decode import Encoded, LazyImage, open_image
from fcmae.data.pixels.on_device import Undecoded, is_for_device
from fcmae.data.pixels.transforms import Transform
from fcmae.data.plan import BatchPlan, MicroBatches, SampleKey
from fcmae.data.sources import Source
from fcmae.data.unreadable import BadSamples, Batch, ErrorsAside, collate, errors_aside
from fcmae.errors import WorkerError
from fcmae.processes import is_stopped
from fcmae.randomness import Stream, derive, generator, seed_globals


class MaskedImages(Dataset[tuple[Any, Tensor]]):
    """Pretraining samples, functions of (seed, epoch, index): (image, mask noise ``[L]``).

    With several crops an image, or images left to the device: (list of k crops, noise ``[k, L]``), or
    (:class:`~fcmae.data.pixels.on_device.Undecoded`, noise ``[k, L]``).

    Args:
        crop: what makes a sample of an image.
        num_patches: L.
        crops_per_image: k.
        undecoded: leave JPEGs to the device.
    """

    def __init__(
        self,
        source: Source,
        crop: RandomCrop,
        num_patches: int,
        seed: int,
        crops_per_image: int = 1,
        undecoded: bool = False,
    ) -> None:
        self.source = source
        self.crop = crop
        self.num_patches = num_patches
        self.seed = seed
        self.crops_per_image = crops_per_image
        self.undecoded = undecoded

    def __getitem__(self, key: SampleKey) -> tuple[Any, Tensor]:
        image = self.source[key[1]].image
        opened = open_image(image, self.crop.format)
        if self.crops_per_image == 1 and not self.undecoded:
            return self._cut([key], opened)[0], self._noise(key)
        crops = [key, *((*key, crop) for crop in range(1, self.crops_per_image))]
        noise = torch.stack([self._noise(counters) for counters in crops])
        if self.undecoded and isinstance(image, Encoded) and is_for_device(image, opened):
            return Undecoded(image, [self._draw(counters, opened) for counters in crops], self.crop.size), noise
        return self._cut(crops, opened), noise

    def _cut(self, crops: Sequence[tuple[int, ...]], image: LazyImage) -> list[Tensor]:
        places = shared.places(len(crops), (self.crop.format.in_chans, *self.crop.size))
        return [self.crop(image, self._uniform(counters), out) for counters, out in zip(crops, places, strict=True)]

    def _draw(self, counters: tuple[int, ...], image: LazyImage) -> Box:
        return self.crop.draw(image, self._uniform(counters))[0]

    def _uniform(self, counters: tuple[int, ...]) -> Uniform:
        return random.Random(derive(self.seed, Stream.AUGMENT, *counters)).random

    def _noise(self, counters: tuple[int, ...]) -> Tensor:
        return torch.rand(self.num_patches, generator=generator(self.seed, Stream.MASK, *counters))


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


class TrainBatches:
    """Micro-batches of one rank from ``start_step`` to ``stop_step``, in order; an iterator over their parts.

    They hold no padding. Where a rank has no sample of a step, one is read for its shapes, and is not counted if bad.

    Args:
        dataset: samples by (epoch, index) of a source of ``plan.num_samples``.
        prefetch: micro-batches that each worker is ahead.
        timeout: waiting for a worker longer than so many seconds is a RuntimeError; 0 = wait for ever.
        skip: replace samples that cannot be read; otherwise the first one is an ImageError.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: BatchPlan,
        *,
        rank: int,
        start_step: int,
        stop_step: int,
        workers: int,
        pin_memory: bool,
        prefetch: int = 2,
        timeout: float = 0,
        skip: bool = False,
    ) -> None:
        samples = errors_aside(dataset, plan.num_samples, plan.seed, skip)
        keys = MicroBatches(plan, rank, start_step, stop_step)
        loader = _loader(samples, workers, pin_memory, prefetch, batch_sampler=keys, timeout=timeout if workers else 0)
        self.plan = plan
        self.rank = rank
        self.bad = BadSamples(skip)
        self._batches: Iterator[Batch] = iter(loader)
        self._taken = start_step * plan.accum_steps
        self._asked_epoch = start_step // plan.steps_per_epoch
        self._asked_total = 0

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> list[Tensor]:
        batch = next(self._batches)
        step, micro = divmod(self._taken, self.plan.accum_steps)
        self._taken += 1
        bad = self.bad if self.plan.part(micro, self.rank) else BadSamples(self.bad.skip)
        return bad.take(batch, step // self.plan.steps_per_epoch, replaced=True)

    def bad_samples(self, step: int) -> list[int]:
        """Samples of this rank that could not be read: since last asked; then in each epoch from the last time's on.

        ``step`` counts the steps whose batches were taken. Epochs are counted from the start of this process.
        """
        epochs = range(self._asked_epoch, (step - 1) // self.plan.steps_per_epoch + 1)
        total = self.bad.counts.total()
        since = total - self._asked_total
        self._asked_epoch, self._asked_total = max(epochs, default=self._asked_epoch), total
        return [since, *(self.bad.counts[epoch] for epoch in epochs)]


def eval_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Every sample exactly once over all ranks: rank r reads r, r + world_size, ..."""
    keys = range(rank, len(dataset), world_size)  # type: ignore[arg-type]
    return _loader(ErrorsAside(dataset), workers, pin_memory, prefetch, batch_size=batch_size, sampler=keys)


def _loader(dataset: Dataset, workers: int, pin_memory: bool, prefetch: int, **kwargs) -> Iterator[Batch]:
    if workers:
        multiprocessing.util.get_temp_dir()  # workers use it too; a killed one would leave its own behind
        _end_workers_at_exit()
    exchange = shared.Exchange(workers)
    # Without a generator of its own the loader draws a seed from the global one, and a resumed run would differ.
    loader = DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=functools.partial(_start_worker, exchange.number, exchange.used),
        collate_fn=collate,
        **kwargs,
    )
    batches = exchange.taken(iter(loader))
    return _from_workers(batches) if workers else batches


def _start_worker(loader: int, used: Tensor, worker: int) -> None:
    interrupt.shield_worker()
    gc.freeze()  # a full collection writes to every object there is, and what is shared by the fork would be copied
    shared.start_worker(loader, used, worker)


@functools.cache
def _end_workers_at_exit() -> None:
    """Workers of iterators that are still alive when Python ends: it would send SIGTERM and wait for them for ever."""
    atexit.register(_end_workers)  # runs before what multiprocessing has registered


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
        raise


def _from_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of a loader with workers. Raises WorkerError if one dies while it sends a batch."""
    try:
        yield from batches
    except (EOFError, ConnectionError) as error:
        if "in DataLoader worker process" in str(error):  # raised there, by reading a sample
            raise
        raise WorkerError(f"a data worker died while it sent a batch ({error})") from error


def _end_workers() -> None:
    """SIGKILL for all workers: they ignore anything else, and one that hangs would keep this process from ending."""
    main = threading.current_thread() is threading.main_thread()
    # torch's handler would raise an error for each of them
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
