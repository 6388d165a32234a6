"""Signed and floating-point pixels of files: ``data.dtype=float32`` keeps their units."""

import numpy as np
import pytest
import torch

from fcmae.config import AugmentConfig, DataConfig, PrepareConfig, compose, from_dict, to_dict
from fcmae.config.prepare import PreparedDataConfig
from fcmae.config.unset import UnsetDataConfig, settled
from fcmae.data.pixels.crops import RandomCrop
from fcmae.data.pixels.decode import Encoded, decode, read_file
from fcmae.data.pixels.scientific import TYPES
from fcmae.data.pixels.transforms import denormalize, eval_transform, finetune_transform, normalize, normalize_channels
from fcmae.data.prepare.command import prepare
from fcmae.data.sources import train_source
from fcmae.errors import ConfigError, ImageError
from fcmae.tasks.pretraining import Pretraining
from tests import bad_files
from tests.conftest import TINY_PRETRAIN

tifffile = pytest.importorskip("tifffile")
HEIGHT, WIDTH = 48, 64


def values(dtype, channels=1, seed=0):
    """Values over the whole range of a type."""
    rng = np.random.default_rng(seed)
    shape = (channels, HEIGHT, WIDTH)
    if np.dtype(dtype).kind == "f":
        return (rng.standard_normal(shape) * 1000).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype, endpoint=True)


def npy(array):
    return Encoded(bad_files.npy(array), "a.npy")


def tiff(array, **options):
    return Encoded(bad_files.tiff(array, photometric="minisblack", **options), "a.tiff")


def read(image, channels=1):
    return decode(image, channels, dtype="float32")


