"""The labels target: classes and numbers of whole images, some of them missing."""

import pytest
import torch
import torch.nn.functional as F

from fcmae.config import compose
from fcmae.errors import ConfigError
from fcmae.models import FCMAE
from fcmae.targets import Labels, Seen, part
from fcmae.tasks.label_targets import settle_labels
from tests.conftest import TINY_PRETRAIN
from tests.unit.test_seen import Numbered

IMGS = torch.zeros(4, 3, 64, 64)
MASK = torch.tensor([[True, False, True, True]] * 4)
NAN = float("nan")


def loss_of(target, label, pred):
    return part(target, Seen(IMGS, label=label), pred, MASK)


def test_a_class_is_predicted_from_the_mean_over_all_patches_and_missing_ones_are_left_out():
    target = Labels(32, 3, dim=5)
    label, pred = torch.tensor([3, -1, 0, 4]), torch.randn(4, 4, 5, requires_grad=True)
    loss = loss_of(target, label, pred)
    of_images = F.cross_entropy(pred.mean(1), label.clamp(min=0), reduction="none")
    torch.testing.assert_close(loss, of_images[[0, 2, 3]].sum() / 4)
    loss.backward()
    assert ((pred.grad != 0).any(-1) == (label >= 0)[:, None]).all()
    one_hot = Labels(32, 3, loss="bce", dim=5)(Seen(IMGS, label=label))
    assert one_hot[0][:, 0].argmax(-1).tolist() == [3, 0, 0, 4]
    assert one_hot[0].shape == (4, 4, 5)
    assert one_hot[1].any(-1).any(-1).tolist() == [True, False, True, True]


def test_numbers_are_standardised_and_each_may_be_missing():
    target = Labels(32, 3, loss="mse", dim=2, mean=[10.0, -1.0], std=[2.0, 0.5])
    label, pred = torch.tensor([[12, -1], [NAN, -2], [8, NAN], [NAN, NAN]]), torch.randn(4, 4, 2, requires_grad=True)
    loss = loss_of(target, label, pred)
    means = pred.mean(1)
    expected = ((means[0, 0] - 1) ** 2 + means[0, 1] ** 2) / 2 + (means[1, 1] + 2) ** 2 + (means[2, 0] + 1) ** 2
    torch.testing.assert_close(loss, expected / 4)
    loss.backward()
    assert ((pred.grad != 0) == ~label.isnan()[:, None]).all()
    alone = Labels(32, 3, loss="l1", dim=1)
    torch.testing.assert_close(loss_of(alone, label[:, 0], pred[..., :1] * 0), torch.tensor(20 / 4))


def test_patches_without_a_valid_pixel_take_no_part():
    valid = torch.ones(4, 1, 64, 64, dtype=torch.bool)
    valid[1, :, :, 32:] = False  # its second and fourth patch
    valid[2, :, :40] = False  # its first two, and some of the others
    pred = torch.randn(4, 4, 5, requires_grad=True)
    loss = part(Labels(32, 3, dim=5), Seen(IMGS, valid, label=torch.tensor([0, 1, 2, 3])), pred, MASK)
    loss.backward()
    left = torch.tensor([[True] * 4, [True, False, True, False], [False, False, True, True], [True] * 4])
    assert ((pred.grad != 0).any(-1) == left).all()
    means = torch.stack([pred[image][left[image]].mean(0) for image in range(4)])
    torch.testing.assert_close(loss, F.cross_entropy(means, torch.tensor([0, 1, 2, 3])))


def test_labels_of_zero_and_one_are_predicted_each():
    label, pred = torch.tensor([[1, 0, NAN]] * 4), torch.randn(4, 4, 3)
    expected = F.binary_cross_entropy_with_logits(pred.mean(1)[:, :2], label[:, :2])
    torch.testing.assert_close(loss_of(Labels(32, 3, loss="bce", dim=3), label, pred), expected)
    whole = torch.tensor([[1, 0, -1]] * 4)  # integers, of which -1 is missing
    torch.testing.assert_close(loss_of(Labels(32, 3, loss="bce", dim=3), whole, pred), expected)


def test_a_model_asks_for_labels_and_learns_from_them():
    model = FCMAE(
        "convnextv2_atto", decoder_embed_dim=8, depths=(1,) * 4, targets={"labels": lambda **k: Labels(dim=4, **k)}
    )
    with pytest.raises(ValueError, match="target labels needs label; give label= as well"):
        model(torch.randn(4, 3, 64, 64), MASK)
    out = model(torch.randn(4, 3, 64, 64), MASK, label=torch.tensor([0, 1, 2, -1]))
    expected = F.cross_entropy(out.pred.mean(1)[:3], torch.tensor([0, 1, 2]), reduction="sum") / 4
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert model.decoder.pred_labels.weight.grad.abs().sum() > 0


def settled(source, loss):
    cfg = compose("pretrain", [*TINY_PRETRAIN[1:], "target=labels", f"target.labels.loss={loss}"])
    assert settle_labels(cfg, lambda: source) is source
    return {name: value for name, value in cfg.target["labels"].items() if name in ("dim", "mean", "std")}


def test_the_number_of_outputs_and_the_scale_come_from_the_images():
    assert settled(Numbered([0, 1, 1], ["a", "b", "c"]), "ce") == {"dim": 3}
    assert settled(Numbered([4, None, -1, 0]), "bce") == {"dim": 5}
    assert settled(Numbered([1.5, None, 2.5]), "mse") == {"dim": 1, "mean": [2.0], "std": [0.5]}
    assert settled(Numbered([5, 7, -1]), "mse") == {"dim": 1, "mean": [6.0], "std": [1.0]}
    columns = Numbered([[1.0, 0.0], None, [NAN, 1.0]])
    assert settled(columns, "bce") == {"dim": 2}
    assert settled(Numbered([[1.0, 4.0], [3.0, NAN], [NAN, 8.0]]), "l1") == {
        "dim": 2, "mean": [2.0, 6.0], "std": [1.0, 2.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "loss", "message"),
    [
        (Numbered([None, None]), "ce", "target.labels needs labels, but the training images have none"),
        (
            Numbered([0.5, 1.5]),
            "ce",
            "target.labels.loss=ce needs classes; the training images have a number each. Give mse",
        ),
        (
            Numbered([[0.5, 1.5]]),
            "ce",
            "needs classes; the training images have 2 numbers each. Give mse, l1 or smooth_l1",
        ),
        (
            Numbered([0, 1], ["a", "b"]),
            "mse",
            "target.labels.loss=mse needs numbers; the training images have 2 classes",
        ),
        (Numbered([[0.0, 2.0]]), "bce", "column 1 of the labels must be from 0 to 1 for target.labels.loss=bce"),
        (Numbered([[0.0, NAN], [1.0, NAN]]), "mse", "target.labels: column 1 of the labels is empty"),
        (Numbered([2.0, 2.0]), "smooth_l1", "target.labels: column 0 of the labels has one value only"),
        (Numbered([-3, 2]), "ce", "target.labels: classes must be integers from 0, or -1 if missing; got -3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(source, loss, message):
    with pytest.raises(ConfigError, match=message) as raised:
        settled(source, loss)
    assert "\n" not in str(raised.value)
