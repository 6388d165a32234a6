"""The commands ``pretrain`` and ``finetune`` as functions of a typed config and a run directory."""

import contextlib
import errno
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fcmae import distributed, precision, toolchain
from fcmae.config import FinetuneConfig, PretrainConfig, RunConfig
from fcmae.data.loading import explained
from fcmae.distributed import World
from fcmae.engines import get_engine
from fcmae.errors import DiskError, UsageError
from fcmae.kernels import precompile
from fcmae.loggers.report_page import write_report
from fcmae.loggers.wandb import wandb_mode
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.initial import Start, find_start
from fcmae.tasks.pretraining import Pretraining
from fcmae.training.agree_to_stop import StopAgreement
from fcmae.training.budget import fit_schedule
from fcmae.training.cuda_graphs import use_cuda_graph
from fcmae.training.determinism import only_deterministic_algorithms
from fcmae.training.few_labels import search
from fcmae.training.loop import train
from fcmae.training.run_dir import RunLock
from fcmae.training.watchdog import Watchdog


def pretrain(cfg: PretrainConfig, run_dir: Path) -> Path:
    """Pretrains and returns the last checkpoint. Every rank of a launch calls this."""
    return _run(
        cfg,
        run_dir,
        lambda world: _pretraining(cfg, world.device.type, world.from_main(lambda: find_start(cfg, run_dir))),
    )


def finetune(cfg: FinetuneConfig, run_dir: Path) -> Path:
    """Fine-tunes and returns the last checkpoint. Every rank of a launch calls this."""
    work = train if cfg.recipe is None else search

    def task(world: World) -> Finetuning:
        made = Finetuning(cfg, world.from_main(lambda: find_start(cfg, run_dir)))
        if cfg.augment.on == "gpu" and world.device.type == "cpu":
            made.notes.append("augment.on=gpu: without a GPU the training process augments, on the CPU; workers do not")
        return made

    return _run(cfg, run_dir, task, work)


def _pretraining(cfg: PretrainConfig, device: str, start: Start) -> Pretraining:
    try:
        get_engine(cfg.engine.name, device)
    except ImportError as error:
        raise UsageError(str(error)) from error
    task = Pretraining(cfg, start)
    if cfg.data.decode_on == "gpu" and device == "cpu":
        task.notes.append(
            "data.decode_on=gpu: without a GPU the training process decodes on the CPU, one image at a time"
        )
    return task


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LINKS = (errno.ELOOP, errno.EMLINK)
"""What :mod:`fcmae.opening` says of a link where a run would write."""


@contextlib.contextmanager
def _disk_explained(run_dir: Path) -> Iterator[None]:
    """In this block, a disk that is full or read-only is a DiskError of one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*DISK_ERRORS, *LINKS):
            raise
        raise DiskError(f"{error.filename or run_dir} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _released() -> Iterator[None]:
    """Frees after this block what a run held in reference cycles: Python's collector does not count a GPU's memory."""
    try:
        yield
    finally:
        gc.collect()


@_released()
def _run(cfg: RunConfig, run_dir: Path, create: Callable[[World], Any], work: Callable[..., Path] = train) -> Path:
    """Connects the ranks, creates the task, takes the run directory, and does ``work``, by default :func:`train`."""
    if cfg.trainer.deterministic:
        only_deterministic_algorithms()
    # The watchdog, which leaves stacks, comes before an error about a collective.
    world = distributed.connect(cfg.trainer.device, cfg.trainer.hang_timeout + 5 * Watchdog.GRACE)
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.disconnect)
        stop = StopAgreement(world, cfg.trainer.max_hours)
        stop.before_training(run_dir)
        kind = world.device.type
        if kind == "cuda":
            precompile.hash_triton()
        world.together(lambda: toolchain.check("trainer.compile", cfg.trainer.compiles(kind), kind))
        world.together(lambda: use_cuda_graph(cfg, world.device))
        world.together(lambda: precision.check_float8(cfg.precision, world.device))
        world.on_main(lambda: wandb_mode(cfg.logger))
        task = None if cfg.trainer.budget else world.together(lambda: create(world))
        stop.before_training(run_dir)
        stack.enter_context(_disk_explained(run_dir))
        if cfg.logger.report and world.is_main:
            stack.callback(write_report, run_dir)  # once the lock is released: the page says how the run ended
        lock = stack.enter_context(contextlib.closing(RunLock(run_dir)))
        world.on_main(lock.acquire)
        watchdog = Watchdog(cfg.trainer.hang_timeout, run_dir, world.rank, distributed.siblings(world))
        stack.enter_context(contextlib.closing(watchdog))
        stack.callback(distributed.disconnect)  # may hang where a rank does, so the watchdog still watches
        stack.enter_context(explained())
        if task is None:
            notes = fit_schedule(cfg, run_dir, create, world, watchdog, stop)
            task = world.together(lambda: create(world))
            task.notes += notes
        return work(task, run_dir, world, watchdog, stop)
