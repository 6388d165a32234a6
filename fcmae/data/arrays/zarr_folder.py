"""Arrays in Zarr folders, versions 2 and 3, and their metadata, OME-Zarr's too.

Chunks are read here, and decompressed by numcodecs into memory of their declared size. zarr-python would let a chunk
expand without bound, and follow links out of the folder.
"""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fcmae.data.arrays.codecs import Codecs, codecs_v2, codecs_v3, scalar
from fcmae.data.arrays.stored import Index, assemble, check_chunk, check_stored, longest
from fcmae.errors import UsageError, shown
from fcmae.opening import open_regular, read_regular

MAX_METADATA = 2**24
"""Bytes of one file of metadata."""
MAX_INDEX = 2**24
"""Bytes of a shard's index."""
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


class ZarrArray:
    """An array of a Zarr folder. Errors of reading are OSError or ValueError.

    Args:
        top: the folder that its files may not leave.
        folder: the array's own folder.
    """

    def __init__(self, top: Path, folder: Path, axes: str | None) -> None:
        self.top, self.folder, self.axes = os.path.realpath(top), folder, axes
        meta, name = _metadata(folder)
        self.files = [str(folder / name)]
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
        self._checked: set[str] = set()
        self._index: tuple[str, np.ndarray | None] = ("", None)

    def read(self, index: Index) -> np.ndarray:
        return assemble(index, self._grid.chunks, self._chunk, self._fill)

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray | None:
        """The chunk of a number, None if it is not stored and so has the fill value everywhere."""
        grid = self._grid
        if grid.shards is None:
            path = self._path(self._key(place))
            try:
                data = read_regular(path, longest(self._size), links=False)
            except FileNotFoundError:
                return None
        else:
            within = [outer // inner for outer, inner in zip(grid.shards, grid.chunks, strict=True)]
            shard = tuple(number // count for number, count in zip(place, within, strict=True))
            inner = tuple(number % count for number, count in zip(place, within, strict=True))
            found = self._inner(self._path(self._key(shard)), inner, within)
            if found is None:
                return None
            data = found
        return grid.codecs.decode(data, grid.chunks, self._stored)

    def _inner(self, path: str, inner: tuple[int, ...], within: list[int]) -> bytes | None:
        """The bytes of a chunk in a shard."""
        try:
            with open_regular(path, links=False) as file:
                if self._index[0] != path:
                    self._index = (path, self._shard_index(file, within))
                assert self._index[1] is not None
                offset, length = (int(number) for number in self._index[1][inner])
                if offset == length == MISSING:
                    return None
                check_stored(length, self._size)
                data = os.pread(file.fileno(), length, offset) if offset < 2**63 else b""
        except FileNotFoundError:
            return None
        if len(data) < length:
            raise ValueError(f"{path} is cut off")
        return data

    def _shard_index(self, file: Any, within: list[int]) -> np.ndarray:
        shape = (*within, 2)
        assert self._grid.of_index is not None
        plain = int(np.prod(shape, dtype=float)) * 8
        size = plain + self._grid.of_index.trailing
        if size > MAX_INDEX:
            raise ValueError(f"the index of a shard has {size} bytes; at most {MAX_INDEX} are read")
        start = 0 if self._grid.index_first else os.fstat(file.fileno()).st_size - size
        data = os.pread(file.fileno(), size, start) if start >= 0 else b""
        if len(data) < size:
            raise ValueError(f"{file.name} is cut off")
        return self._grid.of_index.decode(data, shape, np.dtype("<u8"))

    def _path(self, key: str) -> str:
        """The file of a key. Raises ValueError if a link in the folder leads out of it."""
        path = os.path.join(self.folder, key)
        parent = os.path.dirname(path)
        if parent not in self._checked:
            if os.path.commonpath([os.path.realpath(parent), self.top]) != self.top:
                raise ValueError(f"{parent} is outside of {self.top}")
            self._checked.add(parent)
        return path


def open_zarr(top: Path, dataset: str | None) -> ZarrArray:
    """The array in a Zarr folder, of OME-Zarr the largest resolution. Raises UsageError, ValueError or OSError."""
    meta, name = _metadata(top)
    folder = top
    if dataset is not None:
        if _is_array(meta, name):
            raise UsageError(f"data.dataset must be null for {top}, which is one array; got {dataset!r}")
        folder = _inside(top, dataset)
        meta, name = _metadata(folder)
    if _is_array(meta, name):
        return ZarrArray(top, folder, None)
    attributes = _attributes(folder, meta, name)
    scales = attributes.get("multiscales") or attributes.get("ome", {}).get("multiscales")
    if not scales:
        found = ", ".join(shown(str(path.relative_to(top))) for path in itertools.islice(_arrays(folder), 10))
        raise UsageError(f"data.dataset is not set; {folder} is a group with {found or 'no arrays'}")
    axes = "".join(axis if isinstance(axis, str) else axis["name"] for axis in scales[0].get("axes", "tczyx")).upper()
    return ZarrArray(top, _inside(folder, str(scales[0]["datasets"][0]["path"])), axes)


def _inside(top: Path, name: str) -> Path:
    """A folder in a Zarr folder. Raises ValueError if it is outside, or missing."""
    path = Path(os.path.normpath(top / name))
    real, root = os.path.realpath(path), os.path.realpath(top)
    if os.path.isabs(name) or os.path.commonpath([real, root]) != root:
        raise ValueError(f"{shown(name)} is outside of it")
    if not os.path.isdir(real):
        found = ", ".join(shown(str(path.relative_to(top))) for path in itertools.islice(_arrays(top), 10))
        raise UsageError(f"data.dataset is {name!r}; {top} has {found or 'no arrays'}")
    return path


def _arrays(folder: Path) -> Iterator[Path]:
    """The arrays in a group and in its groups."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if (path / ".zarray").is_file():
                yield path
            elif (path / "zarr.json").is_file() or (path / ".zgroup").is_file():
                yield from [path] if _is_array(*_metadata(path)) else _arrays(path)


def _metadata(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata of an array or group, and the file that has them."""
    for name in ("zarr.json", ".zarray", ".zgroup"):
        if (folder / name).is_file():
            return _json(folder / name), name
    raise ValueError(f"{shown(str(folder))} has neither zarr.json nor .zarray nor .zgroup, so it is no Zarr folder")


def _is_array(meta: dict[str, Any], name: str) -> bool:
    return name == ".zarray" or meta.get("node_type") == "array"


def _attributes(folder: Path, meta: dict[str, Any], name: str) -> dict[str, Any]:
    if name == "zarr.json":
        return meta.get("attributes", {})
    return _json(folder / ".zattrs") if (folder / ".zattrs").is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path, MAX_METADATA, links=False))
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
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
