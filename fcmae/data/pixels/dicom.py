"""DICOM files (``fcmae[science]``): stored values with the rescale slope and intercept, MONOCHROME1 inverted."""

import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from fcmae.data.pixels import jpeg2000
from fcmae.data.pixels.bands import segments
from fcmae.data.pixels.formats import check_size, quiet
from fcmae.data.pixels.jpeg import check_scans
from fcmae.imports import needed

MAGIC, MAGIC_AT, META = b"DICM", 128, 2
"""Before the first elements, and the group of those that say how the others are written."""
UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
RLE = "1.2.840.10008.1.2.5"
JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
SYNTAXES = (*UNCOMPRESSED, RLE, *JPEG, *LOSSLESS_JPEG, *JPEG_LS, *JPEG_2000)
"""Transfer syntaxes. The deflated one is not read: it may expand to any size."""
GREY, COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
TAGS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "PixelData"),
)
"""What is read; the names of patients are not among it."""


def is_dicom(data: bytes) -> bool:
    return data[MAGIC_AT : MAGIC_AT + 4] == MAGIC


def channels(data: bytes) -> int:
    """The channels of a file: samples times frames."""
    with quiet():
        found = _dataset(data)
        return _count(found, "SamplesPerPixel") * _count(found, "NumberOfFrames")


def read(data: bytes, in_chans: int, expected: str, max_pixels: int) -> np.ndarray:
    """A file as ``[C, H, W]``, its samples or else its frames: in the units that its rescale slope and intercept give.

    C is ``in_chans``, or 1 where that is 3. The type is the smallest of uint8, uint16, int16 and int32 that holds what
    may be stored; float32 where the slope or the intercept is no integer. Sizes and channels are checked before pixels
    are decoded.

    Raises ValueError, and UsageError without pydicom.
    """
    with quiet():
        return _read(data, in_chans, expected, max_pixels)


def _read(data: bytes, in_chans: int, expected: str, max_pixels: int) -> np.ndarray:
    found = _dataset(data)
    height, width = int(found.get("Rows") or 0), int(found.get("Columns") or 0)
    check_size(height, width, max_pixels)
    samples, frames = _count(found, "SamplesPerPixel"), _count(found, "NumberOfFrames")
    if samples * frames != in_chans and (samples * frames, in_chans) != (1, 3):
        raise ValueError(f"it has {samples * frames} channels ({samples} samples, {frames} frames); {expected}")
    if samples > 1 and frames > 1:
        raise ValueError(f"it must have one sample or one frame; got {samples} samples, {frames} frames")
    kind = str(found.get("PhotometricInterpretation", ""))
    if kind not in (GREY if samples == 1 else COLOUR):
        raise ValueError(f"its photometric interpretation is {kind}; convert it to MONOCHROME2 or RGB")
    if "ModalityLUTSequence" in found:
        raise ValueError("its values are given by a modality LUT; convert it to a rescale slope and intercept")
    if int(found.get("BitsAllocated", 0)) not in (8, 16, 32):
        raise ValueError(f"its values have {found.get('BitsAllocated')} bits; 8, 16 and 32 are read")
    pixels = np.stack(list(_frames(found, height, width, frames)))
    if samples > 1:
        return pixels[0].transpose(2, 0, 1)
    return _rescaled(_stored_values(pixels, found), found, kind == "MONOCHROME1")


def _dataset(data: bytes) -> Any:
    with needed("DICOM needs pydicom and imagecodecs: pip install 'fcmae[science]'"):
        import pydicom
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    file = io.BytesIO(data)
    file.seek(MAGIC_AT + len(MAGIC))
    meta = pydicom.filereader.read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != META)
    syntax = str(meta.get("TransferSyntaxUID", ""))
    if syntax not in SYNTAXES:
        raise ValueError(f"its transfer syntax {syntax or 'is not given'} is not read; convert it to explicit VR")
    file.seek(0)
    return pydicom.dcmread(file, specific_tags=list(TAGS))


def _count(found: Any, name: str) -> int:
    count = int(found.get(name) or 1)
    if count < 1:
        raise ValueError(f"its {name} is {count}")
    return count


def _frames(found: Any, height: int, width: int, frames: int) -> Iterator[np.ndarray]:
    """The stored pixels of each frame, ``[H, W]``, or ``[H, W, C]`` of several samples."""
    syntax = str(found.file_meta.TransferSyntaxUID)
    if syntax in UNCOMPRESSED:
        from pydicom.pixels import pixel_array

        for number in range(frames):
            yield pixel_array(found, index=number)
        return
    from pydicom.encaps import generate_frames

    given = generate_frames(found.PixelData, number_of_frames=frames)
    for number in range(frames):
        encoded = next(given, None)
        if encoded is None:
            raise ValueError(f"it has {number} of its {frames} frames")
        pixels = _decode(_imagecodecs(), encoded, syntax, found, height, width)
        if pixels.shape[:2] != (height, width):
            raise ValueError(f"a frame is {pixels.shape[1]}x{pixels.shape[0]}; the header says {width}x{height}")
        yield pixels


