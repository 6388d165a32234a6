"""Finds the files of a tar file that are one sample, by their names.

WebDataset's rule: they follow each other and have the same name up to the first dot. If names have dots of their own
(``img_0.25_x.png``, DICOM's ``1.2.840.113.png``), that rule would merge samples, so names end at the last dot.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fcmae.data.pixels.formats import EXTENSIONS
from fcmae.errors import shown

MAX_ENDINGS = 1000
"""Endings of several parts in an archive; if there are more, they are parts of names."""

LABELS = ("cls", "json")
"""Endings of files with labels."""


class Rule(NamedTuple):
    """How the files of a sample are found."""

    extensions: tuple[str, ...] = EXTENSIONS
    """Endings of images, see :func:`fcmae.data.sources.listing.list_folder`."""
    keys: str = "auto"
    """Names end at the ``first_dot`` or the ``last_dot``; ``auto`` decides."""

    def is_image(self, ending: str) -> bool:
        last = ending.rpartition(".")[2]
        if "*" in self.extensions:
            return last not in LABELS
        return (f".{last}" if last else "") in self.extensions


Split = Callable[[str], tuple[str, str]]
"""Splits the name of a file into the name of its sample and the ending in lower case."""


def at_first_dot(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}", ending.lower()


def at_last_dot(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.rpartition(".")
    return f"{folder}/{stem}", ending.lower()


def choose_split(names: Callable[[], Iterable[str]], rule: Rule) -> Split:
    """Decides at which dot the names in an archive end.

    At the first dot if a sample has a file with a single ending (``0001.cls``), or if several samples have the same
    words before the last ending (``0001.left.png``). Otherwise at the last.

    Args:
        names: gives all names, in their order, each time it is called.

    Raises ValueError naming two files if names follow both rules and images would be lost.
    """
    if rule.keys != "auto":
        return at_first_dot if rule.keys == "first_dot" else at_last_dot
    recurring = _recurring(names())
    votes: set[bool] = set()
    weak: set[bool] = set()
    lost, example = 0, ""
    for group, endings in _groups(names()):
        images = [name for name, ending in zip(group, endings, strict=True) if rule.is_image(ending)]
        if len(group) == 1 or all("." not in ending for ending in endings):
            continue
        first = _ends_at_first(endings, recurring, rule)
        (weak if first is False and len(images) < 2 else votes).update([True, False] if first is None else [first])
        if len(images) > 1:
            lost += len(images) - 1
            example = example or f"{shown(images[0])} and {shown(images[1])}"
    votes = votes or weak
    if len(votes) < 2:
        return at_last_dot if False in votes else at_first_dot
    if lost:
        raise ValueError(
            f"{lost} images have the names of others up to the first dot, such as {example}, but other files follow "
            "that rule; rename the files so that only those of one sample have the same name up to the first dot, or "
            "set data.keys"
        )
    return at_first_dot


def _groups(names: Iterable[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Files that follow each other under one name up to the first dot, and their endings."""
    for _, group in itertools.groupby(names, lambda name: at_first_dot(name)[0]):
        found = list(group)
        yield found, [at_first_dot(name)[1] for name in found]


def _recurring(names: Iterable[str]) -> set[str]:
    """The endings of several parts that more than one sample has."""
    counts: Counter[str] = Counter()
    for _, endings in _groups(names):
        counts.update({ending for ending in endings if "." in ending})
        if len(counts) > MAX_ENDINGS:
            return set()
    return {ending for ending, count in counts.items() if count > 1}


def _ends_at_first(endings: list[str], recurring: set[str], rule: Rule) -> bool | None:
    """Whether the name of a sample with endings of several parts ends at the first dot; None if unclear."""
    single = [ending for ending in endings if "." not in ending]
    several = [ending for ending in endings if "." in ending]
    words = not any(ending[:1].isdigit() for ending in several)
    if any(not rule.is_image(ending) for ending in single):
        return True
    if words and (single or recurring.issuperset(several)):
        return True
    return None if single else False
