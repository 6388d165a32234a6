"""Checks of target maps before training: sizes by their headers, values of some of them."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from fcmae.data.pixels.maps import IGNORED, has_values, stored_size
from fcmae.data.samples import Target
from fcmae.data.sources.base import Source, shuffled
from fcmae.data.sources.map_files import Mapped
from fcmae.errors import ConfigError, ImageError, counted, first_of, shown

SIZES = 20_000
"""Pairs whose headers are compared, of a fixed random order. A header takes 0.1 ms, and on a network more."""
VALUES = 200
"""Maps that are decoded, of the same order."""


def check_maps(source: Source, key: str, target: Target, classes: Sequence[str] = ()) -> list[str]:
    """Notes for the user, a line each.

    Args:
        key: names the maps in messages.
        target: reads the map of a sample; raises ImageError.
        classes: their names, if maps have classes.

    Raises ConfigError with a line for each kind of mistake, naming the first maps that have it.
    """
    missing = set(source.missing) if isinstance(source, Mapped) else set()
    sizes = list(_other_sizes(source)) if isinstance(source, Mapped) else []
    wrong, empty, seen = [], [], 0
    found_classes: set[int] = set()
    left_out = False
    for index in sorted({*shuffled(source)[:VALUES]} - missing):
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
        elif not found.is_floating_point():
            labelled = found[found != IGNORED]
            found_classes |= {int(labelled.min()), int(labelled.max())}
            left_out |= len(labelled) < found.numel()
    mistakes = []
    if missing:
        names = [shown(source.describe(index)) for index in sorted(missing)]
        mistakes.append(f"{key} has no file of the same relative name (any ending) for {first_of(names)}")
    if sizes:
        mistakes.append(f"{key}: {counted(len(sizes), 'map')} of another size than the image: {first_of(sizes)}")
    if wrong:
        named = first_of(wrong, separator="; ")
        mistakes.append(f"{key}: {len(wrong)} of {seen + len(wrong)} maps cannot be used: {named}")
    said = f"{len(empty)} of {seen} maps have no labelled pixel: {first_of(empty)}"
    if seen and len(empty) == seen:
        mistakes.append(f"{key}: {said}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    notes = [f"warning: {key}: {said}"] if empty else []
    if len(found_classes) == 1:
        only = classes[found_classes.pop()] if classes else "one number"
        binary = "for masks of 0 and 255 set objective.values=[0,255] objective.ignore_index=null"
        others = f"; the others are left out (objective.ignore_index); {binary}" if left_out else ""
        notes.append(f"warning: {key}: all labelled pixels of {counted(seen, 'map')} are of class {only}{others}")
    return notes


def _other_sizes(source: Mapped) -> Iterator[str]:
    missing = set(source.missing)
    for index in sorted(shuffled(source)[:SIZES]):
        if index in missing:
            continue
        image, target = (stored_size(path) for path in (source.describe(index), source.target_path(index)))
        if image is not None and target is not None:
            yield from _other_size(_named(source, index), image, target)


def _other_size(name: str, image: Sequence[int], target: Sequence[int]) -> list[str]:
    """What is wrong with the size of a map, if anything; sizes are height and width."""
    (height, width), (rows, cols) = image, target
    return [] if (height, width) == (rows, cols) else [f"{name} is {cols}x{rows}, its image {width}x{height}"]


def _named(source: Source, index: int) -> str:
    return shown(source.target_path(index) if isinstance(source, Mapped) else source.describe(index))
