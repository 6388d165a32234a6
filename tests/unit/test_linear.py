"""The linear layer by oneDNN's convolution against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from fcmae.kernels import linear
from fcmae.kernels.linear import _linear_mixed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(24,), (5, 24), (32, 24), (2, 3, 4, 4, 24), (16, 49, 24), (3, 7, 1), (0, 24)], ids=str
)
def test_equals_torch(shape, bias):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(40, shape[-1], requires_grad=True)
    leaves = [x, weight] + ([torch.randn(40, requires_grad=True)] if bias else [])
    out, expected = linear(*leaves), F.linear(*leaves)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    grads, wanted = (torch.autograd.grad(y, leaves, grad) for y in (out, expected))
    torch.testing.assert_close(grads, wanted, rtol=1e-5, atol=1e-4)
    assert [g.stride() for g in grads] == [g.stride() for g in wanted]


def test_other_layouts_of_the_input():
    x, weight = torch.randn(4, 24, 5, 6).permute(0, 2, 3, 1), torch.randn(24, 40).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(("dtype", "enabled"), [(torch.float64, False), (torch.bfloat16, False), (torch.float32, True)])
def test_what_does_not_go_to_onednn_is_torch_to_the_bit(dtype, enabled):
    x, weight, bias = torch.randn(6, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype), torch.randn(4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        out, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


def test_the_same_bits_twice():
    x, weight, grad = torch.randn(16, 50, 64), torch.randn(48, 64, requires_grad=True), torch.randn(16, 50, 48)
    first, second = (torch.autograd.grad(linear(x, weight), weight, grad)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_compiles_into_one_graph():
    x, weight, bias = torch.randn(2, 5, 8, requires_grad=True), torch.randn(4, 8), torch.randn(4)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))


def test_a_mixed_product_has_a_float32_gradient_of_the_weight():
    x, dy = (torch.randn(2, 5, d, dtype=torch.bfloat16) for d in (8, 6))
    x.requires_grad_()
    weight = torch.randn(6, 8, requires_grad=True)
    y, _ = _linear_mixed(x, weight)
    grads = torch.autograd.grad(y, (x, weight), dy)
    assert torch.equal(y, F.linear(x, weight.bfloat16()))
    assert torch.equal(grads[0], dy @ weight.bfloat16())
    torch.testing.assert_close(grads[1], (dy.flatten(0, 1).double().t() @ x.flatten(0, 1).double()).float())
