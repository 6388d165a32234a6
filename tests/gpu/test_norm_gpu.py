"""Layer normalisation's kernels and mixed products on the device."""

import pytest
import torch
import torch.nn.functional as F

from fcmae.kernels import linear_mixed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(3, 1216, 128), (5, 76, 512), (40, 19, 1024), (7, 19, 1408), (5, 19, 1536), (3, 76, 40)]
)
def test_norm_equals_float64_and_itself(shape, dtype):
    from fcmae.kernels.norm_triton import layer_norm_forward

    x, dy = (torch.randn(2, *shape, device="cuda") * 2 + 1).to(dtype).unbind(0)
    leaves = [x.requires_grad_(), *(torch.randn(shape[-1], device="cuda", requires_grad=True) for _ in range(2))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.layer_norm(exact[0], shape[-1:], *exact[1:], 1e-6)

    def run():
        out = layer_norm_forward(*leaves, 1e-6)[0]
        return out.detach(), *torch.autograd.grad(out, leaves, dy)

    wanted = (expected, *torch.autograd.grad(expected, exact, dy.double()))
    for value, again, reference in zip(run(), run(), wanted, strict=True):
        assert error(value, reference) < {torch.float32: 2e-6, torch.bfloat16: 3e-3}[dtype]
        assert torch.equal(value, again)


def test_a_mixed_product_has_a_float32_gradient_of_the_weight():
    x, dy = (torch.randn(4, 300, d, device="cuda", dtype=torch.bfloat16) for d in (128, 512))
    x.requires_grad_()
    weight = torch.randn(512, 128, device="cuda", requires_grad=True)
    of_x, of_weight = torch.autograd.grad(linear_mixed(x, weight), (x, weight), dy)
    assert (of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.float32)
    assert error(of_weight, dy.flatten(0, 1).double().t() @ x.flatten(0, 1).double()) < 1e-5
