"""Lines for the user on stderr."""

import contextlib
import functools
import sys
from typing import Any

from fcmae import ranks


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


def print_once_rank0(line: str) -> None:
    """Prints a line to stderr, on rank 0 only, unless this process has printed it before."""
    if ranks.detect().rank == 0:
        print_once(line)
