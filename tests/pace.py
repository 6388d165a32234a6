"""How slow this machine is: limits of time in tests grow with it."""

import functools
import tempfile
import time
from pathlib import Path

from tests.conftest import TINY_PRETRAIN, start_python

START = 5.0
"""Seconds from the start of the command to its first step on an idle machine with two fast cores."""


@functools.cache
def slowness() -> float:
    """How many times as long the command takes here to its first step, 1 at the least. Measured once."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        run = start_python(Path(folder), "-m", "fcmae.cli", *TINY_PRETRAIN, "hydra.run.dir=run", fresh=True)
        while not (Path(folder) / "run" / "metrics.jsonl").exists():
            assert run.poll() is None
            time.sleep(0.05)
        took = time.monotonic() - begin
        assert run.wait() == 0
    return max(1.0, took / START)


def limit(seconds: float) -> int:
    """What takes ``seconds`` at most on a fast machine takes at most this long here, in whole seconds."""
    return round(seconds * slowness())
