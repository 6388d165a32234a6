"""The image files below a folder: found once, kept in a file, and found again only after the folder changed.

A change is noticed by the modification times of the folder and of all folders below it: a file or folder added, removed
or renamed, but not a file whose content changed, which changes nothing here.
"""

import os
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fcmae.data.arrays import Arrays, Strings, StringsBuilder, find_kept, keep, one_at_a_time
from fcmae.data.formats import EXTENSIONS
from fcmae.errors import UsageError

SUFFIX = ".fcmae-listing"
KEEP_FROM = 10_000
"""Images from which a listing is worth a file."""
FORMAT = 1
_CLOCK_STEP_NS = 2_000_000_000
"""A folder that changed so shortly before it was listed may change again within its clock's resolution."""
_CHANGING = -1
_ENDINGS = frozenset(extension.encode() for extension in EXTENSIONS)


class Listing:
    """Relative paths and classes of the image files below ``root``: a folder's own, then those of each folder in it.

    The class of a file is its first folder; ``class_names`` are those folders, and a file in ``root`` itself has the
    class -1.
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


def list_folder(root: Path, relist: bool = False) -> Listing:
    """The listing of a folder, from its file if that is up to date. Raises UsageError if there is no image.

    Args:
        relist: look again in any case.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder")
    with one_at_a_time(root):
        arrays = None if relist else find_kept(root, SUFFIX, lambda kept: _is_current(root, kept))
        if arrays is None:
            started = time.perf_counter()
            arrays = _list(root)
            count = len(arrays["labels"])
            if count >= KEEP_FROM:
                arrays = keep(arrays, root, SUFFIX)
                took = time.perf_counter() - started
                where = f"kept in {arrays.path}" if arrays.path else "which cannot be kept in a file"
                print(f"listed {count:,} images below {root} in {took:.1f} s, {where}", file=sys.stderr, flush=True)
    if not len(arrays["labels"]):
        raise UsageError(f"{root} has no images; looked for {' '.join(EXTENSIONS)}")
    return Listing(root, arrays)


def _is_current(root: Path, kept: Arrays) -> bool:
    if kept.meta != _meta():
        return False
    base = os.fsencode(root)
    folders = zip(Strings(kept, "folders"), kept["folder_times"], strict=True)
    return all(os.stat(os.path.join(base, name)).st_mtime_ns == changed for name, changed in folders)


def _meta() -> dict:
    return {"format": FORMAT, "extensions": list(EXTENSIONS)}


def _list(root: Path) -> Arrays:
    now = time.time_ns()
    names, folders, classes = StringsBuilder(), StringsBuilder(), StringsBuilder()
    times, labels = array("q"), array("i")
    current = None
    with tqdm(desc=f"listing {root}", unit=" images", unit_scale=True, delay=1, leave=False, disable=None) as bar:
        for folder, changed, files in _walk(os.fsencode(root), b"", frozenset()):
            folders.append(folder)
            times.append(changed if changed < now - _CLOCK_STEP_NS else _CHANGING)
            top = folder.partition(b"/")[0]
            if files and top and top != current:
                current = top
                classes.append(top)
            label = len(classes) - 1 if top else -1
            for name in files:
                names.append(folder + b"/" + name if folder else name)
                labels.append(label)
            bar.update(len(files))
    arrays: dict[str, np.ndarray] = {
        "labels": np.frombuffer(labels, np.int32),
        "folder_times": np.frombuffer(times, np.int64),
    }
    for kind, strings in (("names", names), ("folders", folders), ("classes", classes)):
        arrays |= strings.arrays(kind)
    return Arrays(arrays, _meta())


def _walk(root: bytes, folder: bytes, ancestors: frozenset) -> Iterator[tuple[bytes, int, list[bytes]]]:
    """Each folder from ``folder`` on: its path below ``root``, its modification time, its own image files' names.

    Links are followed, but not into a folder that the link is in. Names that start with a dot are left out.
    """
    path = os.path.join(root, folder) if folder else root
    files, subfolders = [], []
    try:
        status = os.stat(path)  # before its entries are read: what comes later changes the time
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            return
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir():
                    subfolders.append(entry.name)
                elif _is_image(entry):
                    files.append(entry.name)
    except OSError as error:
        raise UsageError(f"cannot list the folder {os.fsdecode(path)}: {error.strerror}") from error
    yield folder, status.st_mtime_ns, sorted(files)
    for name in sorted(subfolders):
        yield from _walk(root, os.path.join(folder, name), ancestors | {identity})


def _is_image(entry: os.DirEntry) -> bool:
    """By its name; what is neither a file nor a broken link to one, such as a pipe, would never end being read."""
    if os.path.splitext(entry.name)[1].lower() not in _ENDINGS:
        return False
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
