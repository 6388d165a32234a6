"""What targets see beyond the images: labels, from the source into the batch."""

import math

import pytest
import torch

from fcmae.config import DataConfig
from fcmae.data.collate import Item, collate
from fcmae.data.labels import Labels
from fcmae.data.pixels.transforms import pretrain_transform
from fcmae.data.samples import MaskedImages
from fcmae.data.sources import Sample
from fcmae.errors import ConfigError, ImageError
from fcmae.models import FCMAE
from fcmae.targets import Pixels
from tests.conftest import TINY_PRETRAIN
from tests.results import assert_same, metrics_of, weights

CFG = DataConfig(image_size=32)


class Numbered:
    """Grey images whose labels a test gives."""

    def __init__(self, labels, classes=None, values=None):
        self.labels, self.classes, self.values = labels, classes, values

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Sample(torch.full((3, 40, 40), index, dtype=torch.uint8), self.labels[index])

    def label(self, index):
        return self.labels[index] if self.values is None else None

    def describe(self, index):
        return f"image {index}"


def batch(source, crops=1, undecoded=False):
    images = MaskedImages(
        source, pretrain_transform(CFG), (1, 1), 0, crops, undecoded, labels=Labels(source, "target.own")
    )
    return collate([Item(images[0, index], []) for index in range(len(source))]).parts


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Numbered([2, 0, None], list("abc")), torch.tensor([2, 0, -1])),
        (Numbered([None, 1.5, None]), torch.tensor([math.nan, 1.5, math.nan])),
        (Numbered([7, None]), torch.tensor([7, -1])),
        (Numbered([[1.0, math.nan], None]), torch.tensor([[1.0, math.nan], [math.nan, math.nan]])),
        (Numbered([torch.tensor([1.0]), torch.tensor([2.0])], values=torch.zeros(2, 1)), torch.tensor([[1.0], [2.0]])),
    ],
)
def test_labels_travel_with_their_crops(source, expected):
    for crops, undecoded in ((1, False), (1, True), (3, False)):
        imgs, noise, label = batch(source, crops, undecoded)
        assert len(imgs) == len(noise) == crops * len(source)
        torch.testing.assert_close(label, expected.repeat_interleave(crops, 0), equal_nan=True)


def test_labels_that_are_missing_or_of_two_shapes_are_refused():
    with pytest.raises(ConfigError, match="target.own needs labels, but the training images have none"):
        batch(Numbered([None, None]))
    with pytest.raises(ImageError, match=r"image 1: its label must have the shape \[2\] of the first one; got \[\]"):
        batch(Numbered([[1.0, 2.0], 3.0]))


class Labelled(Pixels):
    needs = ("label",)


def test_a_target_without_what_it_needs_is_refused():
    model = FCMAE("convnextv2_atto", depths=(1, 1, 1, 1), targets={"own": Labelled})
    with pytest.raises(ValueError, match="target own needs label; give label= as well"):
        model(torch.zeros(1, 3, 64, 64))
    out = model(torch.zeros(1, 3, 64, 64), label=torch.tensor([1]))
    assert out.loss.isfinite()
    assert model.predict(torch.zeros(1, 3, 64, 64))[0].keys() == {"own"}


GUESS = """
import torch


class Guess:
    dim = 1
    needs = ("label",)

    def __init__(self, patch_size, in_chans):
        pass

    def __call__(self, seen):
        patches = (seen.imgs.shape[-1] // 8) ** 2
        return seen.label.float()[:, None, None].expand(-1, patches, 1), None

    def loss(self, pred, target, mask, valid):
        return (pred - target).abs().mean(dim=-1)

    def to_pixels(self, pred, imgs):
        return None
"""


def losses(folder):
    lines = metrics_of(folder)
    return torch.tensor([[line["loss_guess"], line["loss_pixels"]] for line in lines if "loss" in line])


def test_a_run_whose_target_needs_labels_resumes_and_fits_any_layout(tmp_path, fcmae_here, fcmae):
    (tmp_path / "guess.py").write_text(GUESS)
    args = (*TINY_PRETRAIN, "target.guess._target_=guess.py:Guess", "data.crops_per_image=2", "schedule.epochs=2")
    fcmae_here(*args, "hydra.run.dir=whole")
    fcmae_here(*args, "hydra.run.dir=cut", "trainer.max_steps=2", check=75)
    fcmae_here(*args, "hydra.run.dir=cut", "loader.workers=1")
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    fcmae(*args, "hydra.run.dir=ranks", "trainer.micro_batch_size=3", ranks=2)  # with padding
    torch.testing.assert_close(losses(tmp_path / "ranks"), losses(tmp_path / "whole"), rtol=1e-4, atol=1e-5)
