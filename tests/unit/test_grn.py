"""GELU and GRN against timm and against finite differences; their Triton kernels are in interpreted_grn.py."""

import pytest
import torch
import torch.nn.functional as F

from fcmae.kernels.grn import gelu_grn, gelu_grn_torch


def parameters(width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(width, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def test_equals_timm():
    from timm.layers.grn import GlobalResponseNorm

    weight, bias, _ = parameters(12)
    grn = GlobalResponseNorm(12)
    grn.load_state_dict({"weight": weight, "bias": bias})
    x = torch.randn(3, 4, 5, 12)
    torch.testing.assert_close(gelu_grn(x.view(3, 20, 12), weight, bias).view(x.shape), grn(F.gelu(x)))


def test_input_bias_is_added_before_gelu():
    weight, bias, input_bias = parameters(6)
    x = torch.randn(2, 5, 6)
    expected = gelu_grn(x + input_bias, weight, bias)
    torch.testing.assert_close(gelu_grn(x, weight, bias, input_bias=input_bias), expected)


def test_batch_scope_is_a_view():
    weight, bias, _ = parameters(6)
    x = torch.randn(3, 5, 6)
    g = F.gelu(x)
    norm = g.norm(dim=(0, 1))
    expected = g + weight * g * (norm / (norm.mean() + 1e-6)) + bias
    torch.testing.assert_close(gelu_grn(x.view(1, 15, 6), weight, bias).view(x.shape), expected)


def test_gradients_are_exact():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight, bias, input_bias = parameters(4, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: gelu_grn_torch(*a, 1e-6), (x, input_bias, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_channels_and_images_have_zero_gradient(dtype):
    x = torch.randn(3, 5, 8)
    x[:, :, 2] = 0
    x[1] = 0
    x = x.to(dtype).requires_grad_()
    weight, bias, _ = parameters(8)
    y = gelu_grn(x, weight, bias)
    assert y.dtype == dtype
    for gradient in torch.autograd.grad(y.float().square().sum(), (x, weight, bias)):
        assert gradient.isfinite().all()


def test_compiles_into_one_graph():
    weight, bias, input_bias = parameters(8)
    x = torch.randn(2, 5, 8, requires_grad=True)
    compiled = torch.compile(gelu_grn, fullgraph=True, backend="aot_eager")
    expected = gelu_grn(x, weight, bias, input_bias=input_bias)
    y = compiled(x, weight, bias, input_bias=input_bias)
    torch.testing.assert_close(y, expected)
    leaves = (x, weight, bias, input_bias)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "message"), [((4, 8), r"\[images, sites, channels\]"), ((2, 4, 7), "weight has shape")], ids=str
)
def test_wrong_shapes_are_named(shape, message):
    weight, bias, _ = parameters(8)
    with pytest.raises(ValueError, match=message):
        gelu_grn(torch.randn(shape), weight, bias)
