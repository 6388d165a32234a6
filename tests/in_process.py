"""Commands in the test's own process, which is as before afterwards: for tests that patch modules."""

import contextlib
import io
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fcmae import interrupt
from fcmae.cli import main

CUDA, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
STATE: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (os.getcwd, os.chdir),
    (torch.get_rng_state, torch.set_rng_state),
    (np.random.get_state, np.random.set_state),
    (random.getstate, random.setstate),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (lambda: CUDA.allow_tf32, lambda value: setattr(CUDA, "allow_tf32", value)),
    *((lambda k=k: getattr(CUDNN, k), lambda v, k=k: setattr(CUDNN, k, v)) for k in ("allow_tf32", "deterministic")),
    (lambda: logging.root.level, logging.root.setLevel),
    (logging.root.handlers.copy, lambda handlers: logging.root.handlers.__setitem__(slice(None), handlers)),
    (sys.path.copy, lambda path: sys.path.__setitem__(slice(None), path)),
)
"""How to get and set what a command changes of its process."""


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """The process is at the end of the block as it was before."""
    before = [get() for get, _ in STATE]
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (*interrupt.SIGNALS, interrupt.HANG_UP)}
    try:
        yield
    finally:
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        for (_, put), value in zip(STATE, before, strict=True):
            put(value)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(folder: Path, *args: str, check: int | None = 0) -> subprocess.CompletedProcess:
    """Runs ``fcmae ARGS`` in ``folder``. What Python prints is captured; ``check`` is the exit code."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with unchanged(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        os.chdir(folder)
        if args[0] == "evaluate" and not any(arg.startswith("report=") for arg in args):
            args = (*args, "report=null")  # plots take a second
        try:
            code = main(args)
        except SystemExit as error:
            code = error.code
    done = subprocess.CompletedProcess(args, code, stdout.getvalue(), stderr.getvalue())
    assert check in (None, code), done.stdout + done.stderr
    return done
