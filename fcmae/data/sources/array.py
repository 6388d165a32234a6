"""Images in arrays on disk: Zarr, OME-Zarr, HDF5, .npy and TIFF, of any layout."""

import glob
import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcmae.data.arrays.shared_chunks import Layout, SharedChunks, shared_chunks
from fcmae.data.arrays.stored import MAX_SAMPLES, Stored, open_stored
from fcmae.data.pixels.decode import PixelFormat, StoredImage
from fcmae.data.pixels.scientific import check_type, native
from fcmae.data.remote.objects import find_folders, stat
from fcmae.data.sources.base import Sample, class_names, distinct_names, locate
from fcmae.data.sources.heads import empty_classes
from fcmae.errors import ConfigError, UsageError, counted, shown
from fcmae.messages import print_once_rank0
from fcmae.urls import expand_braces, is_url

AXES = {2: "YX", 3: "NYX", 4: "NCYX", 5: "NZCYX"}
"""The axes of an array of so many, where neither ``data.axes`` nor its metadata name them."""
OPEN = 64
"""Arrays that a process has open at a time."""


class ArrayImages:
    """The images of one or several arrays, each opened by every process that reads it.

    Args:
        path: an array, a pattern of several, or a list.
        dataset: the array's name in an HDF5 file or a Zarr group.
        axes: a letter per axis: N or T images, C channels, Z planes, H or Y, W or X; None = those of the metadata, or
            :data:`AXES`.
        planes: those that are read; None = all.
        planes_as: ``channels`` folds them into the channels, all planes of a channel in turn; ``samples`` makes each an
            image.
        channels: those of a sample that are needed; others are 0. None = all.
        labels: a 1-d array of a class, a name or a number per image: its name in the same file, or a .npy file beside
            the array.
        limit: seconds for which reads from a URL are repeated.
        share: keep decoded chunks in shared memory, if all fit.

    Raises RemoteError, and UsageError if an array cannot be read or does not fit ``to``.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        to: PixelFormat,
        dataset: str | None = None,
        axes: str | None = None,
        planes: Sequence[int] | None = None,
        planes_as: str = "channels",
        channels: Sequence[int] | None = None,
        labels: str | None = None,
        limit: float = 0,
        share: bool = True,
    ) -> None:
        self.to = to
        layout = (axes, planes, planes_as == "samples", channels)
        self._open = OpenArrays(limit)
        self.arrays = [_Array(name, dataset, to, limit, *layout) for name in find_arrays(path, limit)]
        self.ends = list(itertools.accumulate(array.images * array.depth for array in self.arrays))
        if not 0 < self.ends[-1] <= MAX_SAMPLES:
            raise UsageError(f"{self.arrays[0].path} has {self.ends[-1]} images; must have 1 to {MAX_SAMPLES}")
        if share:
            for array, chunks in zip(self.arrays, shared_chunks([one.layout for one in self.arrays]), strict=True):
                array.shared = chunks
        self.metadata_files = [file for array in self.arrays for file in array.files]
        """What changes when an array is written again."""
        self.stamps = [stat(file, limit).stamp for file in self.metadata_files if is_url(file)]
        self.classes: list[str] | None = None
        self.unlabelled = "data.label_column is not set, the name of a 1-d array or .npy file"
        self.columns: list[str] = []
        self.values: Tensor | None = None
        if labels is not None:
            self._read_labels(labels)

    def _read_labels(self, name: str) -> None:
        found = np.concatenate([array.labels(name) for array in self.arrays])
        if found.dtype.kind in "US":
            names, numbers = np.unique(found, return_inverse=True)
            self.classes, self.numbers = [str(text) for text in names], numbers.astype(np.int32)
        elif found.dtype.kind in "iub":
            least, most = int(found.min()), int(found.max())
            self.classes = class_names(most, len(found)) if least >= 0 else None
            if self.classes is None:
                raise UsageError(f"data.label_column: {name} must have classes counted from 0; got {least} to {most}")
            self.numbers = found.astype(np.int32)
            if told := empty_classes([self.numbers], self.classes):
                print_once_rank0(f"{self.arrays[0].path}: {counted(len(found), 'image')}{told}")
        else:
            rows = [self._row(index) for index in range(len(self))]  # planes of an image share its number
            self.columns, self.values = [name], torch.from_numpy(found.astype(np.float32))[rows, None]
            self.unlabelled = f"data.label_column: {name} has numbers, not classes"

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        part, place = locate(self.ends, index)
        array = self.arrays[part]
        size = array.sizes["Y"], array.sizes["X"]
        image = StoredImage(
            size, self.describe(index), lambda rows, cols: array.read(self._open, place, rows, cols), self.to
        )
        return Sample(image, self.label(index) if self.values is None else self.values[index])

    def listing_parts(self) -> Iterator[bytes | np.ndarray]:
        yield distinct_names([array.path for array in self.arrays]) if len(self.arrays) > 1 else b""
        yield np.asarray(self.ends)
        if self.classes is not None:
            yield self.numbers
        elif self.values is not None:
            yield self.values.numpy()

    def _row(self, index: int) -> int:
        """The place of a sample's label."""
        part, place = locate(self.ends, index)
        return sum(array.images for array in self.arrays[:part]) + place // self.arrays[part].depth

    def label(self, index: int) -> int | None:
        return None if self.classes is None else int(self.numbers[self._row(index)])

    def describe(self, index: int) -> str:
        part, place = locate(self.ends, index)
        return self.arrays[part].describe(place)


