import functools
import importlib.util
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.data.pixels import jpeg, png
from fcmae.data.pixels.decode import Encoded, PixelFormat, decode, open_image, read_file
from fcmae.errors import ImageError, UsageError
from tests import bad_files

WIDTH, HEIGHT = 50, 30


def noise(*shape, dtype=np.uint8, most=255):
    return np.random.default_rng(0).integers(0, most + 1, shape, dtype=dtype)


def smooth(height=HEIGHT, width=WIDTH):
    """A colour gradient that JPEG keeps; no two corners are alike."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=-1).astype(np.uint8)


def encoded(image, kind, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return Encoded(bad_files.encoded(image, kind, **options), f"a.{kind.lower()}")


def npy(array):
    return Encoded(bad_files.npy(array), "a.npy")


def tiff(array, **options):
    pytest.importorskip("tifffile")
    return Encoded(bad_files.tiff(array, **options), "a.tiff")


def chw(array):
    return torch.from_numpy(np.array(array if array.ndim == 3 else array[..., None])).permute(2, 0, 1)


@pytest.fixture(params=["simplejpeg", "Pillow"])
def library(request, monkeypatch):
    """Both libraries that decode JPEG."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    return request.param


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_eight_bit_images_are_converted_as_pillow_does(mode, in_chans):
    image = Image.fromarray(noise(HEIGHT, WIDTH, 4), "RGBA").convert(mode)
    expected = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[in_chans]))
    decoded = decode(encoded(image, "PNG"), in_chans)
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, chw(expected))


