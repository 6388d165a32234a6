"""Which channels of the image files are read: ``data.channels``."""

import math
from typing import Any, NamedTuple

from fcmae.config.checks import as_list, check

LISTS = ("input", "target", "classes")
KEYS = (*LISTS, "mean", "std", "nodata", "of")
EXPECTED = "null, a list of channels, or a mapping with input and some of target, classes, mean, std, nodata, of"


class Layout(NamedTuple):
    """The channels of a file, counted from 0, and which are read for what."""

    of: int
    """Channels of a file."""
    input: list[int] | None = None
    """Those that the encoder gets; None = all, in their order."""
    target: list[int] = []  # noqa: RUF012  # never changed
    """Those that only targets get, normalised by ``mean`` and ``std``."""
    classes: list[int] = []  # noqa: RUF012
    """Those that only targets get, as they are stored."""
    mean: list[float] = []  # noqa: RUF012
    std: list[float] = []  # noqa: RUF012
    nodata: list[Any] | None = None
    """What marks a pixel without a value in each channel of ``extra``; None = nothing does."""

    @property
    def extra(self) -> list[int]:
        """Those that only targets get."""
        return [*self.target, *self.classes]


def layout(given: Any, in_chans: int) -> Layout:
    """The layout that ``data.channels`` gives. A mistake, and the default, where it cannot be one."""
    default, key = Layout(in_chans), "data.channels"
    given = {"input": given} if isinstance(given, (list, tuple)) else given
    if given is None:
        return default
    ok = isinstance(given, dict) and "input" in given and set(given) <= set(KEYS)
    if not check(key, given, ok, EXPECTED):
        return default
    lists = {name: _list(given.get(name)) for name in LISTS}
    named = [channel for channels in lists.values() for channel in channels]
    ok = all(type(channel) is int and channel >= 0 for channel in named) and len(set(named)) == len(named)
    if not check(key, given, ok, "lists of different channels, counted from 0"):
        return default
    ok = len(lists["input"]) == in_chans
    if not check(f"{key}.input", lists["input"], ok, f"{in_chans} channels (data.in_chans={in_chans})"):
        return default
    count = given.get("of", max(named) + 1)
    if not check(f"{key}.of", count, type(count) is int and count > max(named), f"an integer above {max(named)}"):
        return default
    size = len(lists["target"])
    mean, std = _list(given.get("mean", [0.0] * size)), _list(given.get("std", [1.0] * size))
    for name, values, least in (("mean", mean, -math.inf), ("std", std, 0)):
        numbers = all(type(x) in (int, float) and least < x < math.inf for x in values)
        expected = f"{size} {'positive ' * (name == 'std')}numbers, one per channel of {key}.target"
        if not check(f"{key}.{name}", values, numbers and len(values) == size, expected):
            return default
    marks = no_data(f"{key}.nodata", given.get("nodata"), size + len(lists["classes"]))
    return Layout(count, **lists, mean=mean, std=std, nodata=marks)


def no_data(key: str, given: Any, channels: int) -> list[Any] | None:
    """What marks a pixel without a value in each channel: a number, ``nan``, or None; None alone if nothing does.

    A mistake where it is nothing of that kind. NaN becomes text: it would differ from itself.
    """
    if given is None:
        return None
    values: list[Any] = as_list(given, channels)
    values = ["nan" if isinstance(value, float) and value != value else value for value in values]
    ok = len(values) == channels and all(
        value in ("nan", None) or (type(value) in (int, float) and abs(value) < math.inf) for value in values
    )
    expected = f"a number, nan, or a list of {channels} of these or null, one per channel"
    return values if check(key, given, ok, expected) else None


def _list(value: Any) -> list[Any]:
    return [] if value is None else as_list(value)
