"""``fcmae doctor data.path=...``: a first look at a data set, and the settings that suit it."""

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fcmae.config import LoaderConfig, from_dotlist
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.pixels.look import checksum, look, small
from fcmae.data.prepare.statistics import left_out, white_of
from fcmae.data.sources import Source, train_source
from fcmae.data.sources.array import stored_format
from fcmae.data.sources.base import shuffled
from fcmae.doctor.contact_sheet import SHOWN, draw
from fcmae.doctor.fill import End, ends_of, fill_value, marked
from fcmae.doctor.suggest import of_all, suggest
from fcmae.errors import ConfigError, ImageError, counted, shown
from fcmae.files import output
from fcmae.opening import cache_folder

SAMPLED = 256
"""Rows and columns, evenly spread, that statistics of an image are of."""
NAMED = 3
"""Examples in a line."""
KINDS = {".csv": "table", ".tsv": "table", ".parquet": "table", ".txt": "table", ".tar": "webdataset"}
OF_PIXELS = tuple(f"data.{key}=" for key in ("nodata", "mean", "std", "low", "high", "normalize"))
ARRAYS = (".zarr", ".h5", ".hdf5", ".npy", ".tif", ".tiff", ".svs")


class Seen(NamedTuple):
    """What one image is like; of channels ``[C]``."""

    number: int
    name: str
    kind: str
    size: tuple[int, int]
    dtype: str
    least: np.ndarray
    most: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    """The 0.5 percentile."""
    high: np.ndarray
    """The 99.5 percentile."""
    missing: int
    """Values that are NaN or infinite."""
    ends: tuple[End, End]
    """The least and the largest value of all channels."""

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def has_values(self) -> bool:
        """Whether each channel has a pixel with a value; otherwise its numbers are NaN."""
        return bool(np.isfinite(self.mean).all())


@dataclass
class Survey:
    """What was found in some images of a source."""

    count: int
    """Images of the source."""
    seen: list[Seen]
    unreadable: list[ImageError]
    twice: list[tuple[str, str]]
    """Names of images with the same content."""
    nodata: Any = None
    """What pixels without a value hold, which no number counts: ``data.nodata``, or a value that looks so."""


def run(overrides: Sequence[str], images: int, sheet: str | None) -> int:
    """Prints what the images of a data config are like and which settings suit them. Returns 1 if none can be read.

    Args:
        overrides: ``data.KEY=VALUE`` and ``loader.KEY=VALUE``.
        images: at most so many are read, drawn at random.
        sheet: the contact sheet; None = a file in a private folder of the user, which the next call overwrites.
    """
    data, loader = configs(overrides)
    source = train_source(data, loader)
    order = shuffled(source)[:images]
    survey = examine(source, order, loader.max_pixels, data.nodata)
    odd = odd_ones(survey.seen)
    for line in report(data, source, survey, odd):
        print(line)
    if not survey.seen:
        return 1
    chosen = [seen.number for seen in survey.seen[:SHOWN]], [seen.number for seen, _ in odd]
    picture = draw(source, *chosen, loader.max_pixels)
    if sheet is None:
        sheet = str(cache_folder("doctor") / "contact_sheet.png")
    with output("--contact-sheet", sheet) as file:
        picture.save(file, "PNG")
    print(f"contact sheet {sheet}: {len(chosen[0])} images drawn at random, then with a red edge the odd ones")
    found = survey.nodata if data.nodata is None else None
    for line in suggest(survey.seen, data.bit_depth, found, data.name):
        print(line)
    return 0


def configs(overrides: Sequence[str]) -> tuple[PreparedDataConfig, LoaderConfig]:
    """The data config, its kind of source by the path where none is given. Raises ConfigError."""
    groups: dict[str, list[str]] = {"data": [], "loader": []}
    for override in overrides:
        group, dot, _ = override.partition(".")
        if group not in groups or not dot or "=" not in override:
            raise ConfigError(f"must be data.KEY=VALUE or loader.KEY=VALUE, such as data.path=photos; got {override!r}")
        groups[group].append(override)
    given = [override.partition("=")[0] for override in groups["data"]]
    # Where the images are; what they are like is checked below, with the type of an array.
    places = [override for override in groups["data"] if not override.startswith(OF_PIXELS)]
    data = from_dotlist(PreparedDataConfig, places, "data")
    path = data.path if isinstance(data.path, str) else (data.path or [""])[0]
    if "data.name" not in given and data.source is None:
        groups["data"].append(f"data.name={_kind(path)}")
    if groups["data"][-1] == "data.name=array" or data.name == "array":
        known = stored_format(data.path, data.dataset, data.axes, data.planes, data.planes_as)
        if "data.bit_depth" in given:  # of integers
            del known["dtype"]
        groups["data"] += [f"data.{name}={value}" for name, value in known.items() if f"data.{name}" not in given]
    return from_dotlist(PreparedDataConfig, groups["data"], "data"), from_dotlist(
        LoaderConfig, groups["loader"], "loader"
    )


