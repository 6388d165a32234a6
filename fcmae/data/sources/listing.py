"""Lists the image files below a folder once, and keeps the listing in a file until the folder changes.

Changes are found by the modification times of the folder and its subfolders: files and folders that are added, removed
or renamed.
"""

import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fcmae.data.pixels.formats import EXTENSIONS
from fcmae.data.sources.heads import head_of, unreadable
from fcmae.data.sources.kept import Arrays, Strings, StringsBuilder, find_kept, keep
from fcmae.errors import UsageError, counted, shown
from fcmae.files import one_at_a_time
from fcmae.messages import print_once_rank0, say

SUFFIX = ".fcmae-listing"
KEEP_FROM = 10_000
"""Number of images from which a listing is kept in a file."""
FORMAT = 3
MAX_LINKS = 1000
"""Links that may lead to a folder: listing a few folders full of links to each other would never end."""
MAX_KINDS = 100
"""Endings of files that are counted separately."""
SHOWN = 5
"""Endings that are named in a message."""
_CLOCK_STEP_NS = 2_000_000_000
"""A folder that changed so recently may change again without a new modification time."""
_CHANGING = -1
EVERY = "*"
"""Among the endings of images: every file is one."""


class Listing:
    """Relative paths and labels of the image files below ``root``, those of a folder before those of its subfolders.

    ``class_names`` are the folders in ``root``; the label of a file in ``root`` itself is -1.
    """

    def __init__(self, root: Path, arrays: Arrays) -> None:
        self.root = os.fsencode(root)
        self.arrays = arrays
        self.names = Strings(arrays, "names")
        self.labels = arrays["labels"]
        self.class_names = [os.fsdecode(name) for name in Strings(arrays, "classes")]

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[type, tuple[Path, Arrays]]:
        return Listing, (Path(os.fsdecode(self.root)), self.arrays)

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.root, self.names[index]))

    @property
    def is_labelled(self) -> bool:
        return len(self) > 0 and int(self.labels.min()) >= 0