class _Array:
    """One array: ``images`` times ``depth`` samples."""

    def __init__(
        self,
        path: str,
        dataset: str | None,
        to: PixelFormat,
        limit: float,
        axes: str | None,
        planes: Sequence[int] | None,
        planes_are_samples: bool,
        channels: Sequence[int] | None,
    ) -> None:
        self.path, self.dataset, self.limit = path, dataset, limit
        stored = open_stored(path, dataset, limit)
        self.shape, self.dtype, self.files = stored.shape, stored.dtype, stored.files
        self.layout = None if stored.chunks is None else Layout(stored.shape, stored.chunks, stored.dtype)
        self.shared: SharedChunks | None = None
        self.name = path if dataset is None else f"{path}:{dataset}"
        self.axes = _axes(self.name, self.shape, axes, stored.axes)
        self.sizes = dict(zip(self.axes, self.shape, strict=True))
        self.planes = self._planes(planes)
        self.outer = [letter for letter in self.axes if letter in "NT"]
        """The axes of images."""
        self.images = math.prod(self.sizes[letter] for letter in self.outer)
        self.depth = len(self.planes) if planes_are_samples else 1
        """Samples of an image."""
        if planes_are_samples and "Z" in self.sizes:
            self.outer.append("Z")
        self._check(to)
        folded = to.in_chans // self.sizes.get("C", 1)
        needed = range(to.in_chans) if channels is None else channels
        channels_read = sorted({channel // folded for channel in needed})
        left = [letter for letter in self.axes if letter not in self.outer]
        self.order = [left.index(letter) for letter in "CZYX" if letter in left]
        """The axes of a sample as they are stored, in the order in which it has them."""
        self.folded = [0] if "Z" in self.outer else self.planes
        """The planes of a sample."""
        self.parts = list(itertools.product(_runs(channels_read), _runs(self.folded)))
        """The ranges of channels and planes that are read."""
        in_order = self.folded == sorted(self.folded) and len(channels_read) == self.sizes.get("C", 1)
        self.is_whole = len(self.parts) == 1 and in_order
        """Whether a sample is read as it is stored."""

    def _planes(self, given: Sequence[int] | None) -> list[int]:
        count = self.sizes.get("Z", 1)
        if given is not None and max(given) >= count:
            raise ConfigError(f"data.planes must be from 0 to {count - 1} for {self.name}; got {list(given)}")
        if count > MAX_SAMPLES:
            raise UsageError(f"{self.name} has {count} planes; at most {MAX_SAMPLES} are read")
        return list(range(count)) if given is None else list(given)

    def _check(self, to: PixelFormat) -> None:
        """Raises UsageError if the images do not fit the config."""
        try:
            check_type(self.dtype, to.dtype)
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error
        if self.dtype == np.uint16 and to.bit_depth == 8 and not to.is_float:
            raise UsageError(f"{self.name} has 16 bits per value; set data.bit_depth, 9 to 16, or data.dtype=float32")
        folded = 1 if "Z" in self.outer else len(self.planes)
        channels = self.sizes.get("C", 1)
        if channels * folded != to.in_chans:
            has = counted(channels, "channel") + (f" of {folded} planes" if folded > 1 else "")
            raise UsageError(
                f"{self.name} has {has}; {to.expected}; its shape {list(self.shape)} is read as {self.axes}, which "
                "data.axes changes"
            )
        if not self.sizes["Y"] * self.sizes["X"]:
            raise UsageError(f"{self.name} has no pixels: its shape is {list(self.shape)}")

    def read(self, opened: "OpenArrays", place: int, rows: slice, cols: slice) -> np.ndarray:
        """A part of a sample, ``[C, H, W]`` in native byte order.

        Raises UsageError, OSError, or ValueError, also if the array has changed.
        """
        stored = opened.get(self.path, self.dataset)
        if (stored.shape, stored.dtype) != (self.shape, self.dtype):
            raise ValueError(f"it has changed from {list(self.shape)} {self.dtype} since the command began")
        stored.shared = self.shared
        size, position = (rows.stop - rows.start, cols.stop - cols.start), self._position(place)
        shape = self.sizes.get("C", 1), len(self.folded), *size
        values = None if self.is_whole else np.zeros(shape, self.dtype.newbyteorder("="))
        for channels, planes in self.parts:
            found: dict[str, int | slice] = {"Y": rows, "X": cols, "C": channels, "Z": planes} | position
            part = stored.read(tuple(found[letter] for letter in self.axes)).transpose(self.order)
            part = part.reshape(channels.stop - channels.start, planes.stop - planes.start, *size)
            if values is None:
                return np.ascontiguousarray(native(part)).reshape(-1, *size)
            for plane in range(planes.start, planes.stop):
                values[channels, self.folded.index(plane)] = part[:, plane - planes.start]
        assert values is not None
        return values.reshape(-1, *size)

    def _position(self, place: int) -> dict[str, int]:
        """Where a sample is along the axes of images."""
        counts = [len(self.planes) if letter == "Z" else self.sizes[letter] for letter in self.outer]
        numbers = [int(number) for number in np.unravel_index(place, counts)] if counts else []
        position = dict(zip(self.outer, numbers, strict=True))
        return {letter: self.planes[number] if letter == "Z" else number for letter, number in position.items()}

    def describe(self, place: int) -> str:
        return f"{self.name}[{','.join(map(str, self._position(place).values()))}]"

    def labels(self, name: str) -> np.ndarray:
        """The label of each image. Raises UsageError."""
        beside = name.endswith(".npy")
        if beside and is_url(self.path):
            raise UsageError(f"data.label_column must name an array in {self.path}; at URLs .npy files are not read")
        path = os.path.join(os.path.dirname(self.path), name) if beside else self.path
        found = open_stored(path, None if beside else name, self.limit)
        if found.shape != (self.images,) or found.dtype.kind not in "iubfUS":
            raise UsageError(
                f"data.label_column: {name} must have {self.images} classes or numbers, one per image of {self.name}; "
                f"got {list(found.shape)} {found.dtype}"
            )
        return found.read((slice(0, self.images),))


def stored_format(
    path: str | Sequence[str], dataset: str | None, axes: str | None, planes: Sequence[int] | None, planes_as: str
) -> dict[str, int | str]:
    """Values of keys of ``data`` with which the arrays at ``path`` can be read, by the first of them.

    Raises UsageError.
    """
    name = find_arrays(path)[0]
    stored = open_stored(name, dataset)
    sizes = dict(zip(_axes(name, stored.shape, axes, stored.axes), stored.shape, strict=True))
    folded = 1 if planes_as == "samples" else sizes.get("Z", 1) if planes is None else len(planes)
    return {"in_chans": sizes.get("C", 1) * folded, "dtype": "float32"}


class OpenArrays:
    """The arrays that this process has open, at most :data:`OPEN` at a time. A forked process opens its own.

    Args:
        limit: seconds for which reads from a URL are repeated.
    """

    def __init__(self, limit: float = 0) -> None:
        self.limit = limit
        self._process = os.getpid()
        self._arrays: OrderedDict[tuple[str, str | None], Stored] = OrderedDict()

    def get(self, path: str, dataset: str | None) -> Stored:
        """Raises UsageError, RemoteError."""
        if self._process != os.getpid():
            self._process, self._arrays = os.getpid(), OrderedDict()
        key = path, dataset
        if key not in self._arrays:
            self._arrays[key] = open_stored(path, dataset, self.limit)
            if len(self._arrays) > OPEN:
                self._arrays.popitem(last=False)
        self._arrays.move_to_end(key)
        return self._arrays[key]

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return OpenArrays, (self.limit,)


def _runs(numbers: Sequence[int]) -> list[slice]:
    """Numbers in ascending order as ranges without gaps."""
    runs: list[slice] = []
    for number in sorted(numbers):
        if runs and runs[-1].stop == number:
            runs[-1] = slice(runs[-1].start, number + 1)
        else:
            runs.append(slice(number, number + 1))
    return runs


def _axes(name: str, shape: tuple[int, ...], given: str | None, own: str | None) -> str:
    """The axes by the letters N, T, Z, C, Y, X. Raises UsageError if they do not fit the shape."""
    text = given or own or AXES.get(len(shape), "")
    axes = text.upper().replace("H", "Y").replace("W", "X")
    if len(axes) != len(shape) or len(set(axes)) < len(axes) or not {"Y", "X"} <= set(axes) <= set("NTZCYX"):
        key = "data.axes" if given else f"its metadata name the axes {own}; data.axes" if own else "data.axes"
        raise UsageError(
            f"{name} has the shape {list(shape)}: {key} must have a different letter for each axis, H, W and some of "
            f"N, T, Z, C; got {shown(text)!r}"
        )
    return axes


def find_arrays(path: str | Sequence[str], limit: float = 0) -> list[str]:
    """The arrays of a path, a URL, a pattern or a list of them. Raises UsageError if nothing is there, RemoteError."""
    found: list[str] = []
    for name in [path] if isinstance(path, str) else path:
        if is_url(name):
            found += [url for part in expand_braces(name) for url in find_folders(part, limit)]
            continue
        matches = [name] if Path(name).exists() else sorted(glob.glob(name))
        if not matches:
            raise UsageError(f"{name} must be a Zarr folder, or an HDF5, .npy or TIFF file; nothing is there")
        found += matches
    return found
