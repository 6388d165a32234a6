"""Numbers are resized as torch's interpolate does it, with the same bits wherever they lie and whoever asks."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from fcmae.config import DataConfig
from fcmae.data.pixels.crops import Box, cut, resize
from fcmae.data.pixels.extra import Extra
from fcmae.data.pixels.nodata import _any_read
from fcmae.data.pixels.resampling import _blocks, resize_numbers
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.samples import MaskedImages
from fcmae.data.sources.base import Sample

SIDES = [
    (64, 64),
    (50, 64),
    (17, 96),
    (1, 8),
    (3, 1),
    (300, 224),
    (150, 224),
    (600, 70),
    (1100, 33),
    (513, 1000),
    (65, 64),
]
"""Old and new."""


def numbers(channels, height, width, dtype=torch.float32):
    values = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(height)) * 60_000 - 9
    return values if dtype == torch.float32 else values.clamp(min=0).to(dtype)


def by_torch(pixels, size):
    return interpolate(pixels[None].float(), size, mode="bicubic", antialias=True)[0]


@pytest.mark.parametrize("number", range(len(SIDES)))
def test_numbers_are_those_of_torch(number):
    """Each pair of sides with two others, upright and mirrored, with one and several channels."""
    (height, rows), (width, cols) = SIDES[number], SIDES[(number * 4 + 3) % len(SIDES)]
    for channels in (1, 5):
        pixels = numbers(channels, height, width)
        expected = by_torch(pixels, (rows, cols))
        for vflip in (False, True):
            found = resize_numbers(pixels, (rows, cols), vflip, flip=not vflip)
            mirrored = expected.flip(1 if vflip else 2)
            torch.testing.assert_close(found, mirrored, rtol=0, atol=1e-5 * float(pixels.abs().max()))
            assert found.permute(1, 0, 2).is_contiguous()


def test_only_pixels_that_count_for_no_data_are_read():
    """Also where torch's float32 rounds the end of the filter to the next pixel."""
    for side, size in itertools.product(range(1, 130, 2), (1, 2, 3, 7, 31, 64, 97)):
        read = _any_read(torch.eye(side, dtype=torch.bool), 1, size).T  # [new, old]
        for begin, end, low, high, weights in [] if side == size else _blocks(side, size, False):
            assert not (weights[~read[begin:end, low:high]]).any()
            assert not read[begin:end, :low].any()
            assert not read[begin:end, high:].any()


def test_long_images_take_no_more_memory_than_torch():
    for height, width, size in ((2, 20_000, (224, 16)), (20_000, 2, (16, 224))):
        pixels = numbers(1, height, width)
        torch.testing.assert_close(resize_numbers(pixels, size), by_torch(pixels, size), rtol=0, atol=0.6)


def test_uint16_is_within_one_level():
    pixels = numbers(3, 90, 120, torch.uint16)
    found, expected = resize(pixels, [64, 64]).int(), by_torch(pixels, (64, 64)).round().clamp(0, 65535).int()
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < 0.02  # one unit in the last place of float32 at 60,000 is 0.004
    assert resize(pixels, [45]).shape == (3, 45, 60)
    assert resize(pixels, [90]) is pixels


def test_bits_do_not_depend_on_threads_or_addresses():
    whole = torch.zeros(4, 90, 103)
    pixels = numbers(4, 61, 83)
    whole[:, 7:68, 3:86] = pixels
    elsewhere = torch.from_numpy(
        np.concatenate([np.zeros(1, np.float32), pixels.numpy().ravel()])[1:].reshape(4, 61, 83)
    )
    expected = resize_numbers(pixels, (224, 50))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for same in (whole[:, 7:68, 3:86], elsewhere, pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
                assert torch.equal(resize_numbers(same, (224, 50)), expected)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16])
def test_a_crop_is_cut_then_mirrored(dtype):
    pixels, box = numbers(2, 40, 50, dtype), Box(3, 4, 30, 20, True, True, 1)
    expected = resize(pixels[:, 3:33, 4:24], [16, 16]).float().flip(1, 2).rot90(1, (1, 2))
    torch.testing.assert_close(
        cut(pixels, box, (16, 16)).float(), expected, rtol=0, atol=1 if dtype == torch.uint16 else 0.3
    )


class Whole:
    """A source of one image."""

    def __init__(self, image):
        self.image = image

    def __getitem__(self, index):
        return Sample(self.image, None)


def test_transforms_do_not_change_an_image_that_a_crop_shows_whole():
    """The crop of an image of its size may be the image's memory, which further crops and epochs read."""
    cfg = DataConfig(in_chans=1, image_size=8, crop_scale=[1, 1], crop_ratio=[1, 1], hflip=0, mean=[0.5], std=[1])
    extra = Extra([])
    extra.steps = [("brighter", lambda crop: crop + 1)]
    for image in (torch.full((1, 8, 8), 7, dtype=torch.uint8), torch.full((1, 8, 8), 7.0)):
        crop, _ = MaskedImages(Whole(image), pretrain_transform(cfg), (1, 1), seed=0, extra=extra)[0, 0]
        assert (crop == 8).all()
        assert (image == 7).all()
