"""Tar files in the WebDataset layout, with random access to every sample.

Files that follow each other under one name up to the first dot are a sample: ``a/0001.jpg`` and ``a/0001.cls`` are the
image and the label of the sample ``a/0001``. :mod:`fcmae.data.sources.tar_names` has the full rule.
"""

import functools
import glob
import io
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from tqdm import tqdm

from fcmae.config import LoaderConfig
from fcmae.data.pixels.files import MAX_BYTES, Encoded
from fcmae.data.remote.access import Access
from fcmae.data.remote.commands import Command
from fcmae.data.remote.objects import BLOCK, RemoteFile, RemoteReader, read_beside
from fcmae.data.sources.base import Sample, class_names, locate
from fcmae.data.sources.heads import LENGTH, empty_classes, unreadable
from fcmae.data.sources.tar_index import SPARSE, ShardIndex, index_shard, index_tar
from fcmae.data.sources.tar_names import Rule
from fcmae.errors import ImageError, UsageError, counted, first_of, reason_of, shown
from fcmae.files import one_at_a_time
from fcmae.messages import print_once_rank0
from fcmae.opening import open_regular, read_regular
from fcmae.urls import expand_braces, is_remote

CLASSES_FILE = "classes.txt"
"""The names of the classes, one per line, beside the tar files."""
MAX_NAMES = 2**24
"""Bytes of that file."""
TOO_MANY = f"if that is right, name all classes in {CLASSES_FILE} beside the tar files"

Shard: TypeAlias = Path | RemoteFile | Command
SPARSE_FILE = "it is stored as a sparse file, without its zeros; make the tar file without --sparse"


