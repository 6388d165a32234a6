import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fcmae.config import AugmentConfig, DataConfig, compose
from fcmae.data.pixels import jpeg
from fcmae.data.pixels.crops import GAP, Box, RandomCrop, cut, cut_nearest, middle, random_part, reduction, resize
from fcmae.data.pixels.decode import PixelFormat, decode, open_image
from fcmae.data.pixels.transforms import eval_transform, finetune_transform, normalize, pretrain_transform
from fcmae.errors import ConfigError
from tests.unit.test_pixels import encoded, noise, npy

CFG = DataConfig(image_size=[48, 64])


def texture(height, width, roughness=1.0):
    """Something like a photograph: the power of its frequencies falls with their square."""
    rng = np.random.default_rng(0)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    spectrum = (
        np.fft.fft2(rng.standard_normal((3, height, width))) / np.maximum(np.hypot(fy, fx), 1 / width) ** roughness
    )
    values = np.fft.ifft2(spectrum).real
    values = 128 + 50 * (values - values.mean()) / values.std()
    return values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.fixture(scope="module")
def photo():
    return encoded(texture(150, 200), "JPEG", quality=90)


@pytest.fixture(scope="module")
def large_photo():
    return encoded(texture(768, 1024), "JPEG", quality=90)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_crops_are_those_of_torchvision(photo, in_chans):
    """Bit for bit, for the same box; decoded or not."""
    ours = pretrain_transform(
        DataConfig(image_size=[48, 64], in_chans=in_chans, mean=[0] * in_chans, std=[1] * in_chans)
    )
    pixels = decode(photo, in_chans)
    flips = set()
    for seed in range(40):
        box, _ = ours.draw(open_image(photo, ours.format), random.Random(seed).random)
        expected = F.resized_crop(
            pixels.contiguous(), *box[:4], list(CFG.size), v2.InterpolationMode.BICUBIC, antialias=True
        )
        expected = F.horizontal_flip(expected) if box.flip else expected
        for image in (pixels, pixels.contiguous(), photo):
            assert torch.equal(ours(image, random.Random(seed).random), expected)
        flips.add(box.flip)
    assert flips == {False, True}


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_a_whole_contiguous_image_is_resized_as_by_torchvision(in_chans, flip):
    """With crop_scale=[1, 1], or in evaluation; torch's own filter writes out of bounds for RGB if asked directly."""
    pixels = torch.randint(0, 256, (in_chans, 61, 83), dtype=torch.uint8)
    expected = F.resize(pixels, list(CFG.size), v2.InterpolationMode.BICUBIC, antialias=True)
    expected = expected.flip(-1) if flip else expected
    assert torch.equal(cut(pixels, Box(0, 0, 61, 83, flip), CFG.size), expected)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (60, 400), (400, 60), (3, 2), (1, 1), (1, 9)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.5), (0.01, 0.02)])
def test_boxes_are_those_of_torchvision(monkeypatch, size, scale):
    """The same from the same uniform numbers, whether one fits at once, later, or not at all."""
    ratio = (0.75, 4 / 3)
    theirs = v2.RandomResizedCrop([8, 8], scale=scale, ratio=ratio)
    image = torch.empty(1, *size, device="meta")
    for seed in range(50):
        numbers = random.Random(seed)
        monkeypatch.setattr(
            torch.Tensor,
            "uniform_",
            lambda self, low, high, numbers=numbers: self.fill_(low + (high - low) * numbers.random()),
        )
        monkeypatch.setattr(
            torch, "randint", lambda low, high, size, numbers=numbers: torch.tensor([int(high * numbers.random())])
        )
        expected = theirs.make_params([image])
        monkeypatch.undo()
        part = random_part(size, scale, ratio, random.Random(seed).random)
        assert dict(zip(("top", "left", "height", "width"), part, strict=True)) == expected


@pytest.mark.parametrize("name", ["simplejpeg", "Pillow"])
def test_large_jpegs_are_decoded_to_a_fraction(large_photo, monkeypatch, name):
    """Within 2 of 255 (root mean square) of what the whole gives, and much closer than the next pixel."""
    if name == "Pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    asked = set()
    plain = jpeg.decode

    def counted(data, size, in_chans, reduce=1):
        asked.add(reduce)
        return plain(data, size, in_chans, reduce)

    monkeypatch.setattr(jpeg, "decode", counted)
    cfg = DataConfig(image_size=[24, 32], crop_scale=[0.01, 0.5])
    exact = pretrain_transform(dataclasses.replace(cfg, exact_decode=True))
    for seed in range(40):
        ours = pretrain_transform(cfg)(large_photo, random.Random(seed).random).float()
        whole = exact(large_photo, random.Random(seed).random).float()
        assert (ours - whole).square().mean().sqrt() < 2
        shifted = (whole[..., 1:] - whole[..., :-1]).square().mean().sqrt()
        assert (ours - whole).square().mean().sqrt() < 0.3 * shifted
    assert asked == {1, 2, 4, 8}


