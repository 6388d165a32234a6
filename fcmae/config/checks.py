"""Checks of values: one line that names the full key, what was given and what is allowed.

A check raises what is wrong. In a block of :func:`collected` it goes on, so that all mistakes of a config are told at
once; what comes after a check must therefore bear the value that it refused.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from fcmae.errors import ConfigError

_collected: ContextVar[list[str] | None] = ContextVar("_collected", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """In this block mistakes are appended to the list, a line each, instead of being raised."""
    mistakes: list[str] = []
    token = _collected.set(mistakes)
    try:
        yield mistakes
    finally:
        _collected.reset(token)


def mistake(line: str) -> None:
    """Raises ConfigError, or collects the line."""
    mistakes = _collected.get()
    if mistakes is None:
        raise ConfigError(line)
    mistakes.append(line)


def mistaken() -> bool:
    """Whether a mistake was collected."""
    return bool(_collected.get())


def check(key: str, value: Any, ok: bool, allowed: str) -> bool:
    """Whether ``ok``. Otherwise a mistake that names the full key, what was given and what is allowed."""
    if not ok:
        mistake(f"{key} is {value!r}; allowed is {allowed}")
    return ok


def check_one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    check(key, value, value in allowed, "one of " + ", ".join(allowed))


def check_ratio(key: str, value: float) -> None:
    check(key, value, 0 <= value <= 1, "a number from 0 to 1")


def check_positive(key: str, value: float | None) -> None:
    check(key, value, value is None or 0 < value < math.inf, "a positive number")


def check_not_negative(key: str, value: float | None) -> None:
    check(key, value, value is None or 0 <= value < math.inf, "a number that is not negative")


def check_seed(value: int) -> None:
    check("seed", value, 0 <= value < 2**63, "an integer from 0 to 2**63 - 1")


def check_neighbours(key: str, value: Any, gallery_key: str, gallery: int | None) -> list[int]:
    """Numbers of neighbours from a number or a list of them, at most as many as there are images to compare with."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    ok = len(numbers) > 0 and all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in numbers)
    if check(key, value, ok, "a positive integer, or a list of them") and gallery is not None and gallery > 0:
        check(key, value, max(numbers) <= gallery, f"at most {gallery_key} ({gallery})")
    return numbers


def check_channels(key: str, channels: Sequence[int] | None, in_chans: int) -> None:
    """One channel or three that an image has; None = chosen by the program."""
    ok = channels is None or (len(channels) in (1, 3) and all(0 <= channel < in_chans for channel in channels))
    check(key, channels, ok, f"one channel or three, each from 0 to {in_chans - 1} (data.in_chans={in_chans})")
