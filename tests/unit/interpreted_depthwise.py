"""The Triton kernels against plain torch, on the CPU; test_depthwise.py runs this file with TRITON_INTERPRET=1."""

import pytest
import torch

from fcmae.kernels import depthwise, depthwise_launch
from fcmae.kernels.depthwise import neighbors, packed_depthwise

ROWS, COLS = 2, 3


# C = 5 leaves most of a block of channels masked, C = 70 fills one and starts a second.
@pytest.mark.parametrize(
    ("s", "k", "c", "v"),
    [
        (8, 7, 5, 3), (4, 7, 5, 3), (2, 7, 70, 3), (2, 7, 5, 1), (2, 7, 5, 6), (1, 7, 5, 4), (3, 7, 5, 3),
        (6, 7, 2, 2), (4, 5, 5, 3), (2, 3, 5, 4), (1, 5, 5, 6), (1, 1, 5, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_plain_torch(s, k, c, v, dtype):
    if dtype == torch.float16 and (s, v) != (2, 3):
        pytest.skip("one case shows the conversions")
    torch.manual_seed(s)
    index = torch.rand(2, ROWS * COLS).argsort(1)[:, :v].sort(1).values
    where = neighbors(index, ROWS, COLS)
    x = torch.randn(2, v, s, s, c).to(dtype)
    grad = torch.randn_like(x)
    weight, bias = torch.randn(c, 1, k, k), torch.randn(c)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = packed_depthwise(*leaves, where)
    expected.backward(grad.double())

    tables = where.slots, where.cells
    out = depthwise_launch.forward(x, weight, bias, *tables)
    grad_x = depthwise_launch.input_grad(grad, weight, *tables)
    grad_weight, grad_bias = depthwise_launch.weight_grad(x, grad, k, *tables)
    assert out.dtype == grad_x.dtype == dtype
    assert grad_weight.dtype == grad_bias.dtype == torch.float32
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-2}
    for actual, wanted in [
        (out, expected),
        (grad_x, leaves[0].grad),
        (grad_weight, leaves[1].grad),
        (grad_bias, leaves[2].grad),
    ]:
        torch.testing.assert_close(actual.double(), wanted.detach(), **tolerance)


def test_without_bias():
    where = neighbors(torch.tensor([[0, 4]]), ROWS, COLS)
    x, weight = torch.randn(1, 2, 2, 2, 4), torch.randn(4, 1, 7, 7)
    out = depthwise_launch.forward(x, weight, None, where.slots, where.cells)
    torch.testing.assert_close(out, packed_depthwise(x, weight, None, where), rtol=1e-4, atol=1e-4)


def test_operator_with_triton_kernels(monkeypatch):
    """Autograd through the operator, as on a GPU."""
    torch.manual_seed(0)
    where = neighbors(torch.tensor([[0, 2, 4], [1, 3, 5]]), ROWS, COLS)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 2, 2, 5), (5, 1, 7, 7), (5,))]
    expected = packed_depthwise(*leaves, where)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    monkeypatch.setattr(depthwise, "_use_triton", lambda x, weight: True)
    out = packed_depthwise(*leaves, where)
    for actual, wanted in zip((out, *torch.autograd.grad(out, leaves, grad)), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
