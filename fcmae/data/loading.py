"""The loader: batches of a dataset's samples, in the order of a plan, read by worker processes."""

import atexit
import contextlib
import functools
import gc
import multiprocessing.queues
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fcmae import interrupt
from fcmae.config import LoaderConfig
from fcmae.data import shared_memory as shared
from fcmae.data.collate import Batch, collate
from fcmae.data.cores import default_workers
from fcmae.data.pixels.on_device import Undecoded
from fcmae.data.plan import BatchPlan, MicroBatches
from fcmae.data.unreadable import BadSamples, ErrorsAside, errors_aside, tell_epoch
from fcmae.distributed import World
from fcmae.errors import DiskError, WorkerError, reason_of
from fcmae.processes import is_stopped
from fcmae.threads import one_thread

START = "fork" if sys.platform == "linux" else None
"""How workers start: as copies of this process, which share its memory, whatever Python's default is."""


@dataclass(frozen=True)
class Workers:
    """The worker processes of a loader.

    Args:
        count: 0 = samples are read in the calling process.
        prefetch: batches that each worker reads ahead.
        timeout: seconds to wait for a batch before a RuntimeError; 0 = wait forever.
    """

    count: int = 0
    pin_memory: bool = False
    prefetch: int = 2
    timeout: float = 0

    @classmethod
    def of(cls, cfg: LoaderConfig, world: World, timeout: float = 0) -> "Workers":
        """The workers of one rank."""
        count = default_workers(world.device, world.local_size) if cfg.workers is None else cfg.workers
        return cls(count, world.device.type == "cuda", cfg.prefetch, timeout)


