"""Windows of large images at their own scale: only what they show is read, and epochs count windows."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.config import DataConfig, compose
from fcmae.data.arrays import zarr_folder
from fcmae.data.loading import TrainBatches, Workers
from fcmae.data.pixels.crops import RandomCrop
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.pixels.foreground import TRIES, Foreground
from fcmae.data.pixels.transforms import CentreCrop, eval_transform
from fcmae.data.plan import BatchPlan
from fcmae.data.prepare.statistics import sum_images
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import ImageFolder, Windows, train_source
from fcmae.data.sources.array import ArrayImages
from fcmae.errors import ConfigError
from fcmae.tasks.pretraining import Pretraining
from tests.conftest import TINY_PRETRAIN

zarr = pytest.importorskip("zarr")
pytest.importorskip("numcodecs")
SIDE = 50_000


@pytest.fixture
def slide(tmp_path):
    """An image of 50,000 x 50,000 pixels, of which some chunks are stored."""
    made = zarr.create_array(tmp_path / "slide.zarr", shape=(2, SIDE, SIDE), chunks=(1, 512, 512), dtype="uint16")
    rng = np.random.default_rng(0)
    made[:, 25_000 - 700 : 25_000 + 700, 25_000 - 700 : 25_000 + 700] = rng.integers(
        1, 60_000, (2, 1400, 1400), "uint16"
    )
    return str(tmp_path / "slide.zarr")


def config(path, **given):
    common = {"name": "array", "axes": "CHW", "in_chans": 2, "bit_depth": 16, "mean": [0.5] * 2, "std": [0.2] * 2}
    return DataConfig(path=path, image_size=64, **{**common, "fit": "pad", **given})


@pytest.fixture
def chunks(monkeypatch):
    """The chunks that were read."""
    read, one = [], zarr_folder.ZarrArray._chunk
    monkeypatch.setattr(zarr_folder.ZarrArray, "_chunk", lambda self, place: read.append(place) or one(self, place))
    return read


@pytest.mark.parametrize("given", [{}, {"fit": "crop", "crop_zoom": [0.5, 2.0]}])
def test_a_window_reads_its_chunks_alone(slide, chunks, given):
    cfg = config(slide, **given)
    source, crop = train_source(cfg), RandomCrop(cfg)
    for seed in range(20):
        chunks.clear()
        assert crop(source[0].image, random.Random(seed).random).shape == (2, 64, 64)
        assert len(chunks) == len(set(chunks)) <= 2 * 4


def test_evaluation_reads_the_middle_alone(slide, chunks):
    cfg = config(slide)
    image = train_source(cfg)[0].image
    middle = eval_transform(cfg)(image)
    assert len(chunks) <= 2 * 4
    expected = zarr.open_array(slide)[:, 24_968 : 24_968 + 64, 24_968 : 24_968 + 64]
    assert np.array_equal(middle.numpy(), expected)
    assert torch.equal(CentreCrop(cfg)(image), middle)


def test_mean_and_std_of_an_image_larger_than_the_memory(tmp_path, chunks):
    """Tile by tile; sizes are no multiple of a tile."""
    array = np.random.default_rng(0).integers(0, 4096, (2, 1100, 2500)).astype(np.uint16)
    made = zarr.create_array(tmp_path / "a.zarr", shape=array.shape, chunks=(1, 512, 512), dtype="uint16")
    made[:] = array
    to = PixelFormat(2, bit_depth=12, max_pixels=1024 * 1024)
    sums = sum_images(ArrayImages(str(tmp_path / "a.zarr"), to, axes="CHW"), [0], to)
    assert not sums.unreadable
    pixels = array.astype(np.float64) / 4095
    np.testing.assert_allclose(sums.mean, pixels.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(sums.std, pixels.std((1, 2)), rtol=1e-5)
    assert sums.pixels.tolist() == [1100 * 2500] * 2
    assert len(chunks) == 2 * 3 * 5


def test_several_crops_of_an_image_are_windows_too(slide, chunks):
    cfg = config(slide, crops_per_image=4)
    imgs, *_ = MaskedImages(train_source(cfg), RandomCrop(cfg), (1, 1), seed=0, crops_per_image=4)[0, 0]
    assert len(imgs) == 4
    assert len(chunks) <= 4 * 2 * 4


def test_an_epoch_counts_windows(slide):
    """Each with a draw of its own, for any workers and ranks."""
    cfg = config(slide, foreground={"above": 0.0, "share": 0.01, "tries": 2})
    source = Windows(train_source(cfg), 12)
    assert len(source) == 12
    assert source.describe(11) == f"{slide}[]"
    dataset = MaskedImages(source, RandomCrop(cfg), (1, 1), seed=0)
    boxes = {RandomCrop(cfg).draw(source[i].image, dataset._uniform((0, i)))[0] for i in range(12)}
    assert len(boxes) == 12
    plan = BatchPlan.create(12, 4, 4, 1, seed=0)
    alone = [batch[0].clone() for batch in TrainBatches(dataset, plan, 0, range(3), Workers(0))]
    for expected, batch in zip(alone, TrainBatches(dataset, plan, 0, range(3), Workers(2)), strict=True):
        assert torch.equal(batch[0], expected)
    ranks = [TrainBatches(dataset, BatchPlan.create(12, 4, 2, 2, seed=0), r, range(3), Workers(0)) for r in (0, 1)]
    for expected, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(torch.cat([part[0] for part in parts]), expected)


def test_pretraining_counts_windows(slide):
    given = [
        "data=array",
        f"data.path={slide}",
        "data.axes=CHW",
        "data.in_chans=2",
        "data.bit_depth=16",
        "data.fit=pad",
    ]
    given += ["data.mean=[0.5,0.5]", "data.std=[0.2,0.2]", "data.windows_per_image=24", "data.image_size=32"]
    task = Pretraining(compose("pretrain", [*TINY_PRETRAIN[1:], *given]))
    assert len(task.source) == 24
    assert task.picture(torch.device("cpu")) is not None
    with pytest.raises(ConfigError, match="data.windows_per_image must be 1 in fine-tuning; got 2"):
        compose("finetune", ["data.windows_per_image=2"])


def half(top):
    """Foreground above row 100, or below it."""
    image = torch.zeros(1, 200, 200, dtype=torch.uint8)
    image[:, :100] = 200
    return image if top else image.flip(1)


def test_windows_are_drawn_until_one_has_foreground():
    common = {"in_chans": 1, "mean": [0.5], "std": [0.2], "image_size": 32, "fit": "pad", "vflip": 0.0}
    cfg = DataConfig(**common, foreground={"above": 0.5, "share": 0.9, "tries": 100})
    plain = RandomCrop(DataConfig(**common))
    crop, shares, changed = RandomCrop(cfg), [], 0
    for seed in range(40):
        window = crop(half(True), random.Random(seed).random)
        shares.append(float((window > 127).float().mean()))
        changed += not torch.equal(window, plain(half(True), random.Random(seed).random))
    assert min(shares) >= 0.9
    assert 5 < changed < 35  # a window that has enough is taken as it is


def test_the_window_with_the_most_is_taken_where_none_has_enough():
    cfg = DataConfig(foreground={"below": 0.3, "share": 1.0, "tries": 4})
    windows = [torch.full((3, 4, 4), 255, dtype=torch.uint8) for _ in range(6)]
    windows[1][:, 0], windows[2][:, :2], windows[4][:] = 0, 0, 0  # the fifth is not drawn
    drawn = iter([window] for window in windows)
    assert Foreground(cfg).choose(lambda: next(drawn))[0] is windows[2]
    assert Foreground(DataConfig(foreground={"below": 0.3, "share": 0.5})).tries == TRIES
    units = DataConfig(dtype="float32", mean=[0.0] * 3, std=[1.0] * 3, foreground={"above": -5, "share": 0.5})
    assert Foreground(units).of(torch.full((3, 4, 4), -4.0)) == 1


@pytest.mark.parametrize(
    "given", [{}, {"share": 0.5}, {"above": 0.5}, {"above": 0.5, "share": 0}, {"above": "x", "share": 0.5},
              {"above": 0.5, "share": 0.5, "tries": 0}, {"above": 0.5, "share": 0.5, "more": 1}, [0.5]]
)  # fmt: skip
def test_what_is_no_foreground_is_refused(given):
    with pytest.raises(ConfigError, match=r"data.foreground must be {above: VALUE, share: SHARE}, or below"):
        DataConfig(foreground=given)


def test_images_in_folders_of_classes_give_windows(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "a" / "1.png")
    source = Windows(ImageFolder(tmp_path), 3)
    assert (len(source), source.classes) == (3, ["a"])
