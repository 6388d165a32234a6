"""Runs a function on many tasks in several processes, each of which receives the source once."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import torch

from fcmae import interrupt
from fcmae.errors import WorkerError

T = TypeVar("T")

_job: dict[str, Any] = {}
"""In a process of the pool: the function and what all its calls share."""


def in_processes(count: int, work: Callable[..., T], shared: Any, tasks: Sequence[tuple]) -> Iterator[tuple[int, T]]:
    """Calls ``work(shared, *task)`` for every task. Yields index and result of each task as it ends.

    ``shared`` is sent once to each of ``count`` processes; with one, this process does the work. They end with this
    process, even if it is killed.
    """
    count = min(count, len(tasks))
    if count <= 1:
        yield from ((i, work(shared, *task)) for i, task in enumerate(tasks))
        return
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([work.__module__])  # imported once, not in every process
    with interrupt.postponed():
        resource_tracker.ensure_running()  # first: starting it ends the postponement
    pool = concurrent.futures.ProcessPoolExecutor(count, context, _start, (work, shared))
    try:
        with interrupt.postponed():  # the processes import for seconds before they ignore signals
            futures = {pool.submit(_do, task): i for i, task in enumerate(tasks)}
        for future in concurrent.futures.as_completed(futures):
            yield futures.pop(future), future.result()  # no result is kept
    except (BrokenProcessPool, EOFError, ConnectionError) as error:
        raise WorkerError("a process of the pool was killed; the same command continues") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(work: Callable, shared: Any) -> None:
    interrupt.shield_worker()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _job.update(work=work, shared=shared)


def _end_with_parent() -> None:
    """Otherwise two processes of the pool would wait for each other forever after this one was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _do(task: tuple) -> Any:
    return _job["work"](_job["shared"], *task)
