import pytest
import torch
from torch import nn

from fcmae.config import DataConfig
from fcmae.data.sources import Sample
from fcmae.data.transforms import normalize
from fcmae.evaluation.classify import accuracy
from fcmae.evaluation.knn import knn_accuracy, knn_predict
from fcmae.evaluation.reconstruct import reconstruct, reconstruction_picture
from fcmae.models import FCMAE, create_backbone
from fcmae.training.distributed import World

CPU = World(0, 1, 0, 1, torch.device("cpu"))
DATA = DataConfig(name="synthetic", image_size=32, length=23, workers=0, crop_pct=1.0)


class Known:
    """Images whose every pixel is their label's number, in 10 classes."""

    classes = [str(i) for i in range(10)]  # noqa: RUF012  # as the protocol has it

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return Sample(torch.full((3, 32, 32), index % 10, dtype=torch.uint8), index % 10)


class Guess(nn.Module):
    """Logits that are right for labels up to 6, second best for 7 and 8, and last for 9."""

    def forward(self, imgs):
        raw = imgs[:, 0, 0, 0] * DATA.std[0] + DATA.mean[0]
        label = (raw * 255).round().long()
        logits = torch.zeros(len(imgs), 10)
        logits.scatter_(1, label[:, None], torch.tensor([2.0] * 7 + [0.5, 0.5, -1.0])[label][:, None])
        logits[torch.arange(len(imgs)), (label + 1) % 10] += 1
        return logits


def test_accuracy_counts_every_image_once():
    result = accuracy(Guess(), Known(), DATA, batch_size=5, precision="float32", world=CPU)
    assert result["images"] == 23
    assert result["top1"] == pytest.approx(100 * 17 / 23)  # labels 0-6 of two rounds, and 0-2
    assert result["top5"] == pytest.approx(100 * 21 / 23)


def test_knn_votes_by_similarity():
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    queries = torch.tensor([[2.0, 0.1], [0.0, 3.0], [-5.0, 0.0]])
    assert knn_predict(queries, gallery, labels, 3, 0.07, 3).tolist() == [0, 1, 2]


def test_one_very_near_neighbour_outvotes_two_far_ones():
    gallery = torch.tensor([[1.0, 0.0], [0.5, 0.87], [0.5, -0.87]])
    assert knn_predict(torch.tensor([[1.0, 0.0]]), gallery, torch.tensor([0, 1, 1]), 3, 0.07, 2).tolist() == [0]
    assert knn_predict(torch.tensor([[1.0, 0.0]]), gallery, torch.tensor([0, 1, 1]), 3, 10.0, 2).tolist() == [1]


def test_knn_of_identical_images_is_perfect():
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    assert knn_accuracy(backbone, DATA, k=1, world=CPU) == 100


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(norm_pix_loss, monkeypatch):
    from fcmae.loss import patch_target
    from fcmae.models import FCMAEOutput

    model = FCMAE("convnextv2_atto", norm_pix_loss=norm_pix_loss, decoder_embed_dim=16)
    imgs = torch.randn(2, 3, 64, 96)
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    perfect = FCMAEOutput(torch.zeros(()), patch_target(imgs, 32, norm_pix_loss), mask)
    monkeypatch.setattr(FCMAE, "forward", lambda self, imgs, mask: perfect)
    pred, hidden = reconstruct(model, imgs, mask)
    torch.testing.assert_close(pred, imgs, rtol=1e-3, atol=1e-4)
    assert hidden.shape == (2, 1, 64, 96)
    assert hidden[0, 0, 0, ::32].tolist() == [True, False, True]


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_a_picture_has_a_row_an_image_and_four_columns(in_chans):
    data = DataConfig(image_size=64, in_chans=in_chans, mean=[0.5] * in_chans, std=[0.2] * in_chans)
    model = FCMAE("convnextv2_atto", in_chans=in_chans, decoder_embed_dim=16)
    raw = torch.randint(0, 256, (2, in_chans, 64, 64), dtype=torch.uint8)
    picture = reconstruction_picture(model, normalize(raw, data.mean, data.std), data)
    assert picture.width == 4 * (2 * 64 + 4) + 4
    assert picture.height == 2 * (2 * 64 + 4) + 4 + 16