@pytest.mark.parametrize(("mode", "in_chans"), [("L", 1), ("L", 3), ("L", 4), ("RGB", 1), ("RGB", 3), ("RGB", 4)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpegs_give_the_same_pixels_by_every_library(library, mode, in_chans, options):
    image = encoded(Image.fromarray(smooth()).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(image.data)) as opened:
        opened.draft({1: "L"}.get(in_chans), opened.size)
        expected = np.asarray(opened.convert({1: "L", 3: "RGB", 4: "RGBA"}[in_chans]))
    assert torch.equal(decode(image, in_chans), chw(expected))


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_jpegs_reduced_give_the_same_pixels_by_every_library(monkeypatch, reduce, in_chans):
    pytest.importorskip("simplejpeg")
    image = encoded(smooth(241, 322), "JPEG")
    fast = open_image(image, PixelFormat(in_chans)).pixels(reduce)
    assert fast.shape == (in_chans, -(-241 // reduce), -(-322 // reduce))
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert torch.equal(open_image(image, PixelFormat(in_chans)).pixels(reduce), fast)


def test_cmyk_jpegs_are_converted_by_pillow(library):
    image = encoded(Image.fromarray(smooth()).convert("CMYK"), "JPEG")
    with Image.open(io.BytesIO(image.data)) as opened:
        assert torch.equal(decode(image, 3), chw(np.asarray(opened.convert("RGB"))))
    assert (decode(image, 3).int() - chw(smooth()).int()).abs().float().mean() < 4  # not inverted


def exif(turn):
    tags = Image.Exif()
    tags[274] = turn
    return tags


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "WEBP", "TIFF", "PNG16", "JPEG16"])
def test_exif_rotation_is_applied_on_every_path(library, turn, kind):
    """What a viewer shows: the transpositions by which Pillow's documentation defines the eight values."""
    how = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
    how |= {7: "TRANSVERSE", 8: "ROTATE_90"}
    depth = 8
    if kind in ("PNG16", "JPEG16"):
        depth = 16
    image = Image.fromarray(smooth())
    if kind == "CMYK":
        image = image.convert("CMYK")
    elif kind == "PNG16":
        image = Image.fromarray(smooth()[..., 0].astype(np.uint16) * 257)
    file_kind = {"CMYK": "JPEG", "PNG16": "PNG", "JPEG16": "JPEG"}.get(kind, kind)
    stored = encoded(image, file_kind, exif=exif(turn))
    plain = encoded(image, file_kind)
    in_chans = 1 if kind == "PNG16" else 3
    expected = decode(plain, in_chans, depth).permute(1, 2, 0).numpy().astype(np.float32)
    if turn in how:
        method = Image.Transpose[how[turn]]
        bands = [Image.fromarray(band).transpose(method) for band in np.moveaxis(expected, -1, 0).copy()]
        expected = np.stack([np.asarray(band) for band in bands], axis=-1)
    opened = open_image(stored, PixelFormat(in_chans, depth))
    assert opened.size == expected.shape[:2]
    tolerance = 3 if kind == "WEBP" else 0  # its compression depends on the metadata's presence
    difference = (opened.pixels(1).float() - chw(expected)).abs().max()
    assert difference <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_grey_16_bit_images_keep_their_bits(kind, in_chans):
    values = noise(HEIGHT, WIDTH, dtype=np.uint16, most=65535)
    decoded = decode(encoded(values, kind), in_chans, bit_depth=16)
    assert decoded.dtype == torch.uint16
    assert decoded.shape == (in_chans, HEIGHT, WIDTH)
    assert all(np.array_equal(channel.numpy(), values) for channel in decoded)


def test_colour_16_bit_pngs_keep_their_bits(monkeypatch):
    values = noise(HEIGHT, WIDTH, 4, dtype=np.uint16, most=65535)
    image = png16(values)
    if importlib.util.find_spec("imagecodecs"):
        for channels in (3, 4):  # alpha is dropped
            assert np.array_equal(decode(image, channels, 16).permute(1, 2, 0).numpy(), values[..., :channels])
        with pytest.raises(ImageError, match="a.png: it has 4 channels; data.in_chans is 1"):
            decode(image, 1, 16)
        with pytest.raises(ImageError, match="its pixels have 16 bits; data.bit_depth is 8"):
            decode(image, 4, 8)
        with pytest.raises(ImageError, match="loader.max_pixels is 9"):
            decode(image, 4, 16, max_pixels=9)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    for depth in (8, 16):
        with pytest.raises(ImageError, match="a.png: it is a PNG of 16 bits in several channels, .* pip install"):
            decode(image, 4, depth)


def png16(values):
    """A PNG of 16-bit RGBA, which Pillow can't write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return Encoded(png.MAGIC + b"".join(parts), "a.png")


def test_sixteen_bit_images_are_refused_where_eight_are_expected():
    values = noise(HEIGHT, WIDTH, dtype=np.uint16, most=65535)
    for image in (encoded(values, "PNG"), encoded(values, "TIFF"), npy(values)):
        with pytest.raises(ImageError, match=rf"{image.name}: its pixels have 16 bits; data.bit_depth is 8; set it to"):
            decode(image, 1)
    with pytest.raises(ImageError, match=r"a.tiff: its pixels have 16 bits; data.bit_depth is 8; set it to"):
        decode(tiff(np.stack([values] * 3, -1), photometric="rgb"), 3)


def test_fewer_bits_are_spread_over_the_whole_range():
    values = np.array([[0, 1, 2048, 4095]], dtype=np.uint16)
    assert decode(npy(values), 1, bit_depth=12).flatten().tolist() == [0, 16, 32776, 65535]
    with pytest.raises(ImageError, match="its values must be at most 4095 with data.bit_depth=12; got 4096"):
        decode(npy(values + 1), 1, bit_depth=12)
    assert decode(npy(np.array([[0, 1, 255]], dtype=np.uint8)), 1, bit_depth=12).flatten().tolist() == [0, 257, 65535]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 13])
def test_npy_files_of_any_number_of_channels(dtype, channels):
    depth = 8 if dtype == np.uint8 else 16
    values = noise(channels, HEIGHT, WIDTH, dtype=dtype)
    for stored in (values, values.transpose(1, 2, 0)) + ((values[0],) if channels == 1 else ()):
        assert np.array_equal(decode(npy(stored), channels, depth).numpy(), values)


def test_a_band_beside_rgb_is_not_taken_for_an_opaque_alpha():
    values = noise(4, HEIGHT, WIDTH)
    image = tiff(values.transpose(1, 2, 0), photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(decode(image, 4).numpy(), values)


EXACT = {
    "a JPEG": (lambda: encoded(smooth(), "JPEG"), 3),
    "a grey JPEG": (lambda: encoded(smooth()[..., 0], "JPEG"), 1),
    "a PNG": (lambda: encoded(smooth(), "PNG"), 3),
    "a grey PNG": (lambda: encoded(smooth()[..., 0], "PNG"), 1),
    "a PNG of 16 bits": (lambda: encoded(noise(HEIGHT, WIDTH, dtype=np.uint16), "PNG"), 1),
    "a PNG with alpha": (lambda: encoded(noise(HEIGHT, WIDTH, 4), "PNG"), 4),
    "a GIF": (lambda: encoded(smooth(), "GIF"), 3),
    "a TIFF": (lambda: encoded(smooth(), "TIFF"), 3),
    "a TIFF of five": (lambda: tiff(noise(5, HEIGHT, WIDTH), photometric="minisblack"), 5),
    "an array": (lambda: npy(noise(5, HEIGHT, WIDTH)), 5),
}


@pytest.mark.parametrize("case", EXACT)
def test_with_chosen_channels_files_must_have_those_that_are_named(library, case):
    make, count = EXACT[case]
    image = make()
    read = functools.partial(decode, image, bit_depth=16 if "16" in case else 8, exact=True)
    assert len(read(count)) == count
    for other in {1, 2, 3, 4, 5, 6} - {count}:
        told = f"it has {count} channels?; data.channels needs files of {other} "
        with pytest.raises(ImageError, match=told):
            read(other)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 3, 5, 13])
def test_tiff_files_of_any_number_of_channels(dtype, planar, channels):
    depth = 8 if dtype == np.uint8 else 16
    values = noise(channels, HEIGHT, WIDTH, dtype=dtype)
    stored = values if planar == "separate" else values.transpose(1, 2, 0)
    image = tiff(stored, planarconfig=planar, photometric="rgb" if channels == 3 else "minisblack")
    assert np.array_equal(decode(image, channels, depth).numpy(), values)


@pytest.mark.slow
def test_the_first_image_of_a_process_is_read(tmp_path):
    """Pillow registers most formats only when it opens an image."""
    (tmp_path / "a.png").write_bytes(encoded(smooth(), "PNG").data)
    code = "import sys; from fcmae.data.pixels.decode import decode, read_file; decode(read_file(sys.argv[1]), 3)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)


def test_the_pages_of_a_tiff_are_channels():
    values = noise(6, HEIGHT, WIDTH)
    image = tiff(values, photometric="minisblack")
    assert np.array_equal(decode(image, 6).numpy(), values)
    with pytest.raises(ImageError, match="a.tiff: it has 6 channels; data.in_chans is 1"):
        decode(image, 1)


def test_tifffile_missing_is_not_the_images_fault(monkeypatch):
    image = tiff(noise(6, HEIGHT, WIDTH), photometric="minisblack")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(UsageError, match=r"pip install 'fcmae\[tiff\]'") as raised:
        decode(image, 6)
    assert not isinstance(raised.value, ImageError)


REFUSED = {
    "float TIFF": (
        lambda: encoded(np.ones((8, 8), np.float32), "TIFF"),
        1,
        "its pixels are float32; with data.dtype=uint they must be uint8, uint16; set data.dtype=float32",
    ),
    "float npy": (
        lambda: npy(np.ones((8, 8))),
        1,
        "its pixels are float64; with data.dtype=uint they must be uint8, uint16; convert",
    ),
    "signed npy": (lambda: npy(np.ones((8, 8), np.int16)), 1, "its pixels are int16"),
    "npy without pixels": (lambda: npy(noise(0, 5, 3)), 3, r"its shape is \[3, 0, 5\]: it has no pixels"),
    "objects in npy": (lambda: npy(np.array([[{}]], dtype=object)), 1, "it holds Python objects"),
    "npy with four axes": (
        lambda: npy(noise(1, 2, 3, 4)),
        1,
        r"its shape must be .*; got \[1, 2, 3, 4\]; a stack of images needs data.name=array data.path=FILE",
    ),
    "npy with other channels": (lambda: npy(noise(5, 8, 8)), 3, "it has 5 channels; data.in_chans is 3"),
    "npy cut short": (lambda: Encoded(npy(noise(5, 8, 8)).data[:-9], "a.npy"), 5, "."),
    "7 channels of a JPEG": (lambda: encoded(smooth(), "JPEG"), 7, "it has 3 channels; data.in_chans is 7"),
    "7 channels of a PNG": (lambda: encoded(smooth(), "PNG"), 7, "it has 3 channels; data.in_chans is 7"),
    "text": (lambda: Encoded(b"not an image", "a.jpg"), 3, "its bytes are of no image format"),
    "nothing": (lambda: Encoded(b"", "a.jpg"), 3, "its bytes are of no image format"),
    "half a JPEG": (lambda: half(encoded(noise(64, 64, 3), "JPEG")), 3, "truncated"),
    "half a PNG": (lambda: half(encoded(noise(64, 64, 3), "PNG")), 3, "truncated|broken"),
    "half a TIFF": (lambda: half(encoded(noise(64, 64, 3), "TIFF")), 3, "."),
    "the start of a JPEG": (lambda: Encoded(encoded(smooth(), "JPEG").data[:30], "a.jpg"), 3, "."),
    "damaged TIFF": (lambda: Encoded(b"II*\0\xff\xff\xff\xff", "a.tiff"), 5, "."),
}


def half(image):
    return Encoded(image.data[: len(image.data) // 2], image.name)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named(library, case):
    make, in_chans, reason = REFUSED[case]
    image = make()
    with pytest.raises(ImageError, match=rf"^cannot read the image {image.name}: .*({reason})") as raised:
        decode(image, in_chans)
    assert "\n" not in str(raised.value)
    assert raised.value.name == image.name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF"])
def test_decompression_bombs_are_refused_without_being_decoded(library, kind):
    image = encoded(smooth(), kind)
    message = f"{image.name}: it has 50x30 pixels; loader.max_pixels is 1499; set loader.max_pixels=1500 to read it"
    with pytest.raises(ImageError, match=message):
        open_image(image, PixelFormat(3, max_pixels=1499))


def test_an_error_survives_the_way_from_a_worker():
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "torn")))
    assert (str(error), error.name, error.reason) == ("cannot read the image a.jpg: torn", "a.jpg", "torn")


def test_files_that_cannot_be_opened_are_named(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "x.jpg").mkdir()
    with pytest.raises(ImageError, match=r"cannot read the image .*link.jpg: No such file"):
        read_file(tmp_path / "link.jpg")
    with pytest.raises(ImageError, match=r"cannot read the image .*x.jpg: Is a directory"):
        read_file(tmp_path / "x.jpg")
