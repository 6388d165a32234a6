"""The U-Net over the features of all stages."""

import pytest
import torch

from fcmae.engines.dense import dense
from fcmae.models import create_backbone
from fcmae.models.backbone import stage_shapes
from fcmae.models.unet import UNet

DEPTHS, DIMS = [1, 1, 1, 1, 1], [8, 12, 16, 16, 24]
STRIDES = {
    "timm": None, "16 px": [2, 2, 2, 2], "8 px": [1, 2, 2, 2], "equal strides": [4, 1, 2, 1], "ratio 4": [2, 4, 1, 2],
    "three stages": [4, 2, 2], "five stages": [2, 2, 1, 2, 2],
}  # fmt: skip


def features_of(strides, imgs):
    n = len(strides or DIMS[:4])
    backbone = create_backbone("convnextv2_atto", strides=strides, depths=DEPTHS[:n], dims=DIMS[:n]).to(imgs.dtype)
    return dense(backbone, imgs), *stage_shapes(backbone)


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_the_result_is_at_the_finest_stride_and_every_parameter_learns(strides):
    features, dims, totals = features_of(strides, torch.randn(2, 3, 64, 96))
    assert dims == [f.shape[1] for f in features]
    assert totals == [64 // f.shape[2] for f in features] == [96 // f.shape[3] for f in features]
    unet = UNet(dims, totals, width=16)
    out = unet(features)
    assert out.shape == (2, 16, 64 // totals[0], 96 // totals[0])
    (out * torch.randn_like(out)).sum().backward()
    for name, param in unet.named_parameters():
        assert param.grad.abs().sum() > 0, name
        assert param.grad.stride() == param.stride(), name


def test_an_image_does_not_depend_on_its_batch():
    imgs = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    features, dims, totals = features_of(None, imgs)
    unet = UNet(dims, totals, width=16).double()
    alone = unet([f[1:2] for f in features])
    torch.testing.assert_close(unet(features)[1:2], alone, rtol=1e-12, atol=1e-12)


def test_sites_of_a_coarse_site_differ_although_their_features_are_equal():
    """Inside a masked patch all finer features are one mask token."""
    unet = UNet([8, 8], [4, 32], width=16)
    with torch.no_grad():
        unet.blocks[0].conv_dw.weight.zero_()  # so that the border does not tell them apart
    sites = unet([torch.randn(1, 8, 1, 1).expand(1, 8, 8, 8), torch.randn(1, 8, 1, 1)])[0].flatten(1).T
    assert torch.pdist(sites).min() > 0.1


@pytest.mark.parametrize("size", [(64, 72), (40, 64)])
def test_sides_that_are_no_multiples_of_the_coarsest_stride_are_refused(size):
    features, dims, totals = features_of(None, torch.randn(1, 3, *size))
    with pytest.raises(ValueError, match="divisible by 32 px, the coarsest stride"):
        UNet(dims, totals, width=16)(features)


def test_other_features_are_refused():
    with pytest.raises(ValueError, match=r"expects features of \[8, 16\] channels"):
        UNet([8, 16], [4, 8])([torch.ones(1, 8, 4, 4), torch.ones(1, 8, 2, 2)])
    for dims, strides in (([8], [4, 8]), ([], []), ([8, 8], [8, 4]), ([8, 8], [4, 6])):
        with pytest.raises(ValueError, match="must have a value per stage, finest first"):
            UNet(dims, strides)
