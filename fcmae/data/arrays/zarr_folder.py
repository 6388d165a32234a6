"""Arrays in Zarr folders, versions 2 and 3, on a disk or at a URL, and their metadata, OME-Zarr's too.

Chunks are read here, and decompressed by numcodecs into memory of their declared size. zarr-python would let a chunk
expand without bound, and follow links out of the folder.
"""

import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fcmae.data.arrays.codecs import Codecs, codecs_v2, codecs_v3, scalar
from fcmae.data.arrays.folders import Folder
from fcmae.data.arrays.shared_chunks import SharedChunks
from fcmae.data.arrays.stored import Index, assemble, check_chunk, check_stored, longest
from fcmae.errors import UsageError, shown

MAX_METADATA = 2**24
"""Bytes of one file of metadata."""
MAX_INDEX = 2**24
"""Bytes of a shard's index."""
KEPT = 8
"""Shards of an array whose indexes are kept: a window may touch several."""
MISSING = 2**64 - 1
"""Offset and length in a shard's index of a chunk that is not stored."""


class Grid(NamedTuple):
    """How an array is cut into chunks, and a chunk ("shard") perhaps into inner chunks."""

    chunks: tuple[int, ...]
    codecs: Codecs
    shards: tuple[int, ...] | None = None
    """The shape of a shard; then ``chunks`` are those in it."""
    of_index: Codecs | None = None
    """Of a shard's index."""
    index_first: bool = False


class NoZarr(ValueError):
    """A folder without an array or a group."""


