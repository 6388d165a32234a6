"""Values that mark pixels without one: those of ``data.nodata``, and those that look so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from fcmae.doctor.dataset import Seen

USUAL = (
    -999,
    -9999,
    -99999,
    -32768,
    -32767,
    32767,
    65535,
    *np.array([-3.4028235e38, 3.4028235e38, 9.96921e36, 1e20], "f4"),
)
"""What files of measurements hold where there is none."""
APART, SHARE = 0.5, 1e-3
"""Such a value is further from all others than half of their range, and at least so many pixels hold it."""


class End(NamedTuple):
    """The least or largest value of an image, in the units of its file."""

    value: float
    share: float
    """Of its pixels hold it."""
    next: float
    """The least or largest of its other values; NaN = none."""


def ends_of(values: np.ndarray) -> tuple[End, End]:
    """Of finite values ``[N]``."""
    if not values.size:
        return End(np.nan, 0.0, np.nan), End(np.nan, 0.0, np.nan)
    ends = []
    for extreme in (np.min, np.max):
        value = extreme(values)
        others = values[values != value]
        following = float(extreme(others)) if others.size else np.nan
        ends.append(End(float(value), 1 - others.size / values.size, following))
    return ends[0], ends[1]


def fill_value(seen: Sequence[Seen]) -> float | None:
    """A value that seems to mark pixels without one; None = none does."""
    seen = [one for one in seen if one.dtype != "uint8" and one.ends[0].share]
    for at, extreme in ((0, min), (1, max)):
        ends = [one.ends[at] for one in seen]
        value = extreme((end.value for end in ends), default=0.0)
        others = [end.next if end.value == value else end.value for end in ends]
        others += [one.ends[1 - at].value for one in seen if one.ends[1 - at].value != value]
        others = [other for other in others if other == other]
        share = sum(end.share for end in ends if end.value == value) / max(1, len(ends))
        if value not in USUAL or share < SHARE or not others:
            continue
        nearest = extreme(others)
        if abs(nearest - value) > APART * (max(others) - min(others)):
            return int(value) if value.is_integer() and abs(value) < 2**24 else value
    return None


def marked(values: np.ndarray, nodata: Any) -> np.ndarray:
    """Which values ``[C, N]``, in the units of the file, ``data.nodata`` marks: one number, or one per channel."""
    given = list(nodata) if isinstance(nodata, (list, tuple)) else [nodata] * len(values)
    if len(given) != len(values):
        return np.zeros_like(values, bool)
    numbers = [np.nan if each in (None, "nan") else float(each) for each in given]
    return values == np.array(numbers)[:, None]
