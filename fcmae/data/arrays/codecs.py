"""Codecs of Zarr chunks. A chunk is decompressed into as many bytes as it declares, and never more."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numcodecs
import numcodecs.blosc
import numpy as np

from fcmae.data.arrays.stored import inflate

numcodecs.blosc.use_threads = False  # its threads do not survive the fork of a worker
READ = ("blosc", "zstd", "lz4", "zlib", "gzip")


@dataclass(frozen=True)
class Codecs:
    """How the bytes of a chunk become values."""

    compressor: str | None = None
    transpose: tuple[int, ...] | None = None
    """The axes in the order in which they are stored."""
    order: Literal["<", ">"] | None = None
    """The byte order, ``<`` or ``>``; None = as in the type."""
    trailing: int = 0
    """Bytes of checksums after the data."""

    def decode(self, data: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The values of a chunk of ``shape``. Raises ValueError for other bytes than it has."""
        dtype = dtype.newbyteorder(self.order) if self.order else dtype
        size = math.prod(shape) * dtype.itemsize
        data = data[: len(data) - self.trailing]
        plain = decompress(self.compressor, data, size) if self.compressor else data
        if len(plain) != size:
            raise ValueError(f"a chunk has {len(plain)} bytes instead of {size}")
        values = np.frombuffer(plain, dtype)
        if self.transpose is None:
            return values.reshape(shape)
        stored = values.reshape([shape[axis] for axis in self.transpose])
        return stored.transpose(np.argsort(self.transpose))


def codecs_v2(meta: dict[str, Any]) -> Codecs:
    """Of a ``.zarray``. Raises ValueError for a codec that is not read."""
    if meta.get("filters"):
        names = ", ".join(str(part.get("id")) for part in meta["filters"])
        raise ValueError(f"its filters are {names}; arrays with filters are not read")
    compressor = meta.get("compressor")
    axes = tuple(reversed(range(len(meta["shape"]))))
    return Codecs(_known(compressor["id"]) if compressor else None, axes if meta.get("order") == "F" else None)


def codecs_v3(codecs: list[dict[str, Any]]) -> Codecs:
    """Of a ``zarr.json``, without shards. Raises ValueError for a codec that is not read."""
    compressor: str | None = None
    transpose: tuple[int, ...] | None = None
    order: Literal["<", ">"] | None = None
    trailing, seen = 0, False
    for codec in codecs:
        name, config = codec.get("name"), codec.get("configuration") or {}
        if name == "transpose" and not seen and transpose is None:
            transpose = tuple(config["order"])
            if sorted(transpose) != list(range(len(transpose))):
                raise ValueError(f"its codec transpose has the order {config['order']}")
        elif name == "bytes" and not seen:
            seen, order = True, ">" if config.get("endian") == "big" else "<"
        elif name == "crc32c" and seen:
            trailing += 4
        elif seen and compressor is None and not trailing:
            compressor = _known(name)
        else:
            raise ValueError(f"its codec {name} is not read in this place")
    return Codecs(compressor, transpose, order, trailing)


def _known(name: Any) -> str:
    if name not in READ:
        raise ValueError(f"its codec {name} is not read; write it with {', '.join(READ)} or without compression")
    return name


def decompress(name: str, data: bytes, size: int) -> bytes | np.ndarray:
    """``size`` bytes of compressed ``data``. Raises ValueError if they are more or fewer."""
    if name in ("zlib", "gzip"):
        return inflate(data, size)
    declared = SIZES[name](data)
    if declared is not None and declared != size:
        raise ValueError(f"a chunk is compressed from {declared} bytes instead of {size}")
    out = np.zeros(size, np.uint8)
    try:
        DECODE[name](data, out)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return out


def _blosc_size(data: bytes) -> int:
    if len(data) < 16 or int.from_bytes(data[12:16], "little") != len(data):
        raise ValueError("a chunk is cut off")
    return int.from_bytes(data[4:8], "little")


def _lz4_size(data: bytes) -> int:
    return int.from_bytes(data[:4], "little")


def _zstd_size(data: bytes) -> int | None:
    """The size that the header of a frame declares (RFC 8878, section 3.1.1.1), if it does."""
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 5:
        raise ValueError("a chunk is not compressed by zstd")
    flags = data[4]
    single = flags >> 5 & 1
    start = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    length = (single, 2, 4, 8)[flags >> 6]
    number = int.from_bytes(data[start : start + length], "little")
    return None if not length else number + 256 * (length == 2)


SIZES: dict[str, Callable[[bytes], int | None]] = {"blosc": _blosc_size, "lz4": _lz4_size, "zstd": _zstd_size}
DECODE: dict[str, Callable[[bytes, np.ndarray], Any]] = {
    "blosc": numcodecs.Blosc().decode,
    "lz4": numcodecs.LZ4().decode,
    "zstd": numcodecs.Zstd().decode,
}


def scalar(fill: Any, dtype: np.dtype) -> np.ndarray:
    """A fill value of the metadata as a value of ``dtype``. Raises ValueError."""
    named = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf, None: 0}
    try:
        if isinstance(fill, str) and fill.startswith("0x"):  # the bytes of a float
            return np.frombuffer(bytes.fromhex(fill[2:]), dtype.newbyteorder(">"))[0].astype(dtype.newbyteorder("="))
        with np.errstate(invalid="raise", over="raise"):  # NaN as an integer
            return np.array(named.get(fill, fill)).astype(dtype.newbyteorder("="), casting="unsafe").reshape(())
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"its fill_value is {fill!r}") from error
