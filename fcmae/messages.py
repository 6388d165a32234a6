"""Lines for the user on stderr, each printed once."""

import functools
import sys

from fcmae import ranks


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