class TrainBatches:
    """An iterator over one rank's micro-batches, in order; each is a list of its parts, without padding.

    Where a rank has no sample of a step, it reads one for its shapes, which does not count if it cannot be read.

    Args:
        dataset: samples by (epoch, index) of a source of ``plan.num_samples``.
        steps: the optimizer steps to read for.
        skip: replace samples that cannot be read; otherwise the first one raises ImageError.
        max_bad: the share of an epoch that may be replaced.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: BatchPlan,
        rank: int,
        steps: range,
        workers: Workers,
        skip: bool = False,
        max_bad: float = 1.0,
    ) -> None:
        samples = errors_aside(dataset, plan.num_samples, plan.seed, skip)
        keys = MicroBatches(plan, rank, steps.start, steps.stop)
        self.plan = plan
        self.rank = rank
        self._none = functools.partial(BadSamples, skip, plan.steps_per_epoch * plan.global_batch_size, max_bad)
        self.bad = self._none()
        self._samples, self._keys, self._has_workers = samples, keys, workers.count > 0
        self._batches: Iterator[Batch] = _loader(samples, workers, batch_sampler=keys)
        self._taken = steps.start * plan.accum_steps
        self._asked_epoch = self._first_epoch = steps.start // plan.steps_per_epoch
        self._asked_total, self._has_told = 0, False

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> list[Tensor]:
        batch = next(self._batches)
        step, micro = divmod(self._taken, self.plan.accum_steps)
        self._taken += 1
        bad = (
            self.bad
            if self.plan.part(micro, self.rank)
            else BadSamples(self.bad.skip, self.bad.num_samples, self.bad.max_bad)
        )
        return bad.take(batch, step // self.plan.steps_per_epoch, replaced=True)

    def made_up(self) -> list[Any] | None:
        """The first micro-batch in shape, type and memory order: copies of its first sample, read by this process.

        None without workers, if that sample cannot be read, and if the device decodes it, which would have to hold the
        file once per sample. Workers read the real micro-batch meanwhile: see :func:`deaths_told_later`.
        """
        if not self._has_workers:
            return None
        keys = next(iter(self._keys))
        try:
            item = self._samples[keys[0]]
            whole = item.parts is not None and isinstance(item.parts[0], Undecoded)
            with one_thread():  # several would wait for the workers, which take all cores while they start
                return None if whole else collate([item] * len(keys)).parts
        except Exception:  # of a source or a transform of the user's own: the worker that reads it will say why
            return None

    def tell_first_epoch(self, step: int, world: World) -> None:
        """Says once how many samples of this process's first epoch were unreadable. Every rank calls this.

        Args:
            step: see :meth:`bad_samples`.
        """
        epoch, plan = self._first_epoch, self.plan
        if self.bad.skip and not self._has_told and step >= (epoch + 1) * plan.steps_per_epoch:
            self._has_told = True
            tell_epoch(self.bad, epoch, plan.steps_per_epoch * plan.global_batch_size, world)

    def bad_samples(self, step: int) -> list[int]:
        """Unreadable samples of this rank: since the last call; then in each epoch since the last call's.

        Args:
            step: the number of steps whose batches were taken. Epochs count from the start of this process.
        """
        epochs = range(self._asked_epoch, (step - 1) // self.plan.steps_per_epoch + 1)
        total = self.bad.counts.total()
        since = total - self._asked_total
        self._asked_epoch, self._asked_total = max(epochs, default=self._asked_epoch), total
        return [since, *(self.bad.counts[epoch] for epoch in epochs)]


def eval_loader(dataset: Dataset, batch_size: int, *, rank: int, world_size: int, workers: Workers) -> Iterator[Batch]:
    """Every sample exactly once over all ranks: rank r reads r, r + world_size, ..."""
    keys = range(rank, len(dataset), world_size)  # type: ignore[arg-type]
    return _loader(ErrorsAside(dataset), workers, batch_size=batch_size, sampler=keys)


def _loader(dataset: Dataset, workers: Workers, **kwargs) -> Iterator[Batch]:
    count = workers.count
    if count:
        _make_folder()
        _end_workers_at_exit()
    exchange = shared.Exchange(count)
    # Without a generator the loader draws a seed from the global one, and a resumed run would differ.
    loader = DataLoader(
        dataset,
        num_workers=count,
        pin_memory=workers.pin_memory,
        prefetch_factor=workers.prefetch if count else None,
        timeout=workers.timeout if count else 0,
        multiprocessing_context=START if count else None,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=functools.partial(_start_worker, os.getpid(), exchange.number, exchange.used),
        collate_fn=collate,
        **kwargs,
    )
    return _opened(iter(loader), exchange)


def _make_folder() -> None:
    """The private temporary folder through which workers hand on memory: a killed one would leave its own behind.

    A long run may find that it was deleted since its last workers began. Raises DiskError.
    """
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
    if os.path.isdir(config.get("tempdir") or ""):
        return
    try:
        config["tempdir"] = folder = tempfile.mkdtemp(prefix="pymp-")
    except OSError as error:
        place = f"the folder {os.path.dirname(error.filename)} for temporary files" if error.filename else "TMPDIR"
        raise DiskError(f"{place} cannot be written: {reason_of(error)}; data workers need it") from error
    # Not atexit, which would also run in forks of this process.
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=-100)


def _start_worker(parent: int, loader: int, used: Tensor, worker: int) -> None:
    interrupt.shield_worker()
    # torch's worker looks whether its parent changes, which it does not do once the parent is dead.
    interrupt.die_with_parent(parent)
    sys.excepthook = _unless_hung_up
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
    gc.freeze()  # a full collection would write to all objects, and so copy the memory that the fork shares
    shared.start_worker(loader, used, worker)


def _unless_hung_up(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For the thread that hands on new memory: the training process may stop, or lose a worker, while it takes it."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _send_error(queue: multiprocessing.queues.Queue, error: Exception, unsent: Any) -> None:
    """Sends an error instead of the batch ``(number, Batch)`` that could not be sent, for which training would wait."""
    if not isinstance(unsent, tuple):  # but bytes: the queue is broken
        os._exit(1)
    queue.put((unsent[0], Batch(None, [_not_sent(error)], 0)))


def _not_sent(error: Exception) -> WorkerError:
    folder = multiprocessing.util.get_temp_dir()
    reason = (
        reason_of(error) if os.path.isdir(folder) else f"the temporary folder {folder} was deleted; repeat the command"
    )
    return WorkerError(f"a data worker could not send a batch: {reason}")


@functools.cache
def _end_workers_at_exit() -> None:
    """Ends workers that are alive when Python ends: it would send SIGTERM, which they ignore, and wait forever."""
    atexit.register(_end_workers)  # runs before what multiprocessing has registered


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns RuntimeErrors of a DataLoader in this block into WorkerErrors of one line. Ends all workers after an error.

    torch raises some of these errors in a signal handler, so anywhere in the block.
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


def _opened(batches: Iterator[Batch], exchange: shared.Exchange) -> Iterator[Batch]:
    """The batches of a loader. Raises WorkerError if a worker dies or loses its folder while it sends one."""
    try:
        for batch in batches:
            yield batch.opened()
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        if "in DataLoader worker process" in str(error) or not len(exchange.used):  # raised by reading a sample
            raise
        if isinstance(error, FileNotFoundError):
            raise _not_sent(error) from error
        raise WorkerError(f"a data worker died while it sent a batch ({error})") from error


@contextlib.contextmanager
def deaths_told_later() -> Iterator[None]:
    """Torch raises the death of a worker once, as RuntimeError wherever this process is: here at the end of the block.

    Within it, a decoder or a compiler would take the error for its own, and the next batch would be waited for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deaths: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGCHLD, lambda *death: deaths.append(death))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
    if deaths and callable(handler):
        handler(*deaths[-1])


def _end_workers() -> None:
    """Kills all workers: they ignore other signals, and one that hangs would keep this process from ending."""
    main = threading.current_thread() is threading.main_thread()

    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
