"""Decodes image files to pixels.

Sources give undecoded bytes (:class:`Encoded`), which transforms decode, perhaps only in part. docs/pixels.md has the
rules as a table.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLESPERPIXEL, TiffImageFile
from torch import Tensor

from fcmae.config import DataConfig
from fcmae.data.pixels import dicom, jpeg, jpeg2000, plain_tiff, png, scientific
from fcmae.data.pixels.bands import cut_band, segments
from fcmae.data.pixels.files import Encoded as Encoded
from fcmae.data.pixels.files import LargeTiff
from fcmae.data.pixels.files import read_file as read_file
from fcmae.data.pixels.formats import FORMATS, MAX_PIXELS, check_size, check_tiles, open_picture
from fcmae.data.pixels.jpeg import IMAGE_MODES
from fcmae.errors import ImageError, RemoteError, UsageError, counted, reason_of, shown

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")
"""Pillow's modes whose conversion keeps the scale of brightness; it clips others."""

WIDE_MODES = {"I": "int32", "F": "float32"}
"""Other modes of Pillow, and the types of their values."""


class PixelFormat(NamedTuple):
    """The pixels of all images: ``[in_chans, H, W]``, uint8, or uint16 over its whole range if ``bit_depth`` > 8.

    With a ``dtype`` of float32 instead of uint: float32 in the units of the files, finite but for NaN in the channels
    ``may_be_nan``. Images of more than ``max_pixels`` are refused, and with ``exact``, as with data.channels, files of
    another number of channels, which are converted otherwise. ``extra`` are channels that only targets get, ``unread``
    those that nobody gets, which may hold anything.
    """

    in_chans: int
    bit_depth: int = 8
    max_pixels: int = MAX_PIXELS
    dtype: str = "uint"
    may_be_nan: frozenset[int] = frozenset()
    exact: bool = False
    extra: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()

    @classmethod
    def of(cls, cfg: DataConfig, max_pixels: int = MAX_PIXELS) -> "PixelFormat":
        read = cfg.layout
        unread = set() if read.input is None else {*range(read.of)} - {*read.input, *read.extra}
        return cls(
            read.of,
            cfg.bit_depth,
            max_pixels,
            cfg.dtype,
            frozenset(cfg.may_be_nan),
            exact=cfg.channels is not None,
            extra=frozenset(read.extra),
            unread=frozenset(unread),
        )

    @property
    def expected(self) -> str:
        """What says how many channels files have, for messages."""
        if self.exact:
            return f"data.channels needs files of {self.in_chans} (its largest number plus 1, or of)"
        return f"data.in_chans is {self.in_chans}"

    def problem(self, holding: Iterable[int], infinity: Iterable[int]) -> str:
        """What is wrong with values that are not finite, by the channels with NaN and with infinity; or nothing."""
        wrong, infinite = set(holding) - self.may_be_nan - self.unread, set(infinity) - self.unread
        if not (infinite or wrong):
            return ""
        key = "data.channels.nodata" if wrong and wrong <= self.extra else "data.nodata"
        found = "infinite values" if infinite else "NaN"
        where = "" if infinite else f" in {', '.join(f'channel {channel}' for channel in sorted(wrong)[:3])}"
        return f"it has {found}{where}; replace them, or set {key}=nan if NaN marks pixels without a value"

    @property
    def is_float(self) -> bool:
        return self.dtype != "uint"


class LazyImage:
    """An image of a known size ``(height, width)``, decoded on first use.

    ``reducible``: :meth:`pixels` can decode it to a half, a quarter or an eighth of the size.
    """

    def __init__(
        self,
        size: tuple[int, int],
        decode: Callable[[int], Tensor],
        reducible: bool = False,
        decode_rows: Callable[[int, int], tuple[Tensor, int]] | None = None,
    ) -> None:
        self.size = size
        self.reducible = reducible
        self._decode = decode
        self._decode_rows = decode_rows
        self._decoded: dict[int, Tensor] = {}

    def pixels(self, reduce: int) -> Tensor:
        """``[C, H, W]``, each side divided by ``reduce`` and rounded up if it is reducible."""
        if reduce not in self._decoded:
            self._decoded[reduce] = self._decode(reduce)
        return self._decoded[reduce]

    def rows(self, top: int, bottom: int) -> tuple[Tensor, int]:
        """The rows from ``top`` to ``bottom - 1``, or more, and the number of the first. They are not kept."""
        return self._decode_rows(top, bottom) if self._decode_rows else (self.pixels(1), 0)

    def part(self, top: int, left: int, height: int, width: int) -> tuple[Tensor, int, int]:
        """A part of the image, or more of it, and the row and column where that begins."""
        return *self.rows(top, top + height), 0