def _kind(path: str) -> str:
    """The source that a path is for."""
    ending = os.path.splitext(path.rstrip("/"))[1].lower()
    if ending in ARRAYS:
        return "array"
    if ending in KINDS:
        return KINDS[ending]
    names = os.listdir(path) if os.path.isdir(path) else []
    if {"zarr.json", ".zarray", ".zgroup"} & set(names):
        return "array"
    return "webdataset" if any(name.endswith(".tar") for name in names) else "imagefolder"


def examine(source: Source, order: Sequence[int], max_pixels: int, nodata: Any = None) -> Survey:
    """Reads some images of a source; twice, where a value turns out to mark pixels without one.

    Args:
        nodata: ``data.nodata``.
    """
    survey = _examine(source, order, max_pixels, nodata)
    found = fill_value(survey.seen) if nodata is None else None
    return survey if found is None else _examine(source, order, max_pixels, found)


def _examine(source: Source, order: Sequence[int], max_pixels: int, nodata: Any) -> Survey:
    survey = Survey(len(source), [], [], [], nodata)
    contents: dict[bytes, str] = {}
    for index in tqdm(order, desc="reading", unit=" images", delay=1, leave=False, disable=None):
        name = source.describe(index)
        try:
            image = source[index].image
            found = look(image, name, max_pixels)
        except ImageError as error:
            survey.unreadable.append(error)
            continue
        first = contents.setdefault(checksum(image, found.pixels), name)
        if first is not name:
            survey.twice.append((first, name))
        survey.seen.append(_seen(index, name, found.kind, found.size, small(found.pixels, SAMPLED), nodata))
    return survey


def _seen(index: int, name: str, kind: str, size: tuple[int, int], pixels: np.ndarray, nodata: Any) -> Seen:
    flat = pixels.reshape(len(pixels), -1).astype(np.float64)
    finite = np.isfinite(flat)
    values = np.where(finite & ~marked(flat, nodata), flat, np.nan) / white_of(pixels.dtype)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a channel without a value
        low, high = np.nanpercentile(values, (0.5, 99.5), axis=1)
        numbers = np.nanmin(values, 1), np.nanmax(values, 1), np.nanmean(values, 1), np.nanstd(values, 1)
    ends = ends_of(flat[finite])
    return Seen(index, name, kind, size, pixels.dtype.name, *numbers, low, high, int((~finite).sum()), ends)


def odd_ones(seen: Sequence[Seen], most: int = 10) -> list[tuple[Seen, str]]:
    """The images that differ most from the others, each with the reason."""
    if len(seen) < 3:
        return []
    reasons: dict[int, tuple[float, str]] = {}

    def note(place: int, score: float, reason: str) -> None:
        if score > reasons.get(place, (3.0, ""))[0]:
            reasons[place] = score, reason

    for what, value in (("format", "kind"), ("channels", "channels"), ("type", "dtype")):
        counts = Counter(getattr(one, value) for one in seen)
        for place, one in enumerate(seen):
            share = counts[getattr(one, value)] / len(seen)
            note(place, 4 - np.log10(share) if share < 0.1 else 0.0, f"{what} {getattr(one, value)}")
    numbers = {
        "size {0.size[1]}x{0.size[0]}": [np.log(one.size[0] * one.size[1]) for one in seen],
        "shape {0.size[1]}x{0.size[0]}": [np.log(one.size[1] / one.size[0]) for one in seen],
        "mean {1:.3g}": [one.mean.mean() for one in seen],
        "contrast (std) {2:.3g}": [one.std.mean() for one in seen],
    }
    for text, values in numbers.items():
        found = np.array(values)
        if not np.isfinite(found).any():
            continue
        middle = np.nanmedian(found)
        spread = max(np.nanmedian(abs(found - middle)) * 1.4826, 0.01 * abs(middle), 1e-9)
        for place, one in enumerate(seen):
            score = abs(found[place] - middle) / spread
            note(place, float(score), text.format(one, one.mean.mean(), one.std.mean()))
    for place, one in enumerate(seen):
        note(place, 1e6 * bool((one.least == one.most).all()), f"one value everywhere, {one.mean.mean():.3g}")
        note(place, 1e5 * (not one.has_values), "a channel without a value")
        note(place, 1e5 * bool(one.missing), f"{one.missing} of its values are NaN or infinite")
    ranked = sorted(reasons, key=lambda place: -reasons[place][0])[:most]
    return [(seen[place], reasons[place][1]) for place in ranked]


