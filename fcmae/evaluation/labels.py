"""Files of labels beside the images: other annotations of a validation set, such as ImageNet-ReaL's or -V2's."""

import csv
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fcmae.config.checks import as_list
from fcmae.data.sources import Source
from fcmae.errors import UsageError


def read_accepted(path: Path, source: Source, classes: list[str]) -> list[list[int]]:
    """The classes that are right for each image of ``source``, from a file in one of these forms.

    - JSON, a list of lists: those of the first, second, ... image in order of file name (ImageNet-ReaL's real.json);
    - JSON, an object: name of an image -> class or list of classes;
    - CSV without a header: name of an image, class, class, ...

    An image is named by its file name, with as many of its folders as wished. A class is its name, or else its number
    from 0. Without classes an image is left out of the accuracy.

    Raises UsageError for a file that cannot be read, and naming an image that is missing, an entry that fits several
    images or is there twice, or a class that isn't known.
    """
    names = [source.describe(index) for index in range(len(source))]
    given = _read(path)
    if isinstance(given, list):
        if len(given) != len(names):
            raise UsageError(f"labels {path} has {len(given)} entries for {len(names)} images")
        in_order = sorted(range(len(names)), key=lambda index: Path(names[index]).name)
        for one, other in itertools.pairwise(in_order):
            if Path(names[one]).name == Path(names[other]).name:
                several = f"{names[one]} and {names[other]}, whose file names have no order"
                raise UsageError(f"labels {path} must be an object or a .csv: there are {several}")
        of_image = dict(zip(in_order, given, strict=True))
    else:
        of_image = {index: given[entry] for index, entry in enumerate(_entries(given, names, path))}
    numbers = {name: number for number, name in enumerate(classes)}
    accepted = [[_number(value, numbers, path) for value in as_list(of_image[index])] for index in range(len(names))]
    if not any(accepted):
        raise UsageError(f"labels {path} has no class for any image")
    return accepted


def _read(path: Path) -> list[Any] | dict[str, Any]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".csv":
                rows = [row for row in csv.reader(file) if row]
                return _unique((row[0], [cell.strip() for cell in row[1:] if cell.strip()]) for row in rows)
            given = json.load(file, object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UsageError(f"labels {path} cannot be read: {error}") from error
    if not isinstance(given, (list, dict)):
        raise UsageError(f"labels {path} must hold a list or an object; got a {type(given).__name__}")
    return given


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A dict. Raises ValueError if a name is there twice."""
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name in given:
            raise ValueError(f"{name} is there twice")
        given[name] = value
    return given


def _entries(given: dict[str, Any], names: list[str], path: Path) -> list[str]:
    """The entry of each image: the longest end of its path that is one. No two images share an entry."""
    entries = []
    owner: dict[str, str] = {}
    for name in names:
        parts = Path(name).parts
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        entry = next((end for end in (name, *ends) if end in given), None)
        if entry is None:
            raise UsageError(f"labels {path} has no entry for {name}")
        if entry in owner:
            raise UsageError(
                f"labels {path}: the entry {entry} fits {owner[entry]} and {name}; name them with their folders"
            )
        owner[entry] = name
        entries.append(entry)
    return entries


def _number(value: Any, numbers: dict[str, int], path: Path) -> int:
    if isinstance(value, str) and value in numbers:
        return numbers[value]
    decimal = isinstance(value, str) and value.isdecimal() and len(value) < 20
    number = int(value) if type(value) is int or decimal else -1
    if not 0 <= number < len(numbers):
        raise UsageError(f"labels {path}: a class must be its name or 0 to {len(numbers) - 1}; got {value!r}")
    return number