def test_no_more_is_decoded_than_the_crop_needs(large_photo):
    """The fraction that is asked for is the smallest that keeps GAP times the pixels of the result."""
    assert reduction(Box(0, 0, 48 * 8 * GAP, 64 * 8 * GAP, False), (48, 64)) == 8
    assert reduction(Box(0, 0, 48 * 8 * GAP - 1, 64 * 8 * GAP, False), (48, 64)) == 4
    assert reduction(Box(0, 0, 48 * 2 * GAP, 64 * 2 * GAP, False), (48, 64)) == 2
    assert reduction(Box(0, 0, 48 * 2 * GAP, 64 * 2 * GAP - 1, False), (48, 64)) == 1


def test_boxes_of_reduced_images_are_on_their_grid():
    box = Box(13, 22, 403, 518, True).aligned(4)
    assert box == Box(12, 20, 400, 516, True)
    assert box.divided(4) == Box(3, 5, 100, 129, True)


def test_pixels_are_decoded_once_for_all_crops(large_photo):
    image = open_image(large_photo, PixelFormat(3))
    assert image.pixels(1) is image.pixels(1)
    first = RandomCrop(CFG)(image, random.Random(0).random)
    assert torch.equal(first, RandomCrop(CFG)(large_photo, random.Random(0).random))


def test_padding_comes_before_the_crop(photo):
    cfg = DataConfig(image_size=64, pad=500, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0])
    cropped = pretrain_transform(cfg)(photo)
    assert cropped[:, 0].max() == 0
    assert cropped[:, 32, 32].max() > 0


@pytest.mark.parametrize("in_chans", [1, 2, 5])
def test_sixteen_bits_stay_sixteen(in_chans):
    cfg = DataConfig(image_size=32, in_chans=in_chans, bit_depth=16, mean=[0.5] * in_chans, std=[0.1] * in_chans)
    values = noise(in_chans, 60, 40, dtype=np.uint16, most=65535)
    image = npy(values)
    for transform in (pretrain_transform(cfg), eval_transform(cfg)):
        raw = transform(image)
        assert (raw.dtype, raw.shape) == (torch.uint16, (in_chans, 32, 32))
        assert raw.float().std() > 1000
    whole = cut(torch.from_numpy(values), Box(0, 0, 60, 40, True), (60, 40))
    assert np.array_equal(whole.numpy(), values[..., ::-1])
    expected = (torch.from_numpy(values.astype(np.float32)) / 65535 - 0.5) / 0.1
    torch.testing.assert_close(normalize(torch.from_numpy(values), cfg.mean, cfg.std), expected)
    assert finetune_transform(cfg, AugmentConfig())(image).dtype == torch.float32


def test_the_ends_of_sixteen_bits_do_not_wrap():
    """A bicubic filter overshoots at edges."""
    edge = torch.zeros(1, 16, 16).to(torch.uint16)
    edge[..., 8:] = 65535
    resized = cut(edge, Box(0, 0, 16, 16, False), (48, 48)).float()
    assert (resized.diff(dim=-1) >= 0).all()


def test_auto_augment_needs_eight_bits():
    with pytest.raises(ConfigError, match="augment.auto_augment must be null with data.bit_depth=16; got 'rand-m9'"):
        finetune_transform(DataConfig(bit_depth=16), AugmentConfig(auto_augment="rand-m9"))


def test_evaluation_takes_files_and_pixels(photo):
    transform = eval_transform(CFG)
    assert torch.equal(transform(photo), transform(decode(photo, 3)))


