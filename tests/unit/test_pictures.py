"""Pictures of reconstructions: rows, columns, and what each target draws."""

from functools import partial

import numpy as np
import pytest
import torch

from fcmae.config import DataConfig
from fcmae.data.pixels.transforms import normalize
from fcmae.evaluation import run
from fcmae.evaluation.reconstruct import reconstruct, reconstruction_picture
from fcmae.models import FCMAE
from fcmae.targets import Hog, Laplacian, Pixels, Seen
from fcmae.targets.laplacian import laplacian


@pytest.mark.parametrize("norm", ["patch", "channel", "none"])
def test_a_perfect_prediction_reconstructs_the_image(norm, monkeypatch):
    model = FCMAE("convnextv2_atto", targets={"pixels": partial(Pixels, norm=norm)}, decoder_embed_dim=16)
    imgs = torch.randn(2, 3, 64, 96)
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    perfect = {"pixels": model.targets["pixels"](Seen(imgs))[0]}
    monkeypatch.setattr(FCMAE, "predict", lambda self, imgs, mask: (perfect, mask))
    [(name, original, pred, _)], hidden = reconstruct(model, imgs, mask)
    assert name == "pixels"
    for pixels in (original, pred):
        torch.testing.assert_close(pixels, imgs, rtol=1e-3, atol=1e-4)
    assert hidden.shape == (2, 1, 64, 96)
    assert hidden[0, 0, 0, ::32].tolist() == [True, False, True]


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_a_picture_has_a_row_an_image_and_four_columns(in_chans):
    data = DataConfig(image_size=64, in_chans=in_chans, mean=[0.5] * in_chans, std=[0.2] * in_chans)
    model = FCMAE("convnextv2_atto", in_chans=in_chans, decoder_embed_dim=16)
    raw = torch.randint(0, 256, (2, in_chans, 64, 64), dtype=torch.uint8)
    picture = reconstruction_picture(model, normalize(raw, data.mean, data.std), data).image
    assert picture.width == 4 * (2 * 64 + 4) + 4
    assert picture.height == 2 * (2 * 64 + 4) + 4 + 16


def test_each_target_that_can_be_drawn_has_a_row(monkeypatch):
    """Of what it asks for; a perfect prediction pasted in is that again."""
    data = DataConfig(image_size=64, mean=[0.5] * 3, std=[0.2] * 3)
    targets = {"edges": Laplacian, "hog": Hog, "pixels": Pixels}
    model = FCMAE("convnextv2_atto", targets=targets, decoder_embed_dim=16)
    imgs = normalize(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), data.mean, data.std)
    perfect = {name: target(Seen(imgs))[0] for name, target in model.targets.items()}
    monkeypatch.setattr(FCMAE, "predict", lambda self, imgs, mask: (perfect, torch.tensor([[True, False] * 2] * 2)))
    drawn, _ = reconstruct(model, imgs)
    assert [each.name for each in drawn] == ["edges", "pixels"]
    assert (drawn[0].original - laplacian(imgs)).abs().max() < 1e-3
    picture = reconstruction_picture(model, imgs, data).image
    assert picture.height == 2 * 2 * (2 * 64 + 4) + 4 + 16
    tiles = [[_tile(picture, row, column) for column in range(4)] for row in range(4)]
    for original, masked, pred, pasted in tiles:
        assert (original - pred).abs().max() <= 1
        assert (original - pasted).abs().max() <= 1
        assert (masked[:, :64] == masked[0, 0]).all()
    assert not torch.equal(tiles[0][0], tiles[1][0])


def _tile(picture, row: int, column: int) -> torch.Tensor:
    """The lower half of a tile of 128 px, which has no name on it."""
    top, left = 16 + 4 + row * 132 + 64, 4 + column * 132
    return torch.from_numpy(np.array(picture.crop((left, top, left + 128, top + 64)))).float()


def test_a_folder_shows_images_evenly_spread_over_its_classes(tmp_path):
    """They were the first ones, all of one class."""
    files = [tmp_path / f"folder/{label}/{number}.png" for label in "abc" for number in range(4)]
    for file in (*files, tmp_path / "own.png"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    given = [f"{tmp_path}/folder", f"{tmp_path}/own.png"]
    assert run._files(given, 4) == [given[1], *map(str, files[::4])]
    assert run._files(given, 100) == [given[1], *map(str, files)]
    assert run._files(given, 1) == given[1:]
    assert run._files(list(map(str, files)), 3) == list(map(str, files[::4]))
