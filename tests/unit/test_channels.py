"""Channels of files that the encoder sees, and those that only targets see."""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fcmae.config import DataConfig, compose
from fcmae.data.pixels.decode import PixelFormat, open_image, to_tensor
from fcmae.data.pixels.transforms import eval_transform, normalize_channels, pretrain_transform
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import Sample
from fcmae.data.sources.own import Own
from fcmae.errors import ConfigError, ImageError
from fcmae.evaluation import reconstruct
from fcmae.evaluation.display import choose
from fcmae.masks.patches import patchify
from fcmae.targets import Channels, Seen, part
from fcmae.tasks.pretraining import Pretraining
from tests.conftest import TINY_PRETRAIN
from tests.results import assert_same, metrics_of, weights
from tests.unit.test_pixels import encoded, npy

LAYOUT = {"input": [3, 0, 1], "target": [0, 4], "classes": [2]}


def config(channels, in_chans=3, **more):
    own = {"mean": [0.5] * in_chans, "std": [0.2] * in_chans, "source": {"_target_": "tests.x"}}
    return DataConfig(image_size=32, in_chans=in_chans, channels=channels, **{**own, **more})


class Bands:
    """Five channels of the same pixels plus their number; the channel 2 has class 7 left of the middle, then 9."""

    classes = None

    def __init__(self, dtype, height=50, width=70):
        most = 200 if dtype == torch.uint8 else 60000
        smooth = torch.rand(1, 6, 7)
        smooth = torch.nn.functional.interpolate(smooth[None], (height, width), mode="bilinear")[0]
        values = smooth if dtype == torch.float32 else (smooth * most)
        self.image = torch.cat([values + band for band in range(5)]).to(dtype)
        self.image[2, :, : width // 2], self.image[2, :, width // 2 :] = 7, 9

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Sample(self.image, None)

    def describe(self, index):
        return f"bands {index}"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("crops", [1, 3])
def test_channels_of_targets_are_cut_and_mirrored_as_the_image(dtype, crops):
    source = Bands(dtype)
    layout = {"input": [3, 0, 1], "target": [4], "classes": [2]}
    every = pretrain_transform(config([0, 1, 2, 3, 4], 5))
    seen = pretrain_transform(config(layout), channels=True)
    assert (every.carries, seen.carries) == ((), ("channels",))
    for index in range(8):
        whole = MaskedImages(source, every, (4, 4), 5, crops)[0, index]
        some = MaskedImages(source, seen, (4, 4), 5, crops)[0, index]
        imgs, noise, channels = some if crops == 3 else ([some[0]], some[1][None], some[2][None])
        expected = whole[0] if crops == 3 else [whole[0]]
        for image, extra, full in zip(imgs, channels, expected, strict=True):
            assert extra.dtype == dtype
            assert torch.equal(image.float(), full[[3, 0, 1]].float())
            assert torch.equal(extra[0].float(), full[4].float())
            assert {*extra[1].flatten().tolist()} <= {7, 9}
            # The border of the classes is where a filter puts it.
            border = (full[2].float() > 8) != (extra[1].float() > 8)
            assert border.any(dim=0).sum() <= 1
        assert torch.equal(noise.reshape(-1), whole[1].reshape(-1))


@pytest.mark.parametrize(("bit_depth", "stored"), [(8, [0, 7, 255]), (12, [0, 7, 4095]), (16, [0, 7, 65535])])
def test_classes_have_their_stored_numbers(bit_depth, stored):
    cfg = config({"input": [0], "classes": [1], "target": [2], "mean": [0.5], "std": 2}, 1, bit_depth=bit_depth)
    pixels = torch.tensor(stored).numpy().astype("uint8" if bit_depth == 8 else "uint16")
    raw = to_tensor(pixels.reshape(1, 1, 1, 3).repeat(2, axis=1), PixelFormat.of(cfg))
    numbers, classes = normalize_channels(raw, cfg.layout, bit_depth)[0]
    assert classes.round().int().tolist() == [stored]
    torch.testing.assert_close(numbers[0], (torch.tensor(stored) / stored[-1] - 0.5) / 2, atol=1e-4, rtol=0)


def test_evaluation_reads_the_channels_of_the_network():
    source = Bands(torch.uint8, 32, 32)
    chosen = eval_transform(config([3, 0, 1], crop_pct=1.0))(source.image)
    assert torch.equal(chosen, source.image[[3, 0, 1]])


def test_files_must_have_the_channels_that_are_named():
    """An RGB file has no fourth channel; converted to RGBA it would have one that says nothing."""
    photo = encoded(np.zeros((40, 40, 3), np.uint8), "PNG")
    for channels in ([3, 2, 1], {"input": [0, 1, 2], "target": [3]}, [1, 2, 4], {"input": [0, 1, 2], "of": 5}):
        cfg = config(channels)
        for read in (eval_transform(cfg), pretrain_transform(cfg, channels=True)):
            with pytest.raises(ImageError, match=f"it has 3 channels; data.channels needs files of {cfg.layout.of} "):
                read(photo)
    assert eval_transform(config([2, 1, 0]))(photo).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("at", "given", "key"),
    [
        (0, {"input": [0, 1], "target": [2]}, "data.nodata"),
        (2, {"input": [0, 1], "target": [2]}, "data.channels.nodata"),
        (3, {"input": [0, 1], "target": [2], "classes": [3], "nodata": ["nan", None]}, None),
        (3, {"input": [0, 1], "classes": [3], "of": 5}, "data.channels.nodata"),
        (4, {"input": [0, 1], "classes": [3], "of": 5}, None),  # which nobody reads
        (1, [0, 2], None),
    ],
)
def test_of_nan_the_key_is_named_that_takes_it(at, given, key):
    pixels = np.zeros((PixelFormat.of(cfg := config(given, 2, dtype="float32")).in_chans, 40, 40), np.float32)
    pixels[at, 3, 3] = np.nan
    source = Bands(torch.float32)
    source.image = torch.from_numpy(pixels)
    own = Own(source, PixelFormat.of(cfg))
    for read in (lambda: open_image(npy(pixels), PixelFormat.of(cfg)), lambda: own[0]):
        with pytest.raises(ImageError, match=f"NaN in channel {at}; .* {key}=nan") if key else nullcontext():
            read()


