"""Arrays in HDF5 files, read by h5py."""

import h5py
import numpy as np

from fcmae.data.arrays.shared_chunks import SharedChunks
from fcmae.data.arrays.stored import Index, assemble, check_chunk, check_stored, inflate
from fcmae.errors import UsageError, shown

DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000
FILTERS = (DEFLATE, SHUFFLE, FLETCHER32, LZF)
"""The filters that are read, by HDF5's numbers. HDF5 looks for others among its plug-ins."""
CHECKSUM = 4
"""Bytes."""
LZF_RATIO, MAX_LZF = 90, 2**30
"""The most by which LZF expands, and the bytes to which a chunk may: HDF5 has no limit of its own."""


class HDF5Array:
    """A dataset. Refuses links, and data that lie in other files. Raises UsageError, ValueError or OSError.

    The file stays open; processes must not share it.
    """

    axes: str | None = None

    def __init__(self, path: str, name: str | None) -> None:
        self._file = h5py.File(path, "r", locking="best-effort")
        found = _find(self._file, path, name)
        if found.is_virtual or found.external:
            raise ValueError(f"the dataset {shown(found.name)} takes its values from other files")
        properties = found.id.get_create_plist()
        self._filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        other = [number for number in self._filters if number not in FILTERS]
        if other:
            raise ValueError(f"its filter {other[0]} is not read; write it with gzip, shuffle, lzf or without any")
        if found.chunks is not None:
            self._size = check_chunk(found.chunks, found.dtype)
        self._dataset, self._fill = found, np.array(found.fillvalue, found.dtype)
        self.shape, self.dtype, self.files = found.shape, found.dtype, [path]
        self.chunks: tuple[int, ...] | None = found.chunks if self._filters else None
        self.shared: SharedChunks | None = None

    def read(self, index: Index) -> np.ndarray:
        if self.chunks is None:
            return np.asarray(self._dataset[index])
        return assemble(index, self.chunks, self._chunk, self._fill, self.shared)

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray | None:
        """The chunk of a number, None if it is not stored and so has the fill value everywhere."""
        dataset, chunks = self._dataset, self._dataset.chunks
        corner = tuple(number * side for number, side in zip(place, chunks, strict=True))
        stored = dataset.id.get_chunk_info_by_coord(corner)
        if stored.byte_offset is None:
            return None
        check_stored(stored.size, self._size)
        if LZF in self._filters:
            if stored.size * LZF_RATIO > MAX_LZF or DEFLATE in self._filters:
                raise ValueError("its chunks are too large for lzf, or have gzip, too; write it with gzip alone")
            ends = [min(start + side, most) for start, side, most in zip(corner, chunks, self.shape, strict=True)]
            return dataset[tuple(map(slice, corner, ends))]
        mask, data = dataset.id.read_direct_chunk(corner)
        for number, kind in reversed(list(enumerate(self._filters))):
            if not mask >> number & 1:
                data = self._decoded(kind, data)
        if len(data) != self._size:
            raise ValueError(f"a chunk has {len(data)} bytes instead of {self._size}")
        return np.frombuffer(data, self.dtype).reshape(chunks)

    def _decoded(self, kind: int, data: bytes) -> bytes:
        if kind == DEFLATE:
            return inflate(data, self._size + CHECKSUM)
        if kind == FLETCHER32:
            return data[:-CHECKSUM]
        if len(data) != self._size:
            return data
        # shuffled: the first bytes of all values, then the second ones, and so on
        return np.frombuffer(data, np.uint8).reshape(self.dtype.itemsize, -1).T.tobytes()


def _find(file: h5py.File, path: str, name: str | None) -> h5py.Dataset:
    """The dataset of a name, or the only one at the top. Raises UsageError naming those there are."""
    names = [key for key in file if isinstance(file.get(key, getlink=True), h5py.HardLink)]
    names = [key for key in names if isinstance(file[key], h5py.Dataset)]
    if name is None and len(names) == 1:
        name = names[0]
    has = f"{path} has {', '.join(map(shown, names[:10])) or 'only groups'}"
    if name is None:
        raise UsageError(f"data.dataset is not set; {has}")
    found = file
    for part in filter(None, name.split("/")):
        if not isinstance(found, h5py.Group) or part not in found:
            raise UsageError(f"data.dataset is {name!r}; {has}")
        if not isinstance(found.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{shown(name)} is a link, perhaps to another file; give the name of the dataset itself")
        found = found[part]
    if not isinstance(found, h5py.Dataset):
        raise UsageError(f"data.dataset is {name!r}, which is a group in {path}; give the dataset in it")
    return found
