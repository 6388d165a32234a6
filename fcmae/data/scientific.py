"""Files of scientific images: .npy, and TIFF with any number of channels (``fcmae[tiff]``)."""

import io

import numpy as np

from fcmae.errors import UsageError

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_npy(data: bytes, in_chans: int) -> np.ndarray:
    """A .npy file as ``[C, H, W]``: of ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]``. Raises ValueError."""
    pixels = np.load(io.BytesIO(data), allow_pickle=False)
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3:
        raise ValueError(f"its shape is {list(pixels.shape)}; allowed is [H, W], [C, H, W] or [H, W, C]")
    if pixels.shape[0] != in_chans and pixels.shape[2] == in_chans:
        pixels = pixels.transpose(2, 0, 1)
    return _checked(pixels, in_chans)


def read_tiff(data: bytes, in_chans: int, max_pixels: int) -> np.ndarray:
    """A TIFF file as ``[C, H, W]``: its samples, or else its pages, are the channels. Raises ValueError."""
    try:
        import tifffile
    except ImportError:
        raise UsageError("this kind of TIFF needs tifffile: pip install 'fcmae[tiff]'") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        shape = dict(zip(series.axes, series.shape, strict=True))
        if shape["Y"] * shape["X"] > max_pixels:
            raise ValueError(f"it has {shape['X']}x{shape['Y']} pixels; allowed are {max_pixels}")
        channels = [axis for axis in series.axes if axis not in "YX" and shape[axis] > 1]
        if len(channels) > 1:
            raise ValueError(f"its axes are {series.axes}; allowed is one beside Y and X")
        order = sorted(range(len(series.axes)), key=lambda i: "YX".find(series.axes[i]))
        pixels = series.asarray().transpose(order)
        return _checked(pixels.reshape(-1, shape["Y"], shape["X"]), in_chans)


def _checked(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    if len(pixels) != in_chans:
        raise ValueError(f"it has {len(pixels)} channels; data.in_chans is {in_chans}")
    if not pixels.size:
        raise ValueError(f"its shape is {list(pixels.shape)}: it has no pixels")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)  # torch knows the machine's own byte order only
