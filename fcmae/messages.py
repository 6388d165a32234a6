"""Lines for the user on stderr."""

import contextlib
import functools
import os
import select
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

from fcmae import ranks
from fcmae.errors import EXIT_ERROR


def say(message: str) -> None:
    """Prints a line for the user, above a progress bar if there is one."""
    bars: Any = sys.modules.get("tqdm")
    with bars.tqdm.external_write_mode(file=sys.stderr) if bars else contextlib.nullcontext():
        print(message, file=sys.stderr, flush=True)


def print_rank0(line: str) -> None:
    """Prints a line to stderr, on rank 0 only."""
    if ranks.detect().rank == 0:
        print(line, file=sys.stderr, flush=True)


@functools.cache
def print_once(line: str) -> None:
    """Prints a line to stderr, unless this process has printed it before."""
    print(line, file=sys.stderr, flush=True)


P = ParamSpec("P")


def ends_with_its_reader(command: Callable[P, int]) -> Callable[P, int]:
    """A command that ends with 1, without a traceback, when its reader ends, as in ``fcmae --help | head``."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            code = command(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            if not _nobody_reads():  # but a connection broke
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left at its end
            return EXIT_ERROR
        return code

    return run


def _nobody_reads() -> bool:
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def print_once_rank0(line: str) -> None:
    """Prints a line to stderr, on rank 0 only, unless this process has printed it before."""
    if ranks.detect().rank == 0:
        print_once(line)
