"""Processes that have everything imported when they start: importing torch takes seconds, a fork milliseconds.

``python -m tests.preloaded`` imports the package, composes a config, and forks a process for every request. Such a
process has its own session, folder, environment, output and exit code, and runs ``python ARGS`` as ``__main__``; only
what happens while modules are imported differs from a real start. Linux only.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).parents[1]
MODULES = (
    "fcmae.cli",
    "fcmae.data.prepare.command",
    "fcmae.evaluation.reconstruct",
    "fcmae.evaluation.run",
    "fcmae.hydra_run",
    "fcmae.interchange.convert",
    "fcmae.training.run",
    "hydra._internal.hydra",
    "hydra.experimental.callback",
    "hydra.main",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "tests.quick_hydra",
    "torchmetrics.functional.classification",
)
GROUPS = ["model=demo", "data=synthetic", "logger=quiet"]
"""Of the small runs of conftest.py, whose config is composed once."""
_LOCK = threading.Lock()
_ENVIRONMENT = dict(os.environ)
"""Of this process, before any test changes it."""
TO_RANKS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
READY = b"!"
GRACE = 30
"""Seconds that ranks have to end after one has failed or a signal came, as under torchrun."""


def is_possible() -> bool:
    """Whether processes can be forked here. A forked process cannot use a GPU that its parent has looked at."""
    return hasattr(os, "pidfd_open") and not Path("/dev/nvidiactl").exists()


class Process:
    """A process of the server, with the part of ``subprocess.Popen`` that tests use.

    Args:
        args: what follows ``python``: ``-m MODULE ...``, ``-c CODE ...`` or ``SCRIPT ...``.
        ranks: for more than one, this is their parent, which does what torchrun does for ranks on one machine.
        stdout, stderr: open files.
    """

    def __init__(
        self, args: Sequence[str], cwd: Path, env: Mapping[str, str], ranks: int, stdout: IO, stderr: IO
    ) -> None:
        self.args = args
        self.returncode: int | None = None
        self._reply, theirs = socket.socketpair()
        request = {"args": list(args), "cwd": str(cwd), "env": dict(env), "ranks": ranks}
        fds = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
        with theirs, _LOCK:
            socket.send_fds(_server()[1], [json.dumps(request).encode()], fds)
        self._lines = self._reply.makefile()
        self.pid = int(self._lines.readline())

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._reply], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            self.returncode = int(self._lines.readline() or -signal.SIGKILL)
            self._lines.close()
            self._reply.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> tuple[subprocess.Popen, socket.socket, float]:
    """The server, which this starts, the socket to it, and after how many seconds it was ready.

    It ends with this process, and its processes with it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    began = time.monotonic()
    with theirs:
        command = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())]
        env = {**_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
    atexit.register(server.wait)
    atexit.register(ours.close)  # comes first
    assert ours.recv(1) == READY
    return server, ours, time.monotonic() - began


def start_seconds() -> float:
    """How long it took to start Python, import everything and compose a config: how slow this machine is."""
    with _LOCK:
        return _server()[2]


def cpu_seconds() -> float:
    """User and system time of the server and of its processes that have ended."""
    if not _server.cache_info().currsize:
        return 0.0
    fields = Path(f"/proc/{_server()[0].pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _serve(control: socket.socket) -> dict | None:
    """Forks a process for every request and reports how it ended. Returns the request in the new process."""
    replies: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    while True:
        ready = select.select([control, *replies], [], [])[0]
        for pidfd in [fd for fd in ready if fd in replies]:
            pid, reply = replies.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError), reply:
                reply.send(b"%d\n" % code)
            os.close(pidfd)
        if control not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not message:
            for pid, _ in replies.values():
                os.kill(pid, signal.SIGKILL)
            return None
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number, fd in enumerate((os.open(os.devnull, os.O_RDONLY), *fds[:2])):
                os.dup2(fd, number)
            for fd in (*fds, *replies):
                os.close(fd)
            for one in (control, *(reply for _, reply in replies.values())):
                one.close()
            return json.loads(message)
        reply = socket.socket(fileno=fds[2])
        for fd in fds[:2]:
            os.close(fd)
        reply.send(b"%d\n" % pid)
        replies[os.pidfd_open(pid)] = (pid, reply)


def _become(request: dict) -> None:
    """Gives this new process its folder and environment."""
    import numpy as np
    import torch

    from fcmae import interrupt

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    interrupt.STARTED = time.monotonic()
    np.random.seed()
    threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    if threads not in (0, 1):
        torch.set_num_threads(threads)
    gc.enable()


def _start_ranks(ranks: int) -> None:
    """Returns in every rank; the process that calls it stays behind as their launcher, and ends with 0 or 1."""
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", GROUP_RANK="0")
    os.environ.update(TORCHELASTIC_RUN_ID="preloaded", TORCHELASTIC_USE_AGENT_STORE="True")
    pids: list[int] = []
    receive, send = os.pipe()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(send)
            port = os.read(receive, 5)
            if not port:
                os._exit(1)  # the launcher is gone
            os.close(receive)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(int(port)))
            return
        pids.append(pid)
    _launcher(pids, send)


def _launcher(pids: list[int], send: int) -> NoReturn:
    from torch.distributed import TCPStore

    def to_ranks(number: int, _: object = None) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    for name in TO_RANKS:
        signal.signal(getattr(signal, name), to_ranks)
    signal.signal(signal.SIGALRM, lambda *_: to_ranks(signal.SIGKILL))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(send, b"%05d" % store.port * len(pids))
    failed = False
    while pids:
        pid, status = os.waitpid(-1, 0)
        if pid in pids:
            pids.remove(pid)
            if status and not failed:
                failed = True
                to_ranks(signal.SIGTERM)
                signal.alarm(GRACE)
    os._exit(int(failed))


def _run(args: list[str]) -> None:
    """``python ARGS``, as ``__main__``."""
    if args[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *args[2:]], ""
        main = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("__main__", None))
        sys.modules["__main__"] = main
        exec(compile(args[1], "<string>", "exec"), main.__dict__)
    elif args[0] == "-m":
        sys.argv, sys.path[0] = args[1:], os.getcwd()
        sys.modules.pop(args[1], None)  # as in a real start it is __main__ only
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(args), str(Path(args[0]).resolve().parent)
        runpy.run_path(args[0], run_name="__main__")


def _end(code: object) -> NoReturn:
    """Does what Python does at its end but for taking half a million objects apart."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def main(control: socket.socket) -> None:
    gc.disable()
    for module in MODULES:
        importlib.import_module(module)
    compose = importlib.import_module("fcmae.config").compose  # Hydra's parser and plugins are slow at first
    for command, groups in (("pretrain", GROUPS), ("finetune", [*GROUPS, "augment=none"])):
        compose(command, groups)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        each.atexit = False  # of the imported libraries: they take their operators apart
    gc.freeze()
    control.send(READY)
    request = _serve(control)
    if request is None:
        return
    _become(request)
    if request["ranks"] > 1:
        _start_ranks(request["ranks"])
    try:
        _run(request["args"])
        code: object = 0
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    _end(code)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
