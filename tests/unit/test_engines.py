"""Sparse = dense: every engine computes the masked engine's function, outputs and gradients."""

from functools import partial

import pytest
import timm
import torch
from timm.layers.create_act import _ACT_LAYER_DEFAULT
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from fcmae.engines import ENGINES, check_backbone, get_engine, total_stride
from fcmae.masks.patches import grid_size, len_keep, random_mask
from fcmae.models import FCMAE, create_backbone
from tests.conftest import ENGINE_NAMES, relative_error

TOLERANCE = 1e-5

# name, backbone, in_chans, image size, mask ratio, mask patch (None = total stride)
CASES = {
    "v2": ({"name": "convnextv2_atto"}, 3, (96, 96), 0.6, None),
    "v2 with linear layers": ({"name": "convnextv2_tiny"}, 3, (96, 96), 0.6, None),
    "v1 with layer scale": ({"name": "convnext_tiny"}, 3, (96, 96), 0.6, None),
    "v1 with convolutional mlp": ({"name": "convnext_atto"}, 3, (96, 96), 0.6, None),
    "norm before the head": ({"name": "convnext_tiny_hnf"}, 3, (64, 96), 0.5, None),
    "stem stride 1": ({"name": "convnextv2_atto", "patch_size": 1}, 3, (32, 24), 0.6, None),
    "stem stride 2": ({"name": "convnextv2_tiny", "patch_size": 2}, 3, (64, 96), 0.6, None),
    "not square": ({"name": "convnextv2_atto"}, 3, (64, 160), 0.6, None),
    "grey": ({"name": "convnextv2_atto"}, 1, (96, 96), 0.6, None),
    "four channels": ({"name": "convnextv2_atto"}, 4, (96, 96), 0.6, None),
    "one visible patch": ({"name": "convnextv2_atto"}, 3, (96, 96), 0.85, None),
    "nothing masked": ({"name": "convnextv2_atto"}, 3, (64, 64), 0.0, None),
    "mask patch of two strides": ({"name": "convnextv2_atto", "patch_size": 1}, 3, (64, 48), 0.5, 16),
    "another activation": ({"name": "convnextv2_atto", "act_layer": "relu"}, 3, (96, 96), 0.6, None),
    "other kernels": ({"name": "convnextv2_atto", "kernel_sizes": (3, 5, 7, 9)}, 3, (96, 96), 0.6, None),
}


def small_backbone(name: str, in_chans: int = 3, depths: tuple[int, ...] = (1, 1, 2, 1), **kwargs) -> nn.Module:
    """A backbone of few channels whose every parameter matters (GRN and layer scale start at 0 otherwise)."""
    backbone = create_backbone(name, in_chans=in_chans, depths=depths, dims=(8, 12, 16, 24), **kwargs)
    for param in backbone.parameters():
        nn.init.normal_(param, std=0.3)
    return backbone


def run(engine, backbone, imgs, mask, patch_size, scope):
    keep = int((~mask[0]).sum())
    backbone.zero_grad()
    kwargs = {"keep": keep, "patch_size": patch_size, "grn_scope": scope}
    features = ENGINES[engine](backbone, imgs, mask, **kwargs, all_stages=True)
    rng = torch.Generator().manual_seed(1)
    torch.autograd.backward(features, [torch.randn(f.shape, generator=rng).to(f.dtype) for f in features])
    return [f.detach() for f in features], {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("engine", "dtype", "tolerance"),
    [
        ("packed", torch.float32, TOLERANCE),
        ("packed", torch.float64, 1e-12),
        # its threads add in another order each time, which float64 tells from a mistake
        pytest.param("minkowski", torch.float64, 1e-12, marks=pytest.mark.minkowski),
    ],
)
def test_every_engine_equals_masked(engine, case, scope, dtype, tolerance):
    kwargs, in_chans, size, ratio, mask_patch = CASES[case]
    backbone = small_backbone(in_chans=in_chans, **kwargs).to(dtype)
    patch_size = mask_patch or total_stride(backbone)
    rows, cols = grid_size(*size, patch_size)
    imgs = torch.randn(3, in_chans, *size, dtype=dtype)
    mask = random_mask(torch.rand(3, rows * cols), len_keep(rows * cols, ratio))
    expected, expected_grads = run("masked", backbone, imgs, mask, patch_size, scope)
    features, grads = run(engine, backbone, imgs, mask, patch_size, scope)
    assert [f.shape for f in features] == [f.shape for f in expected]
    assert all(relative_error(a, b) < tolerance for a, b in zip(features, expected, strict=True))
    assert grads.keys() == expected_grads.keys() != set()
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < tolerance, name


