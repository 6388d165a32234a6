"""Formats of cameras and hospitals: JPEG 2000, AVIF, HEIC, .jfif and DICOM, with the values that they hold."""

import sys

import numpy as np
import pytest
import torch

from fcmae.config import DataConfig, LoaderConfig, PrepareConfig
from fcmae.config.prepare import PreparedDataConfig
from fcmae.data.pixels import dicom as reader
from fcmae.data.pixels import jpeg2000
from fcmae.data.pixels.decode import Encoded, decode
from fcmae.data.pixels.look import look
from fcmae.data.pixels.transforms import eval_transform, pretrain_transform
from fcmae.data.prepare.command import prepare
from fcmae.data.sources import train_source
from fcmae.errors import ImageError, UsageError
from tests import more_files as made
from tests.bad_files import encoded, picture

pytest.importorskip("imagecodecs")
pytest.importorskip("pydicom")
pytest.importorskip("pillow_heif")
HEIGHT, WIDTH = 24, 32
rng = np.random.default_rng(0)


def grey(dtype="uint16", frames=1, bits=16):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if dtype.startswith("int") else (0, 2**bits)
    return rng.integers(low, high, (frames, HEIGHT, WIDTH)).astype(dtype)


def read(data, channels=1, **keys):
    return decode(Encoded(data, "a"), channels, **keys)


LOSSLESS = {"explicit": made.EXPLICIT, "implicit": made.IMPLICIT, "big-endian": made.BIG, "RLE": made.RLE,
            "JPEG lossless": made.LOSSLESS, "JPEG-LS": made.JPEG_LS, "JPEG 2000": made.JPEG_2000}  # fmt: skip


@pytest.mark.parametrize("syntax", LOSSLESS.values(), ids=LOSSLESS)
def test_dicom_of_every_lossless_syntax_is_exact(syntax):
    pixels = grey(bits=12)
    data = made.dicom(pixels, syntax, stored=12)
    assert torch.equal(read(data, dtype="float32"), torch.from_numpy(pixels.astype(np.float32)))
    assert torch.equal(read(data, bit_depth=12), read(made.dicom(pixels), bit_depth=12))


def test_dicom_is_in_the_units_of_its_slope_and_intercept():
    pixels = grey(bits=12)
    hounsfield = read(made.dicom(pixels, stored=12, RescaleSlope=1, RescaleIntercept=-1024), dtype="float32")
    assert torch.equal(hounsfield, torch.from_numpy(pixels.astype(np.float32) - 1024))
    half = reader.read(made.dicom(pixels, stored=12, RescaleSlope=0.5, RescaleIntercept=1), 1, "", 10**9)
    assert half.dtype == np.float32
    assert np.array_equal(half, pixels * np.float32(0.5) + 1)
    signed = grey("int16", bits=12)
    assert np.array_equal(reader.read(made.dicom(signed, stored=12), 1, "", 10**9), signed)
    with pytest.raises(ImageError, match=r"its pixels are int16; with data.dtype=uint .* set data.dtype=float32"):
        read(made.dicom(signed))


def test_monochrome1_is_inverted():
    pixels = grey(bits=12)
    found = reader.read(made.dicom(pixels, kind="MONOCHROME1", stored=12), 1, "", 10**9)
    assert np.array_equal(found, 4095 - pixels)
    rescaled = made.dicom(pixels, kind="MONOCHROME1", stored=12, RescaleSlope=2, RescaleIntercept=-5)
    assert np.array_equal(reader.read(rescaled, 1, "", 10**9), 2 * (4095 - pixels.astype(int)) - 5)
    signed = grey("int16", bits=12)
    found = reader.read(made.dicom(signed, kind="MONOCHROME1", stored=12), 1, "", 10**9)
    assert np.array_equal(found, -1 - signed)


def test_bits_beside_those_that_are_stored_do_not_count():
    pixels = grey(bits=12)
    overlay = pixels | 0x4000
    assert np.array_equal(reader.read(made.dicom(overlay, stored=12), 1, "", 10**9), pixels)


def test_frames_of_dicom_are_channels_and_grey_is_repeated():
    pixels = grey(frames=5)
    assert torch.equal(read(made.dicom(pixels), 5, dtype="float32"), torch.from_numpy(pixels.astype(np.float32)))
    with pytest.raises(ImageError, match=r"it has 5 channels \(1 samples, 5 frames\); data.in_chans is 3"):
        read(made.dicom(pixels), 3)
    one = read(made.dicom(pixels[:1]), 3, bit_depth=16)
    assert torch.equal(one, read(made.dicom(pixels[:1]), 1, bit_depth=16).expand(3, -1, -1))


