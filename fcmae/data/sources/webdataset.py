"""Tar files in the WebDataset layout, with random access to every sample.

Files that follow each other under one name up to the first dot are a sample: ``a/0001.jpg`` and ``a/0001.cls`` are the
image and the label of the sample ``a/0001``. :mod:`fcmae.data.sources.tar_names` has the full rule.
"""

import glob
import itertools
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from fcmae.data.pixels.decode import MAX_BYTES, Encoded
from fcmae.data.pixels.formats import EXTENSIONS
from fcmae.data.sources.base import Sample, class_names, locate
from fcmae.data.sources.tar_index import SPARSE, ShardIndex, index_shard
from fcmae.errors import ImageError, UsageError, shown
from fcmae.files import one_at_a_time
from fcmae.messages import print_once_rank0
from fcmae.opening import open_regular, read_regular

CLASSES_FILE = "classes.txt"
"""The names of the classes, one per line, beside the tar files."""
MAX_NAMES = 2**24
"""Bytes of that file."""
TOO_MANY = f"if that is right, name all classes in {CLASSES_FILE} beside the tar files"


class WebDataset:
    """The images in tar files ("shards"), and their labels where every sample has one.

    The image of a sample is its first file with the ending of an image. Its label is the number in its ``.cls``, or
    ``label`` or ``cls`` in its ``.json``. Samples without an image are left out.

    Args:
        shards: a tar file, a folder of them, a pattern such as ``train-{0000..0146}.tar`` or ``train-*.tar``, or
            several of these.
        allow_cut: read what is left of truncated tar files; otherwise they raise UsageError.
        reindex: index the files again even if nothing has changed.
    """

    def __init__(
        self, shards: str | Path | Sequence[str | Path], allow_cut: bool = False, reindex: bool = False
    ) -> None:
        given = [shards] if isinstance(shards, (str, Path)) else shards
        self.shards = [path for pattern in given for path in find_shards(str(pattern))]
        self.indices = _index(self.shards, allow_cut, reindex)
        self.ends = list(itertools.accumulate(map(len, self.indices)))
        if not self.ends[-1]:
            raise UsageError(f"{self.shards[0]} to {self.shards[-1]} have no images; looked for {' '.join(EXTENSIONS)}")
        self._tell_left_out()
        self.classes = self._class_names()
        self._open = OpenFiles()

    def _tell_left_out(self) -> None:
        """Prints one line about files of the tar files that are not samples."""
        notes = [index.left_out for index in self.indices]
        further, without = sum(note.further for note in notes), sum(note.without for note in notes)
        told = []
        if further:
            example = next(note.further_example for note in notes if note.further)
            told.append(f"{further:,} further images of samples are left out, such as {shown(example)}")
        if without:
            example = next(note.without_example for note in notes if note.without)
            told.append(f"{without:,} samples without an image are left out, such as {shown(example)}")
        if any(note.at_last_dot for note in notes):
            told.append("samples' names end at the last dot, as the first dot would merge samples")
        if told:
            files = f"{self.shards[0]}" + (f" to {self.shards[-1]}" if len(self.shards) > 1 else "")
            print_once_rank0(f"{files}: {len(self):,} images; {'; '.join(told)}")

    @property
    def unlabelled(self) -> str:
        """Why there are no classes."""
        if class_names(self._largest, len(self)) is None:
            most = max(range(len(self.indices)), key=lambda i: self.indices[i].largest_label)
            name = f"{self.shards[most]}/{self.indices[most].name(int(self.indices[most].labels.argmax()))}"
            return f"{shown(name)} has the class {self._largest}, but there are {len(self)} images; {TOO_MANY}"
        number = next(i for i, index in enumerate(self.indices) if not index.is_labelled)
        position = int(self.indices[number].labels.argmin())
        name = f"{self.shards[number]}/{self.indices[number].name(position)}"
        return f"{name} has no number from 0 on in a .cls, or as label or cls in a .json, beside it"

    def _class_names(self) -> list[str] | None:
        if not all(index.is_labelled for index in self.indices):
            return None
        count = 1 + self._largest
        file = self.shards[0].with_name(CLASSES_FILE)
        try:
            names = read_regular(file, MAX_NAMES).decode().splitlines()
        except FileNotFoundError:
            return class_names(self._largest, len(self))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if len(names) < count:
            raise UsageError(f"{file} names {len(names)} classes; the tar files have labels up to {count - 1}")
        return names

    @property
    def _largest(self) -> int:
        """The largest class's number."""
        return max(index.largest_label for index in self.indices)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        shard, position = locate(self.ends, index)
        entry = self.indices[shard]
        name = self.describe(index)
        size, offset = int(entry.sizes[position]), int(entry.offsets[position])
        if size == SPARSE:
            raise ImageError(
                name, "it is stored as a sparse file, without its zeros; make the tar file without --sparse"
            )
        try:
            descriptor = self._open[self.shards[shard]]
            left = os.fstat(descriptor).st_size - offset
            if left < size:
                raise ImageError(name, f"the tar file ends after {max(0, left)} of its {size} bytes")
            if size > MAX_BYTES:
                raise ImageError(name, f"it has {size} bytes; at most {MAX_BYTES} are read")
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise ImageError(name, error.strerror or str(error)) from error
        if len(data) < size:  # the system reads two GiB at a time
            raise ImageError(name, f"only {len(data)} of its {size} bytes can be read at once")
        return Sample(Encoded(data, name), self.label(index))

    def label(self, index: int) -> int | None:
        if self.classes is None:
            return None
        shard, position = locate(self.ends, index)
        return int(self.indices[shard].labels[position])

    def describe(self, index: int) -> str:
        shard, position = locate(self.ends, index)
        return f"{self.shards[shard]}/{self.indices[shard].name(position)}"