@pytest.mark.parametrize("dtype", TYPES["float32"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_every_type_keeps_its_values(dtype, channels):
    array = values(dtype, channels)
    expected = torch.from_numpy(array.astype(np.float32))
    last = np.ascontiguousarray(array.transpose(1, 2, 0))
    files = [npy(array), npy(last), npy(array.astype(array.dtype.newbyteorder(">")))]
    files += [tiff(array), tiff(array, bigtiff=True), tiff(array, byteorder=">")]
    if channels > 1:
        files += [
            tiff(last, planarconfig="contig"),
            tiff(array, planarconfig="separate"),
            tiff(array, planarconfig="separate", tile=(16, 16)),
        ]
    if dtype != "float16":  # which tifffile does not write tiled without imagecodecs
        files.append(
            tiff(array[0] if channels == 1 else last, planarconfig="contig" if channels > 1 else None, tile=(16, 16))
        )
    for image in files:
        decoded = read(image, channels)
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded, expected)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint32", "int8", "bool", "complex64"])
def test_other_types_are_refused(dtype):
    array = np.zeros((1, 8, 8), dtype)
    with pytest.raises(ImageError, match=rf"a.npy: its pixels are {dtype}; with data.dtype=float32 .*; convert the fi"):
        read(npy(array))
    with pytest.raises(ImageError, match=rf"a.npy: its pixels are {dtype}; with data.dtype=uint .*; convert the files"):
        decode(npy(array), 1)


@pytest.mark.parametrize("dtype", ["int16", "int32", "float16", "float32"])
@pytest.mark.parametrize("channels", [1, 5])
def test_the_key_that_reads_them_is_named(dtype, channels):
    array = values(dtype, channels)
    for image in (npy(array), tiff(array)):
        with pytest.raises(ImageError, match=r"its pixels are \w+; with data.dtype=uint .* set data.dtype=float32"):
            decode(image, channels)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_not_finite_is_refused(value, dtype):
    array = values(dtype)
    array[0, 3, 3] = value
    for image in (npy(array), tiff(array)):
        with pytest.raises(ImageError, match="it has (NaN in channel 0|infinite values); .* data.nodata=nan"):
            read(image)


@pytest.mark.parametrize(("channels", "dtype"), [(1, "float32"), (1, "uint16"), (4, "int16")])
def test_a_tiffs_orientation_is_applied(channels, dtype):
    array = values(dtype, channels)
    image = tiff(array, extratags=[(274, 3, 1, 6, True)])
    assert torch.equal(read(image, channels), torch.from_numpy(array.astype(np.float32)).rot90(-1, (1, 2)))


def test_pixels_without_a_value_become_the_mean(tmp_path):
    """In the units of the file; NaN without more, since it has no other meaning where data.nodata is set."""
    array = values("float32", 2)
    array[0, 8:12, 8:12], array[1, 30] = -9999, np.nan
    np.save(tmp_path / "a.npy", array)
    cfg = DataConfig(in_chans=2, dtype="float32", image_size=[HEIGHT, WIDTH], mean=[-300.0, 5.0], std=[2.0, 4.0],
                     nodata=[-9999, None], fit="pad", hflip=0.0)  # fmt: skip
    crop, valid = RandomCrop(cfg).seen(read_file(tmp_path / "a.npy"), lambda: 0.0)
    expected = np.isfinite(array) & (array != -9999)
    assert np.array_equal(valid.numpy(), expected)
    assert (normalize(crop[None], cfg.mean, cfg.std, cfg.dtype)[0][~valid] == 0).all()
    assert np.array_equal(crop.numpy()[expected], array[expected])
    given = {"path": str(tmp_path), "in_chans": 2, "dtype": "float32", "nodata": [-9999, None], "stats": True}
    said = prepare(PrepareConfig(data=PreparedDataConfig(**given)))
    lines = dict(line.split(": ") for line in said.splitlines()[1:])
    kept = [array[i][expected[i]].astype(np.float64) for i in range(2)]
    for name, numbers in (("mean", [x.mean() for x in kept]), ("std", [x.std() for x in kept])):
        np.testing.assert_allclose([float(x) for x in lines[name].strip("[]").split(",")], numbers, rtol=1e-5)


def test_channels_that_only_targets_get_have_units_too(tmp_path):
    array = np.stack([np.full((HEIGHT, WIDTH), value, np.float32) for value in (-300, 7, 3)])
    np.save(tmp_path / "a.npy", array)
    channels = {"input": [0], "target": [1], "classes": [2], "mean": [5.0], "std": [4.0]}
    cfg = DataConfig(dtype="float32", in_chans=1, mean=[-300.0], std=[2.0], channels=channels, fit="pad", image_size=32)
    crop, _, others, _ = RandomCrop(cfg, channels=True).seen(read_file(tmp_path / "a.npy"))
    assert crop.shape == (1, 32, 32)
    found = normalize_channels(others[None], cfg.layout, cfg.bit_depth, cfg.dtype)
    assert found[0, :, 0, 0].tolist() == [0.5, 3.0]


def test_ordinary_images_are_read_in_their_own_units(tmp_path):
    from tests.bad_files import encoded, picture

    for kind in ("JPEG", "PNG"):
        data = encoded(picture(40, 50), kind)
        assert torch.equal(read(Encoded(data, "a"), 3), decode(Encoded(data, "a"), 3).float())


def test_crops_keep_signs_and_units():
    cfg = DataConfig(in_chans=2, dtype="float32", image_size=32, mean=[-300.0, 5.0], std=[2.0, 4.0], hflip=1.0)
    array = np.stack([np.full((HEIGHT, WIDTH), -304, np.int16), np.full((HEIGHT, WIDTH), 13, np.int16)])
    rounding = {"atol": 1e-4, "rtol": 0}  # the weights of a resize add up to almost 1
    for crop in (RandomCrop(cfg)(npy(array)), eval_transform(cfg)(npy(array))):
        assert crop.dtype == torch.float32
        normal = normalize(crop[None], cfg.mean, cfg.std, cfg.dtype)
        torch.testing.assert_close(normal[0, :, 0, 0], torch.tensor([-2.0, 2.0]), **rounding)
        torch.testing.assert_close(denormalize(normal, cfg.mean, cfg.std)[0], crop)
    crop = finetune_transform(cfg, AugmentConfig())(npy(array))
    torch.testing.assert_close(crop[:, 0, 0], torch.tensor([-2.0, 2.0]), **rounding)
    assert normalize(crop, [], [], "float32") is crop  # of a source that normalises


def test_the_config_asks_for_mean_and_std_in_these_units():
    for channels in (1, 3):
        with pytest.raises(ConfigError, match=rf"data.mean must be {channels} numbers?, one per channel .*; got \[\]"):
            DataConfig(in_chans=channels, dtype="float32")
    cfg = DataConfig(dtype="float32", mean=[1, 2, 3], std=[4, 5, 6])
    assert from_dict(DataConfig, to_dict(cfg)) == cfg
    with pytest.raises(ConfigError, match=r"data.bit_depth must be 8 with data.dtype=float32.*; got 12"):
        DataConfig(dtype="float32", bit_depth=12, mean=[1, 2, 3], std=[4, 5, 6])
    with pytest.raises(ConfigError, match=r"data.dtype must be one of uint, float32; got 'int16'"):
        DataConfig(dtype="int16")
    PreparedDataConfig(dtype="float32")
    known = {"dtype": "float32", "mean": [1] * 3, "std": [1] * 3}
    assert settled(DataConfig, UnsetDataConfig(), known).dtype == "float32"  # as fine-tuning takes it from init_from
    with pytest.raises(ConfigError, match="auto_augment must be null with data.dtype=float32"):
        finetune_transform(cfg, AugmentConfig(auto_augment="rand-m9"))


@pytest.fixture
def folder(tmp_path):
    """Temperatures in kelvins, and depths in metres below zero."""
    rng = np.random.default_rng(0)
    where = tmp_path / "fields"
    where.mkdir()
    for index in range(8):
        kelvins = 300 + 0.01 * rng.standard_normal((HEIGHT, WIDTH))
        metres = rng.normal(-20, 3, (HEIGHT, WIDTH))
        np.save(where / f"{index}.npy", np.stack([kelvins, metres]).astype(np.float32))
    return where


def test_prepare_prints_mean_and_std_in_these_units(folder):
    given = {"path": str(folder), "in_chans": 2, "dtype": "float32", "stats": True}
    said = prepare(PrepareConfig(data=PreparedDataConfig(**given)))
    pixels = np.stack([np.load(file) for file in sorted(folder.iterdir())]).astype(np.float64)
    lines = dict(line.split(": ") for line in said.splitlines()[1:])
    assert lines["dtype"] == "float32"
    for name, expected in (("mean", pixels.mean((0, 2, 3))), ("std", pixels.std((0, 2, 3)))):
        printed = [float(x) for x in lines[name].strip("[]").split(",")]
        np.testing.assert_allclose(printed, expected, rtol=1e-5)


def test_prepared_files_are_the_same_bits(folder, tmp_path):
    given = {"path": str(folder), "in_chans": 2, "dtype": "float32"}
    prepare(PrepareConfig(data=PreparedDataConfig(**given), out=str(tmp_path / "out"), shuffle=False))
    source = train_source(DataConfig(name="webdataset", path=str(tmp_path / "out"), in_chans=2, dtype="float32",
                                     mean=[0.0] * 2, std=[1.0] * 2))  # fmt: skip
    for index, file in enumerate(sorted(folder.iterdir())):
        assert source[index].image.data == file.read_bytes()


def test_pretraining_takes_them(folder):
    given = [f"data.path={folder}", "data=imagefolder", "data.in_chans=2", "data.dtype=float32"]
    given += ["data.mean=[300,-20]", "data.std=[0.01,3]", "data.image_size=32"]
    task = Pretraining(compose("pretrain", [*TINY_PRETRAIN[1:], *given]))
    imgs, noise = task.dataset()[0, 3]
    assert 299 < imgs[0].mean() < 301
    assert torch.isfinite(task.loss(task.model, (imgs[None], noise[None]))[0])
    assert task.picture(torch.device("cpu")).display.stretched
