"""Sources of the user's own whose pixels are float32 and normalised already: nothing else is asked or changed."""

import json

import pytest
import torch

from fcmae.checkpoints.checkpoint import read
from fcmae.config import DataConfig, compose, from_dict, to_dict
from fcmae.data.pixels.transforms import denormalize, normalize
from fcmae.data.sources import Sample, train_source
from fcmae.errors import ConfigError, ImageError
from fcmae.interchange.convert import export, import_weights
from fcmae.models.build import config_of
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.pretraining import Pretraining
from tests import interchange as made
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN


class Planes:
    """Images of ``chans`` channels and one ``dtype``; the first may be damaged."""

    classes = ("a", "b")

    def __init__(self, dtype="float32", chans=5, damaged=False):
        self.dtype, self.chans, self.damaged = getattr(torch, dtype), chans, damaged

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if self.damaged and index == 0:
            raise ImageError("plane 0", "damaged")
        values = torch.randn(self.chans, 40, 40, generator=torch.Generator().manual_seed(index))
        return Sample((values if self.dtype.is_floating_point else values.abs() * 50).to(self.dtype), index % 2)

    def label(self, index):
        return index % 2

    def describe(self, index):
        return f"plane {index}"


def overrides(**arguments):
    given = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    return f"data.source={{_target_: {__name__}.Planes, {given}}}"


def test_neither_mean_nor_deviation_is_asked_for():
    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], "data.in_chans=5", overrides(dtype="float32")])
    assert cfg.data.mean == cfg.data.std == []
    assert from_dict(DataConfig, to_dict(cfg.data)) == cfg.data
    task = Pretraining(cfg)
    imgs, noise = task.dataset()[0, 3]
    assert imgs.dtype == torch.float32
    assert torch.isfinite(task.loss(task.model, (imgs[None], noise[None]))[0])
    assert task.picture(torch.device("cpu")).display.stretched


def test_the_users_own_numbers_stay():
    numbers = ("data.mean=[1,2,3,4,5]", "data.std=[1,1,1,1,1]")
    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], "data.in_chans=5", overrides(dtype="float32"), *numbers])
    assert cfg.data.mean == [1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match=r"data.std must be 5 positive numbers.*; got \[0.229.*"):
        compose("pretrain", [*TINY_PRETRAIN[1:], "data.in_chans=5", overrides(dtype="float32"), numbers[0]])


def test_raw_pixels_still_need_them():
    source = {"_target_": f"{__name__}.Planes", "dtype": "uint8"}
    with pytest.raises(ConfigError, match="data.mean and data.std are not set, but data.source does not give float32"):
        train_source(DataConfig(source=source, in_chans=5))
    assert len(train_source(DataConfig(source={**source, "damaged": True}, in_chans=5))) == 24
    train_source(DataConfig(source=source, in_chans=5, mean=[0.5] * 5, std=[0.2] * 5))
    for given in ({}, {"mean": [], "std": []}):
        with pytest.raises(ConfigError, match=r"must be 5 numbers, one per channel .* data.stats=true prints them"):
            DataConfig(in_chans=5, **given)
    with pytest.raises(ConfigError, match="data.mean and data.std are not set, but pixels are uint8"):
        normalize(torch.zeros(1, 5, 2, 2, dtype=torch.uint8), [], [])
    imgs = torch.randn(1, 5, 2, 2)
    assert normalize(imgs, [], []) is denormalize(imgs, [], []) is imgs


def test_augmentation_of_8_bits_is_refused_for_float32():
    """Pillow's images would wrap round what is not in 0..1."""
    own = overrides(dtype="float32", chans=3)
    args = [*(part for part in TINY_FINETUNE[1:] if part != "augment=none"), own, "trainer.eval_every_epochs=null"]
    with pytest.raises(ConfigError, match="augment.auto_augment is 'rand-m9'; must be null for a source of float32"):
        Finetuning(compose("finetune", [*args, "augment.auto_augment=rand-m9"]))
    Finetuning(compose("finetune", [*args, "augment.auto_augment=null"]))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_exports_say_so(tmp_path, library):
    data = DataConfig(in_chans=5, image_size=64, source={"_target_": f"{__name__}.Planes"})
    made.finetuned(tmp_path / "ours.pt", data)
    export(tmp_path / "ours.pt", library, tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| mean | normalised by the source |" in card
    assert "float32, normalised by the source that it was trained with" in card
    file = tmp_path / "out" / ("config.json" if library == "timm" else "preprocessor_config.json")
    config = json.loads(file.read_text())
    mean = config["pretrained_cfg"]["mean"] if library == "timm" else config["image_mean"]
    assert mean == [0] * 5
    import_weights(tmp_path / "out", library, tmp_path / "back.pt")
    assert config_of(read(tmp_path / "back.pt"), tmp_path / "back.pt").data.std == [1] * 5