def report(data: PreparedDataConfig, source: Source, survey: Survey, odd: Sequence[tuple[Seen, str]]) -> Iterable[str]:
    """Lines about the images."""
    seen = survey.seen
    classes = f" in {len(source.classes)} classes" if source.classes else ""
    yield f"data          {data.path} ({data.name}): {counted(survey.count, 'image')}{classes}"
    if source.classes:
        yield from _classes(source)
    looked = len(seen) + len(survey.unreadable)
    yield f"looked at     {looked:,} images" + (", drawn at random (--images)" if looked < survey.count else "")
    yield f"unreadable    {len(survey.unreadable):,}"
    for line in left_out(survey.unreadable):
        yield f"              {line.removeprefix('left out ')}"
    yield f"duplicates    {len(survey.twice):,}" + _examples(f"{shown(a)} = {shown(b)}" for a, b in survey.twice)
    if not seen:
        return
    heights, widths = (sorted(one.size[i] for one in seen) for i in (0, 1))
    middle = len(seen) // 2
    yield (
        f"size          {widths[0]}x{heights[0]} to {widths[-1]}x{heights[-1]} px (width x height), median "
        f"{widths[middle]}x{heights[middle]}"
    )
    for title, name in (("format", "kind"), ("channels", "channels"), ("type", "dtype")):
        counts = Counter(getattr(one, name) for one in seen).most_common()
        yield f"{title:13} {', '.join(f'{value} ({count:,})' for value, count in counts)}"
    if survey.nodata is not None:
        yield f"nodata        {survey.nodata}: pixels that hold it are left out of the numbers below"
    yield from _channels(seen)
    if odd:
        yield f"odd           {len(odd)} images that differ most from the others:"
        yield from (f"              {shown(one.name)}: {reason}" for one, reason in odd)


def _classes(source: Source) -> Iterable[str]:
    assert source.classes is not None
    counts = Counter(source.label(index) for index in range(len(source)))
    ranked = sorted((counts[number], name) for number, name in enumerate(source.classes))
    least, most = ranked[0], ranked[-1]
    yield f"classes       {least[0]:,} images ({shown(least[1])}) to {most[0]:,} ({shown(most[1])})"
    empty = [name for count, name in ranked if not count]
    if empty:
        yield f"empty classes {len(empty)}" + _examples(map(shown, empty))


def _channels(seen: Sequence[Seen]) -> Iterable[str]:
    """The range, mean and deviation of each channel, by the number of channels and the type."""
    groups: dict[tuple[int, str], list[Seen]] = defaultdict(list)
    for one in seen:
        if one.has_values:
            groups[one.channels, one.dtype].append(one)
    for (channels, dtype), alike in groups.items():
        white = white_of(np.dtype(dtype))
        columns = {name: np.stack([getattr(one, name) for one in alike]) for name in ("least", "most", "mean", "std")}
        mean, std = of_all(columns["mean"], columns["std"])
        for channel in range(channels):
            low, high = columns["least"][:, channel].min() * white, columns["most"][:, channel].max() * white
            numbers = f"{low:.6g} to {high:.6g}, mean {mean[channel] * white:.5g}, std {std[channel] * white:.5g}"
            yield f"{'range':13} {dtype}, channel {channel} of {channels}: {numbers}"
    missing = [one.name for one in seen if one.missing]
    if missing:
        yield f"NaN           in {len(missing)} images{_examples(map(shown, missing))}"


def _examples(names: Iterable[str]) -> str:
    found = list(names)
    return f", such as {', '.join(found[:NAMED])}" if found else ""