@pytest.mark.parametrize("act", [*_ACT_LAYER_DEFAULT, nn.GELU, partial(nn.GELU, approximate="tanh")], ids=str)
def test_every_activation_of_timm_is_the_one_that_is_computed(act):
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(4, 4, 4, 4), act_layer=act).double()
    for param in backbone.parameters():
        nn.init.normal_(param, std=0.5)
    imgs = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    mask = torch.tensor([[True, False, False, True]] * 2)
    expected, expected_grads = run("masked", backbone, imgs, mask, 32, "image")
    features, grads = run("packed", backbone, imgs, mask, 32, "image")
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(features, expected, strict=True))
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < 1e-10, name


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny", "convnext_tiny", "convnext_tiny_hnf"])
def test_nothing_masked_equals_timm(engine, name):
    backbone = small_backbone(name)
    imgs = torch.randn(2, 3, 64, 96)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    visible = ENGINES[engine](backbone, imgs, mask, keep=6, patch_size=32)[-1]
    expected = backbone.forward_features(imgs)
    assert relative_error(visible.view(2, 2, 3, -1).permute(0, 3, 1, 2), expected) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_the_last_of_all_stages_is_the_default(engine):
    backbone = small_backbone("convnextv2_atto")
    imgs, mask = torch.randn(2, 3, 96, 96), random_mask(torch.rand(2, 9), 4)
    (last,) = ENGINES[engine](backbone, imgs, mask, keep=4, patch_size=32)
    features = ENGINES[engine](backbone, imgs, mask, keep=4, patch_size=32, all_stages=True)
    assert [f.shape[2:] for f in features] == [(8, 8, 8), (4, 4, 12), (2, 2, 16), (1, 1, 24)]
    assert torch.equal(features[-1], last) or engine == "minkowski"  # its threads add up in another order each time
    assert relative_error(features[-1], last) < 1e-6


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_a_masked_pixel_has_no_influence(engine):
    backbone = small_backbone("convnextv2_atto")
    mask = random_mask(torch.rand(2, 9), 4)
    imgs = torch.randn(2, 3, 96, 96)
    hidden = mask.view(2, 1, 3, 1, 3, 1).expand(2, 3, 3, 32, 3, 32).reshape(2, 3, 96, 96)
    other = torch.where(hidden, 1e3 * torch.randn_like(imgs), imgs)
    results = [ENGINES[engine](backbone, x, mask, keep=4, patch_size=32)[-1] for x in (imgs, other)]
    if engine == "minkowski":  # its threads add up in another order each time
        assert relative_error(*results) < 1e-6
    else:
        assert torch.equal(*results)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_order_of_images_does_not_matter_with_image_scope(engine):
    backbone = small_backbone("convnextv2_atto")
    mask = random_mask(torch.rand(3, 9), 4)
    imgs = torch.randn(3, 3, 96, 96)
    together = ENGINES[engine](backbone, imgs, mask, keep=4, patch_size=32)[-1]
    alone = ENGINES[engine](backbone, imgs[1:2], mask[1:2], keep=4, patch_size=32)[-1]
    assert relative_error(together[1:2], alone) < TOLERANCE
    batch = ENGINES[engine](backbone, imgs, mask, keep=4, patch_size=32, grn_scope="batch")[-1]
    assert relative_error(batch[1:2], alone) > 1e-3


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_all_zero_channel_has_gradient_zero_not_nan(engine, dtype):
    """Flat images with zero biases give all-zero activations, at which sqrt(sum of squares) has gradient NaN."""
    model = FCMAE("convnextv2_atto", engine=engine, decoder_embed_dim=16)
    imgs = torch.zeros(2, 3, 64, 64)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(imgs)
    out.loss.backward()
    for name, param in model.named_parameters():
        if not name.startswith("backbone.head."):  # no part of pretraining
            assert torch.isfinite(param.grad).all(), name


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_autocast_keeps_statistics_in_float32(engine):
    """Activations near 300 have squares beyond float16's 65,504."""
    backbone = small_backbone("convnextv2_atto")
    with torch.no_grad():
        for stage in backbone.stages:
            for block in stage.blocks:
                block.mlp.fc1.weight.mul_(100)
                block.mlp.fc2.weight.mul_(0.01)
    imgs, mask = torch.randn(2, 3, 64, 64), torch.tensor([[True, False, True, False]]).expand(2, 4)
    expected = ENGINES[engine](backbone, imgs, mask, keep=2, patch_size=32)[-1]
    with torch.autocast("cpu", torch.float16):
        half = ENGINES[engine](backbone, imgs, mask, keep=2, patch_size=32)[-1]
    assert relative_error(half, expected) < 0.02


@pytest.mark.parametrize(("stem", "stride"), [(1, 8), (2, 32), (4, 32)])
def test_total_stride_counts_what_the_backbone_has(stem, stride):
    backbone = small_backbone("convnextv2_atto", patch_size=stem)
    assert total_stride(backbone) == stride
    assert backbone.forward_features(torch.zeros(1, 3, 64, 64)).shape[-1] == 64 // stride


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_atto_ols", "convolutions overlap patches"),
        ("convnext_atto_rms", "must be LayerNorm; got RmsNorm"),
        ("resnet18", "must be a ConvNeXt of timm .*; got ResNet"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        check_backbone(timm.create_model(name))


def test_dilation_is_refused():
    with pytest.raises(ValueError, match="must have an odd kernel, stride 1, no dilation; got"):
        check_backbone(timm.create_model("convnext_atto", output_stride=16))


def test_unknown_engine_names_those_there_are():
    with pytest.raises(ValueError, match="engine must be one of packed, masked, minkowski; got 'dense'"):
        get_engine("dense")


def test_no_kernel_of_ours_is_launched_on_fake_tensors():
    """Of a GPU, in 16 bits, as a tool that counts memory or operations makes them."""
    how = {"device": "cuda", "dtype": torch.bfloat16}
    model = FCMAE("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), decoder_embed_dim=8)
    with FakeTensorMode():
        for module in model.modules():
            for name, param in module._parameters.items():
                module._parameters[name] = None if param is None else nn.Parameter(torch.empty(param.shape, **how))
        mask = torch.zeros(2, 4, dtype=torch.bool, device="cuda")
        output = model(torch.zeros(2, 3, 64, 64, **how), mask, 2)
        assert isinstance(output.loss, FakeTensor)
