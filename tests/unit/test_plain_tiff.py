"""Uncompressed TIFF files: parts of them are those of the decoded image."""

import io
import os

import numpy as np
import pytest
import torch

from fcmae.data.pixels import files, plain_tiff
from fcmae.data.pixels.decode import PixelFormat, open_image
from fcmae.data.pixels.files import Encoded, read_file
from fcmae.errors import ImageError
from tests.damaged_files import KINDS, damage

tifffile = pytest.importorskip("tifffile")
RNG = np.random.default_rng(0)
GREY16, GREY8, RGB8 = (
    RNG.integers(0, 2 ** (8 * size), shape).astype(f"u{size}")
    for size, shape in ((2, (40, 50)), (1, (40, 50)), (1, (40, 50, 3)))
)


def written(array, **how):
    file = io.BytesIO()
    tifffile.imwrite(file, array, metadata=None, **how)
    return file.getvalue()


PLAIN = {
    "16 bits": (written(GREY16), 1, 16),
    "16 bits, big-endian, repeated": (written(GREY16, byteorder=">"), 3, 16),
    "8 bits": (written(GREY8), 1, 8),
    "strips of 7 rows, big": (written(GREY8, rowsperstrip=7, bigtiff=True), 3, 8),
    "RGB": (written(RGB8, photometric="rgb"), 3, 8),
}


def both(monkeypatch, data, to):
    """The image by this module and by the others."""
    ours = open_image(Encoded(data, "a.tif"), to)
    monkeypatch.setattr(plain_tiff, "opened", lambda *_: None)
    return ours, open_image(Encoded(data, "a.tif"), to)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_part_is_that_of_the_decoded_image(monkeypatch, kind):
    data, channels, bits = PLAIN[kind]
    assert plain_tiff.opened(data, channels, bits, False, 10_000) is not None
    ours, decoded = both(monkeypatch, data, PixelFormat(channels, bits))
    whole = decoded.pixels(1)
    assert ours.size == decoded.size == (40, 50)
    torch.testing.assert_close(ours.pixels(1), whole, rtol=0, atol=0)
    part, top, left = ours.part(5, 6, 20, 30)
    assert (top, left) == (5, 6)
    torch.testing.assert_close(part, whole[:, 5:25, 6:36], rtol=0, atol=0)


OTHERS = {
    "compressed": (written(GREY16, compression="zlib"), 1, 16),
    "tiles": (written(GREY16, tile=(16, 16)), 1, 16),
    "white is zero": (written(GREY8, photometric="miniswhite"), 1, 8),
    "turned": (written(GREY8, extratags=[(274, "H", 1, 6, True)]), 1, 8),
    "two pages": (written(np.stack([GREY16] * 2), photometric="minisblack"), 2, 16),
    "12 of 16 bits": (written(GREY16 // 16), 1, 12),
    "grey as RGB of 16 bits": (written(GREY16), 3, 8),
    "infrared beside RGB": (written(np.dstack([RGB8, GREY8]), photometric="rgb", extrasamples=["unspecified"]), 3, 8),
    "floats": (written(GREY16.astype(np.float32)), 1, 16),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_decoded(kind):
    data, channels, bits = OTHERS[kind]
    assert plain_tiff.opened(data, channels, bits, False, 10_000) is None


def test_channels_are_not_made_up_where_they_are_named():
    data, _, _ = PLAIN["8 bits"]
    assert plain_tiff.opened(data, 3, 8, True, 10_000) is None


def test_damage_is_an_error_whatever_part_is_read():
    for data, message in ((PLAIN["16 bits"][0][:-100], "a.tif"), (PLAIN["16 bits"][0], "loader.max_pixels")):
        with pytest.raises(ImageError, match=message):
            open_image(Encoded(data, "a.tif"), PixelFormat(1, 16, 1999)).part(0, 0, 4, 4)


def outcome(image, to):
    """A part of an image, or the error without its name."""
    try:
        opened = open_image(image, to)
        height, width = opened.size
        return [opened.part(0, 0, 1, width)[0][:, :1], opened.pixels(1)[:, height // 3 :, width // 2 :].clone()]
    except ImageError as error:
        return error.reason


def test_a_large_file_is_read_in_part_as_from_memory(tmp_path, monkeypatch):
    """Also what is damaged, by the same seed: the same pixels, or the same words."""
    monkeypatch.setattr(files, "LARGE", 1)
    rng, parts = np.random.default_rng(0), 0
    for name, (data, channels, bits) in {**PLAIN, **OTHERS}.items():
        damaged = [damage(data, kind, rng) for kind in KINDS * 4]
        for content in [data, *damaged]:
            path = tmp_path / "a.tif"
            path.write_bytes(content)
            for to in (PixelFormat(channels, bits), PixelFormat(channels, dtype="float32")):
                image = read_file(path)
                assert (type(image), image.data, image.name) == (files.LargeTiff, content, str(path))
                ours, theirs = outcome(image, to), outcome(Encoded(content, image.name), to)
                assert isinstance(ours, list) == isinstance(theirs, list), name
                if isinstance(ours, list):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
                    parts += 1
                else:
                    assert ours == theirs
    assert parts > 2 * len(PLAIN)


def test_a_large_file_that_changes_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 1)
    path = tmp_path / "a.tif"
    path.write_bytes(PLAIN["16 bits"][0])
    opened, image = open_image(read_file(path), PixelFormat(1, 16)), read_file(path)
    os.truncate(path, 2000)
    with pytest.raises(ImageError, match=f"{path}: it is cut off"):
        opened.part(20, 0, 10, 50)
    path.unlink()
    for read in (lambda: image.data, lambda: read_file(path), lambda: open_image(image, PixelFormat(1, 16))):
        with pytest.raises(ImageError, match=f"{path}: No such file"):
            read()
