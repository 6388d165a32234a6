"""Counter-based randomness: every random number is a function of a seed and of what it is for, not of what ran before.

The crop, flip and mask of a sample follow from (seed, epoch, sample index); what is random in a step from (seed, step).
So a run does not depend on its number of workers, ranks or restarts.
"""

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What randomness is for; streams of different purpose never meet."""

    ORDER = 0
    AUGMENT = 1
    MASK = 2
    STEP = 3
    INIT = 4
    SUBSET = 5
    REPLACE = 6


def derive(seed: int, stream: Stream, *counters: int) -> int:
    """A 63-bit seed from the run's seed, a purpose and counters such as (epoch, sample index)."""
    counted = struct.pack(f"<{2 + len(counters)}q", seed, stream, *counters)
    return int.from_bytes(hashlib.blake2b(counted, digest_size=8).digest(), "little") >> 1


def generator(seed: int, stream: Stream, *counters: int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, stream, *counters))


def seed_globals(seed: int, stream: Stream, *counters: int) -> None:
    """Seeds the global CPU generators of Python, NumPy and torch, for libraries that draw from those.

    Whoever relies on a global generator seeds it first: training does before every step.
    """
    derived = derive(seed, stream, *counters)
    random.seed(derived)
    np.random.seed(derived >> 32)  # torch takes the lower 32 bits; both run the Mersenne Twister from them
    torch.default_generator.manual_seed(derived)


@contextlib.contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """The global generators, that of ``device`` too, are after this block as they were before it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_step(seed: int, step: int, micro: int, rank: int, device: torch.device) -> None:
    """Seeds what is random within a training step: drop path, mixup."""
    seed_globals(seed, Stream.STEP, step, micro, rank)
    if device.type == "cuda":
        torch.cuda.manual_seed(derive(seed, Stream.STEP, step, micro, rank))
