"""``data.normalize``, and what it sets ``data.mean`` and ``data.std`` to."""

import math
from typing import Any

from fcmae.config.checks import as_list, check, mistake

CLIPPING = ("window", "percentile")
"""Those that clip to ``data.low`` and ``data.high``."""
NORMALIZE = ("dataset", "image", *CLIPPING, "none")


def bounds(normalize: str, low: Any, high: Any, in_chans: int) -> list[tuple[float, float]]:
    """``data.low`` and ``data.high`` of each channel; empty if they are not set. A mistake where they are wrong."""
    if (low is None) != (high is None) or (low is None and normalize in CLIPPING):
        hint = "; fcmae prepare data.normalize=percentile data.stats=true prints them" * (normalize in CLIPPING)
        mistake(f"data.low={low} and data.high={high} must both be set with data.normalize={normalize}{hint}")
        return []
    if low is None:
        return []
    least, most = _per_channel(low, in_chans), _per_channel(high, in_chans)
    ok = bool(least) and bool(most) and all(a < b for a, b in zip(least, most, strict=True))
    expected = f"a number or a list of {in_chans}, one per channel, each below that of data.high={high}"
    return list(zip(least, most, strict=True)) if check("data.low", low, ok, expected) else []


def fixed_scale(normalize: str, given: list[tuple[float, float]], in_chans: int) -> tuple[list[float], list[float]]:
    """Mean and deviation with another value than ``dataset``, of :func:`bounds`; of ``image`` none."""
    if normalize in CLIPPING and given:
        return [(low + high) / 2 for low, high in given], [(high - low) / 2 for low, high in given]
    channels = 0 if normalize == "image" else in_chans
    return [0.0] * channels, [1.0] * channels


def _per_channel(value: Any, channels: int) -> list[float]:
    """A finite number per channel; empty where it is nothing of that kind."""
    values = as_list(value, channels)
    ok = len(values) == channels and all(type(x) in (int, float) and math.isfinite(x) for x in values)
    return [float(x) for x in values] if ok else []


def without_derived(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``values`` of group ``data`` that ``given`` ones replace, without a mean and deviation that would follow from
    others.
    """
    if all(kind in (None, "dataset") for kind in (values.get("normalize"), given.get("normalize"))):
        return values
    return {name: value for name, value in values.items() if name not in ("mean", "std")}
