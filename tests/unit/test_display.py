"""Pictures of images that are not ordinary photographs show something, and say what."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.cli import main
from fcmae.config import DataConfig, compose
from fcmae.data.pixels.transforms import normalize
from fcmae.errors import ConfigError
from fcmae.evaluation.display import choose, rgb
from fcmae.tasks.pretraining import Pretraining
from tests import interchange as made
from tests.conftest import TINY_PRETRAIN


def data_of(in_chans: int, **values) -> DataConfig:
    return DataConfig(in_chans=in_chans, image_size=32, mean=[0.3] * in_chans, std=[0.2] * in_chans, **values)


def microscopy(in_chans: int, low: int = 400, high: int = 5884, count: int = 3) -> torch.Tensor:
    """12-bit values in 16 bits, spread evenly from ``low`` to ``high``."""
    values = torch.linspace(low, high, 32 * 32).view(1, 1, 32, 32).expand(count, in_chans, 32, 32)
    return values.to(torch.int32).to(torch.uint16)


def shown(raw: torch.Tensor, data: DataConfig, channels: list[int] | None = None) -> tuple[str, torch.Tensor]:
    imgs = normalize(raw, data.mean, data.std)
    display = choose(imgs, data, channels)
    return str(display), rgb(display, imgs, data=data)[0]


@pytest.mark.parametrize(("in_chans", "said"), [(1, "channel 0 as grey"), (3, "channels 0, 1, 2 as red, green and")])
def test_ordinary_images_are_shown_as_they_are(in_chans, said):
    raw = torch.randint(0, 256, (2, in_chans, 32, 32), dtype=torch.uint8)
    line, picture = shown(raw, data_of(in_chans))
    assert line.startswith(said)
    assert "stretched" not in line
    torch.testing.assert_close(picture, (raw / 255).expand(-1, 3, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("in_chans", "first"), [(1, "channel 0 as grey"), (2, "channel 0 as grey"), (6, "channels 0, 1, 2")]
)
def test_few_values_of_many_bits_are_stretched(in_chans, first):
    """Of 65,535 levels 400 to 5,884: without stretching a black picture."""
    line, picture = shown(microscopy(in_chans), data_of(in_chans, bit_depth=16))
    assert line.startswith(first)
    assert "stretched from its 0.5 to its 99.5 percentile" in line
    assert picture.shape == (3, 3, 32, 32)
    assert picture.min() == 0
    assert picture.max() == 1
    assert picture.mean() == pytest.approx(0.5, abs=0.01)


def test_each_image_and_channel_is_stretched_on_its_own():
    raw = torch.cat([microscopy(3, 0, 2000, 1), microscopy(3, 9000, 60000, 1)])
    raw[:, 2] = microscopy(1, 100, 200, 2)[:, 0]
    _, picture = shown(raw, data_of(3, bit_depth=16))
    assert picture.mean((2, 3)).sub(0.5).abs().max() < 0.01


def test_dark_8_bit_images_are_stretched_and_a_nearly_flat_one_is_not_turned_into_noise():
    raw = torch.randint(10, 71, (4, 1, 32, 32), dtype=torch.uint8)
    raw[3] = 10 + (torch.rand(1, 32, 32) < 0.5)
    line, picture = shown(raw, data_of(1))
    assert "stretched" in line
    assert picture[:3].std() > 0.2
    assert picture[3].max() < 0.9


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_pixels_that_are_normalised_already_are_stretched_to_what_they_hold(scale):
    imgs = scale * torch.linspace(-3, 3, 1024).view(1, 1, 32, 32)
    line, picture = shown(imgs, data_of(1))
    assert "stretched" in line
    assert picture.mean() == pytest.approx(0.5, abs=0.01)


def test_channels_are_chosen():
    raw = microscopy(6)
    raw[:, 4] = raw[:, 4].int().flip(-1)  # torch 2.11 does not mirror uint16
    line, picture = shown(raw, data_of(6, bit_depth=16), [4])
    assert line.startswith("channel 4 as grey")
    assert torch.equal(picture[:, 0], shown(raw, data_of(6, bit_depth=16))[1][:, 0].flip(-1))
    line, picture = shown(raw, data_of(6, bit_depth=16), [0, 2, 4])
    assert line.startswith("channels 0, 2, 4 as red, green and blue")
    assert not torch.equal(picture[:, 1], picture[:, 2])


class Cells:
    """The user's own source, of normalised float32."""

    classes = None

    def __len__(self):
        return 5

    def __getitem__(self, index):
        from fcmae.data.sources import Sample

        return Sample(microscopy(6, count=1)[0].float() / 1000 - 3, None)

    def label(self, index):
        return None

    def describe(self, index):
        return f"cell {index}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A checkpoint of six channels of 16 bits, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "cells", sys.modules[__name__])
    made.pretrained(tmp_path / "ours.pt", made.data_config(6, 32, bit_depth=16), stem_stride=1)
    np.save("image.npy", microscopy(6, count=1)[0].numpy())
    return tmp_path


def test_the_command_says_what_it_shows(run, capsys):
    assert main(["reconstruct", "ours.pt", "image.npy", "--channels", "0,2,4", "--out", "a.png"]) == 0
    assert "channels 0, 2, 4 as red, green and blue, each image and channel stretched" in capsys.readouterr().err
    with Image.open("a.png") as image:
        picture = np.asarray(image.convert("L"))
    assert 90 < picture[30:, 8:90].mean() < 180  # the original
    for channels in ("6", "0,1", "-1", "0,1,2,3"):
        assert main(["reconstruct", "ours.pt", "image.npy", f"--channels={channels}"]) == 2
        assert "--channels must be one or three channels from 0 to 5" in capsys.readouterr().err


def height_of(file: str) -> int:
    with Image.open(file) as image:
        return image.height


def test_the_command_takes_a_source_of_ones_own(run, capsys):
    given = ["data.source={_target_: cells.Cells}", "--max-images", "3", "--out", "a.png"]
    assert main(["reconstruct", "ours.pt", *given]) == 0
    one = 96 + 4
    assert height_of("a.png") == 3 * one + 4 + 16
    assert main(["reconstruct", "ours.pt", "image.npy", *given]) == 0
    assert height_of("a.png") == 3 * one + 4 + 16
    capsys.readouterr()
    for given, said in (
        ("data.source._target_=cells.Nothing", "data.source._target_ is 'cells.Nothing'"),
        ("data.sourc=x", "data.sourc: unknown key"),
        ("data.path=nowhere", "data.path: "),
        ("data.path=[", "data.path=["),
    ):
        assert main(["reconstruct", "ours.pt", given]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert "Traceback" not in err


def test_pictures_during_training_take_the_channels_of_the_logger(capsys):
    many = ("data.in_chans=5", f"data.mean={[0.5] * 5}", f"data.std={[0.2] * 5}")
    task = Pretraining(compose("pretrain", [*TINY_PRETRAIN[1:], *many, "logger.channels=[4]"]))
    assert task.picture(torch.device("cpu")).display.channels == (4,)
    with pytest.raises(ConfigError, match=r"logger.channels must be one or three channels from 0 to 4.*; got \[5\]"):
        compose("pretrain", [*TINY_PRETRAIN[1:], *many, "logger.channels=[5]"])
