"""A process that holds the lock of a run."""

import contextlib
import multiprocessing

from fcmae.training.run_dir import RunLock


@contextlib.contextmanager
def held(run):
    """Another process has the lock of ``run``; it is killed at the end. Gives the process."""
    context = multiprocessing.get_context("fork")  # which need not import torch again
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(run, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == "held"
        yield process
    finally:
        process.kill()
        process.join()


def _hold(run, pipe):
    lock = RunLock(run)
    lock.acquire()
    pipe.send("held")
    pipe.recv()
