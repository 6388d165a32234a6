import pytest
import torch

from fcmae.masks.patches import grid_size, len_keep, patchify, random_mask, unpatchify, upsample_mask, visible_indices


def test_len_keep_rounds_down():
    assert len_keep(49, 0.6) == 19
    assert len_keep(16, 0.0) == 16


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.99])
def test_len_keep_refuses_what_leaves_nothing(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        len_keep(49, ratio)


def test_grid_size_names_the_sizes_that_fit():
    assert grid_size(224, 160, 32) == (7, 5)
    with pytest.raises(ValueError, match="height 225 is not a multiple of the patch of 32 px.* 224 and 256"):
        grid_size(225, 224, 32)
    with pytest.raises(ValueError, match="width 20 .*size that fits is 32"):
        grid_size(32, 20, 32)


def test_random_mask_keeps_exactly_the_least_noise():
    noise = torch.rand(5, 12)
    mask = random_mask(noise, 4)
    assert mask.dtype == torch.bool
    assert (~mask).sum(dim=1).tolist() == [4] * 5
    assert (noise.masked_fill(mask, -1).amax(dim=1) < noise.masked_fill(~mask, 2).amin(dim=1)).all()


def test_visible_indices_are_ascending():
    mask = random_mask(torch.rand(5, 12), 4)
    index = visible_indices(mask, 4)
    assert (index.diff(dim=1) > 0).all()
    assert not mask.gather(1, index).any()


def test_patchify_has_the_channel_fastest_and_is_undone():
    imgs = torch.randn(2, 3, 64, 96)
    patches = patchify(imgs, 32)
    assert patches.shape == (2, 6, 32 * 32 * 3)
    assert torch.equal(patches[1, 4].view(32, 32, 3), imgs[1, :, 32:64, 32:64].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 32, 64, 96), imgs)


def test_upsample_mask():
    mask = torch.tensor([[True, False]])
    assert upsample_mask(mask, 1, 2, 2).tolist() == [[[True, True, False, False]] * 2]
