import io

import numpy as np
import pytest
from PIL import Image

from fcmae.config import DataConfig
from fcmae.data.pixels import jpeg
from fcmae.data.pixels.bands import BLOCK, SOF0, cut_band, segments
from fcmae.data.pixels.decode import Encoded, PixelFormat, _decode_rows, decode, open_image
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.prepare.shards import Encoding, encode
from fcmae.errors import ImageError
from tests.unit.test_crops import texture
from tests.unit.test_pixels import encoded, exif

SUBSAMPLINGS = {"4:4:4": 8, "4:2:2": 8, "4:2:0": 16}
"""And the height of a row of blocks."""


def with_rows(pixels, **options):
    return encoded(pixels, "JPEG", **{"quality": 90, "restart_marker_rows": 1, **options}).data


def cut(data, top, bottom):
    return cut_band(data, segments(data), top, bottom)


@pytest.fixture(scope="module", params=[(203, 130), (160, 96), (49, 300)], ids=str)
def pixels(request):
    return texture(*request.param)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])
def test_the_pixels_of_a_band_are_those_of_the_whole(pixels, subsampling, in_chans, decoder, monkeypatch):
    if decoder == "Pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    data = with_rows(pixels, subsampling=subsampling)
    whole = decode(Encoded(data, "whole"), in_chans)
    height, row = len(pixels), SUBSAMPLINGS[subsampling]
    image = open_image(Encoded(data, "rows"), PixelFormat(in_chans))
    firsts = set()
    for top in range(0, height, 5):
        for bottom in {top + 1, (top + height) // 2, height} - {top}:
            part, first = image.rows(top, bottom)
            assert first % row == 0
            assert part.shape[1] == height or part.shape[1] <= min(bottom - top + 3 * row, height - row)
            rows = part[:, top - first : bottom - first]
            assert np.array_equal(rows.numpy(), whole[:, top:bottom].numpy())
            firsts.add(first)
    assert len(firsts) > 1


def test_grey_files_have_bands_too():
    data = with_rows(texture(100, 70)[..., 0])
    band = cut(data, 40, 60)
    assert (band.top, band.height) == (32, 32)
    whole, part = (np.array(Image.open(io.BytesIO(file))) for file in (data, band.data))
    assert np.array_equal(part, whole[32:64])


def test_a_band_is_an_ordinary_jpeg(pixels):
    band = cut(with_rows(pixels), 0, 1)
    assert len(band.data) < 0.95 * len(with_rows(pixels))
    with Image.open(io.BytesIO(band.data)) as image:
        image.load()
        assert image.size == (pixels.shape[1], band.height)


@pytest.mark.parametrize(
    "options",
    [
        {"restart_marker_rows": 0},
        {"restart_marker_rows": 2},
        {"restart_marker_rows": 0, "restart_marker_blocks": 1},
        {"progressive": True},
    ],
)
def test_other_files_are_decoded_whole(options):
    data = with_rows(texture(200, 120), **options)
    assert cut(data, 0, 1) is None
    image = open_image(Encoded(data, "other"), PixelFormat(3))
    assert image.rows(100, 120)[0].shape == (3, 200, 120)


@pytest.mark.parametrize("kind", ["cut off", "without a row", "rows exchanged", "not a JPEG", "empty"])
def test_files_that_are_not_whole_have_no_bands(kind):
    data = with_rows(texture(200, 120))
    second, third = data.index(b"\xff\xd1"), data.index(b"\xff\xd2")
    damaged = {
        "cut off": data[:-40],
        "without a row": data[:second] + data[third:],
        "rows exchanged": data.replace(b"\xff\xd1", b"\xff\xd2"),
        "not a JPEG": b"\xff\xd8\xffnothing",
        "empty": b"",
    }
    assert cut(data, 0, 1) is not None
    assert cut(damaged[kind], 0, 1) is None


def test_a_header_without_sense_is_named():
    data = bytearray(with_rows(texture(96, 64)))
    where = segments(bytes(data))
    for component in range(3):
        data[where[SOF0] + 7 + 3 * component] = 0  # blocks of no size
    with pytest.raises(ImageError, match="odd.jpg"):
        _decode_rows(Encoded(bytes(data), "odd.jpg"), where, jpeg.Size(96, 64), PixelFormat(3), 0, 10)


def test_a_band_leaves_out_two_rows_of_blocks_or_more():
    data = with_rows(texture(96, 64))
    assert cut(data, 0, 96) is None
    assert cut(data, 1, 80) is None
    assert cut(data, 1, 64) is None  # the row below is needed for the chroma
    assert cut(data, 1, 63).height == 64


def test_turned_files_are_decoded_whole():
    data = with_rows(texture(100, 60), exif=exif(6))
    image = open_image(Encoded(data, "turned"), PixelFormat(3))
    assert image.size == (60, 100)
    assert image.rows(0, 5)[0].shape == (3, 60, 100)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_prepared_jpegs_have_bands_and_their_crops_are_the_same(in_chans, monkeypatch):
    import random

    original = encoded(texture(300, 400), "JPEG", quality=90)
    ending, data = encode(original, Encoding(PixelFormat(in_chans), short_side=256))
    assert ending == "jpg"
    decoded = []
    plain = jpeg.decode
    monkeypatch.setattr(
        jpeg, "decode", lambda data, size, *rest: decoded.append(size.height) or plain(data, size, *rest)
    )
    crop = pretrain_transform(DataConfig(image_size=96, in_chans=in_chans, mean=[0] * in_chans, std=[1] * in_chans))
    image = Encoded(data, "prepared")
    whole = decode(image, in_chans)
    for seed in range(20):
        ours, theirs = (crop(given, random.Random(seed).random) for given in (image, whole))
        assert np.array_equal(ours.numpy(), theirs.numpy())
    assert max(decoded[1:]) <= 256
    assert np.mean(decoded[1:]) < 230
    assert all(height % BLOCK == 0 for height in decoded)