@pytest.mark.parametrize(("at", "refused"), [(0, True), (2, True), (3, False)])
def test_infinity_in_a_channel_that_is_not_read_is_nobodys(at, refused):
    pixels = np.random.default_rng(0).random((4, 40, 40), dtype=np.float32)
    cfg = config({"input": [0, 1], "target": [2], "of": 4}, 2, dtype="float32")
    source = Bands(torch.float32)
    source.image = torch.from_numpy(pixels)
    expected = eval_transform(cfg)(npy(pixels))
    pixels[at, 3, 3] = -np.inf
    own = Own(source, PixelFormat.of(cfg))
    for read in (lambda: eval_transform(cfg)(npy(pixels)), lambda: eval_transform(cfg)(own[0].image)):
        with pytest.raises(ImageError, match="infinite values") if refused else nullcontext():
            assert torch.equal(read(), expected)


def target(pixels, **arguments):
    return Channels(8, 3, **arguments)(Seen(torch.zeros(2, 3, 16, 16), channels=pixels))


def test_numbers_are_predicted_as_they_are_or_normalised():
    channels = torch.randn(2, 3, 16, 16)
    values, valid = target(channels, channels=[2, 0])
    assert valid is None
    assert torch.equal(values, patchify(channels[:, [2, 0]], 8))
    values, _ = target(channels, channels=[2, 0], norm="channel")
    torch.testing.assert_close(values.unflatten(-1, (64, 2)).mean(2), torch.zeros(2, 4, 2), atol=1e-6, rtol=0)
    values, _ = target(channels, channels=1, cell=4)
    cells = channels[:, 1:2].unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean(dim=(3, 5))
    torch.testing.assert_close(values, patchify(cells, 2))


