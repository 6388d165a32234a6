import torch

from fcmae.masks.patches import patchify
from fcmae.targets.pixels import masked_pixel_loss, patch_target


def test_norm_pix_uses_unbiased_variance_with_eps_inside_the_root():
    imgs = torch.randn(2, 3, 64, 64)
    raw = patchify(imgs, 32)
    expected = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(patch_target(imgs, 32), expected)
    assert torch.equal(patch_target(imgs, 32, norm_pix=False), raw)


def test_flat_patches_have_a_finite_target():
    assert torch.equal(patch_target(torch.full((1, 1, 32, 32), 0.7), 32), torch.zeros(1, 1, 1024))


def test_loss_averages_over_a_patch_then_over_masked_patches():
    pred, target = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    expected = torch.stack([((pred - target) ** 2)[i, j].mean() for i, j in mask.nonzero().tolist()]).mean()
    torch.testing.assert_close(masked_pixel_loss(pred, target, mask), expected)


def test_predictions_of_visible_patches_have_no_gradient():
    pred = torch.randn(2, 4, 8, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    masked_pixel_loss(pred, torch.randn(2, 4, 8), mask).backward()
    assert (pred.grad[~mask] == 0).all()
    assert (pred.grad[mask] != 0).all()


def test_a_visible_nan_does_not_reach_the_loss():
    pred = torch.zeros(1, 2, 4)
    pred[0, 0] = float("nan")
    assert masked_pixel_loss(pred, torch.ones(1, 2, 4), torch.tensor([[False, True]])) == 1


def test_nothing_masked_costs_nothing():
    assert masked_pixel_loss(torch.ones(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool)) == 0
