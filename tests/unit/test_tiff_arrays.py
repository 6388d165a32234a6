"""Windows of TIFF files: the tiles that they touch are read, and no others."""

import numpy as np
import pytest
import torch

from fcmae.config import DataConfig
from fcmae.data.arrays.stored import open_stored
from fcmae.data.arrays.tiff import TiffArray
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.sources import train_source
from fcmae.errors import ImageError, UsageError

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")
rng = np.random.default_rng(0)
COLOUR = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
STACK = rng.integers(0, 65536, (4, 70, 90), dtype=np.uint16)
FLOATS = rng.normal(0, 100, (2, 70, 90)).astype(np.float32)
TILES, PLANES = {"tile": (32, 16)}, {"planarconfig": "separate"}
FILES = {
    "tiles": (COLOUR, "YXC", {**TILES, "photometric": "rgb"}),
    "deflated tiles": (COLOUR, "YXC", {**TILES, "photometric": "rgb", "compression": "zlib", "predictor": True}),
    "LZW strips": (COLOUR, "YXC", {"photometric": "rgb", "compression": "lzw", "rowsperstrip": 16}),
    "ZSTD, big": (COLOUR, "YXC", {**TILES, "photometric": "rgb", "compression": "zstd", "bigtiff": True}),
    "planes": (COLOUR.transpose(2, 0, 1), "CYX", {**PLANES, **TILES, "photometric": "rgb", "compression": "zlib"}),
    "pages": (STACK, None, {"photometric": "minisblack", "compression": "zlib"}),
    "pages of tiles, other byte order": (STACK, None, {**TILES, "photometric": "minisblack", "byteorder": ">"}),
    "one after another": (STACK, None, {"photometric": "minisblack", "byteorder": ">"}),
    "floats": (FLOATS, None, {**TILES, "photometric": "minisblack", "compression": "zlib", "predictor": True}),
    "one page of grey": (STACK[0], "YX", {**TILES, "compression": "packbits"}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_part_is_what_the_whole_file_has(name, tmp_path):
    array, axes, options = FILES[name]
    tifffile.imwrite(tmp_path / "a.tif", array, metadata=None, **options)
    found = open_stored(str(tmp_path / "a.tif"))
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert axes is None or found.axes == axes
    whole = tuple(slice(0, side) for side in array.shape)
    assert np.array_equal(found.read(whole), array)
    for _ in range(20):
        index = tuple(slice(a, b) for a, b in (sorted(rng.choice(side + 1, 2, replace=False)) for side in array.shape))
        assert np.array_equal(found.read(tuple(slice(int(s.start), int(s.stop)) for s in index)), array[index])


def test_a_large_image_is_read_by_tiles(tmp_path, monkeypatch):
    """2,500 million pixels, nearly all of them in tiles that are not stored."""
    side, tile = 50_176, 512
    with tifffile.TiffWriter(tmp_path / "a.tif", bigtiff=True) as file:
        count = (side // tile) ** 2
        tiles = (rng.integers(1, 255, (tile, tile), dtype=np.uint8) if i in (0, 99) else None for i in range(count))
        file.write(tiles, shape=(side, side), dtype="uint8", tile=(tile, tile), compression="zlib")
    cfg = DataConfig(name="array", path=str(tmp_path / "a.tif"), in_chans=1, fit="pad", image_size=256, hflip=0.0,
                     mean=[0.5], std=[0.2], windows_per_image=4)  # fmt: skip
    source = train_source(cfg)
    assert len(source) == 1
    read, given = [], TiffArray._chunk
    monkeypatch.setattr(TiffArray, "_chunk", lambda self, place: read.append(place) or given(self, place))
    assert pretrain_transform(cfg)(source[0].image, lambda: 0.0).min() > 0
    assert read == [(0, 0)]
    read.clear()
    crop = pretrain_transform(cfg)(source[0].image, lambda: 0.5)
    assert len(read) <= 4
    assert not crop.any()
    with pytest.raises(ImageError, match="loader.max_pixels"):
        source[0].image.pixels(1)


def test_an_images_own_mean_is_read_once(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", FLOATS, photometric="minisblack", compression="zlib", **TILES)
    cfg = DataConfig(name="array", path=str(tmp_path / "a.tif"), in_chans=2, dtype="float32", axes="CYX", fit="pad",
                     image_size=16, normalize="image", hflip=0.0)  # fmt: skip
    monkeypatch.setattr("fcmae.data.sources.array.shared_chunks", lambda layouts: [None] * len(layouts))
    source, crop = train_source(cfg), pretrain_transform(cfg)
    read, given = [], TiffArray._chunk
    monkeypatch.setattr(TiffArray, "_chunk", lambda self, place: read.append(place) or given(self, place))
    first = crop(source[0].image, lambda: 0.0)
    assert len(set(read)) == 2 * 3 * 6  # all tiles
    read.clear()
    assert torch.equal(crop(source[0].image, lambda: 0.0), first)
    assert set(read) == {(0, 0, 0), (1, 0, 0)}
    mean, std = FLOATS.mean((1, 2), dtype=np.float64), FLOATS.std((1, 2), dtype=np.float64)
    expected = (FLOATS[:, :16, :16] - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(first.numpy(), expected, atol=1e-4)


def test_levels_and_mistakes(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        file.write(COLOUR, photometric="rgb", subifds=1, **TILES, compression="zlib")
        file.write(COLOUR[::2, ::2], photometric="rgb", subfiletype=1, **TILES, compression="zlib")
    path = str(tmp_path / "a.ome.tif")
    assert np.array_equal(open_stored(path, "1").read((slice(0, 35), slice(0, 45), slice(0, 3))), COLOUR[::2, ::2])
    with pytest.raises(UsageError, match=r"data.dataset must be a level from 0 to 1 for .*; got 'x'"):
        open_stored(path, "x")
    data = (tmp_path / "a.ome.tif").read_bytes()
    for cut in (100, len(data) // 2):
        (tmp_path / "cut.tif").write_bytes(data[:cut])
        with pytest.raises((UsageError, ValueError), match=r"cut.tif cannot be read|cut off"):
            open_stored(str(tmp_path / "cut.tif")).read((slice(0, 70), slice(0, 90), slice(0, 3)))
    tifffile.imwrite(tmp_path / "b.tif", COLOUR, photometric="rgb", compression="jpeg2000", **TILES)
    with pytest.raises(UsageError, match="its compression is .*; convert it to deflate, LZW or none"):
        open_stored(str(tmp_path / "b.tif"))


def test_pages_are_images_unless_they_are_called_channels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack", compression="zlib", metadata=None)
    keys = {"name": "array", "path": str(tmp_path / "a.tif"), "bit_depth": 16, "normalize": "none"}
    images = train_source(DataConfig(in_chans=1, **keys))
    assert len(images) == 4
    assert torch.equal(images[2].image.pixels(1), torch.from_numpy(STACK[2:3]))
    image = train_source(DataConfig(in_chans=4, axes="CYX", **keys))[0].image
    assert torch.equal(image.pixels(1), torch.from_numpy(STACK))
