"""Several processes that share the cells of a study, each with a GPU of its own or a part of one."""

import contextlib
import multiprocessing
import os
import pickle
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fcmae import interrupt
from fcmae.data.cores import default_workers
from fcmae.distributed import pick_device
from fcmae.errors import EXIT_ERROR, FCMAEError, Interrupted
from fcmae.imports import call_pickled
from fcmae.studies.arms import Cell, Plan
from fcmae.studies.cells import Result, measure

Done = Callable[[Cell, Result], None]
VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL = 0.2
"""Seconds between looks at the processes."""


class StudyError(FCMAEError):
    """A measurement failed in another process."""


def devices(plan: Plan) -> list[str]:
    """One entry per process: the GPU that it sees, as CUDA_VISIBLE_DEVICES names it. Empty: this process measures."""
    import torch

    if pick_device(plan.cfg.trainer.device).type != "cuda":
        return []
    named = os.environ.get(VISIBLE)
    gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    found = gpus * plan.cfg.processes
    return found if len(found) > 1 else []


def measure_all(plan: Plan, cells: Sequence[Cell], folder: Path, done: Done) -> None:
    """Measures cells and calls ``done`` with each result. Raises what measuring raises; Interrupted."""
    found = devices(plan)[: len(cells)]
    if not found:
        for cell in cells:
            _check_signals()
            done(cell, measure(plan, cell, folder))
        return
    if plan.cfg.loader.workers is None:
        workers = max(1, default_workers(pick_device("auto"), 1) // len(found))
        plan = replace(plan, cfg=replace(plan.cfg, loader=replace(plan.cfg.loader, workers=workers)))
    _Pool(plan, cells, folder, found).run(done)


class _Pool:
    def __init__(self, plan: Plan, cells: Sequence[Cell], folder: Path, found: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.cells = {cell.name: cell for cell in cells}
        self.left = len(cells)
        self.todo, self.results = context.Queue(), context.Queue()
        for cell in [*cells, *[None] * len(found)]:
            self.todo.put(cell)
        self.processes = []
        work = pickle.dumps((_work, plan, folder))
        for device in found:
            process = context.Process(target=call_pickled, args=(work, self.todo, self.results), daemon=False)
            with _visible(device):
                process.start()
            self.processes.append(process)

    def run(self, done: Done) -> None:
        try:
            while self.left:
                self._step(done)
        except BaseException:
            self._stop()
            raise
        for process in self.processes:
            process.join()

    def _step(self, done: Done) -> None:
        _check_signals()
        try:
            name, result, failure = self.results.get(timeout=POLL)
        except queue.Empty:
            ended = [process for process in self.processes if process.exitcode not in (None, 0)]
            if ended:
                raise StudyError(f"a process of the study ended with exit code {ended[0].exitcode}") from None
            return
        if failure is not None:
            line, code = failure
            error: FCMAEError = StudyError(line)
            error.exit_code = code
            raise error
        self.left -= 1
        done(self.cells[name], result)

    def _stop(self) -> None:
        """Lets the trainings save, and waits for them."""
        for process in self.processes:
            if process.is_alive():
                process.terminate()
        for process in self.processes:
            process.join()
        for each in (self.todo, self.results):
            each.cancel_join_thread()
            each.close()


def _check_signals() -> None:
    """Raises Interrupted after a signal."""
    if interrupt.received():
        raise Interrupted(f"stopped by {interrupt.received()}")


@contextlib.contextmanager
def _visible(device: str) -> Iterator[None]:
    """A process that starts in this block sees one GPU."""
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = device
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


def _work(plan: Plan, folder: Path, todo: Any, results: Any) -> None:
    """Measures cells until there are none."""
    interrupt.die_with_parent()
    os.setpgid(0, 0)  # a terminal signals the whole group; the parent passes signals on
    interrupt.install()
    while (cell := todo.get()) is not None:
        try:
            _check_signals()
            results.put((cell.name, measure(plan, cell, folder), None))
        except FCMAEError as error:
            results.put((cell.name, None, (str(error), error.exit_code)))
            break
        except Exception as error:
            results.put((cell.name, None, (f"{cell.name}: {type(error).__name__}: {error}", EXIT_ERROR)))
            break
    results.close()
    results.join_thread()
    sys.exit(0)
