"""Writes samples into tar files of the WebDataset layout."""

import io
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fcmae.data.pixels import jpeg
from fcmae.data.pixels.crops import resize
from fcmae.data.pixels.decode import Encoded, LazyImage, PixelFormat, StoredImage, explained, open_image, to_stored
from fcmae.data.pixels.dicom import is_dicom
from fcmae.data.pixels.formats import EXTENSIONS, FORMATS, open_picture
from fcmae.data.pixels.jpeg2000 import CODESTREAM, JP2_MAGIC
from fcmae.data.pixels.scientific import NPY_MAGIC, TIFF_MAGICS
from fcmae.data.sources.base import Source
from fcmae.errors import ImageError
from fcmae.files import HashingWriter, replacing

MAGICS = {
    jpeg.MAGIC: "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"BM": "bmp",
    **dict.fromkeys(TIFF_MAGICS, "tif"),
    NPY_MAGIC: "npy",
    JP2_MAGIC: "jp2",
    CODESTREAM: "j2k",
}
"""The first bytes of each format; others are known by their names."""

PICTURES = (1, 3, 4)
"""Numbers of channels of uint8 that PNG holds."""
SUBSAMPLING = "4:2:0"
"""Chroma of JPEGs at half the resolution, as usual: a fifth faster to decode than at full resolution."""


class Encoding(NamedTuple):
    """How images are written: unchanged, or resized to ``short_side`` and encoded; as pixels with ``encode="npy"``."""

    to: PixelFormat
    short_side: int | None = None
    encode: str = "jpeg"
    quality: int = 90


@dataclass
class Shard:
    """The contents of a tar file."""

    name: str
    samples: int
    bytes: int
    sha256: str
    unreadable: list[list[str]]
    """Name and reason of each sample that could not be read."""


def encode(image: Encoded | Tensor | LazyImage, how: Encoding) -> tuple[str, bytes]:
    """The ending and the bytes of an image's file. All images are decoded, to check that they can be.

    Raises ImageError.
    """
    opened = open_image(image, how.to)
    pixels = opened.pixels(1)
    if how.short_side is not None and min(opened.size) > how.short_side:
        smaller = resize(pixels, [how.short_side])
        return _npy(smaller, how.to) if how.encode == "npy" else _encode_pixels(smaller, how.to, how.quality)
    if how.encode == "npy":
        return _npy(pixels, how.to)
    if isinstance(image, Encoded):
        return ending_of(image), image.data
    if isinstance(opened, StoredImage) and (pixels.dtype != torch.uint8 or len(pixels) not in PICTURES):
        return "npy", _saved(opened.stored(0, 0, *opened.size))
    return _encode_pixels(pixels, how.to, None)


def ending_of(image: Encoded) -> str:
    """The ending of an image file, by its first bytes, its name, or what reads it. Raises ImageError."""
    for magic, ending in MAGICS.items():
        if image.data.startswith(magic):
            return ending
    if is_dicom(image.data):
        return "dcm"
    ending = os.path.splitext(image.name)[1].lower()
    if ending in EXTENSIONS:
        return ending[1:]
    with explained(image.name), open_picture(image.data) as opened:
        return FORMATS[str(opened.format)][0][1:]


def _encode_pixels(pixels: Tensor, to: PixelFormat, quality: int | None) -> tuple[str, bytes]:
    """JPEG of a quality, or lossless for None; .npy if no other format can store the pixels."""
    if pixels.dtype != torch.uint8 or len(pixels) not in PICTURES:
        return _npy(pixels, to)
    content = io.BytesIO()
    picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).contiguous().numpy())
    if quality is None or len(pixels) == 4:
        picture.save(content, "PNG")
        return "png", content.getvalue()
    # restart markers are for fcmae.data.pixels.bands; optimize=True saves 4 % of the bytes and of the decoding time
    picture.save(content, "JPEG", quality=quality, subsampling=SUBSAMPLING, restart_marker_rows=1, optimize=True)
    return "jpg", content.getvalue()


def _npy(pixels: Tensor, to: PixelFormat) -> tuple[str, bytes]:
    """``[H, W, C]``, which is resized fastest, with the scale of unchanged files."""
    return "npy", _saved(to_stored(pixels, to.bit_depth).permute(1, 2, 0).contiguous().numpy())


def _saved(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def write_shard(source: Source, indices: Iterable[int], path: Path, how: Encoding) -> Shard:
    """Writes samples, named by their indices, into a tar file: the whole file or nothing, and always the same bytes.

    Raises OSError.
    """
    shard = Shard(path.name, 0, 0, "", [])
    with replacing(path) as file:
        hashed = HashingWriter(file)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for index in indices:
                try:
                    image, label = source[index]
                    ending, content = encode(image, how)
                except ImageError as error:
                    shard.unreadable.append([error.name, error.reason])
                    continue
                _add(tar, f"{index:09d}.{ending}", content)
                if label is not None:
                    _add(tar, f"{index:09d}.cls", str(label).encode())
                shard.samples += 1
    shard.bytes, shard.sha256 = hashed.count, hashed.digest.hexdigest()
    return shard


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: nothing but the content
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
