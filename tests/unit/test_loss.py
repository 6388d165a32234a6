"""Targets and their losses."""

from functools import partial

import pytest
import torch

from fcmae.errors import UsageError
from fcmae.masks.patches import patchify
from fcmae.models import FCMAE
from fcmae.targets import Laplacian, Pixels, Seen, has_own_errors, part

MASK = torch.tensor([[True, False, True, True], [False, True, False, False]])


def target_of(imgs, norm):
    return Pixels(32, imgs.shape[1], norm)(Seen(imgs))[0]


def test_pixels_are_normalised_by_the_unbiased_variance_with_eps_inside_the_root():
    imgs = torch.randn(2, 3, 64, 64)
    raw = patchify(imgs, 32)
    expected = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(target_of(imgs, "patch"), expected)
    assert torch.equal(target_of(imgs, "none"), raw)
    channels = raw.view(2, 4, 1024, 3)
    expected = (channels - channels.mean(2, keepdim=True)) / (channels.var(2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(target_of(imgs, "channel"), expected.flatten(2))


def test_flat_patches_have_a_finite_target():
    for norm in ("patch", "channel"):
        assert target_of(torch.full((1, 2, 32, 32), 0.7), norm).abs().max() < 1e-3
    assert torch.equal(target_of(torch.full((1, 1, 32, 32), 0.7), "patch"), torch.zeros(1, 1, 1024))


class Given:
    """A target with the values, and the validity, that a test gives."""

    def __init__(self, target, valid=None, dim=8):
        self.target, self.valid, self.dim = target, valid, dim

    def __call__(self, seen):
        return self.target, self.valid

    def loss(self, pred, target, mask, valid):
        squares = (pred - target).square()
        if valid is None:
            return squares.mean(-1)
        return torch.where(valid, squares, 0).sum(-1) / valid.sum(-1).clamp(min=1)

    def to_pixels(self, pred, imgs):
        return None


def test_loss_averages_over_a_patch_then_over_masked_patches():
    pred, target = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    expected = torch.stack([((pred - target) ** 2)[i, j].mean() for i, j in MASK.nonzero().tolist()]).mean()
    torch.testing.assert_close(part(Given(target), Seen(pred), pred, MASK), expected)


def test_predictions_of_visible_patches_have_no_gradient():
    pred = torch.randn(2, 4, 8, requires_grad=True)
    part(Given(torch.randn(2, 4, 8)), Seen(pred), pred, MASK).backward()
    assert (pred.grad[~MASK] == 0).all()
    assert (pred.grad[MASK] != 0).all()


def test_invalid_values_have_no_gradient_and_images_count_the_same():
    pred = torch.randn(2, 4, 8, requires_grad=True)
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    valid = torch.ones(2, 4, 8, dtype=torch.bool)
    valid[0, :2] = valid[1, 0, :5] = False
    target = torch.randn(2, 4, 8)
    loss = part(Given(target, valid), Seen(pred), pred, mask)
    loss.backward()
    assert ((pred.grad != 0) == valid & mask[..., None]).all()
    squares = (pred - target).square().detach()
    first, second = squares[0, 2].mean(), (squares[1, 0, 5:].mean() + squares[1, 1].mean() + squares[1, 2].mean()) / 3
    torch.testing.assert_close(loss, (first + second) / 2)
    single = [
        part(Given(target[i : i + 1], valid[i : i + 1]), Seen(pred[:1]), pred[i : i + 1], mask[:1]) for i in (0, 1)
    ]
    torch.testing.assert_close(loss, torch.stack(single).mean())  # whatever the micro-batches


def test_a_patch_without_a_valid_pixel_is_not_in_the_loss_of_a_target_that_says_nothing():
    pred, target = torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 4, 8)
    pixels = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    pixels[0, 1, 3, 3] = pixels[0, 0, 4, 7] = True  # in the first and the last patch
    mask = torch.tensor([[True, True, False, True]])
    loss = part(Given(target), Seen(torch.zeros(1, 2, 8, 8), pixels), pred, mask)
    torch.testing.assert_close(loss, (pred - target)[0, [0, 3]].square().mean())
    loss.backward()
    assert pred.grad.abs().sum(-1).bool().tolist() == [[True, False, False, True]]


def test_a_visible_nan_does_not_reach_the_loss():
    pred = torch.zeros(1, 2, 4)
    pred[0, 0] = float("nan")
    assert part(Given(torch.ones(1, 2, 4)), Seen(pred), pred, torch.tensor([[False, True]])) == 1


def test_nothing_masked_costs_nothing():
    pred = torch.ones(1, 2, 4)
    assert part(Given(torch.zeros(1, 2, 4)), Seen(pred), pred, torch.zeros(1, 2, dtype=torch.bool)) == 0


def test_several_targets_have_a_head_each_and_add_up_by_their_weights():
    one = FCMAE("convnextv2_atto", decoder_embed_dim=16, depths=(1, 1, 1, 1))
    targets = {"pixels": Pixels, "grey": partial(Pixels, norm="none")}
    two = FCMAE("convnextv2_atto", decoder_embed_dim=16, depths=(1, 1, 1, 1), targets=targets)
    new = ["decoder.pred_grey.weight", "decoder.pred_grey.bias"]
    assert list(two.state_dict()) == [*one.state_dict(), *new]
    one.load_state_dict({name: value for name, value in two.state_dict().items() if name not in new})
    two.target_weights = {"pixels": 0.5, "grey": 2.0}
    imgs, mask = torch.randn(2, 3, 64, 64), torch.tensor([[True, False, True, False]] * 2)
    loss, pred, ours = two(imgs, mask)
    out = two(imgs, mask)
    assert torch.equal(out.parts["pixels"], one(imgs, mask).loss)
    assert torch.equal(loss, 0.5 * out.parts["pixels"] + 2 * out.parts["grey"])
    assert torch.equal(pred, out.preds["pixels"])
    assert torch.equal(ours, mask)
    out.loss.backward()
    assert two.decoder.pred_grey.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Given(torch.zeros(2, 4, 7)), r"the target of tests.*Given must be \[2, 4, 8\]; got \[2, 4, 7\]"),
        (Given(torch.zeros(2, 4, 8), torch.ones(2, 4)), r"the validity of .*Given must be \[2, 4, 8\]; got \[2, 4\]"),
    ],
)
def test_a_target_that_returns_other_shapes_is_refused_in_one_line(target, message):
    with pytest.raises(UsageError, match=message) as raised:
        part(target, Seen(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8), MASK)
    assert "\n" not in str(raised.value)


class Own(Pixels):
    """A researcher's target made from ours."""


@pytest.mark.parametrize(
    ("target", "seen", "expected"),
    [
        (Pixels, {}, True),
        (partial(Pixels, norm="channel"), {}, False),
        (partial(Pixels, loss="l1"), {}, False),
        (Pixels, {"valid": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, False),
        (Own, {}, False),
        (Laplacian, {}, False),
    ],
)
def test_only_the_default_target_of_whole_images_has_a_kernel(target, seen, expected, monkeypatch):
    monkeypatch.setattr("fcmae.targets.pixels.HAS_TRITON", True)
    target = target(4, 3)

    class OnDevice(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr("fcmae.targets.pixels.Tensor", OnDevice)
    pred = torch.zeros(1, 4, 48, dtype=torch.bfloat16).as_subclass(OnDevice)
    imgs = torch.zeros(1, 3, 8, 8)
    assert has_own_errors(target, Seen(imgs, **seen), pred) == expected
    assert not has_own_errors(target, Seen(imgs.requires_grad_()), pred)
    assert not has_own_errors(target, Seen(imgs.detach()), pred.float())