def list_folder(root: Path, relist: bool = False, extensions: Sequence[str] = EXTENSIONS) -> Listing:
    """The listing of a folder, from its file if that is up to date. Raises UsageError if there is no image.

    Args:
        relist: list the folder in any case.
        extensions: endings of images in lower case, "" of names without one, :data:`EVERY` of all.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder")
    with one_at_a_time(root):
        arrays = None if relist else find_kept(root, SUFFIX, lambda kept: _is_current(root, kept, extensions))
        if arrays is None:
            started = time.perf_counter()
            arrays = _list(root, extensions)
            count = len(arrays["labels"])
            if count >= KEEP_FROM:
                arrays = keep(arrays, root, SUFFIX)
                took = time.perf_counter() - started
                where = f"kept in {arrays.path}" if arrays.path else "which cannot be kept in a file"
                say(f"listed {count:,} images below {root} in {took:.1f} s, {where}")
    others, looked_for = Others(**arrays.meta["others"]), " ".join(ending or '""' for ending in extensions)
    if not len(arrays["labels"]):
        raise UsageError(f"{root} has no images; looked for {looked_for} (data.extensions){others.message()}")
    listing = Listing(root, arrays)
    told = others.message(listing.is_labelled)
    told += unreadable(len(listing), lambda index: head_of(listing.path(index)), listing.path)
    if told:
        print_once_rank0(f"{root}: {counted(len(listing), 'image')} ({looked_for}){told}")
    return listing


@dataclass
class Others:
    """Files that are not read: their number by ending, and an example; links to nothing; empty folders of classes."""

    kinds: dict[str, int] = field(default_factory=dict)
    example: str = ""
    broken: int = 0
    broken_example: str = ""
    empty: int = 0
    empty_example: str = ""

    def add(self, folder: bytes, name: bytes, what: str) -> None:
        kind = what if what in self.kinds or len(self.kinds) < MAX_KINDS else "of other kinds"
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        self.example = self.example or os.fsdecode(os.path.join(folder, name))

    def message(self, labelled: bool = False) -> str:
        """A part of a line; nothing if there are none.

        Args:
            labelled: folders are classes.
        """
        parts = [self._not_read()]
        if self.broken:
            parts.append(f"; {self.broken:,} links lead to no file, such as {shown(self.broken_example)}")
        if self.empty and labelled:
            parts.append(
                f"; {self.empty:,} folders have no image and are no class, such as {shown(self.empty_example)}"
            )
        return "".join(parts)

    def _not_read(self) -> str:
        most = Counter(self.kinds).most_common()
        named = [f"{count:,} {what}" for what, count in most[:SHOWN]]
        named += [f"{sum(count for _, count in most[SHOWN:]):,} others"] if most[SHOWN:] else []
        return f"; not read: {', '.join(named)}, such as {shown(self.example)}" if named else ""


def _is_current(root: Path, kept: Arrays, extensions: Sequence[str]) -> bool:
    if not _meta(root, extensions).items() <= kept.meta.items():
        return False
    names, folders, classes = (Strings(kept, kind) for kind in ("names", "folders", "classes"))
    for strings in (names, folders, classes):
        strings.check(paths=True)
    labels, times = kept["labels"], kept["folder_times"]
    if (labels.shape, times.shape) != ((len(names),), (len(folders),)) or labels.dtype != np.int32:
        raise ValueError("its arrays have other sizes")
    if labels.min(initial=0) < -1 or labels.max(initial=-1) >= len(classes):
        raise ValueError("its labels are not those of its classes")
    Others(**kept.meta["others"]).message()
    base = os.fsencode(root)
    found = zip(folders, times, strict=True)
    return all(os.stat(os.path.join(base, name)).st_mtime_ns == changed for name, changed in found)


def _meta(root: Path, extensions: Sequence[str]) -> dict:
    return {"format": FORMAT, "extensions": list(extensions), "root": str(root.resolve())}


def _list(root: Path, extensions: Sequence[str]) -> Arrays:
    now = time.time_ns()
    names, folders, classes = StringsBuilder(), StringsBuilder(), StringsBuilder()
    times, labels, others = array("q"), array("i"), Others()
    current, tops = None, set[bytes]()
    endings = None if EVERY in extensions else frozenset(ending.encode() for ending in extensions)
    with tqdm(desc=f"listing {root}", unit=" images", unit_scale=True, delay=1, leave=False, disable=None) as bar:
        for folder, changed, files in _walk(os.fsencode(root), others, endings):
            folders.append(folder)
            times.append(changed if changed < now - _CLOCK_STEP_NS else _CHANGING)
            top = folder.partition(b"/")[0]
            tops.add(top)
            if files and top and top != current:
                current = top
                classes.append(top)
            label = len(classes) - 1 if top else -1
            for name in files:
                names.append(folder + b"/" + name if folder else name)
                labels.append(label)
            bar.update(len(files))
    empty = tops - {b""} - set(Strings(Arrays(classes.arrays("classes"), {}), "classes"))
    others.empty, others.empty_example = len(empty), os.fsdecode(min(empty, default=b""))
    arrays: dict[str, np.ndarray] = {
        "labels": np.frombuffer(labels, np.int32),
        "folder_times": np.frombuffer(times, np.int64),
    }
    for kind, strings in (("names", names), ("folders", folders), ("classes", classes)):
        arrays |= strings.arrays(kind)
    return Arrays(arrays, {**_meta(root, extensions), "others": asdict(others)})


def _walk(root: bytes, others: Others, endings: frozenset[bytes] | None) -> Iterator[tuple[bytes, int, list[bytes]]]:
    """For each folder its path below ``root``, its modification time and the names of its images. Counts ``others``.

    Links are followed unless they lead to a folder above them. Names that start with a dot are left out.
    """
    linked: Counter[tuple[int, int]] = Counter()
    left: list[tuple[bytes, frozenset, bool]] = [(b"", frozenset(), False)]
    while left:
        folder, ancestors, by_link = left.pop()
        path = os.path.join(root, folder) if folder else root
        files, subfolders = [], []
        try:
            status = os.stat(path)  # first: later changes change the time
            identity = (status.st_dev, status.st_ino)
            if identity in ancestors:
                continue
            linked[identity] += by_link
            if linked[identity] > MAX_LINKS:
                raise UsageError(f"{os.fsdecode(path)} is reached by more than {MAX_LINKS} links; remove some of them")
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        subfolders.append((entry.name, by_link or entry.is_symlink()))
                    elif problem := _why_not(entry, endings):
                        others.add(folder, entry.name, problem)
                    else:
                        files.append(entry.name)
                        if not entry.is_file():
                            others.broken += 1
                            others.broken_example = os.fsdecode(os.path.join(folder, entry.name))
        except OSError as error:
            raise UsageError(f"cannot list the folder {os.fsdecode(path)}: {error.strerror}") from error
        yield folder, status.st_mtime_ns, sorted(files)
        below = ancestors | {identity}
        left += [(os.path.join(folder, name), below, link) for name, link in sorted(subfolders, reverse=True)]


def _why_not(entry: os.DirEntry, endings: frozenset[bytes] | None) -> str:
    """The kind of a file that is not read as an image; empty for an image.

    Reading a pipe or a device might never end. A broken link is read, to be reported as an error.
    """
    ending = os.path.splitext(entry.name)[1].lower()
    if endings is not None and ending not in endings:
        return os.fsdecode(ending) or "without an ending"
    is_read = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    return "" if is_read else "not regular files"