def test_colour_dicom():
    colours = np.asarray(picture(HEIGHT, WIDTH))
    for syntax in (made.EXPLICIT, made.RLE, made.JPEG_2000):
        found = read(made.dicom(colours, syntax, "RGB" if syntax != made.JPEG_2000 else "YBR_RCT"), 3)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), colours)
    found = read(made.dicom(colours, made.JPEG, "YBR_FULL_422"), 3).permute(1, 2, 0).numpy()
    assert abs(found.astype(int) - colours).mean() < 20


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (made.dicom(grey()[:, :0]), "it has no pixels"),
        (made.dicom(grey(), kind="MONOCHROME2", Rows=60000, Columns=60000), "set loader.max_pixels=3600000000"),
        (made.dicom(grey(), NumberOfFrames=1000), "it has 1000 channels"),
        (
            made.dicom(grey(), kind="MONOCHROME2", PhotometricInterpretation="PALETTE COLOR"),
            "interpretation is PALETTE",
        ),
        (made.dicom(grey(), made.JPEG_2000, Rows=HEIGHT - 1), "a frame declares 32x24 pixels; the header says 32x23"),
        (made.dicom(grey(), made.LOSSLESS, Rows=HEIGHT - 1), "a frame declares 32x24 pixels; the header says 32x23"),
        (made.dicom(grey(), RescaleSlope=0), "its rescale slope and intercept are 0"),
        (made.dicom(grey())[:-100], "a: "),
        (made.dicom(grey()).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"), "a: "),
    ],
)
def test_dicom_that_is_refused(data, problem):
    with pytest.raises(ImageError, match=problem):
        read(data, dtype="float32")


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_jpeg_2000_keeps_all_bits(bits, channels, boxed):
    pixels = rng.integers(0, 2**bits, (HEIGHT, WIDTH, channels)).astype("uint8" if bits == 8 else "uint16")
    data = made.jpeg2000(pixels if channels > 1 else pixels[..., 0], bits, boxed and channels < 5)
    assert jpeg2000.header(data) == (HEIGHT, WIDTH, [bits] * channels)
    found = read(data, channels, dtype="float32")
    assert torch.equal(found, torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32)))


def test_photographs():
    image = picture(HEIGHT, WIDTH)
    for data in (encoded(image, "AVIF", quality=95), made.heic(image, 95), encoded(image, "JPEG2000")):
        found = read(data, 3).permute(1, 2, 0).numpy()
        assert abs(found.astype(int) - np.asarray(image)).mean() < 20  # of colours at half the resolution
        assert read(data, 1).shape == (1, HEIGHT, WIDTH)
        with pytest.raises(ImageError, match="set loader.max_pixels=768 to read it"):
            read(data, 3, max_pixels=700)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("mixed")
    for ending, data in {**made.every_format(), "jfif": encoded(picture(HEIGHT, WIDTH), "JPEG")}.items():
        if not ending.endswith("dcm"):
            (where / f"a.{ending}").write_bytes(data)
    return where


def test_a_folder_of_every_format_is_read_cropped_and_prepared(folder, tmp_path, capsys):
    cfg = DataConfig(path=str(folder), image_size=16, dtype="float32", normalize="image")
    source = train_source(cfg)
    assert len(source) == len(list(folder.iterdir()))
    for index in range(len(source)):
        image = source[index].image
        assert pretrain_transform(cfg)(image).shape == (3, 16, 16)
        assert eval_transform(cfg)(image).isfinite().all()
        assert look(image, "a").size == (HEIGHT, WIDTH)
    data = PreparedDataConfig(path=str(folder), dtype="float32")
    prepare(PrepareConfig(data=data, out=str(tmp_path / "out"), shuffle=False, loader=LoaderConfig(workers=0)))
    again = train_source(DataConfig(name="webdataset", path=str(tmp_path / "out"), dtype="float32", normalize="none"))
    assert [again[i].image.data for i in range(len(again))] == [source[i].image.data for i in range(len(source))]
    assert "not read" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "package", "told"),
    [
        ("dcm", "pydicom", "DICOM needs pydicom and imagecodecs: pip install 'fcmae\\[science\\]'"),
        ("j2k.dcm", "imagecodecs", "compressed DICOM needs imagecodecs"),
        ("wide.j2k", "imagecodecs", "JPEG 2000 of more than 8 bits needs imagecodecs"),
    ],
)
def test_a_missing_package_is_named(ending, package, told, monkeypatch):
    data = made.every_format()[ending]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=told):
        read(data, 3, dtype="float32")


def test_patients_are_not_read():
    found = reader._dataset(made.dicom(grey()))
    assert "PatientName" not in found
