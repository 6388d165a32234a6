"""Files of the formats that packages of ``fcmae[science]`` read, made for tests."""

import io
import warnings

import numpy as np
from PIL import Image

from tests.bad_files import encoded, npy, picture, tiff

EXPLICIT, IMPLICIT, BIG, RLE = (f"1.2.840.10008.1.2{end}" for end in (".1", "", ".2", ".5"))
JPEG, LOSSLESS, JPEG_LS, JPEG_2000 = (f"1.2.840.10008.1.2.4.{number}" for number in (50, 70, 80, 90))


def dicom(
    pixels: np.ndarray, syntax: str = EXPLICIT, kind: str = "MONOCHROME2", stored: int | None = None, **tags: object
) -> bytes:
    """Frames ``[F, H, W]``, or colours ``[H, W, 3]`` with a ``kind`` of several samples."""
    import imagecodecs
    import pydicom
    from pydicom.encaps import encapsulate

    colour = not kind.startswith("MONO")
    frames = pixels[None] if colour else pixels
    allocated = 8 * pixels.dtype.itemsize
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    file.file_meta.MediaStorageSOPClassUID, file.file_meta.MediaStorageSOPInstanceUID = "1.2", "1.2.3"
    file.PatientName = "Nobody"
    file.Rows, file.Columns = frames.shape[1:3]
    file.SamplesPerPixel, file.PhotometricInterpretation = 3 if colour else 1, kind
    file.BitsAllocated, file.BitsStored = allocated, stored or allocated
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, int(pixels.dtype.kind == "i")
    if colour:
        file.PlanarConfiguration = 0
    if len(frames) > 1:
        file.NumberOfFrames = len(frames)
    for name, value in tags.items():
        setattr(file, name, value)
    encoders = {
        JPEG: lambda frame: imagecodecs.jpeg8_encode(frame, level=95),
        LOSSLESS: imagecodecs.ljpeg_encode,
        JPEG_LS: imagecodecs.jpegls_encode,
        JPEG_2000: lambda frame: imagecodecs.jpeg2k_encode(frame, codecformat="J2K", reversible=True, level=0),
    }
    if syntax in encoders:
        file.PixelData = encapsulate([encoders[syntax](np.ascontiguousarray(frame)) for frame in frames])
    elif syntax == RLE:
        from pydicom.pixels.encoders import RLELosslessEncoder

        given = {"rows": file.Rows, "columns": file.Columns, "samples_per_pixel": file.SamplesPerPixel,
                 "photometric_interpretation": kind, "bits_allocated": allocated, "bits_stored": file.BitsStored,
                 "pixel_representation": file.PixelRepresentation, "number_of_frames": 1,
                 "planar_configuration": 0}  # fmt: skip
        file.PixelData = encapsulate([RLELosslessEncoder.encode(frame, **given) for frame in frames])
    else:
        order = ">" if syntax == BIG else "<"
        file.PixelData = frames.astype(frames.dtype.newbyteorder(order)).tobytes()
    file["PixelData"].VR = "OB" if allocated == 8 or syntax in (*encoders, RLE) else "OW"
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(content, file, enforce_file_format=True)
    return content.getvalue()


def jpeg2000(pixels: np.ndarray, bits: int = 8, boxed: bool = True) -> bytes:
    """Lossless, of ``[H, W]`` or ``[H, W, C]``."""
    import imagecodecs

    kind = "JP2" if boxed else "J2K"
    return imagecodecs.jpeg2k_encode(pixels, bitspersample=bits, reversible=True, level=0, codecformat=kind)


def heic(image: Image.Image, quality: int = 90) -> bytes:
    import pillow_heif

    content = io.BytesIO()
    pillow_heif.from_pillow(image).save(content, quality=quality)
    return content.getvalue()


def every_format() -> dict[str, bytes]:
    """A small file of each format, by its ending."""

    colour, grey = picture(24, 32), picture(24, 32, "L")
    kinds = {"jpg": "JPEG", "png": "PNG", "ppm": "PPM", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "webp": "WEBP"}
    files = {ending: encoded(colour, kind) for ending, kind in kinds.items()}
    files |= {"jp2": encoded(colour, "JPEG2000"), "avif": encoded(colour, "AVIF"), "heic": heic(colour)}
    sixteen = (np.asarray(grey).astype(np.uint16) * 257)[None]
    files["dcm"] = dicom(sixteen, RescaleSlope=1, RescaleIntercept=-1024)
    files["j2k.dcm"], files["rle.dcm"] = dicom(sixteen, JPEG_2000), dicom(sixteen, RLE)
    files["jpeg.dcm"] = dicom(np.asarray(colour), JPEG, "YBR_FULL_422")
    files["wide.j2k"] = jpeg2000(np.repeat(sixteen.transpose(1, 2, 0), 3, axis=2), 16, boxed=False)
    for name, options in {
        "deflate": {"compression": "zlib"},
        "tiles": {"tile": (16, 16)},
        "big": {"bigtiff": True},
    }.items():
        files[f"{name}.tif"] = tiff(np.repeat(sixteen, 3, axis=0), photometric="minisblack", **options)
    files["npy"] = npy(np.asarray(colour))
    return files
