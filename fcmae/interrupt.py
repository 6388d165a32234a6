"""Signals that ask a run to stop: noted at once, acted upon between two steps. Imports nothing that takes time.

The command line installs this before torch is imported: SLURM's warning may arrive seconds after the start.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
HANG_UP = getattr(signal, "SIGHUP", signal.SIGTERM)
PR_SET_PDEATHSIG = 1

STARTED = time.monotonic()
"""When this process started, on the monotonic clock."""

_received: list[str] = []
_before: dict[signal.Signals, Any] = {}


def install() -> None:
    """From now on the signals are noted instead of ending the process; a second one changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may; whoever calls from another one handles signals himself
    for number in SIGNALS:
        _before[number] = signal.signal(number, _note)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # torchrun, killed, would leave its ranks behind


def uninstall() -> None:
    """Forgets what was received and restores the handlers of before."""
    _received.clear()
    while _before:
        signal.signal(*_before.popitem())


def ignore() -> None:
    """From now on the signals change nothing: the process is about to end, and its exit code is settled.

    A handler would not do: Python gives handlers up before it has ended.
    """
    for number in _before:
        signal.signal(number, signal.SIG_IGN)


def received() -> str | None:
    """The name of the first signal that asked this process to stop, if one did."""
    return _received[0] if _received else None


def shield_worker() -> None:
    """For data workers: only the training process decides when they end, but they never outlive it.

    Schedulers and terminals signal whole process groups, and the last step before a stop needs its workers.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """In this block signals wait for its end. Processes that start here never get any."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    came: list[int] = []
    # The mask, which processes inherit, does not do for this one: any thread may be given a signal, to be handled here.
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (*SIGNALS, HANG_UP)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def take_for_ctrl_c() -> None:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does, so that processes of a pool end with this one."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, HANG_UP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, signal.default_int_handler)


def die_with_parent() -> None:
    """SIGKILL for this process as soon as its parent is dead. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _note(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
