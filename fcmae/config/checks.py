"""Checks of values, whose errors are one line: ``KEY must be EXPECTED; got VALUE``.

A check raises ConfigError. Inside :func:`collected` it appends to a list instead, so that all mistakes of a config are
reported together; the code after a check must therefore cope with the value that it refused.
"""

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from fcmae.errors import ConfigError
from fcmae.plugins import is_named

LAYERS = ("pooled", "mean", "stages", "stages_std")
"""What a row of features may be made of (:mod:`fcmae.models.pooled`)."""
L2 = (1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Strengths of the penalty of logistic regression that cross-validation tries."""
_collected: ContextVar[list[str] | None] = ContextVar("_collected", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """In this block mistakes are appended to the list, one line each, instead of being raised."""
    mistakes: list[str] = []
    token = _collected.set(mistakes)
    try:
        yield mistakes
    finally:
        _collected.reset(token)


def mistake(line: str) -> None:
    """Raises ConfigError, or collects the line; of several lines each."""
    mistakes = _collected.get()
    if mistakes is None:
        raise ConfigError(line)
    mistakes += line.split("\n")


def mistaken() -> bool:
    """Whether a mistake was collected."""
    return bool(_collected.get())


def check(key: str, value: Any, ok: bool, expected: str) -> bool:
    """Returns ``ok``. If it is false: a mistake ``KEY must be EXPECTED; got VALUE``."""
    if not ok:
        mistake(f"{key} must be {expected}; got {value!r}")
    return ok


def as_list(value: Any, count: int = 1) -> list[Any]:
    """What is in a list or a tuple; any other value ``count`` times."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def check_one_of(key: str, value: Any, options: Iterable[str]) -> None:
    check(key, value, value in options, "one of " + ", ".join(options))


def check_class(key: str, value: Any) -> None:
    """``_target_`` and its arguments, or None."""
    check(key, value, value is None or is_named(value), "null, or _target_: PACKAGE.CLASS and its arguments")


def check_ratio(key: str, value: float) -> None:
    check(key, value, 0 <= value <= 1, "a number from 0 to 1")


def check_positive(key: str, value: float | None) -> None:
    check(key, value, value is None or 0 < value < math.inf, "a positive number")


def check_not_negative(key: str, value: float | None) -> None:
    check(key, value, value is None or 0 <= value < math.inf, "a number that is not negative")


def check_device(key: str, value: str) -> None:
    check_one_of(key, value, ("auto", "cpu", "cuda"))


def check_seed(value: int) -> None:
    check("seed", value, 0 <= value < 2**63, "an integer from 0 to 2**63 - 1")


def check_neighbours(key: str, value: Any, gallery_key: str, gallery: int | None) -> list[int]:
    """The numbers of neighbours in a number or a list of numbers, each at most the number of gallery images."""
    numbers = as_list(value)
    ok = len(numbers) > 0 and all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in numbers)
    if check(key, value, ok, "a positive integer, or a list of them") and gallery is not None and gallery > 0:
        check(key, value, max(numbers) <= gallery, f"at most {gallery_key} ({gallery})")
    return numbers


def check_channels(key: str, channels: Sequence[int] | None, in_chans: int) -> None:
    """One or three of an image's channels; None = chosen by the program."""
    ok = channels is None or (len(channels) in (1, 3) and all(0 <= channel < in_chans for channel in channels))
    check(key, channels, ok, f"one or three channels from 0 to {in_chans - 1} (data.in_chans={in_chans})")


def check_stages(key: str, stages: Sequence[int] | None, layer: str) -> None:
    """Different stages of a network, from 1; None = all."""
    ok = stages is None or (len(stages) > 0 and min(stages) > 0 and len(set(stages)) == len(stages))
    ok = check(key, stages, ok, "a list of different stages, from 1")
    check(
        key, stages, not ok or stages is None or layer.startswith("stages"), "unset unless layer=stages or stages_std"
    )


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0 that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def check_positives(key: str, value: Any) -> Any:
    """One positive number or several, as a list; ``value`` itself if it is neither."""
    numbers = as_list(value)
    ok = bool(numbers) and all(map(is_positive, numbers))
    return [float(n) for n in numbers] if check(key, value, ok, "a positive number, or a list of them") else value


def check_class_weights(key: str, value: Any) -> Any:
    """Factors on the loss of each class: None, ``auto`` or a list of positive numbers."""
    if value is None or value == "auto":
        return value
    ok = isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_positive, value))
    return [float(n) for n in value] if check(key, value, ok, "auto, null, or a positive number per class") else value