class WebDataset:
    """The images in tar files ("shards"), and their labels where every sample has one.

    The image of a sample is its first file with the ending of an image. Its label is the number in its ``.cls``, or
    ``label`` or ``cls`` in its ``.json``. Samples without an image are left out.

    Args:
        shards: a tar file, a folder of them, a pattern such as ``train-{0000..0146}.tar`` or ``train-*.tar``, each
            also at a URL, a command after ``pipe:``, or several of these.
        allow_cut: read what is left of truncated tar files; otherwise they raise UsageError.
        reindex: index the files again even if nothing has changed.
        access: how files at URLs are read; None = as a default config says.
        rule: how the files of a sample are found.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        allow_cut: bool = False,
        reindex: bool = False,
        access: Access | None = None,
        rule: Rule = Rule(),  # noqa: B008  # immutable
    ) -> None:
        given = [shards] if isinstance(shards, (str, Path)) else shards
        if access is None and any(is_remote(str(pattern)) for pattern in given):
            access = Access.of(LoaderConfig())
        self.shards = [path for pattern in given for path in find_shards(str(pattern), access)]
        self.indices = _index(self.shards, allow_cut, reindex, access, rule)
        self.ends = list(itertools.accumulate(map(len, self.indices)))
        if not self.ends[-1]:
            raise UsageError(f"{first_of(self.shards)}: no images; looked for {' '.join(rule.extensions)}")
        self.classes = self._class_names()
        self._open = OpenFiles(access)
        self._tell_problems()
        self._open = OpenFiles(access)  # each process opens those that it reads
        self.stamps = [shard.stamp for shard in self.shards if isinstance(shard, RemoteFile)]
        """What changes with tar files at URLs."""

    def _tell_problems(self) -> None:
        """Prints one line about files of the tar files that are not samples or cannot be read, and empty classes."""
        notes = [index.left_out for index in self.indices]
        further, without = sum(note.further for note in notes), sum(note.without for note in notes)
        told = []
        if further:
            example = next(note.further_example for note in notes if note.further)
            told.append(f"{further:,} further images of samples are left out, such as {shown(example)}")
        if without:
            example = next(note.without_example for note in notes if note.without)
            told.append(f"{without:,} samples without an image are left out, such as {shown(example)}")
        if empty := sum(int((index.sizes == 0).sum()) for index in self.indices):
            number = next(i for i, index in enumerate(self.indices) if (index.sizes == 0).any())
            name = self.indices[number].name(int(self.indices[number].sizes.argmin()))
            told.append(f"{counted(empty, 'image')} without content, such as {shown(f'{self.shards[number]}/{name}')}")
        if any(note.at_last_dot for note in notes):
            told.append("samples' names end at the last dot, as the first dot would merge samples")
        told += filter(None, [unreadable(len(self), self._head, self.describe)[2:]])
        told += filter(None, [empty_classes([index.labels for index in self.indices], self.classes)[2:]])
        if told:
            files = f"{self.shards[0]}" + (f" to {self.shards[-1]}" if len(self.shards) > 1 else "")
            print_once_rank0(f"{files}: {counted(len(self), 'image')}; {'; '.join(told)}")

    def _head(self, index: int) -> bytes | None:
        """The first bytes of an image; None of an empty one, and in tar files at URLs. Raises OSError."""
        shard, position = locate(self.ends, index)
        entry = self.indices[shard]
        size = int(entry.sizes[position])
        if not size or not isinstance(self.shards[shard], Path):
            return None
        if size == SPARSE:
            raise OSError(SPARSE_FILE)
        start, left = self._open.read(self.shards[shard], int(entry.offsets[position]), min(size, LENGTH))
        if left < size:
            raise OSError(f"the tar file ends after {max(0, left)} of its {size} bytes")
        return start

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
        first = self.shards[0]
        file = CLASSES_FILE
        try:
            if isinstance(first, RemoteFile):
                names = read_beside(first, file, MAX_NAMES).decode().splitlines()
            elif isinstance(first, Path):
                file = str(first.with_name(CLASSES_FILE))
                names = read_regular(file, MAX_NAMES).decode().splitlines()
            else:  # the output of a command lies nowhere
                return class_names(self._largest, len(self))
        except FileNotFoundError:
            return class_names(self._largest, len(self))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read: {reason_of(error)}") from error
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
            raise ImageError(name, SPARSE_FILE)
        try:
            data, left = self._open.read(self.shards[shard], offset, size)
        except OSError as error:
            raise ImageError(name, reason_of(error)) from error
        if left < size:
            raise ImageError(name, f"the tar file ends after {max(0, left)} of its {size} bytes")
        if size > MAX_BYTES:
            raise ImageError(name, f"it has {size} bytes; at most {MAX_BYTES} are read")
        if len(data) < size:  # the system reads two GiB at a time
            raise ImageError(name, f"only {len(data)} of its {size} bytes can be read at once")
        return Sample(Encoded(data, name), self.label(index))

    def label(self, index: int) -> int | None:
        if self.classes is None:
            return None
        shard, position = locate(self.ends, index)
        return int(self.indices[shard].labels[position])

    def listing_parts(self) -> Iterator[np.ndarray]:
        for index in self.indices:
            yield from (index.names.data, index.names.offsets, index.sizes, index.labels)

    def describe(self, index: int) -> str:
        shard, position = locate(self.ends, index)
        return f"{self.shards[shard]}/{self.indices[shard].name(position)}"


class OpenFiles:
    """Open files, at most ``limit`` at a time. Pickled without descriptors.

    Forked processes may share descriptors, since reading by ``pread`` moves no position.
    """

    def __init__(self, access: Access | None = None, limit: int = 128) -> None:
        self.access = access
        self.limit = limit
        self.descriptors: OrderedDict[Shard, int] = OrderedDict()
        self._unchanged: set[RemoteFile] = set()

    def read(self, shard: Shard, offset: int, size: int) -> tuple[bytes, int]:
        """Bytes of a file, none if they are too many, and how many there are from ``offset`` on.

        Raises OSError, UsageError or RemoteError.
        """
        descriptor = self.descriptor(shard)
        if descriptor is None:
            assert isinstance(shard, RemoteFile)
            if shard not in self._unchanged:
                shard.check()
                self._unchanged.add(shard)
            left = shard.size - offset
            return shard.read(offset, size) if size <= min(left, MAX_BYTES) else b"", left
        left = os.fstat(descriptor).st_size - offset
        return os.pread(descriptor, size, offset) if size <= min(left, MAX_BYTES) else b"", left

    def descriptor(self, shard: Shard) -> int | None:
        """Of an open file or of its copy; None if a file at a URL has no copy."""
        if shard not in self.descriptors:
            if isinstance(shard, Path):
                opened: IO[bytes] | None = open_regular(shard)
            else:
                assert self.access is not None
                opened = self.access.open(shard)
            if opened is None:
                return None
            with opened:
                self.descriptors[shard] = os.dup(opened.fileno())
            if len(self.descriptors) > self.limit:
                os.close(self.descriptors.popitem(last=False)[1])
        self.descriptors.move_to_end(shard)
        return self.descriptors[shard]

    def __reduce__(self) -> tuple[type, tuple[Access | None, int]]:
        return OpenFiles, (self.access, self.limit)

    def __del__(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def find_shards(pattern: str, access: Access | None = None) -> list[Shard]:
    """The tar files of a path, a folder or a pattern, in the order of the pattern. Raises UsageError, RemoteError."""
    if is_remote(pattern):
        assert access is not None
        return [*access.find(pattern, ".tar")]
    found: list[Shard] = []
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


def _index(shards: list[Shard], allow_cut: bool, reindex: bool, access: Access | None, rule: Rule) -> list[ShardIndex]:
    indices = []
    first = shards[0]
    if isinstance(first, Path):
        lock = first.parent
    else:
        assert access is not None
        lock = access.cache.place(str(first)).with_suffix(".listing")
    with one_at_a_time(lock):
        found = _indexed(shards, reindex, access, rule)
        bar = {"desc": "indexing tar files", "unit": " files", "delay": 1, "leave": False, "disable": None}
        for shard, index in tqdm(zip(shards, found, strict=True), total=len(shards), **bar):
            if index.cut and not allow_cut:
                raise UsageError(
                    f"{shard} is cut off or damaged after {len(index)} images ({index.cut}); download it again, or "
                    "read what is left with loader.on_error=skip"
                )
            indices.append(index)
    return indices


def _indexed(shards: list[Shard], reindex: bool, access: Access | None, rule: Rule) -> Iterator[ShardIndex]:
    """The indices of local and of remote files, whose copies are made where there is room for them."""
    remote = [shard for shard in shards if not isinstance(shard, Path)]
    if access is None or not remote:
        yield from (index_shard(shard, reindex, rule) for shard in shards if isinstance(shard, Path))
        return
    made = access.copy(remote, functools.partial(_index_remote, access=access, reindex=reindex, rule=rule))
    for shard in shards:
        yield index_shard(shard, reindex, rule) if isinstance(shard, Path) else next(made)


def _index_remote(shard: RemoteFile | Command, access: Access, reindex: bool, rule: Rule) -> ShardIndex:
    """The index of a remote file, from its copy if there is one, or else by reading it once."""
    if isinstance(shard, Command):
        return index_shard(access.cache.fetch_output(shard), rule=rule)
    state = {"name": shard.url, "size": shard.size, "etag": shard.etag}

    def opened() -> IO[bytes]:
        return access.open(shard) or io.BufferedReader(RemoteReader(shard), BLOCK)

    return index_tar(shard.url, state, opened, access.cache.place_of(shard), reindex, rule)
