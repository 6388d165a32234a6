"""Counter-based randomness: every random number is a function of a seed and its purpose, not of what ran before.

The crop, flip and mask of a sample are functions of (seed, epoch, sample index). Drop path and mixup are functions of
(seed, step, position of the sample in the global batch). So a run does not depend on its number of workers, ranks,
micro-batches or restarts.
"""

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", int, Tensor)


class Stream(IntEnum):
    """What random numbers are for. Two streams never share numbers."""

    ORDER = 0
    AUGMENT = 1
    MASK = 2
    STEP = 3
    INIT = 4
    SUBSET = 5
    REPLACE = 6
    STEP_SAMPLES = 7
    TRANSFORM = 8
    FOLDS = 9


def derive(seed: int, stream: Stream, *counters: int) -> int:
    """A 63-bit seed from the run's seed, a purpose and counters such as (epoch, sample index)."""
    counted = struct.pack(f"<{2 + len(counters)}q", seed, stream, *counters)
    return int.from_bytes(hashlib.blake2b(counted, digest_size=8).digest(), "little") >> 1


def generator(seed: int, stream: Stream, *counters: int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, stream, *counters))


def seed_globals(seed: int, stream: Stream, *counters: int) -> None:
    """Seeds the global CPU generators of Python, NumPy and torch, for libraries that draw from those.

    Code that relies on a global generator must seed it first.
    """
    derived = derive(seed, stream, *counters)
    random.seed(derived)
    np.random.seed(derived >> 32)  # torch takes the lower 32 bits; both run the Mersenne Twister from them
    torch.default_generator.manual_seed(derived)


@contextlib.contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Restores the global generators, also that of ``device``, at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def step_generator(seed: int, step: int) -> np.random.Generator:
    """The generator for the whole global batch of an optimizer step, the same on every rank."""
    return np.random.Generator(np.random.Philox(derive(seed, Stream.STEP, step)))


def sample_keys(seed: int, step: int, positions: range) -> Tensor:
    """A 63-bit key for each sample of an optimizer step, at its position in the global batch: int64 ``[n]``."""
    keys = np.random.Philox(derive(seed, Stream.STEP_SAMPLES, step)).random_raw(positions.stop)[positions.start :]
    return torch.from_numpy((keys >> np.uint64(1)).astype(np.int64))


def uniform(keys: Tensor, counter: Any) -> Tensor:
    """A number in [0, 1) for each sample, a function of its key and of ``counter``: float32 of the shape of both.

    ``counter`` is an int or a tensor of them.
    The same on every device, compiled or not.
    """
    mixed = _mix(_mix((keys & _WORD) ^ _mix(counter)) ^ (keys >> 32))
    return (mixed >> 8).float() * 2.0**-24


_WORD = 0xFFFFFFFF


def _mix(x: T) -> T:
    """A bijection of 32-bit words that changes half of the bits at random (C. Wellons, hash-prospector).

    Its factors have 31 bits, so that a product fits a signed word of 64.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return x ^ (x >> 15)
