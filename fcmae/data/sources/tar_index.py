"""Where in a tar file its samples are: made by reading the file's headers once, and kept beside it."""

import json
import os
import tarfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fcmae.data.arrays import Arrays, Strings, StringsBuilder, find_kept, keep
from fcmae.data.formats import EXTENSIONS
from fcmae.errors import UsageError

SUFFIX = ".fcmae-index"
FORMAT = 1
NO_LABEL = -1


class ShardIndex:
    """The images of one tar file: the byte at which each begins, its size, its label or -1, its name in the file.

    ``cut`` says why reading the headers ended before the end of the archive; empty if it did not.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self.offsets = arrays["offsets"]
        self.sizes = arrays["sizes"]
        self.labels = arrays["labels"]
        self.names = Strings(arrays, "names")
        self.cut: str = arrays.meta["cut"]

    def __len__(self) -> int:
        return len(self.offsets)

    def __reduce__(self) -> tuple[type, tuple[Arrays]]:
        return ShardIndex, (self.arrays,)

    def name(self, position: int) -> str:
        return os.fsdecode(self.names[position])

    @property
    def is_labelled(self) -> bool:
        return len(self) == 0 or int(self.labels.min()) > NO_LABEL

    @property
    def largest_label(self) -> int:
        return int(self.labels.max(initial=NO_LABEL))


def index_shard(shard: Path, reindex: bool = False) -> ShardIndex:
    """The index of a tar file, from its own file if size and modification time are as they were, else made anew.

    Raises UsageError if it is not a tar file, or a compressed one.
    """
    try:
        status = shard.stat()
    except OSError as error:
        raise UsageError(f"cannot read the tar file {shard}: {error.strerror}") from error
    state = {"format": FORMAT, "extensions": list(EXTENSIONS), "size": status.st_size, "mtime": status.st_mtime_ns}
    if not reindex:
        kept = find_kept(shard, SUFFIX, lambda kept: kept.meta["shard"] == state)
        if kept is not None:
            return ShardIndex(kept)
    return ShardIndex(keep(_read_headers(shard, state), shard, SUFFIX))


@dataclass
class _Samples:
    """What is collected of a tar file, one sample after another."""

    names: StringsBuilder = field(default_factory=StringsBuilder)
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    labels: array = field(default_factory=lambda: array("i"))
    key: str | None = None
    image: tarfile.TarInfo | None = None
    label: int = NO_LABEL

    def add(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if not stem:
            return  # what some systems put beside a file: ._0001.jpg
        key = f"{folder}/{stem}"
        if key != self.key:
            self.finish()
            self.key = key
        ending = ending.lower()
        if self.image is None and os.path.splitext("x." + ending)[1] in EXTENSIONS:
            self.image = member
        elif ending in ("cls", "json") and self.label == NO_LABEL:
            content = tar.extractfile(member)
            assert content is not None
            self.label = read_label(ending, content.read())

    def finish(self) -> None:
        """Ends the current sample."""
        if self.image is not None:
            self.names.append(os.fsencode(self.image.name))
            self.offsets.append(self.image.offset_data)
            self.sizes.append(self.image.size)
            self.labels.append(self.label)
        self.key, self.image, self.label = None, None, NO_LABEL


def read_label(ending: str, content: bytes) -> int:
    """The class's number in a ``cls`` or ``json`` file; -1 where there is none."""
    try:
        value = json.loads(content)
    except ValueError:
        return NO_LABEL
    if ending == "json":
        known = value if isinstance(value, dict) else {}
        value = known.get("label", known.get("cls"))
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else NO_LABEL


def _read_headers(shard: Path, state: dict) -> Arrays:
    samples = _Samples()
    cut = ""
    try:
        with tarfile.open(shard, "r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    if member.isfile():
                        samples.add(member, tar)
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                cut = _missing_end(shard, tar.offset)
            except tarfile.ReadError as error:
                cut = str(error)
            samples.finish()
    except (tarfile.ReadError, OSError) as error:
        hint = "; compressed tar files have no random access, unpack them first" if _is_compressed(shard) else ""
        raise UsageError(f"cannot read the tar file {shard}: {error}{hint}") from error
    arrays: dict[str, np.ndarray] = {
        "offsets": np.frombuffer(samples.offsets, np.int64),
        "sizes": np.frombuffer(samples.sizes, np.int64),
        "labels": np.frombuffer(samples.labels, np.int32),
        **samples.names.arrays("names"),
    }
    return Arrays(arrays, {"shard": state, "cut": cut})


def _missing_end(shard: Path, offset: int) -> str:
    """What is wrong where no header was found; nothing if there is the mark of the archive's end, a block of zeros."""
    with shard.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block == bytes(tarfile.BLOCKSIZE):
        return ""
    return f"no header at byte {offset}" if block else "no mark of the archive's end"


def _is_compressed(shard: Path) -> bool:
    with shard.open("rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7z", b"\x28\xb5\x2f\xfd"))
