"""The block as one operation on the device against float64, with what training does to it."""

import pytest
import torch
from timm.models.convnext import ConvNeXtBlock

from fcmae.engines import convnext, fused
from fcmae.engines.compiled import recomputed
from fcmae.kernels import neighbors, packed_depthwise
from tests.conftest import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def arguments(s, c, dtype):
    torch.manual_seed(s)
    block = ConvNeXtBlock(c, use_grn=True, ls_init_value=None).cuda()
    for param in block.parameters():
        torch.nn.init.normal_(param, std=0.1)
    index = torch.rand(5, 49, device="cuda").argsort(1)[:, :19].sort(1).values
    x = torch.randn(5, 19, s, s, c, device="cuda").to(dtype).requires_grad_()
    factor = torch.tensor([0.0, 1.25, 1.25, 0.0, 1.25], device="cuda", dtype=dtype)
    return block, x, neighbors(index, 7, 7), factor


def operation(block, x, where, factor):
    ((_, copies),) = fused.with_copies([block], x)
    assert copies is not None
    return fused.run(block, x, copies, where, "image", factor)


def plain(block, x, where, factor):
    h = packed_depthwise(x, block.conv_dw.weight, block.conv_dw.bias, where)
    h = convnext.pointwise(block, h, "image")
    return x + (h if factor is None else factor.view(-1, 1, 1, 1, 1) * h)


def outputs(function, block, x, where, factor):
    out = function(block, x, where, factor)
    torch.manual_seed(1)
    dy = torch.randn(out.shape, device="cuda").to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], dy)]


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(
    ("s", "c", "dtype"),
    [(8, 128, torch.bfloat16), (4, 80, torch.bfloat16), (2, 40, torch.float16), (1, 1024, torch.bfloat16)],
)
def test_equals_float64_and_itself(s, c, dtype, drops):
    block, x, where, factor = arguments(s, c, dtype)
    factor = factor if drops else None
    found = outputs(operation, block, x, where, factor)
    for function in (operation, recomputed(operation, True)):
        again = outputs(function, block, x, where, factor)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    with torch.inference_mode():
        assert torch.equal(operation(block, x, where, factor), found[0])
    assert [g.dtype for g in found] == [dtype, dtype] + [torch.float32] * len(list(block.parameters()))
    exact = x.detach().double().requires_grad_()
    expected = outputs(plain, block.double(), exact, where, None if factor is None else factor.double())
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value, wanted) < TOLERANCE[dtype]
