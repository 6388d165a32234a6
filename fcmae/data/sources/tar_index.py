"""The positions of the samples in a tar file, found by reading its headers once and kept in a file beside it."""

import itertools
import json
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fcmae.data.sources.kept import Arrays, Strings, StringsBuilder, find_kept, keep
from fcmae.data.sources.tar_headers import DamagedError, Member, members
from fcmae.data.sources.tar_names import LABELS, Rule, at_last_dot, choose_split
from fcmae.errors import UsageError, shown
from fcmae.opening import open_regular

SUFFIX = ".fcmae-index"
FORMAT = 3
NO_LABEL = -1
MAX_LABEL = 2**31 - 1
MAX_LABEL_BYTES = 2**20
"""Of a .cls or .json file; larger ones have no label."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7z", b"\x28\xb5\x2f\xfd")
"""How compressed files begin."""
SPARSE = -1
"""In place of the size of an image that is stored as a sparse file."""


@dataclass
class LeftOut:
    """Files of a tar file that are left out: further images of samples, and samples without an image."""

    further: int = 0
    further_example: str = ""
    without: int = 0
    without_example: str = ""
    at_last_dot: bool = False
    """Samples' names end at the last dot instead of the first."""


class ShardIndex:
    """The images of one tar file: position, size, label or -1, and name of each.

    ``cut`` says why the headers ended before the archive; empty if they did not.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self.offsets = arrays["offsets"]
        self.sizes = arrays["sizes"]
        self.labels = arrays["labels"]
        self.names = Strings(arrays, "names")
        self.cut: str = arrays.meta["cut"]
        self.left_out = LeftOut(**arrays.meta["left_out"])

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


def index_shard(shard: Path, reindex: bool = False, rule: Rule = Rule()) -> ShardIndex:  # noqa: B008  # immutable
    """The index of a tar file, from the kept file if the size and modification time are the same.

    Raises UsageError if it is not a tar file or is compressed.
    """
    try:
        status = shard.stat()
    except OSError as error:
        raise UsageError(f"cannot read the tar file {shard}: {error.strerror}") from error
    state = {"name": shard.name, "size": status.st_size, "mtime": status.st_mtime_ns}
    return index_tar(str(shard), state, lambda: open_regular(shard), shard, reindex, rule)


def index_tar(
    name: str, state: dict[str, Any], opened: Callable[[], IO[bytes]], beside: Path, reindex: bool, rule: Rule
) -> ShardIndex:
    """The index of a tar file, from the kept file if the state is the same. Raises UsageError as :func:`index_shard`.

    Args:
        state: ``size`` in bytes, and what else changes with the file.
        opened: opens it, to read and seek.
        beside: where its index is kept, as a path of the tar file that need not exist.
    """
    state = {"format": FORMAT, "extensions": list(rule.extensions), "keys": rule.keys, **state}
    kept = None if reindex else find_kept(beside, SUFFIX, lambda kept: _is_current(kept, state))
    return ShardIndex(kept or keep(_read(name, opened, state, rule), beside, SUFFIX))


def _is_current(kept: Arrays, state: dict) -> bool:
    if kept.meta["shard"] != state:
        return False
    index = ShardIndex(kept)
    index.names.check()
    arrays = (index.offsets, index.sizes, index.labels)
    if any(values.shape != (len(index.names),) for values in arrays):
        raise ValueError("its arrays have other sizes")
    if index.offsets.min(initial=0) < 0 or index.sizes.min(initial=0) < SPARSE:
        raise ValueError("it has places before the beginning of the file")
    if index.offsets.max(initial=0) > state["size"] or index.labels.min(initial=0) < NO_LABEL:
        raise ValueError("it has places or labels that cannot be")
    return True


class _Files:
    """The names, positions, sizes and labels of an archive's regular files, without an object per file."""

    def __init__(self) -> None:
        self.names = StringsBuilder()
        self.offsets, self.sizes, self.labels = array("q"), array("q"), array("i")

    def add(self, member: Member, file: IO[bytes]) -> None:
        base = member.name.rpartition("/")[2]
        if base.startswith("."):
            return  # such as ._0001.jpg, which macOS adds
        self.names.append(os.fsencode(member.name))
        self.offsets.append(member.offset)
        self.sizes.append(SPARSE if member.is_sparse else member.size)
        ending = base.lower().rpartition(".")[2]
        label = NO_LABEL
        if ending in LABELS and not member.is_sparse and member.size <= MAX_LABEL_BYTES:
            file.seek(member.offset)
            label = read_label(ending, file.read(member.size))
        self.labels.append(label)

    def all_names(self) -> Iterator[str]:
        strings = Strings(Arrays(self.names.arrays("names"), {}), "names")
        return map(os.fsdecode, strings)

    def samples(self, rule: Rule) -> tuple[dict[str, np.ndarray], LeftOut]:
        """The arrays of a :class:`ShardIndex`, and what is left out. Raises ValueError for ambiguous names."""
        split, keys = choose_split(self.all_names, rule), dict[int, str]()
        left_out = LeftOut(at_last_dot=split is at_last_dot)
        images, labels, names = array("q"), array("i"), StringsBuilder()
        position = itertools.count()
        files = ((*split(name), name, next(position)) for name in self.all_names())
        for key, group in itertools.groupby(files, lambda file: file[0]):
            found = [(ending, name, place) for _, ending, name, place in group]
            pictures = [(name, place) for ending, name, place in found if rule.is_image(ending)]
            if not pictures:
                left_out.without += 1
                left_out.without_example = left_out.without_example or found[0][1]
                continue
            (name, place), further = pictures[0], pictures[1:]
            twice = next((other for other, _ in further if other == name), None)
            if twice is not None:
                raise ValueError(f"{shown(name)} is there twice, one after the other; remove one of them")
            earlier = keys.setdefault(hash(key), name)
            if earlier is not name and split(earlier)[0] == key:
                same = f"are apart, but have the same name {shown(key.strip('/'))}"
                raise ValueError(
                    f"{shown(earlier)} and {shown(name)} {same}; rename or remove one of them, or set data.keys"
                )
            left_out.further += len(further)
            if further and not left_out.further_example:
                left_out.further_example = f"{further[0][0]} beside {name}"
            known = (self.labels[at] for ending, _, at in found if ending in LABELS)
            images.append(place)
            names.append(os.fsencode(name))
            labels.append(next((label for label in known if label != NO_LABEL), NO_LABEL))
        chosen = np.frombuffer(images, np.int64)
        return {
            "offsets": np.frombuffer(self.offsets, np.int64)[chosen],
            "sizes": np.frombuffer(self.sizes, np.int64)[chosen],
            "labels": np.frombuffer(labels, np.int32),
            **names.arrays("names"),
        }, left_out


def read_label(ending: str, content: bytes) -> int:
    """The label in a ``cls`` or ``json`` file; -1 without one."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # also numbers of thousands of digits, and lists in lists in lists
        return NO_LABEL
    if ending == "json":
        known = value if isinstance(value, dict) else {}
        value = known.get("label", known.get("cls"))
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 <= value <= MAX_LABEL else NO_LABEL


def _read(name: str, opened: Callable[[], IO[bytes]], state: dict, rule: Rule) -> Arrays:
    files, cut, start = _Files(), "", b""
    try:
        with opened() as file:
            start = file.read(len(max(COMPRESSED, key=len)))
            try:
                for member in members(file):
                    files.add(member, file)
            except DamagedError as error:
                cut = str(error)
        arrays, left_out = files.samples(rule)
    except (tarfile.ReadError, OSError) as error:
        is_compressed = start.startswith(COMPRESSED)
        hint = "; compressed tar files have no random access, unpack them first" if is_compressed else ""
        raise UsageError(f"cannot read the tar file {name}: {error}{hint}") from error
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    return Arrays(arrays, {"shard": state, "cut": cut, "left_out": asdict(left_out)})
