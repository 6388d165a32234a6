"""TIFF files as arrays: of a large image, a slide or a stack of pages only the strips or tiles are read that a crop
touches.
"""

import mmap

import numpy as np

from fcmae.data.arrays.shared_chunks import SharedChunks
from fcmae.data.arrays.stored import MAX_CHUNK, Index, assemble, check_chunk
from fcmae.data.pixels.scientific import check_compression, check_segment, open_tiff_file
from fcmae.errors import UsageError
from fcmae.opening import open_regular

LETTERS = {"Y": "Y", "X": "X", "C": "C", "S": "C", "Z": "Z", "T": "T"}
"""Our names of tifffile's axes; others are images (N)."""


class TiffArray:
    """The first series of a TIFF file, or one of its levels of resolution.

    Args:
        dataset: the number of the level; None = the first, the largest.

    Raises UsageError or ValueError.
    """

    def __init__(self, path: str, dataset: str | None) -> None:
        with open_regular(path) as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        series = open_tiff_file(self._data, self._data).series[0]
        levels = series.levels
        if dataset is not None and not (dataset.isdigit() and int(dataset) < len(levels)):
            most = len(levels) - 1
            raise UsageError(f"data.dataset must be a level from 0 to {most} for {path}; got {dataset!r}")
        series = levels[int(dataset or 0)]
        self._key, self._pages = series.keyframe, series.pages
        self.shape, self.dtype, self.files = tuple(series.shape), np.dtype(series.dtype), [path]
        self.axes = _axes(series.axes)
        self._outer = self.shape[: len(self.shape) - len(self._key.shape)]
        if self._outer + tuple(self._key.shape) != self.shape:
            raise ValueError(f"its pages of {list(self._key.shape)} do not make the shape {list(self.shape)}")
        self._inner = str(self._key.axes)
        self.chunks: tuple[int, ...] | None = None
        self.shared: SharedChunks | None = None
        self._at = series.dataoffset if int(self._key.compression) == 1 else None
        if self._at is None:
            check_compression(self._key, MAX_CHUNK)
            self.chunks = self._chunks = self._chunk_shape()
            check_chunk(self._chunks, self.dtype)
        elif self._at + series.size * self.dtype.itemsize > len(self._data):
            raise ValueError("it is cut off")

    def _chunk_shape(self) -> tuple[int, ...]:
        key = self._key
        rows = key.tilelength if key.is_tiled else min(key.rowsperstrip, key.imagelength)
        cols = key.tilewidth if key.is_tiled else key.imagewidth
        samples = 1 if int(key.planarconfig) == 2 else key.samplesperpixel
        sides: dict[str, int] = {"Y": rows, "X": cols, "S": samples}
        return (1,) * len(self._outer) + tuple(sides[axis] for axis in self._inner)

    def read(self, index: Index) -> np.ndarray:
        if self._at is not None:  # all pixels follow each other
            order = self.dtype.newbyteorder(self._key.parent.byteorder)
            stored = np.ndarray(self.shape, order, self._data, self._at)
            return stored[index].astype(self.dtype)
        return assemble(index, self._chunks, self._chunk, np.zeros((), self.dtype), self.shared)

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray | None:
        """A strip or tile; None if it is not stored."""
        outer, inner = place[: len(self._outer)], dict(zip(self._inner, place[len(self._outer) :], strict=True))
        page = self._pages[int(np.ravel_multi_index(outer, self._outer))] if outer else self._pages[0]
        across = -(-self._key.imagewidth // self._side("X"))
        down = -(-self._key.imagelength // self._side("Y"))
        plane = inner.get("S", 0) if int(self._key.planarconfig) == 2 else 0
        number = (plane * down + inner["Y"]) * across + inner["X"]
        offset, count = page.dataoffsets[number], page.databytecounts[number]
        if not count:
            return None
        segment = self._data[offset : offset + count]
        if len(segment) < count:
            raise ValueError("it is cut off")
        check_segment(segment, self._key)
        values = self._key.decode(segment, number, jpegtables=page.jpegtables)[0]
        if values is None:
            return None
        return _shaped(values[0], self._inner, self._chunks, self.dtype)

    def _side(self, axis: str) -> int:
        return self._chunks[len(self._outer) + self._inner.index(axis)]


def _shaped(values: np.ndarray, inner: str, chunks: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A decoded segment ``[rows, columns, samples]`` in the order of the axes; short at the end of the image."""
    order = ["YXS".index(axis) for axis in inner]
    rest = [axis for axis in range(3) if axis not in order]
    values = np.transpose(values, [*order, *rest])
    values = values.reshape(values.shape[: len(order)])
    full = np.zeros(chunks[len(chunks) - len(order) :], dtype)
    part = tuple(slice(side) for side in np.minimum(values.shape, full.shape))
    full[part] = values[part]
    return full.reshape(chunks)


def _axes(given: str) -> str | None:
    """Our axes; None if they are not clear."""
    letters = "".join(LETTERS.get(letter, "N") for letter in given)
    return letters if len(set(letters)) == len(letters) else None