class StoredImage(LazyImage):
    """An image in an array on disk, of which only the part that is needed is read.

    Args:
        read: gives some rows and columns, ``[C, rows, columns]``.
    """

    def __init__(
        self, size: tuple[int, int], name: str, read: Callable[[slice, slice], np.ndarray], to: PixelFormat
    ) -> None:
        super().__init__(size, lambda _: self._pixels(0, 0, *size))
        self.name, self._read, self._to = name, read, to

    def part(self, top: int, left: int, height: int, width: int) -> tuple[Tensor, int, int]:
        return self._pixels(top, left, height, width), top, left

    def stored(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A part ``[C, height, width]`` in the type that is stored. Raises ImageError."""
        with explained(self.name):
            check_size(height, width, self._to.max_pixels)
            return self._read(slice(top, top + height), slice(left, left + width))

    def _pixels(self, top: int, left: int, height: int, width: int) -> Tensor:
        stored = self.stored(top, left, height, width)
        with explained(self.name):
            return to_tensor(stored, self._to)


def decode(
    image: Encoded | Tensor | LazyImage,
    in_chans: int,
    bit_depth: int = 8,
    max_pixels: int = MAX_PIXELS,
    dtype: str = "uint",
    may_be_nan: frozenset[int] = frozenset(),
    exact: bool = False,
    extra: frozenset[int] = frozenset(),
    unread: frozenset[int] = frozenset(),
) -> Tensor:
    """An image ``[in_chans, H, W]`` as :class:`PixelFormat` says. Raises ImageError naming the file, for any damage."""
    to = PixelFormat(in_chans, bit_depth, max_pixels, dtype, may_be_nan, exact, extra, unread)
    return open_image(image, to).pixels(1)


def open_image(image: Encoded | Tensor | LazyImage, to: PixelFormat) -> LazyImage:
    """A JPEG, not decoded yet; other images are decoded at once. A tensor is taken as it is. Raises ImageError."""
    if isinstance(image, LazyImage):
        return image
    if isinstance(image, Tensor):
        return _decoded(image.float() if to.is_float else image)
    with explained(image.name):
        if isinstance(image, LargeTiff):
            in_file = None
            with contextlib.suppress(Exception):  # what is wrong, the decoders below say
                if not to.is_float:
                    in_file = plain_tiff.opened_file(image.name, to.in_chans, to.bit_depth, to.exact, to.max_pixels)
            if in_file is not None:
                return StoredImage(in_file.size, image.name, in_file, to)
            image = Encoded(image.data, image.name)
        is_jpeg = image.data.startswith(jpeg.MAGIC)
        where = segments(image.data) if is_jpeg else {}
        if is_jpeg:
            jpeg.check_scans(image.data, where)
        if is_jpeg and to.in_chans in jpeg.COLORS and to.bit_depth == 8 and not to.is_float:
            size = jpeg.stored_size(image.data, to.max_pixels)
            if size is not None:
                check_size(*size, to.max_pixels)
                if to.exact:
                    with open_picture(image.data) as picture:
                        _check_channels(picture, to.in_chans, to.expected)
                turn = jpeg.orientation(image.data, where)
                shown = (size.height, size.width) if turn < 5 else (size.width, size.height)
                rows = functools.partial(_decode_rows, image, where, size, to) if turn == 1 else None
                return LazyImage(shown, lambda reduce: _decode_jpeg(image, size, turn, to, reduce), True, rows)
        if not to.is_float:
            plain = plain_tiff.opened(image.data, to.in_chans, to.bit_depth, to.exact, to.max_pixels)
            if plain is not None:
                return StoredImage(plain.size, image.name, plain, to)
        pixels = stored(image.data, to.in_chans, to.expected, to.max_pixels, to.is_float, to.exact)
        return _decoded(to_tensor(pixels, to))


def _decoded(pixels: Tensor) -> LazyImage:
    height, width = pixels.shape[-2:]
    return LazyImage((height, width), lambda _: pixels)


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns all errors in this block into ImageError: libraries raise all kinds for damaged files.

    A missing package remains a UsageError, which no other image can replace.
    """
    try:
        yield
    except (UsageError, RemoteError) as error:  # our own, a missing package, or a server
        if isinstance(error.__cause__, ImportError):
            raise UsageError(f"cannot read the image {shown(name)}: {error}") from error
        raise
    except UnidentifiedImageError as error:
        raise ImageError(name, f"its bytes are of no image format that is read ({', '.join(FORMATS)}, .npy)") from error
    except OSError as error:
        where = f" ({shown(str(error.filename))})" if error.filename else ""
        raise ImageError(name, f"{reason_of(error)}{where}") from error
    except Exception as error:
        raise ImageError(name, reason_of(error)) from error


def _upright(pixels: Tensor, turn: int) -> Tensor:
    """Stored pixels ``[C, H, W]`` rotated by an EXIF orientation."""
    if turn >= 5:
        pixels = pixels.transpose(-1, -2)
    flips = {2: [-1], 3: [-1, -2], 4: [-2], 6: [-1], 7: [-1, -2], 8: [-2]}
    return pixels.flip(flips[turn]) if turn in flips else pixels


def _decode_jpeg(image: Encoded, size: jpeg.Size, turn: int, to: PixelFormat, reduce: int) -> Tensor:
    with explained(image.name):
        pixels = torch.from_numpy(jpeg.decode(image.data, size, to.in_chans, reduce))
        return _upright(pixels.permute(2, 0, 1), turn)


def _decode_rows(
    image: Encoded, where: dict[int, int], size: jpeg.Size, to: PixelFormat, top: int, bottom: int
) -> tuple[Tensor, int]:
    with explained(image.name):
        band = cut_band(image.data, where, top, bottom)
    if band is None:
        return _decode_jpeg(image, size, 1, to, 1), 0
    return _decode_jpeg(Encoded(band.data, image.name), jpeg.Size(band.height, size.width), 1, to, 1), band.top


def stored(
    data: bytes,
    channels: int,
    expected: str,
    max_pixels: int = MAX_PIXELS,
    floats: bool = False,
    exact: bool = False,
) -> np.ndarray:
    """The pixels of an image file as they are stored: ``[channels, H, W]``, uint8, uint16, or what a .npy file has.

    Args:
        expected: says in messages what the channels must be.
        floats: read TIFFs of other numbers too.
        exact: refuse files of another number of channels instead of converting them.

    Raises what decoders raise, see :func:`explained`.
    """
    if data.startswith(scientific.NPY_MAGIC):
        return scientific.read_npy(data, channels, expected)
    if dicom.is_dicom(data):
        return _converted(dicom.read(data, channels, expected, max_pixels), channels, expected, exact)
    if data.startswith(jpeg2000.MAGICS) and not jpeg2000.header(data).is_plain:
        return _converted(jpeg2000.read(data, max_pixels), channels, expected, exact)
    if png.is_wide_colour(data):
        return _converted(png.read(data, max_pixels, None if exact else channels), channels, expected, exact)
    try:
        pixels = _decode_by_pillow(data, channels, expected, max_pixels, floats, exact)
    except UnidentifiedImageError:
        if not data.startswith(scientific.TIFF_MAGICS):
            raise
        pixels = None
    return scientific.read_tiff(data, channels, expected, max_pixels, floats) if pixels is None else pixels


def _decode_by_pillow(
    data: bytes, channels: int, expected: str, max_pixels: int, floats: bool, exact: bool
) -> np.ndarray | None:
    """Decodes a file by Pillow; None for a TIFF that Pillow reads wrongly, or not at all."""
    with open_picture(data, max_pixels) as image:
        if isinstance(image, TiffImageFile) and (
            image.is_animated
            or channels not in IMAGE_MODES
            or (floats and image.mode in WIDE_MODES)
            or _has_wide_colour(image)
            or _lacks_samples(image, channels, exact)
        ):
            return None
        check_tiles(image, max_pixels)
        return picture_pixels(image, channels, expected, floats, exact)


def picture_pixels(image: Image.Image, channels: int, expected: str, floats: bool, exact: bool) -> np.ndarray:
    """The pixels of an opened picture, upright. Arguments are those of :func:`stored`. Raises ValueError."""
    if exact or channels not in IMAGE_MODES:
        _check_channels(image, channels, expected)
    if image.mode in WIDE_MODES and not floats:
        scientific.check_type(np.dtype(WIDE_MODES[image.mode]))
    if image.mode.startswith("I;16") or image.mode in WIDE_MODES:
        return _repeated(scientific.native(np.array(ImageOps.exif_transpose(image))), channels, expected)
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(f"its pixels are {image.mode}; they must be integers of 8 or 16 bits")
    upright = np.array(ImageOps.exif_transpose(image).convert(IMAGE_MODES[channels]))
    return upright.reshape(*upright.shape[:2], -1).transpose(2, 0, 1)


def _check_channels(image: Image.Image, channels: int, expected: str) -> None:
    """Raises ValueError for another number of channels than those of the file, or one that Pillow does not give."""
    colours = 4 if image.has_transparency_data else 3
    count = colours if image.mode in ("P", "CMYK") else len(image.getbands())
    if count != channels:
        raise ValueError(f"it has {counted(count, 'channel')}; {expected}")
    if channels not in IMAGE_MODES:
        raise ValueError(f"its {channels} channels are {image.mode}; convert it to TIFF or .npy")


def _converted(pixels: np.ndarray, channels: int, expected: str, exact: bool) -> np.ndarray:
    """Pixels ``[C, H, W]`` that Pillow does not convert: grey is repeated unless ``exact``, other numbers must fit."""
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1 and not exact:
        return _repeated(pixels[0], channels, expected)
    raise ValueError(f"it has {counted(len(pixels), 'channel')}; {expected}")


def _repeated(grey: np.ndarray, channels: int, expected: str) -> np.ndarray:
    if channels not in (1, 3):
        raise ValueError(f"it has 1 channel of more than 8 bits; {expected}")
    return np.repeat(grey[None], channels, axis=0)


def _has_wide_colour(image: TiffImageFile) -> bool:
    """Whether several channels have more than 8 bits, which Pillow cuts to 8."""
    bits = image.tag_v2.get(BITSPERSAMPLE, (1,))
    return len(bits) > 1 and max(bits) > 8


def _lacks_samples(image: TiffImageFile, channels: int, exact: bool) -> bool:
    """Whether the file has samples that Pillow leaves out, such as infrared beside RGB, and they are asked for."""
    samples = image.tag_v2.get(SAMPLESPERPIXEL, 1)
    return samples != len(image.getbands()) and (exact or samples == channels)


def to_tensor(pixels: np.ndarray, to: PixelFormat) -> Tensor:
    """Stored pixels ``[C, H, W]`` as ``to`` says, with the largest value of ``to.bit_depth`` bits at 65535 of uint16.

    Raises ValueError for another type, and for values that are too large or not finite.
    """
    if to.is_float:
        scientific.check_type(pixels.dtype, to.dtype)
        if pixels.dtype.kind == "f":
            _check_finite(pixels, to)
        return torch.from_numpy(pixels.astype(np.float32, copy=not pixels.flags.writeable))
    bit_depth = to.bit_depth
    if pixels.dtype == np.uint8:
        return torch.from_numpy(pixels if bit_depth == 8 else pixels.astype(np.uint16) * 257)
    scientific.check_type(pixels.dtype)
    if bit_depth == 8:
        raise ValueError("its pixels have 16 bits; data.bit_depth is 8; set it to the bits that are used, 9 to 16")
    if bit_depth == 16:
        return torch.from_numpy(pixels)
    most = 2**bit_depth - 1
    if pixels.max(initial=0) > most:
        raise ValueError(f"its values must be at most {most} with data.bit_depth={bit_depth}; got {pixels.max()}")
    scaled = pixels.astype(np.uint32) * 65535
    return torch.from_numpy(((scaled + most // 2) // most).astype(np.uint16))


def _check_finite(pixels: np.ndarray, to: PixelFormat) -> None:
    if np.isfinite(pixels).all():
        return
    problem = to.problem(*(kind(pixels).any(axis=(1, 2)).nonzero()[0].tolist() for kind in (np.isnan, np.isinf)))
    if problem:
        raise ValueError(problem)


def to_stored(pixels: Tensor, bit_depth: int) -> Tensor:
    """The inverse of the scaling to ``bit_depth`` bits, for pixels that are written to a file."""
    if pixels.dtype != torch.uint16 or bit_depth == 16:
        return pixels
    scaled = pixels.to(torch.int64) * (2**bit_depth - 1)
    return ((scaled + 65535 // 2) // 65535).to(torch.uint16)
