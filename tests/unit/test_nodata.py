"""Pixels without a value change nothing: no sample, no loss, no gradient."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch

from fcmae.config import DataConfig, PretrainConfig, from_dict, to_dict
from fcmae.data.pixels.crops import Box, cut
from fcmae.data.pixels.decode import PixelFormat
from fcmae.data.pixels.nodata import NoData, resized
from fcmae.data.pixels.transforms import CentreCrop, eval_transform, normalize, pretrain_transform
from fcmae.data.samples import MaskedImages, hidden_without_data
from fcmae.data.sources import Sample
from fcmae.data.sources.own import Own
from fcmae.errors import ConfigError, ImageError
from fcmae.masks.patches import random_mask
from fcmae.models import FCMAE
from fcmae.targets import Channels, Hog, Laplacian, Pixels, Seen, part
from tests.conftest import TINY_PRETRAIN
from tests.results import assert_same, metrics_of, weights

TYPES = (torch.uint8, torch.uint16, torch.float32)


def pixels_of(dtype, *shape):
    most = 255 if dtype == torch.uint8 else 65535
    return torch.rand(shape) if dtype == torch.float32 else (torch.rand(shape) * most).round().to(dtype)


def test_values_that_are_no_data_are_found_and_replaced_by_the_mean():
    missing = NoData([0, 7, None], [0.5, 0.2, 0.1], 8)
    pixels = torch.tensor([0, 7, 9], dtype=torch.uint8).expand(3, 1, 3)
    valid = torch.tensor([[[False, True, True]], [[True, False, True]], [[True, True, True]]])
    assert torch.equal(missing.valid(pixels), valid)
    assert missing.replaced(pixels)[:, 0].tolist() == [[128, 7, 9], [0, 51, 9], [0, 7, 9]]
    wide = torch.tensor([0, 65535, 16], dtype=torch.uint16).expand(3, 1, 3)  # of 12 bits: 0, 4095, 1
    found = NoData([4095, 1, 5000], [0.5] * 3, 12).valid(wide)
    assert found[:, 0].tolist() == [[True, False, True], [True, True, False], [True, True, True]]
    floats = torch.tensor([math.nan, -9999.0, 0.0]).expand(3, 1, 3)
    missing = NoData([-9999, "nan", None], [0.5] * 3, 8)
    assert missing.valid(floats)[:, 0].tolist() == [[False, False, True], [False, True, True], [False, True, True]]
    assert missing.replaced(floats)[1, 0].tolist() == [0, -9999, 0]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(30))
def test_a_resized_pixel_with_a_value_is_made_of_such_pixels_alone(dtype, seed):
    torch.manual_seed(seed)
    height, width, rows, cols = torch.randint(1, 90, (4,)).tolist()
    height, cols = (rows if seed % 5 == 0 else height), (width if seed % 10 == 0 else cols)
    pixels, valid = pixels_of(dtype, 2, height, width), torch.ones(2, height, width, dtype=torch.bool)
    for _ in range(seed % 4):
        row, col = torch.randint(height, ()), torch.randint(width, ())
        valid[torch.randint(2, ()), row : row + 3, col : col + 2] = False
    box = Box(0, 0, height, width, False)
    results = []
    for fill in (0.0, 0.9):
        missing = NoData([None, None], [fill, fill], 8 if dtype == torch.uint8 else 16)
        filled = missing.replace(pixels, valid)
        if dtype == torch.float32:
            filled = torch.where(valid, pixels, fill)
        results.append(cut(filled, box, (rows, cols)))
    known = resized(valid, (rows, cols))
    assert known.shape == (2, rows, cols)
    assert torch.equal(results[0][known], results[1][known])
    if (height, width) == (rows, cols):
        assert torch.equal(known, valid)
    assert known[valid.flatten(1).all(dim=1)].all()


def test_pixels_far_from_those_without_a_value_keep_theirs():
    valid = torch.ones(1, 40, 60, dtype=torch.bool)
    valid[0, 10, 20] = False
    known = resized(valid, (20, 30))[0]
    lost = (~known).nonzero()
    assert lost.amin(dim=0).tolist() == [3, 8]
    assert lost.amax(dim=0).tolist() == [6, 11]


class Holes:
    """Images of which a part has no value; ``mark`` is what float32 images hold there."""

    classes = None

    def __init__(self, dtype, mark, channels=3):
        self.images = []
        for index in range(4):
            rng = torch.Generator().manual_seed(index)
            image = torch.rand(channels, 60, 52, generator=rng)
            image = image if dtype == torch.float32 else (200 * image + 20).to(dtype)
            place = image[: channels - 1, 5 * index : 5 * index + 20, 10:36]
            place.copy_(torch.full(place.shape, mark).to(dtype))
            self.images.append(image)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Sample(self.images[index], None)

    def describe(self, index):
        return f"holes {index}"


def config(nodata, **more):
    more = {"image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "source": {"_target_": "x.Y"}, **more}
    return DataConfig(nodata=nodata, **more)


@pytest.mark.parametrize("fixed", [False, True])
def test_nan_and_a_number_for_no_data_give_the_same_samples(fixed):
    same = {"crop_scale": [1, 1], "crop_ratio": [0.8, 0.9]} if fixed else {}
    crop = pretrain_transform(config(-9999.0, **same))
    assert crop.carries == ("valid",)
    ours, theirs = (MaskedImages(Holes(torch.float32, mark), crop, (4, 4), 3) for mark in (-9999.0, math.nan))
    for index in range(4):
        for one, other in zip(ours[1, index], theirs[1, index], strict=True):
            assert torch.equal(one, other)
        image, noise, valid = ours[1, index]
        assert valid.shape == image.shape
        assert 0 < (~valid[:2]).sum() < valid[:2].numel()
        assert valid[2].all()
        assert (image[~valid] == 0).all()
        assert image.isfinite().all()
        assert noise.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("crops", [1, 2])
def test_integers_without_a_value_become_the_mean(dtype, crops):
    crop = pretrain_transform(config([0, 0, None], bit_depth=8 if dtype == torch.uint8 else 16))
    parts = MaskedImages(Holes(dtype, 0), crop, (4, 4), 3, crops)[0, 1]
    images, _, valids = parts if crops == 2 else [part[None] for part in parts]
    for image, valid in zip(images, valids, strict=True):
        assert (~valid[:2]).any()
        normalised = normalize(image, [0.5] * 3, [0.2] * 3)
        assert normalised[~valid].abs().max() < 0.02
        # Where pixels have a value, it is that of the image.
        low = 20 if dtype == torch.uint8 else 0
        assert (image.int()[valid] >= low - 60).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("nodata", [None, 0])
def test_padded_crops_are_the_pixels_themselves(dtype, nodata):
    depth = 8 if dtype == torch.uint8 else 16
    layout = {"input": [0, 1, 2], "classes": [3], "nodata": None if nodata is None else 250}
    cfg = config(nodata, fit="pad", bit_depth=depth, channels=layout)
    crop = pretrain_transform(cfg, channels=True)
    assert crop.carries == ("valid", "channels", "channels_valid")
    for height, width in ((20, 60), (50, 13), (32, 32), (70, 40)):
        image = pixels_of(dtype, 4, height, width)
        image[0, 5, 5] = 0
        rows, cols = min(32, height), min(32, width)
        places, flips = set(), set()
        for seed in range(8):
            imgs, valid, channels, known = crop.seen(image, random.Random(seed).random)
            assert imgs.shape[1:] == channels.shape[1:] == (32, 32)
            assert imgs.dtype == channels.dtype == dtype
            assert not valid[:, rows:].any()
            assert not valid[:, :, cols:].any()
            assert known[:, :rows, :cols].all() if nodata is None else known[:, :rows, :cols].any()
            windows = torch.cat([imgs, channels])[:, :rows, :cols].float(), torch.cat([valid, known])[:, :rows, :cols]
            found = [
                (top, left, flip)
                for top in range(height - rows + 1)
                for left in range(width - cols + 1)
                for flip in (False, True)
                if _same(image[:, top : top + rows, left : left + cols].float(), *windows, flip)
            ]
            assert len(found) == 1
            places.add(found[0][:2])
            flips.add(found[0][2])
        assert flips == {False, True}
        assert (len(places) > 1) == ((height, width) not in ((32, 32),))
        middle = eval_transform(cfg)(image)
        assert middle.shape == (3, 32, 32)
        assert torch.equal(CentreCrop(cfg)(image), middle)
        top, left = (height - rows) // 2, (width - cols) // 2
        expected = image[:3, top : top + rows, left : left + cols].float()
        same = middle[:, :rows, :cols].float() == expected
        assert same[expected > 0].all()
        mean = normalize(middle, [0.5] * 3, [0.2] * 3)
        assert mean[:, rows:].abs().sum() < 0.02 * mean[:, rows:].numel() + 1e-9


def _same(window, crop, valid, flip):
    window = window.flip(-1) if flip else window
    return bool((window == crop)[valid].all())


def test_evaluation_replaces_pixels_without_a_value():
    images = Holes(torch.uint8, 0)
    made = eval_transform(config(0, crop_pct=1.0))(images[0].image)
    assert made.dtype == torch.uint8
    assert made.min() > 0


@pytest.mark.parametrize("size", [32, 384])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_evaluation_shows_no_mixture_of_a_value_and_none(dtype, size):
    """A pixel that is resized from some without a value has none either, as in training: it is the mean."""
    cfg = config(0 if dtype == torch.uint8 else "nan", image_size=size)
    image = torch.full((3, 100, 150), 200, dtype=dtype)
    image[:, 35:60, 70:90] = 0 if dtype == torch.uint8 else math.nan
    made, mean = eval_transform(cfg)(image).float().round(), 128 if dtype == torch.uint8 else 0
    assert set(made.flatten().tolist()) == {200, mean}
    filled = (made == mean).float().mean()
    assert filled > (25 * 20) / (100 * 150) * (1 if size == 384 else 1.2)


def test_patches_without_a_pixel_are_hidden_first():
    scores = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.8, 0.3])
    valid = torch.ones(3, 8, 12, dtype=torch.bool)
    valid[:, :4, :4] = valid[:, 4:, 8:] = False  # the first and the last of 2 x 3
    valid[:2, :4, 4:8] = False  # the second has one channel
    raised = hidden_without_data(scores, valid, (2, 3))
    assert random_mask(raised[None], 4)[0].tolist() == [True, False, False, False, False, True]
    assert random_mask(raised[None], 5)[0].tolist() == [False, False, False, False, False, True]  # the better one
    assert torch.equal(hidden_without_data(scores, valid | True, (2, 3)), scores)


TARGETS = {
    "pixels": Pixels,
    "channel": partial(Pixels, norm="channel", loss="l1"),
    "none": partial(Pixels, norm="none"),
    "hog": Hog,
    "laplacian": Laplacian,
    "depth": partial(Channels, channels=[0, 1], norm="patch"),
    "map": partial(Channels, channels=2, loss="ce", classes=3, cell=8),
}


@pytest.mark.parametrize("engine", ["packed", "masked"])
def test_what_is_stored_where_there_is_no_value_changes_no_bit_of_loss_and_gradients(engine):
    small = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "decoder_embed_dim": 16}
    model = FCMAE("convnextv2_atto", targets=TARGETS, engine=engine, **small)
    imgs, channels = torch.randn(2, 3, 96, 96), torch.randint(0, 3, (2, 3, 96, 96)).float()
    valid, channels_valid = torch.rand(2, 3, 96, 96) > 0.3, torch.rand(2, 3, 96, 96) > 0.3
    valid[0, :, :32, :32] = valid[1, :, 32:64] = False
    channels_valid[0, :, 64:] = False
    mask, keep = model.random_mask(imgs)
    results = []
    for mark in (0.0, 7.0, math.nan, math.inf):
        model.zero_grad()
        garbage = mark + torch.randn(imgs.shape)
        out = model(
            torch.where(valid, imgs, garbage),
            mask,
            keep,
            valid=valid,
            channels=torch.where(channels_valid, channels, garbage),
            channels_valid=channels_valid,
        )
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert results[0][0].isfinite()
    assert len(results[0]) > 20
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["pixels", "channel", "none"])
def test_statistics_and_loss_are_of_the_pixels_with_a_value(name):
    target, side = TARGETS[name](patch_size=8, in_chans=2), 16
    imgs, valid = torch.randn(1, 2, side, side), torch.rand(1, 2, side, side) > 0.5
    valid[0, :, 8:, 8:] = False
    wanted, known = target(Seen(torch.where(valid, imgs, 0), valid))
    for patch, (row, col) in enumerate([(0, 0), (0, 8), (8, 0)]):
        values = imgs[0, :, row : row + 8, col : col + 8].flatten(1).T
        mine = valid[0, :, row : row + 8, col : col + 8].flatten(1).T
        groups = [(values, mine)] if name == "pixels" else [(values[:, c], mine[:, c]) for c in range(2)]
        for c, (group, counted) in enumerate(groups):
            chosen = group[counted]
            expected = chosen if name == "none" else (chosen - chosen.mean()) / (chosen.var() + 1e-6).sqrt()
            ours = wanted[0, patch].view(64, 2)
            ours = ours[mine] if name == "pixels" else ours[:, c][counted]
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert known[0].any(dim=-1).tolist() == [True, True, True, False]
    pred = torch.randn(1, 4, target.dim, requires_grad=True)
    part(target, Seen(torch.where(valid, imgs, 0), valid), pred, torch.tensor([[True, False, True, True]])).backward()
    assert ((pred.grad != 0) == (known & torch.tensor([True, False, True, True])[:, None])).all()


def test_everything_valid_is_as_without_validity():
    model = FCMAE("convnextv2_atto", depths=(1, 1, 1, 1), decoder_embed_dim=16)
    imgs, (mask, keep) = torch.randn(2, 3, 64, 64), (torch.tensor([[True, False, True, True]] * 2), 1)
    whole = model(imgs, mask, keep, valid=torch.ones(2, 1, 64, 64, dtype=torch.bool))
    torch.testing.assert_close(whole.loss, model(imgs, mask, keep).loss)


def test_nan_is_refused_unless_it_is_no_data():
    source = Holes(torch.float32, math.nan)
    with pytest.raises(ImageError, match="or set data.nodata=nan if NaN marks pixels without a value"):
        Own(source, PixelFormat(3))[0]
    assert config("nan").may_be_nan == {0, 1, 2}
    Own(source, PixelFormat(3, may_be_nan=frozenset({0, 1})))[0]
    with pytest.raises(ImageError, match="infinite"):
        Own(Holes(torch.float32, math.inf), PixelFormat(3, may_be_nan=frozenset({0, 1, 2})))[0]
    layout = {"input": [0], "target": [2], "classes": [1], "nodata": [math.nan, 255]}
    cfg = DataConfig(in_chans=1, channels=layout, mean=[0.5], std=[0.5])
    assert (cfg.layout.nodata, cfg.may_be_nan) == (["nan", 255], {1, 2})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nodata": "red"}, "data.nodata must be a number, nan, or a list of 3 of these or null"),
        ({"nodata": [0, 1]}, r"data.nodata must be .* one per channel; got \[0, 1\]"),
        ({"nodata": 0, "pad": 2}, "data.pad must be 0 with data.nodata and data.fit=pad; got 2"),
        ({"nodata": -9999}, r"data.nodata must be an integer from 0 to 255 \(data.bit_depth=8\); got -9999"),
        ({"nodata": 0, "decode_on": "gpu"}, "data.decode_on must be cpu unless"),
    ],
)
def test_no_data_that_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**given)


def test_padding_goes_with_no_other():
    with pytest.raises(ConfigError, match="data.pad must be 0 with data.nodata and data.fit=pad; got 1"):
        DataConfig(fit="pad", pad=1)
    with pytest.raises(ConfigError, match="data.fit must be one of crop, pad; got 'stretch'"):
        DataConfig(fit="stretch")


def test_nan_survives_a_config_file():
    data = {"nodata": math.nan, "source": {"_target_": "x.Y"}, "mean": [], "std": []}
    cfg = from_dict(PretrainConfig, {"data": data})
    assert cfg.data.nodata == "nan"
    assert to_dict(from_dict(PretrainConfig, to_dict(cfg))) == to_dict(cfg)


RUN = (
    *TINY_PRETRAIN,
    "schedule.epochs=2",
    "data.nodata=[3,null,5]",
    "data.crops_per_image=2",
    "data.channels={input: [0, 1, 2], classes: [3], nodata: 9}",
    "target.map={_target_: fcmae.targets.Channels, loss: ce, classes: 256, cell: 4, weight: 0.1}",
)


def losses(folder):
    lines = metrics_of(folder)
    return torch.tensor([[line["loss_map"], line["loss_pixels"]] for line in lines if "loss" in line])


@pytest.mark.slow
def test_a_run_with_no_data_resumes_and_fits_any_layout(tmp_path, fcmae_here, fcmae):
    fcmae_here(*RUN, "hydra.run.dir=whole")
    fcmae_here(*RUN, "hydra.run.dir=cut", "trainer.max_steps=2", check=75)
    fcmae_here(*RUN, "hydra.run.dir=cut", "loader.workers=1")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    fcmae(*RUN, "hydra.run.dir=ranks", "trainer.micro_batch_size=3", ranks=2)  # with padding
    torch.testing.assert_close(losses(tmp_path / "ranks"), losses(tmp_path / "whole"), rtol=1e-4, atol=1e-5)
    fcmae_here("knn", "checkpoint=whole", "k=1", "cache=null")
    fcmae_here(
        *RUN,
        "data.fit=pad",
        "data.source={_target_: fcmae.data.sources.Synthetic, length: 24, in_chans: 4, size: [20, 50]}",
        "hydra.run.dir=padded",
    )
    assert losses(tmp_path / "padded").isfinite().all()
    refused = fcmae_here(*RUN, "data.transforms=[{_target_: x.Y}]", "hydra.run.dir=new", check=2).stderr
    assert "data.transforms must be [] with data.nodata" in refused


def test_statistics_are_of_the_pixels_with_a_value(tmp_path, fcmae_here):
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (3, 40, 40), dtype=np.uint8)
    pixels[0, :10] = 0
    np.save(tmp_path / "a.npy", pixels)
    said = fcmae_here("prepare", "data.path=.", "data.nodata=0", "data.stats=true", "loader.workers=0").stdout
    mean = float(said.split("mean: [")[1].split(",")[0])
    assert mean == pytest.approx(pixels[0, 10:].mean() / 255, rel=1e-5)
    pixels[1] = 0
    np.save(tmp_path / "a.npy", pixels)
    refused = fcmae_here("prepare", "data.path=.", "data.nodata=0", "data.stats=true", "loader.workers=0", check=2)
    assert "channel 1 has no pixel with a value (data.nodata=0)" in refused.stderr
    refused = fcmae_here("prepare", "data.path=.", "data.nodata=0", "out=out", "short_side=20", check=2)
    assert "short_side must be null with data.nodata; got 20" in refused.stderr


def test_targets_with_validity_compile_into_one_graph():
    valid = torch.rand(2, 3, 64, 64) > 0.3
    seen = Seen(torch.randn(2, 3, 64, 64), valid, torch.randint(0, 3, (2, 3, 64, 64)).float(), valid)
    mask = torch.rand(2, 4) > 0.3
    compiled = torch.compile(part, backend="eager", dynamic=False, fullgraph=True)
    for create in TARGETS.values():
        target = create(patch_size=32, in_chans=3)
        pred = torch.randn(2, 4, target.dim)
        torch.testing.assert_close(compiled(target, seen, pred, mask), part(target, seen, pred, mask))