def test_classes_are_predicted_by_their_shares_and_unknown_ones_are_left_out():
    channels = torch.randint(0, 3, (2, 1, 16, 16)).float()
    channels[0, 0, :8, :8] = 255  # no class
    channels[1, 0, 0, :3] = 255
    values, valid = target(channels, loss="ce", classes=3)
    assert torch.equal(valid.unflatten(-1, (64, 3)).all(-1), patchify(channels, 8) < 3)
    numbers = values.unflatten(-1, (64, 3))
    assert (numbers.argmax(-1) == patchify(channels, 8))[patchify(channels, 8) < 3].all()
    shares, known = target(channels, loss="ce", classes=3, cell=4)
    assert shares.shape == (2, 4, 2 * 2 * 3)
    assert known[0].any(-1).tolist() == [False, True, True, True]
    torch.testing.assert_close(
        shares.unflatten(-1, (4, 3)).sum(-1)[known.unflatten(-1, (4, 3)).all(-1)].mean(), torch.ones(())
    )
    patch = channels[1, 0, :4, :4].flatten()
    assert shares[1, 0, :3].tolist() == pytest.approx([(patch[patch < 3] == c).float().mean().item() for c in range(3)])


def test_the_cross_entropy_of_a_perfect_prediction_is_nothing():
    channels, mask = torch.randint(0, 3, (2, 1, 16, 16)).float(), torch.ones(2, 4, dtype=torch.bool)
    channels[0] = 255
    wanted, _ = target(channels, loss="ce", classes=3)
    seen = Seen(torch.zeros(2, 3, 16, 16), channels=channels)
    assert part(Channels(8, 3, loss="ce", classes=3), seen, 100 * wanted, mask) < 1e-6
    pred = torch.randn_like(wanted, requires_grad=True)
    part(Channels(8, 3, loss="ce", classes=3), seen, pred, mask).backward()
    assert (pred.grad[0] == 0).all()
    assert (pred.grad[1] != 0).all()


