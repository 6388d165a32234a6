"""Mean, deviation and percentiles of a source's images as lines of a data config, by several processes."""

import functools
import operator
from typing import Any

import numpy as np
from tqdm import tqdm

from fcmae.config import PrepareConfig
from fcmae.data.cores import cores_per_rank
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.pixels.nodata import NoData
from fcmae.data.pixels.own_scale import FLAT
from fcmae.data.prepare.statistics import (
    HALF,
    Sums,
    count_images,
    from_ascending,
    left_out,
    locate_ranks,
    ranks,
    sum_images,
)
from fcmae.data.prepare.workers import in_processes
from fcmae.data.sources import Source
from fcmae.data.sources.base import shuffled
from fcmae.errors import UsageError
from fcmae.messages import say

CHUNK = 100
"""Samples per task of a process."""


def statistics(cfg: PrepareConfig, source: Source) -> list[str]:
    """Lines of a data config: mean and standard deviation; with normalize=percentile also ``low`` and ``high``.

    Raises UsageError if no image can be read.
    """
    data, to = cfg.data, PixelFormat.of(cfg.data, cfg.loader.max_pixels)
    count = min(len(source), data.stats_samples or len(source))
    chosen = shuffled(source, cfg.seed)[:count]
    bounds, notes = list[str](), list[str]()
    if data.normalize == "percentile":
        sums, values = _percentiles(cfg, source, chosen, to)
        low, high = (_list(column) for column in values.T)
        bounds = ["normalize: percentile", f"low: {low}", f"high: {high}"]
        if (values[:, 0] >= values[:, 1]).any():
            notes.append(
                "# low is high in a channel, which is refused; take data.percentiles further apart, such as [0,100]"
            )
    else:
        sums, _ = _read(cfg, source, chosen, to)
    flat = sums.std <= FLAT * abs(sums.mean)
    if flat.any() and not bounds:
        notes.append("# a channel has one value everywhere; a std of 1 leaves it as it is")
    columns = (sums.mean, np.where(flat, 1, sums.std), sums.least, sums.most)
    mean, std, least, most = (_list(x) for x in columns)
    return [
        f"# of {count - len(sums.unreadable):,} of {len(source):,} images (seed {cfg.seed})",
        f"in_chans: {to.in_chans}",
        *([f"bit_depth: {to.bit_depth}"] if to.bit_depth != 8 else []),
        *([f"dtype: {to.dtype}"] if to.is_float else []),
        *(bounds or [f"mean: {mean}", f"std: {std}"]),
        f"# values: {least} to {most}",
        *notes,
    ]


def worker_count(cfg: PrepareConfig) -> int:
    """Processes that read."""
    return cores_per_rank(1) if cfg.loader.workers is None else max(1, cfg.loader.workers)


def _list(values: np.ndarray) -> str:
    return f"[{', '.join(f'{x:#.6g}' for x in values)}]"


def _percentiles(cfg: PrepareConfig, source: Source, chosen: list[int], to: PixelFormat) -> tuple[Sums, np.ndarray]:
    """The sums, and ``data.percentiles`` of each channel ``[C, 2]`` in the units of the mean."""
    sums, counts = _read(cfg, source, chosen, to, count=True)
    assert counts is not None
    upper, within = locate_ranks(counts[:, 0], ranks(sums.pixels, cfg.data.percentiles))
    if not to.is_float:
        return sums, upper / (counts.shape[-1] - 1)
    _, lower_counts = _read(cfg, source, chosen, to, count=True, upper=upper)
    assert lower_counts is not None
    lower = [locate_ranks(lower_counts[:, i], within[:, i : i + 1])[0][:, 0] for i in range(upper.shape[1])]
    return sums, from_ascending(upper * HALF + np.stack(lower, axis=1)).astype(np.float64)


def _read(
    cfg: PrepareConfig,
    source: Source,
    chosen: list[int],
    to: PixelFormat,
    count: bool = False,
    upper: np.ndarray | None = None,
) -> tuple[Sums, np.ndarray | None]:
    """The sums of all images, and with ``count`` how often each value occurs, see :func:`count_images`."""
    no_data, more = NoData.of(cfg.data), (upper,) if count else ()
    chunks = [(chosen[first : first + CHUNK], to, no_data, *more) for first in range(0, len(chosen), CHUNK)]
    parts: dict[int, Sums] = {}
    counts: np.ndarray | None = None
    with tqdm(total=len(chosen), desc="reading", unit=" images", disable=None) as bar:
        for i, part in in_processes(worker_count(cfg), count_images if count else sum_images, source, chunks):
            found: tuple[Any, ...] = part if isinstance(part, tuple) else (part,)
            parts[i] = found[0]
            if count:
                counts = found[1] if counts is None else counts + found[1]
            bar.update(len(chunks[i][0]))
    sums = functools.reduce(operator.add, [parts[i] for i in range(len(chunks))])  # in the order of the chunks
    if upper is None:
        for line in left_out(sums.unreadable):
            say(line)
    if len(sums.unreadable) == len(chosen):
        raise UsageError(f"none of {len(chosen)} images could be read, such as: {sums.unreadable[0]}")
    if not sums.pixels.all():
        empty = ", ".join(map(str, (sums.pixels == 0).nonzero()[0].tolist()))
        raise UsageError(f"channel {empty} has no pixel with a value (data.nodata={cfg.data.nodata})")
    return sums, counts
