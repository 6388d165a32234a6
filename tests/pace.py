"""How slow this machine is: limits of time in tests grow with it."""

from tests import preloaded

START = 4.0
"""Seconds that the processes of tests/preloaded.py need to start on an idle machine with two fast cores."""


def slowness() -> float:
    """How many times as long that takes here, 1 at the least. Measured once."""
    return max(1.0, preloaded.start_seconds() / START)


def limit(seconds: float) -> int:
    """What takes ``seconds`` at most on a fast machine takes at most this long here, in whole seconds."""
    return round(seconds * slowness())