@pytest.mark.parametrize("shape", [(100, 1600), (8, 200), (33, 1057), (1000, 9)])
def test_of_long_images_evaluation_resizes_the_middle_alone(shape):
    """To a ratio of 16 the whole, bit for bit as before; beyond it the result may be shifted by half a pixel."""
    whole = torch.from_numpy(texture(*shape).transpose(2, 0, 1))
    expected = F.center_crop(F.resize(whole, [256], v2.InterpolationMode.BICUBIC, antialias=True), [224])
    difference = (eval_transform(DataConfig())(whole).int() - expected.int()).abs().float()
    assert difference.max() <= (0 if shape == (100, 1600) else 12)
    assert difference.mean() < 1
    assert middle(whole, 256, 256).shape[1:] == {8: (8, 128), 33: (33, 529), 1000: (144, 9)}.get(shape[0], shape)


def test_a_tall_image_is_resized_in_its_height_first():
    tall = torch.from_numpy(texture(2000, 3).transpose(2, 0, 1))
    expected = F.resize(tall, [64, 64], v2.InterpolationMode.BICUBIC, antialias=True)
    difference = (resize(tall, [64, 64]).int() - expected.int()).abs().float()
    assert difference.max() <= 4  # uint8 is rounded between the two
    assert difference.mean() < 0.5


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (3, 3), (60, 80)])
def test_images_with_their_channels_first_are_resized_as_others(channels, shape):
    """As in a .npy file; torch's own function ends the process."""
    image = torch.from_numpy(noise(channels, *shape))
    expected = torch.nn.functional.interpolate(image[None], (384, 384), mode="bicubic", antialias=True)[0]
    assert torch.equal(eval_transform(DataConfig(image_size=384))(image), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.bool])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crops_are_turned_in_the_same_order_in_memory(dtype, channels):
    pixels = torch.randint(0, 2, (channels, 20, 20)).to(dtype)
    how = cut_nearest if dtype == torch.bool else cut
    plain = how(pixels, Box(2, 3, 12, 12, False), (8, 8))
    as_numpy = plain.numpy()
    for flip, vflip, turns in itertools.product((False, True), (False, True), range(4)):
        turned = how(pixels, Box(2, 3, 12, 12, flip, vflip, turns), (8, 8))
        expected = as_numpy[:, :, ::-1] if flip else as_numpy
        expected = expected[:, ::-1] if vflip else expected
        assert (turned.numpy() == np.rot90(expected, turns, (1, 2))).all()
        assert turned.stride() == plain.stride()


def test_turns_are_drawn_only_where_they_are_asked_for():
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)

    def boxes(*overrides):
        data = compose("pretrain", ["data=synthetic", "data.image_size=64", *overrides]).data
        crop = RandomCrop(data)
        return [crop.with_box(image, random.Random(seed).random)[1] for seed in range(400)]

    before, turned, mirrored = boxes(), boxes("data.rot90=true"), boxes("data.vflip=0.5")
    assert [box[:5] for box in before] == [box[:5] for box in turned] == [box[:5] for box in mirrored]
    assert {(box.vflip, box.turns) for box in before} == {(False, 0)}
    assert {box.turns for box in turned} == {0, 1, 2, 3}
    assert all(60 < [box.turns for box in turned].count(turn) < 140 for turn in range(4))
    assert 150 < sum(box.vflip for box in mirrored) < 250
    with pytest.raises(ConfigError, match="data.rot90 must be false with data.image_size=\\[64, 128\\]"):
        compose("pretrain", ["data=synthetic", "data.image_size=[64,128]", "data.rot90=true"])


def test_zoomed_crops_have_the_scale_of_the_image():
    cfg = DataConfig(image_size=[32, 48], crop_zoom=[0.5, 2.0])
    crop, draw = RandomCrop(cfg), random.Random(0).random
    boxes = [crop.box((200, 300), draw) for _ in range(400)]
    factors = np.array([32 / box.height for box in boxes])
    assert 0.49 < factors.min() < 0.55
    assert 1.8 < factors.max() < 2.1
    assert 0.8 < np.median(factors) < 1.25  # the logarithm is uniform
    for box in boxes:
        assert box.width / box.height == pytest.approx(1.5, rel=0.05)
        assert 0 <= box.top <= 200 - box.height
        assert 0 <= box.left <= 300 - box.width
    small = crop.box((20, 100), draw)
    assert (small.top, small.height, small.width) == (0, 20, 30)  # enlarged until it fits
    own = RandomCrop(DataConfig(image_size=32, crop_zoom=[1, 1], hflip=0))
    image = torch.randint(0, 255, (3, 70, 90), dtype=torch.uint8)
    pixels, box = own.with_box(image, draw)
    assert torch.equal(pixels, image[:, box.top : box.top + 32, box.left : box.left + 32])