class ZarrArray:
    """An array of a Zarr folder. Errors of reading are OSError or ValueError.

    Args:
        folder: the array's own.
        meta: the metadata in it, and the file that has them.
    """

    def __init__(self, folder: Folder, axes: str | None, meta: dict[str, Any], name: str) -> None:
        self.folder, self.axes = folder, axes
        self.files = [f"{folder}/{name}"]
        self.shape = tuple(meta["shape"])
        if not all(type(side) is int and 0 <= side < 2**62 for side in self.shape):
            raise ValueError(f"its shape is {meta['shape']}")
        self._grid, self._stored, fill = _version_2(meta) if name == ".zarray" else _version_3(meta)
        self._key = _keys(meta, name == ".zarray")
        if len(self._grid.shards or self._grid.chunks) != len(self.shape):
            raise ValueError("its chunks have another number of axes than its shape")
        self._size = check_chunk(self._grid.chunks, self._stored)
        self.dtype = self._stored.newbyteorder("=")
        self._fill = scalar(fill, self.dtype)
        self.chunks: tuple[int, ...] | None = self._grid.chunks
        self.shared: SharedChunks | None = None
        self._indexes: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, index: Index) -> np.ndarray:
        return assemble(index, self._grid.chunks, self._chunk, self._fill, self.shared, self.folder.each)

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray | None:
        """The chunk of a number, None if it is not stored and so has the fill value everywhere."""
        grid = self._grid
        try:
            if grid.shards is None:
                data = self.folder.read(self._key(place), longest(self._size))
            else:
                within = [outer // inner for outer, inner in zip(grid.shards, grid.chunks, strict=True)]
                shard = tuple(number // count for number, count in zip(place, within, strict=True))
                inner = tuple(number % count for number, count in zip(place, within, strict=True))
                found = self._inner(self._key(shard), inner, within)
                if found is None:
                    return None
                data = found
        except FileNotFoundError:
            return None
        return grid.codecs.decode(data, grid.chunks, self._stored)

    def _inner(self, key: str, inner: tuple[int, ...], within: list[int]) -> bytes | None:
        """The bytes of a chunk in a shard."""
        with self._lock:  # threads that want other chunks of the shard wait for its index
            index = self._indexes.get(key)
            if index is None:
                if len(self._indexes) == KEPT:
                    self._indexes.clear()
                index = self._indexes[key] = self._shard_index(key, within)
        offset, length = (int(number) for number in index[inner])
        if offset == length == MISSING:
            return None
        check_stored(length, self._size)
        data = self.folder.part(key, offset, length) if length else b""
        if len(data) < length:
            raise ValueError(f"{self.folder}/{key} is cut off")
        return data

    def _shard_index(self, key: str, within: list[int]) -> np.ndarray:
        shape = (*within, 2)
        assert self._grid.of_index is not None
        plain = int(np.prod(shape, dtype=float)) * 8
        size = plain + self._grid.of_index.trailing
        if size > MAX_INDEX:
            raise ValueError(f"the index of a shard has {size} bytes; at most {MAX_INDEX} are read")
        data = self.folder.part(key, 0 if self._grid.index_first else -size, size)
        if len(data) < size:
            raise ValueError(f"{self.folder}/{key} is cut off")
        return self._grid.of_index.decode(data, shape, np.dtype("<u8"))


def open_zarr(top: Folder, dataset: str | None) -> ZarrArray:
    """The array in a Zarr folder, of OME-Zarr the largest resolution. Raises UsageError, ValueError or OSError."""
    meta, name = _metadata(top)
    folder = top
    if dataset is not None:
        if _is_array(meta, name):
            raise UsageError(f"data.dataset must be null for {top}, which is one array; got {dataset!r}")
        folder = top.below(dataset)
        try:
            meta, name = _metadata(folder)
        except (NoZarr, NotADirectoryError):
            raise UsageError(f"data.dataset is {dataset!r}; {top} has {_listed(top)}") from None
    if _is_array(meta, name):
        return ZarrArray(folder, None, meta, name)
    attributes = _attributes(folder, meta, name)
    scales = attributes.get("multiscales") or attributes.get("ome", {}).get("multiscales")
    if not scales:
        raise UsageError(f"data.dataset is not set; {folder} is a group with {_listed(folder)}")
    axes = "".join(axis if isinstance(axis, str) else axis["name"] for axis in scales[0].get("axes", "tczyx")).upper()
    largest = folder.below(str(scales[0]["datasets"][0]["path"]))
    return ZarrArray(largest, axes, *_metadata(largest))


def _listed(folder: Folder) -> str:
    """Arrays in a group and in its groups, for a message."""
    return ", ".join(map(shown, itertools.islice(_arrays(folder), 10))) or "no arrays that can be listed"


def _arrays(folder: Folder, prefix: str = "") -> Iterator[str]:
    for name in folder.names():
        below = folder.below(name)
        try:
            meta, file = _metadata(below)
        except NoZarr:
            continue
        if _is_array(meta, file):
            yield prefix + name
        else:
            yield from _arrays(below, f"{prefix}{name}/")


def _metadata(folder: Folder) -> tuple[dict[str, Any], str]:
    """The metadata of an array or group, and the file that has them."""
    denied: UsageError | None = None
    for name in ("zarr.json", ".zarray", ".zgroup"):
        try:
            return _json(folder, name), name
        except FileNotFoundError:
            continue
        except UsageError as error:  # S3 forbids what is not there if one may not list the bucket
            denied = error
    if denied is not None:
        raise denied
    raise NoZarr(f"{shown(str(folder))} has neither zarr.json nor .zarray nor .zgroup, so it is no Zarr folder")


def _is_array(meta: dict[str, Any], name: str) -> bool:
    return name == ".zarray" or meta.get("node_type") == "array"


def _attributes(folder: Folder, meta: dict[str, Any], name: str) -> dict[str, Any]:
    if name == "zarr.json":
        return meta.get("attributes", {})
    try:
        return _json(folder, ".zattrs")
    except FileNotFoundError:
        return {}


def _json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        content = json.loads(folder.read(name, MAX_METADATA))
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no JSON object")
    return content


def _keys(meta: dict[str, Any], is_v2: bool) -> Any:
    """The function from a chunk's number to the name of its file."""
    encoding = meta.get("chunk_key_encoding", {})
    kind = "v2" if is_v2 else encoding.get("name", "default")
    given = meta.get("dimension_separator") if is_v2 else encoding.get("configuration", {}).get("separator")
    separator = given or ("." if kind == "v2" else "/")
    if kind not in ("default", "v2") or separator not in (".", "/"):
        raise ValueError(f"its chunk_key_encoding is {kind} with {separator!r}")
    start = ["c"] if kind == "default" else []
    return lambda place: separator.join([*start, *map(str, place)])


def _version_2(meta: dict[str, Any]) -> tuple[Grid, np.dtype, Any]:
    if not isinstance(meta["dtype"], str):
        raise ValueError("its values are structures; they must be numbers")
    dtype = np.dtype(meta["dtype"])
    return Grid(_sides(meta["chunks"]), codecs_v2(meta)), dtype, meta.get("fill_value")


def _version_3(meta: dict[str, Any]) -> tuple[Grid, np.dtype, Any]:
    grid = meta["chunk_grid"]
    if grid.get("name") != "regular" or meta.get("storage_transformers"):
        raise ValueError("its chunks are not regular, or have storage_transformers; such arrays are not read")
    if not isinstance(meta["data_type"], str):
        raise ValueError("its data_type must be a number type")
    dtype, chunks = np.dtype(meta["data_type"]), _sides(grid["configuration"]["chunk_shape"])
    codecs = meta["codecs"]
    if codecs[0].get("name") != "sharding_indexed":
        return Grid(chunks, codecs_v3(codecs)), dtype, meta.get("fill_value")
    if len(codecs) > 1:
        raise ValueError("it has codecs after its shards; such arrays are not read")
    config = codecs[0]["configuration"]
    inner = _sides(config["chunk_shape"])
    if len(inner) != len(chunks) or any(outer % side for outer, side in zip(chunks, inner, strict=True)):
        raise ValueError("its shards are no multiple of its chunks")
    index = codecs_v3(config["index_codecs"])
    if index.compressor is not None:
        raise ValueError("the index of its shards is compressed; such arrays are not read")
    first = config.get("index_location", "end") == "start"
    return Grid(inner, codecs_v3(config["codecs"]), chunks, index, first), dtype, meta.get("fill_value")


def _sides(given: Any) -> tuple[int, ...]:
    if not all(type(side) is int and 0 < side < 2**62 for side in given):
        raise ValueError(f"its chunks are {given}")
    return tuple(given)
