"""Settings that suit images: what ``fcmae doctor data.path=...`` suggests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fcmae.config.own import image_size, strides
from fcmae.data.pixels.scientific import TYPES

if TYPE_CHECKING:
    from fcmae.doctor.dataset import Seen

KINDS = {"array": "the path is an array", "table": "the path is a table", "webdataset": "the path has tar files"}
"""Sources that a command must name."""
WIDTH = 70
"""Of the column of keys, at most; mean and std of many channels are longer."""
VARYING = 1.0
"""An image's mean differs from that of others by more than this many of its own deviations: it needs its own."""
TAIL = 4.0
"""How much longer than between the percentiles 0.5 and 99.5 the range is where some pixels should be clipped."""


def suggest(seen: Sequence[Seen], bit_depth: int, nodata: float | None = None, source: str = "") -> list[str]:
    """Lines that begin with ``suggested``: keys of a data config, and why.

    Args:
        source: ``data.name``.
    """
    keys = suggested(seen, bit_depth, nodata)
    if keys and source in KINDS:
        keys.insert(0, (f"data={source}", KINDS[source]))
    if not keys:
        return [f"suggested     convert the files: pixels of {seen[0].dtype} are not read"]
    width = max(len(key) for key, _ in keys if len(key) <= WIDTH)
    return [f"{'suggested':13} {key:{width}}  {why}" for key, why in keys]


def suggested(seen: Sequence[Seen], bit_depth: int, nodata: float | None = None) -> list[tuple[str, str]]:
    """Overrides, one or several in a text, and why; none for files of a type that is not read.

    Args:
        bit_depth: ``data.bit_depth``, which is kept for 16-bit pixels where all values fit into it.
        nodata: a value that seems to mark pixels without one.
    """
    channels, dtype = Counter((one.channels, one.dtype) for one in seen).most_common(1)[0][0]
    alike = [one for one in seen if (one.channels, one.dtype) == (channels, dtype)]
    if dtype not in TYPES["float32"]:
        return []
    keys = [(f"data.in_chans={channels}", f"{len(alike)} of {len(seen)} images have it")]
    if nodata is not None:
        keys.append((f"data.nodata={nodata:.9g}", "it is far from all other values, and many pixels hold it"))
    alike = [one for one in alike if one.has_values]
    if not alike:
        return keys + _size(seen)
    if dtype == "uint16":
        largest = max(round(max(one.most.max() for one in alike) * 65535), round(nodata or 0))
        bits = bit_depth if bit_depth > 8 and largest < 2**bit_depth else min(16, max(9, int(largest).bit_length()))
        if bits != bit_depth:
            why = f"the largest value is {largest}; if others may be larger, run it again with data.bit_depth=16"
            keys.append((f"data.bit_depth={bits}", why))
        alike = [_of_bits(one, bits) for one in alike]
    elif dtype != "uint8":
        keys.append(("data.dtype=float32", f"pixels are {dtype}"))
    return keys + _size(seen) + _scale(alike, channels, dtype)


def _of_bits(one: Seen, bits: int) -> Seen:
    """With the scale of ``data.mean``: the largest value of so many bits is 1, no longer that of 16 bits."""
    names = ("least", "most", "mean", "std", "low", "high")
    return one._replace(**{name: getattr(one, name) * (65535 / (2**bits - 1)) for name in names})


def _size(seen: Sequence[Seen]) -> list[tuple[str, str]]:
    side = int(np.median([min(one.size) for one in seen]))
    size = image_size(side)
    keys = [(f"data.image_size={size}", f"the median of the shorter sides is {side} px")]
    steps = strides(size)
    if steps is not None:
        given = ",".join(map(str, steps))
        keys.append((f"model.strides=[{given}]", f"a total stride of {math.prod(steps)}, since the images are small"))
    return keys


def _scale(alike: Sequence[Seen], channels: int, dtype: str) -> list[tuple[str, str]]:
    """How to normalise."""
    means, stds = np.stack([one.mean for one in alike]), np.stack([one.std for one in alike])
    mean, std = of_all(means, stds)
    low, high = np.median([one.low for one in alike], axis=0), np.median([one.high for one in alike], axis=0)
    of_each = np.stack([one.least for one in alike]), np.stack([one.most for one in alike])
    least, most = of_each[0].min(0), of_each[1].max(0)
    keys = [("data.nodata=nan", "some values are NaN")] if any(one.missing for one in alike) else []
    if (of_each[0] == of_each[1]).all():
        return [*keys, _mean_std(mean, std, least == most, "every image has one value everywhere: look at the files")]
    inside = np.median(of_each[0] < of_each[1], axis=0) > 0  # a channel of one value per image is 0 by its own scale
    if len(alike) > 2 and (inside & (means.std(0) > VARYING * np.median(stds, axis=0))).any():
        return [*keys, ("data.normalize=image", "brightness differs more from image to image than within one")]
    if dtype != "uint8" and (most.max() - least.min()) > TAIL * max(float((high - low).max()), 1e-12):
        bounds = f"data.low={_numbers(low)} data.high={_numbers(high)}"
        why = "few pixels are far from the others; fcmae prepare data.stats=true computes low and high of all images"
        return [*keys, (f"data.normalize=percentile {bounds}", why)]
    if channels == 3 and dtype == "uint8" and (abs(mean - 0.45) < 0.15).all() and (abs(std - 0.25) < 0.1).all():
        return keys
    why = "of what was looked at; fcmae prepare data.stats=true computes them"
    return [*keys, _mean_std(mean, std, least == most, why)]


def _mean_std(mean: np.ndarray, std: np.ndarray, constant: np.ndarray, why: str) -> tuple[str, str]:
    """A channel with one value in all images gets a deviation of 1, which leaves it as it is."""
    return f"data.mean={_numbers(mean)} data.std={_numbers(np.where(constant, 1, std.clip(min=1e-6)))}", why


def of_all(means: np.ndarray, stds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of images together, of those of each image, ``[N, C]``."""
    mean = means.mean(0)
    return mean, np.sqrt((stds**2 + (means - mean) ** 2).mean(0))


def _numbers(values: np.ndarray) -> str:
    return f"[{','.join(f'{value:.4g}' for value in values)}]"
