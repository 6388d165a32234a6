"""Data files made to do harm (tests/hostile.py): one line says what is wrong, at no cost in memory or time."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
from PIL import Image

import fcmae
from fcmae.config import DataConfig, LoaderConfig
from fcmae.data.pixels.decode import Encoded, PixelFormat, decode, read_file
from fcmae.data.pixels.formats import FORMATS, open_picture
from fcmae.errors import ConfigError, ImageError
from tests.bad_files import encoded, picture
from tests.hostile import SECONDS, measure
from tests.hostile_sources import CASES

PACKAGE = Path(fcmae.__file__).parent


@pytest.fixture(scope="module")
def taken():
    """All cases, read in a child process."""
    return measure(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_does_no_harm(taken, name):
    found = taken[name]
    assert re.search(CASES[name].says, found.said)
    assert not found.said.startswith(("MemoryError", "RecursionError"))
    assert found.memory <= CASES[name].memory
    assert found.seconds < SECONDS / 4
    assert "\n" not in found.said
    assert len(found.printed.splitlines()) <= (2 if name.startswith("listing") else 1)


def test_pictures_are_opened_in_one_place():
    """Where the formats are named, sizes are checked and warnings are silenced. Benchmarks open what they wrote."""
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py") if "bench" not in path.parts}
    nodes = [(path, node) for path, text in texts.items() if "Image.open" in text for node in ast.walk(ast.parse(text))]
    opens = {path for path, node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "Image.open"}
    assert opens == {PACKAGE / "data" / "pixels" / "formats.py"}


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_no_other_format_is_read_whatever_the_name():
    Image.init()
    others = sorted(set(Image.SAVE) & set(Image.OPEN) - set(FORMATS) - {"DIB", "MPO"})  # read as BMP and JPEG
    assert "EPS" in others
    for kind in others:
        content = io.BytesIO()
        with contextlib.suppress(OSError, ValueError, KeyError):  # nothing that this kind holds
            picture(64, 64, "RGB").save(content, kind)
            with pytest.raises(ImageError, match=r"a.jpg: (its bytes are of no image format|it is)"):
                decode(Encoded(content.getvalue(), "a.jpg"), 3)


def test_the_limit_of_pixels_can_be_raised(tmp_path, monkeypatch):
    """Above twice Pillow's own limit, too; which is then as before."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for kind in ("PNG", "TIFF", "GIF", "JPEG"):
        (tmp_path / kind).write_bytes(encoded(picture(40, 50), kind))
        with pytest.raises(ImageError, match="it has 50x40 pixels; loader.max_pixels is 1999; set loader.max_pixels="):
            decode(read_file(tmp_path / kind), *PixelFormat.of(DataConfig(), 1999))
        with pytest.raises(ImageError, match=r"it has \S+ pixels; loader.max_pixels is 9; set loader.max_pixels=2000"):
            decode(read_file(tmp_path / kind), 3, max_pixels=9)
        assert decode(read_file(tmp_path / kind), 3, max_pixels=2000).shape == (3, 40, 50)
        with open_picture((tmp_path / kind).read_bytes()) as image:
            assert image.convert("RGB").size == (50, 40)
        assert vars(Image)["MAX_IMAGE_PIXELS"] == 100
    with pytest.raises(ConfigError, match=r"loader.max_pixels must be a positive number; got 0"):
        LoaderConfig(max_pixels=0)