def test_a_perfect_prediction_is_drawn_as_the_channels():
    channels, imgs = torch.randint(0, 3, (2, 3, 16, 16)).float(), torch.zeros(2, 3, 16, 16)
    for arguments, expected in (
        ({"channels": [2, 0]}, channels[:, [2, 0]]),
        ({"loss": "ce", "classes": 3}, channels[:, :1] / 2),
        ({"channels": 1, "cell": 4}, channels[:, 1:2].unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5))),
    ):
        drawn = Channels(8, 3, **arguments).to_pixels(target(channels, **arguments)[0], imgs)
        assert torch.allclose(drawn[..., :: 16 // expected.shape[2], :: 16 // expected.shape[2]], expected)
        assert drawn.shape[2:] == imgs.shape[2:]
    assert Channels(8, 3, loss="bce").to_pixels(torch.zeros(2, 4, 64), imgs) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": [-1]}, "channels must be positions"),
        ({"loss": "hinge"}, "loss must be one of mse"),
        ({"loss": "ce"}, "classes must be a number from 2 on with loss=ce"),
        ({"classes": 3}, "and null otherwise; got 3"),
        ({"channels": [0, 1], "loss": "ce", "classes": 3}, "channels must be one with loss=ce"),
        ({"loss": "bce", "norm": "patch"}, "norm must be none with loss=bce"),
        ({"cell": 3}, "cell must divide the patch of 8 px; got 3"),
        ({"norm": "image"}, "norm must be one of patch"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Channels(8, 3, **arguments)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ("red", "data.channels must be null, a list of channels, or a mapping with input"),
        ({"target": [1]}, "data.channels must be null, a list"),
        ({"input": [0, 1, 2], "depth": [3]}, "data.channels must be null, a list"),
        ([0, 1, 1], "data.channels must be lists of different channels"),
        ([0, 1], r"data.channels.input must be 3 channels \(data.in_chans=3\); got \[0, 1\]"),
        ({"input": [0, 1, 2], "target": [2]}, "lists of different channels"),
        ({"input": [0, 1, 4], "of": 4}, "data.channels.of must be an integer above 4; got 4"),
        (
            {"input": [0, 1, 2], "target": [3], "std": 0},
            "data.channels.std must be 1 positive numbers",
        ),
    ],
)
def test_a_wrong_layout_is_refused(channels, message):
    with pytest.raises(ConfigError, match=message):
        config(channels)


def test_pictures_have_a_row_per_target():
    """Of the image's own channels in their scale, of the others stretched; both for the crop of evaluation."""
    task = Pretraining(compose("pretrain", [*RUN[1:], "data.length=3"]))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruct, "choose", lambda imgs, *rest: drawn.append(imgs) or choose(imgs, *rest))
        picture = task.picture(torch.device("cpu"))
    assert [imgs.shape[1] for imgs in drawn] == [3, 1, 1]
    side = -(-96 // drawn[0].shape[-1]) * drawn[0].shape[-1] + 4
    assert picture.image.height == 3 * 3 * side + 4 + 16


RUN = (
    *TINY_PRETRAIN,
    "schedule.epochs=2",
    "data.channels={input: [4, 1, 0], target: [2], classes: [3], of: 6}",
    "target.depth._target_=fcmae.targets.Channels",
    "target.map={_target_: fcmae.targets.Channels, channels: 1, loss: ce, classes: 256, cell: 4, weight: 0.1}",
)


@pytest.mark.slow
def test_a_run_with_channels_of_targets_resumes(tmp_path, fcmae_here):
    fcmae_here(*RUN, "hydra.run.dir=whole", "data.crops_per_image=2")
    fcmae_here(*RUN, "hydra.run.dir=cut", "trainer.max_steps=2", "data.crops_per_image=2", check=75)
    fcmae_here(*RUN, "hydra.run.dir=cut", "data.crops_per_image=2", "loader.workers=1")
    whole, cut = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert whole["backbone.stem.0.weight"].shape[1] == 3
    assert_same(whole, cut)
    logged = metrics_of(tmp_path / "whole")
    assert {"loss_pixels", "loss_depth", "loss_map"} <= logged[0].keys()
    other = "data.channels={input: [4, 1, 0], target: [5], classes: [3], of: 6}"
    refused = fcmae_here(*RUN, other, "hydra.run.dir=whole", "data.crops_per_image=2", check=2)
    assert "data.channels" in refused.stderr
    fcmae_here("knn", "checkpoint=whole", "k=1", "cache=null")
    picture = fcmae_here("reconstruct", "whole", "data.name=synthetic")
    assert (tmp_path / "reconstruction.png").is_file(), picture.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("data.channels=null", "target.depth needs data.channels with target or classes; got none"),
        ("target.map.channels=2", r"target.map.channels must be below 2, the number .*; got \[2\]"),
        ("data.transforms=[{_target_: x.Y}]", "data.transforms must be .* with channels that only targets get"),
        ("data.decode_on=gpu", "data.decode_on must be cpu unless"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(more, message, fcmae_here):
    refused = fcmae_here(*RUN, more, "hydra.run.dir=run", check=2).stderr
    assert re.search(message, refused), refused


def test_fine_tuning_takes_the_channels_of_files_that_have_more():
    bands = list(range(12))
    cfg = compose("finetune", [f"data.channels={{input: {bands}, of: 13}}", "data.path=x", "data.val_path=x"])
    settled = cfg.settled({"data": {"in_chans": 12, "mean": [0.5] * 12, "std": [0.5] * 12}})
    assert (settled.data.layout.input, settled.data.layout.of) == (bands, 13)