def _imagecodecs() -> Any:
    with needed("compressed DICOM needs imagecodecs: pip install 'fcmae[science]'"):
        import imagecodecs
    return imagecodecs


def _decode(imagecodecs: Any, encoded: bytes, syntax: str, found: Any, height: int, width: int) -> np.ndarray:
    """A frame, whose own header must declare the same size."""
    if syntax == RLE:
        return _unpacked(imagecodecs, encoded, found, height, width)
    if syntax in JPEG_2000:
        declared = tuple(jpeg2000.header(encoded)[:2])
    else:
        where = segments(encoded)
        at = next((where[kind] for kind in (*range(0xC0, 0xC4), 0xF7) if kind in where), len(encoded))
        declared = struct.unpack_from(">HH", encoded, at + 1) if at + 5 <= len(encoded) else (0, 0)
        check_scans(encoded, where)
    if declared != (height, width):
        raise ValueError(f"a frame declares {declared[1]}x{declared[0]} pixels; the header says {width}x{height}")
    if syntax in JPEG_2000:
        return imagecodecs.jpeg2k_decode(encoded)
    if syntax in JPEG_LS:
        return imagecodecs.jpegls_decode(encoded)
    if syntax in LOSSLESS_JPEG:
        return imagecodecs.ljpeg_decode(encoded)
    samples, kind = _count(found, "SamplesPerPixel"), str(found.PhotometricInterpretation)
    if samples == 1 or syntax == JPEG[1]:
        return imagecodecs.jpeg_decode(encoded)
    space = "RGB" if kind == "RGB" else "YCBCR"
    return imagecodecs.jpeg8_decode(encoded, colorspace=space, outcolorspace="RGB")


def _unpacked(imagecodecs: Any, encoded: bytes, found: Any, height: int, width: int) -> np.ndarray:
    """A frame of run lengths: the bytes of each sample, the highest first, one after another (PS3.5, annex G)."""
    samples, size = _count(found, "SamplesPerPixel"), int(found.BitsAllocated) // 8
    count, *offsets = struct.unpack_from("<16I", encoded)
    if count != samples * size:
        raise ValueError(f"a frame has {count} RLE segments; expected {samples * size}")
    ends = [*offsets[1:count], len(encoded)]
    planes = [
        imagecodecs.packbits_decode(encoded[a:b], out=height * width) for a, b in zip(offsets, ends, strict=False)
    ]
    if any(len(plane) < height * width for plane in planes):
        raise ValueError("a frame is cut off")
    values = np.frombuffer(b"".join(planes), np.uint8).reshape(samples, size, height, width)
    pixels = np.ascontiguousarray(values.transpose(2, 3, 0, 1)).view(f">u{size}").astype(f"u{size}")[..., 0]
    return pixels[..., 0] if samples == 1 else pixels


def _stored_values(pixels: np.ndarray, found: Any) -> np.ndarray:
    """Without the bits beside those that are stored, which may hold overlays, and with their sign."""
    allocated = 8 * pixels.dtype.itemsize
    stored = int(found.get("BitsStored") or allocated)
    high = int(found.get("HighBit") or stored - 1)
    if not 0 < stored <= high + 1 <= allocated:
        raise ValueError(f"its values have {stored} bits up to bit {high} of {allocated}")
    signed = int(found.get("PixelRepresentation") or 0)
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    return (pixels.view(kind) << (allocated - 1 - high)) >> (allocated - stored)


def _rescaled(pixels: np.ndarray, found: Any, inverted: bool) -> np.ndarray:
    stored = int(found.get("BitsStored") or 8 * pixels.dtype.itemsize)
    signed = pixels.dtype.kind == "i"
    least, most = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    slope, intercept = (
        default if found.get(name) is None else float(found.get(name))
        for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise ValueError(f"its rescale slope and intercept are {slope} and {intercept}")
    if inverted:  # the brightest value is the least
        slope, intercept = -slope, intercept + slope * (least + most)
    bounds = sorted((slope * least + intercept, slope * most + intercept))
    if not (slope.is_integer() and intercept.is_integer()) or max(map(abs, bounds)) >= 2**31:
        return (pixels.astype(np.float64) * slope + intercept).astype(np.float32)
    types = [np.dtype(name) for name in ("uint8", "uint16", "int16", "int32")]
    fits = (kind for kind in types if np.iinfo(kind).min <= bounds[0] and bounds[1] <= np.iinfo(kind).max)
    return (pixels.astype(np.int64) * int(slope) + int(intercept)).astype(next(fits))