class OpenFiles:
    """Open files, at most ``limit`` at a time. Pickled without descriptors.

    Forked processes may share descriptors, since reading by ``pread`` moves no position.
    """

    def __init__(self, limit: int = 128) -> None:
        self.limit = limit
        self.descriptors: OrderedDict[Path, int] = OrderedDict()

    def __getitem__(self, path: Path) -> int:
        if path not in self.descriptors:
            with open_regular(path) as file:
                self.descriptors[path] = os.dup(file.fileno())
            if len(self.descriptors) > self.limit:
                os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors.move_to_end(path)
        return self.descriptors[path]

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return OpenFiles, (self.limit,)

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def find_shards(pattern: str) -> list[Path]:
    """The tar files of a path, a folder or a pattern, in the order of the pattern. Raises UsageError."""
    if re.match(r"[a-z0-9+.-]{2,}://|pipe:", pattern, re.IGNORECASE):
        raise UsageError(
            f"{pattern} is a URL, which is not supported yet; download the tar files and give their folder"
        )
    found: list[Path] = []
    for name in expand_braces(pattern):
        if os.path.isdir(name):
            found += sorted(Path(name).glob("*.tar"))
        elif os.path.isfile(name):
            found.append(Path(name))
        else:
            matches = sorted(glob.glob(name))
            if not matches:
                raise UsageError(f"{name} must be a tar file, a folder of them or a pattern; nothing is there")
            found += map(Path, matches)
    if not found:
        raise UsageError(f"{pattern} has no files that end in .tar")
    return found


def expand_braces(pattern: str) -> list[str]:
    """Expands ``a-{00..02}`` and ``{a,b}`` as a shell does."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is None:
        parts = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        parts = choices.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [expanded for part in parts for expanded in expand_braces(head + part + tail)]


def _index(shards: list[Path], allow_cut: bool, reindex: bool) -> list[ShardIndex]:
    indices = []
    with one_at_a_time(shards[0].parent):
        for shard in tqdm(shards, desc="indexing tar files", unit=" files", delay=1, leave=False, disable=None):
            index = index_shard(shard, reindex)
            if index.cut and not allow_cut:
                raise UsageError(
                    f"{shard} is cut off or damaged after {len(index)} images ({index.cut}); download it again, or "
                    "read what is left with loader.on_error=skip"
                )
            indices.append(index)
    return indices
