"""Signals that stop a run: the first one is recorded and handled between two steps, a second one ends the process.

The command line installs this before it imports torch, since SLURM's warning may arrive seconds after the start. So
this module imports nothing slow. It can be imported without POSIX signals (Windows).
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
ENDING = (signal.SIGINT, signal.SIGTERM)
"""Signals that end the process the second time. After SIGUSR1 and SIGUSR2 SLURM sends SIGTERM."""
DOUBLED = 0.5
"""Seconds in which signals count as one: torchrun and srun send each twice."""
PATIENCE = 20.0
"""Seconds that Python may take to end after a signal."""
HANG_UP = getattr(signal, "SIGHUP", signal.SIGTERM)
PR_SET_PDEATHSIG = 1

STARTED = time.monotonic()
"""The start of this process on the monotonic clock."""

_received: list[str] = []
_before: dict[signal.Signals, Any] = {}
_watchers: list["_Watcher"] = []


def install(say: Callable[[str], object] | None = None) -> None:
    """Records signals from now on instead of ending the process; a second one ends it, see :func:`watch`.

    Args:
        say: prints a line at the first SIGINT or SIGTERM and at the end; called from another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread can; callers in other threads handle signals themselves
    watch(say, "stops as soon as it can, and saves; another {} ends it at once")
    for number in SIGNALS:
        _before.setdefault(number, signal.signal(number, _note))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # a killed torchrun leaves its ranks behind


@contextlib.contextmanager
def recorded(say: Callable[[str], object]) -> Iterator[None]:
    """In this block SIGINT and SIGTERM stop a run after its step, for Python and notebooks: the process continues.

    A second SIGINT is a KeyboardInterrupt, which ends the run at once. Without effect in other threads than the main.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        if _received and number == signal.SIGINT:
            raise KeyboardInterrupt
        _note(number, frame)
        say(f"{signal.Signals(number).name}: stops as soon as it can, and saves; another SIGINT ends it at once")

    _received.clear()
    before = {number: signal.signal(number, note) for number in ENDING}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def uninstall() -> None:
    """Forgets received signals, restores the previous handlers and stops watching."""
    _received.clear()
    while _before:
        signal.signal(*_before.popitem())
    _stop_watching()


def watch(say: Callable[[str], object] | None = None, at_first: str = "") -> None:
    """From now on a second SIGINT or SIGTERM ends this process at once. Call it in the main thread.

    Python's handlers wait for the end of the main thread's current call, such as a collective or a compilation. So a
    thread reads the descriptor to which Python writes each signal immediately. Signals without a Python handler are
    not seen.
    """
    _stop_watching()
    _watchers.append(_Watcher(say or (lambda _: None), at_first))


def _stop_watching() -> None:
    while _watchers:
        _watchers.pop().close()


def ignore() -> None:
    """Ignores the signals from now on: the process is about to end with a known exit code.

    A Python handler would not be enough: Python drops handlers before it ends.
    """
    for number in _before:
        signal.signal(number, signal.SIG_IGN)
    _stop_watching()


def end_soon(code: int) -> None:
    """Ends this process with ``code`` in ``PATIENCE`` seconds, if Python's own end has not done so.

    torch waits up to five minutes for the end of compilers that a signal has torn from their work.
    """
    timer = threading.Timer(PATIENCE, os._exit, (code,))
    timer.daemon = True
    timer.start()


def received() -> str | None:
    """The name of the first recorded signal, or None."""
    return _received[0] if _received else None


def shield_worker() -> None:
    """Makes a data worker ignore signals, but end with its parent.

    Schedulers and terminals signal whole process groups, and the last step before a stop needs its workers.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Delays signals to the end of this block. Processes that start in it never receive any."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    came: list[int] = []
    # New processes inherit the mask. It is not enough for this one: any of its threads may receive a signal.
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (*SIGNALS, HANG_UP)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            handler = handlers[number]
            if callable(handler):
                handler(number, None)  # a second signal would end the process
            else:
                signal.raise_signal(number)


def take_for_ctrl_c() -> None:
    """Makes SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does: pools end, and temporary files are deleted."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, HANG_UP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                _before.setdefault(number, signal.signal(number, signal.default_int_handler))


def die_with_parent(parent: int | None = None) -> None:
    """Lets the system kill this process when its parent dies: Linux only.

    Args:
        parent: the parent's id, if it may be dead already; then this process ends at once, everywhere.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


class _Watcher:
    """The thread of :func:`watch`."""

    def __init__(self, say: Callable[[str], object], at_first: str) -> None:
        self.say = say
        self.at_first = at_first
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._outer = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="fcmae-signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._outer)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def drop(self) -> None:
        """Closes the descriptors in a forked process, which has no such thread."""
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        self._writer.close()
        self._reader.close()

    def _run(self) -> None:
        first: float | None = None
        while arrived := self._reader.recv(64):
            ending = [signal.Signals(number) for number in arrived if number in ENDING]
            now = time.monotonic()
            if ending and first is None:
                first = now
                if self.at_first:
                    self._tell(f"{ending[0].name}: {self.at_first.format(ending[0].name)}")
            elif ending and first is not None and now - first >= DOUBLED:
                self._end(ending[0])

    def _end(self, number: signal.Signals) -> None:
        """Ends the process with the exit code that a shell gives for the signal."""
        with contextlib.suppress(Exception):
            # Not imported here: the main thread may be importing it. Without it there are no children.
            for child in sys.modules["multiprocessing.process"].active_children():
                child.kill()
        line = f"ended at once by a second {number.name}; nothing more was saved"
        teller = threading.Thread(target=self._tell, args=(line,), daemon=True)  # stderr may be a full pipe
        teller.start()
        teller.join(0.5)
        os._exit(128 + number)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(Exception):
            self.say(line)


def _drop_watchers() -> None:
    while _watchers:
        _watchers.pop().drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_watchers)


def _note(number: int, _: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)
