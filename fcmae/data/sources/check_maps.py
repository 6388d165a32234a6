"""Checks of target maps before training: sizes by their headers, values of some of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fcmae.data.pixels.maps import has_values, stored_size
from fcmae.data.samples import Target
from fcmae.data.sources.base import Source
from fcmae.data.sources.map_files import NAMED, Mapped
from fcmae.errors import ConfigError, ImageError, shown
from fcmae.opening import open_regular
from fcmae.randomness import Stream, generator

SIZES = 20_000
"""Pairs whose headers are compared, of a fixed random order. A header takes 0.1 ms, and on a network more."""
VALUES = 200
"""Maps that are decoded, of the same order."""


def some(source: Source, count: int) -> Iterator[int]:
    """The first ``count`` samples of a fixed random order, or all."""
    yield from torch.randperm(len(source), generator=generator(0, Stream.SUBSET))[:count].tolist()


def check_maps(source: Source, key: str, target: Target) -> list[str]:
    """Notes for the user, a line each.

    Args:
        key: names the maps in messages.
        target: reads the map of a sample; raises ImageError.

    Raises ConfigError with a line for each kind of mistake, naming the first maps that have it.
    """
    missing = set(source.missing) if isinstance(source, Mapped) else set()
    sizes = list(_other_sizes(source)) if isinstance(source, Mapped) else []
    wrong, empty, seen = [], [], 0
    for index in sorted({*some(source, VALUES)} - missing):
        try:
            sample = source[index]
            found = target(sample, source, index)
        except ImageError as error:
            wrong.append(f"{shown(error.name)}: {error.reason}")
            continue
        seen += 1
        if isinstance(sample.image, Tensor) and isinstance(found, Tensor):
            sizes += _other_size(_named(source, index), sample.image.shape[-2:], found.shape[-2:])
        if not isinstance(found, Tensor) or not has_values(found):
            empty.append(_named(source, index))
    mistakes = []
    if missing:
        names = [shown(source.describe(index)) for index in sorted(missing)]
        mistakes.append(f"{key} has no file of the same relative name (any ending) for {_first(names)}")
    if sizes:
        mistakes.append(f"{key}: {len(sizes)} maps have another size than their image: {_first(sizes)}")
    if wrong:
        mistakes.append(f"{key}: {len(wrong)} of {seen + len(wrong)} maps cannot be used: {_first(wrong, '; ')}")
    said = f"{len(empty)} of {seen} maps have no labelled pixel: {_first(empty)}"
    if seen and len(empty) == seen:
        mistakes.append(f"{key}: {said}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return [f"warning: {key}: {said}"] if empty else []


def _other_sizes(source: Mapped) -> Iterator[str]:
    missing = set(source.missing)
    for index in sorted(some(source, SIZES)):
        if index in missing:
            continue
        image, target = (_size(path) for path in (source.describe(index), source.target_path(index)))
        if image is not None and target is not None:
            yield from _other_size(_named(source, index), image, target)


def _other_size(name: str, image: Sequence[int], target: Sequence[int]) -> list[str]:
    """What is wrong with the size of a map, if anything; sizes are height and width."""
    (height, width), (rows, cols) = image, target
    return [] if (height, width) == (rows, cols) else [f"{name} is {cols}x{rows}, its image {width}x{height}"]


def _size(path: str) -> tuple[int, int] | None:
    try:
        with open_regular(path) as file:
            return stored_size(file)
    except OSError:
        return None


def _named(source: Source, index: int) -> str:
    return shown(source.target_path(index) if isinstance(source, Mapped) else source.describe(index))


def _first(items: Sequence[str], separator: str = ", ") -> str:
    more = len(items) - NAMED
    return separator.join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")
