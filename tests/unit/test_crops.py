import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fcmae.config import AugmentConfig, DataConfig
from fcmae.data import jpeg
from fcmae.data.crops import GAP, Box, RandomCrop, cut, reduction
from fcmae.data.pixels import PixelFormat, decode, open_image
from fcmae.data.transforms import eval_transform, finetune_transform, normalize, pretrain_transform
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


def test_crops_are_those_of_torchvision(photo):
    """Bit for bit, from the same state of the global generator; decoded or not."""
    size = list(CFG.size)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    ours = pretrain_transform(CFG)
    pixels = decode(photo, 3).contiguous()
    for seed in range(40):
        outputs = []
        for transform, image in ((theirs, pixels), (ours, pixels), (ours, photo)):
            torch.manual_seed(seed)
            outputs.append(transform(image))
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


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
        torch.manual_seed(seed)
        ours = pretrain_transform(cfg)(large_photo).float()
        torch.manual_seed(seed)
        whole = exact(large_photo).float()
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
    assert box == (12, 20, 400, 516, True)
    assert box.divided(4) == (3, 5, 100, 129, True)


def test_pixels_are_decoded_once_for_all_crops(large_photo):
    image = open_image(large_photo, PixelFormat(3))
    assert image.pixels(1) is image.pixels(1)
    torch.manual_seed(0)
    first = RandomCrop(CFG)(image)
    torch.manual_seed(0)
    assert torch.equal(first, RandomCrop(CFG)(large_photo))


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
    torch.manual_seed(0)
    assert finetune_transform(cfg, AugmentConfig())(image).dtype == torch.float32


def test_the_ends_of_sixteen_bits_do_not_wrap():
    """A bicubic filter overshoots at edges."""
    edge = torch.zeros(1, 16, 16).to(torch.uint16)
    edge[..., 8:] = 65535
    resized = cut(edge, Box(0, 0, 16, 16, False), (48, 48)).float()
    assert (resized.diff(dim=-1) >= 0).all()


def test_auto_augment_needs_eight_bits():
    with pytest.raises(ConfigError, match="augment.auto_augment is 'rand-m9'; allowed with data.bit_depth=16 is null"):
        finetune_transform(DataConfig(bit_depth=16), AugmentConfig(auto_augment="rand-m9"))


def test_evaluation_takes_files_and_pixels(photo):
    transform = eval_transform(CFG)
    assert torch.equal(transform(photo), transform(decode(photo, 3)))
