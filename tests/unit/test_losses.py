"""Losses by name: formulas, and values that are not valid."""

from functools import partial

import numpy as np
import pytest
import torch

from fcmae.errors import UsageError
from fcmae.interchange.save import save
from fcmae.models import FCMAE
from fcmae.models.build import load
from fcmae.targets import Laplacian, Pixels
from fcmae.targets.losses import LOSSES, OF_NUMBERS, ce, get_loss

SHAPE = (2, 3, 6)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


def by_hand(name, pred, target):
    """The error of one patch, from its valid values only."""
    if name == "cosine":
        return 1 - (pred @ target) / np.sqrt((pred @ pred) * (target @ target))
    if name == "ce":
        return -(target * log_softmax(pred)).sum()
    gap = np.abs(pred - target)
    errors = {
        "mse": gap**2,
        "l1": gap,
        "smooth_l1": np.where(gap < 1, gap**2 / 2, gap - 0.5),
        "bce": -target * np.log(1 / (1 + np.exp(-pred))) - (1 - target) * np.log(1 / (1 + np.exp(pred))),
    }
    return errors[name].mean()


@pytest.fixture
def given():
    rng = torch.Generator().manual_seed(0)
    pred = 2 * torch.randn(SHAPE, generator=rng, dtype=torch.float64)
    return pred.requires_grad_(), torch.rand(SHAPE, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_the_error_of_a_patch_is_that_of_the_formula(name, given):
    pred, target = given
    if name == "ce":
        target = target / target.sum(-1, keepdim=True)
    expected = [[by_hand(name, p, t) for p, t in zip(*rows, strict=True)] for rows in zip(
        pred.detach().numpy(), target.numpy(), strict=True
    )]  # fmt: skip
    torch.testing.assert_close(get_loss(name)(pred, target, None), torch.tensor(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "ce"])
@pytest.mark.parametrize("hole", [float("nan"), float("inf"), 1e30])
def test_values_that_are_not_valid_change_nothing_and_have_no_gradient(name, hole, given):
    pred, target = given
    valid = torch.ones(SHAPE, dtype=torch.bool)
    valid[0, 0, 1:3] = valid[1, 2, 0] = False
    valid[0, 1] = False
    errors = get_loss(name)(pred, torch.where(valid, target, hole), valid)
    errors.sum().backward()
    assert torch.isfinite(pred.grad).all()
    assert ((pred.grad != 0) == valid).all()
    for i, j in np.ndindex(2, 3):
        left = valid[i, j]
        expected = by_hand(name, pred[i, j, left].detach().numpy(), target[i, j, left].numpy()) if left.any() else 0
        assert errors[i, j].item() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_counts_the_pixels_whose_classes_are_all_valid(given):
    pred, _ = given
    target = torch.eye(3, dtype=torch.float64)[torch.arange(12) % 3].view(SHAPE)
    valid = torch.ones(SHAPE, dtype=torch.bool)
    valid[0, 0, :3] = valid[0, 1] = False
    errors = ce(pred, torch.where(valid, target, float("nan")), valid, classes=3)
    errors.sum().backward()
    assert ((pred.grad != 0) == valid).all()
    values = pred.detach().unflatten(-1, (2, 3)).numpy()
    classes = target.unflatten(-1, (2, 3)).argmax(-1).numpy()
    own = np.array(
        [[[-log_softmax(values[i, j, k])[classes[i, j, k]] for k in (0, 1)] for j in range(3)] for i in (0, 1)]
    )
    expected = own.mean(-1)
    expected[0, 0], expected[0, 1] = own[0, 0, 1], 0
    np.testing.assert_allclose(errors.detach().numpy(), expected, rtol=1e-12)
    whole = ce(pred, target, None, classes=3).detach().numpy()
    np.testing.assert_allclose(whole, own.mean(-1), rtol=1e-12)


def test_pixels_keep_their_loss_to_the_bit():
    pred, target = torch.randn(2, 4, 3072), torch.randn(2, 4, 3072)
    assert torch.equal(Pixels(32, 3).loss(pred, target, None, None), (pred - target).square().mean(dim=-1))
    for name in OF_NUMBERS:
        assert torch.equal(Pixels(32, 3, loss=name).loss(pred, target, None, None), LOSSES[name](pred, target, None))


def test_a_saved_model_keeps_its_loss(tmp_path):
    model = FCMAE("convnextv2_atto", depths=(1, 1, 1, 1), targets={"pixels": partial(Pixels, loss="l1", norm="none")})
    save(model, tmp_path / "model.pt", image_size=64)
    imgs, mask = torch.randn(1, 3, 64, 64), torch.tensor([[True, False, False, True]])
    assert load(tmp_path / "model.pt")(imgs, mask).loss.equal(model(imgs, mask).loss)
    model.targets["pixels"] = Laplacian(32, 3)
    with pytest.raises(UsageError, match="target pixels must be of fcmae.targets.Pixels to be saved; got .*Laplacian"):
        save(model, tmp_path / "model.pt", image_size=64)


def test_a_wrong_loss_is_refused():
    with pytest.raises(ValueError, match="loss must be one of mse, l1, smooth_l1, ce, bce, cosine; got 'huber'"):
        get_loss("huber")
    with pytest.raises(ValueError, match="loss must be one of mse, l1, smooth_l1; got 'ce'"):
        Pixels(32, 3, loss="ce")
