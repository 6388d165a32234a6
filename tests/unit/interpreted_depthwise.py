"""The Triton kernels against plain torch, on the CPU; test_depthwise.py runs this file with TRITON_INTERPRET=1.
Its largest cases are `slow`.

The interpreter takes a millisecond an operation, so the cases are small: few visible patches, which still have
neighbours above, beside and at a corner, inside the image and beyond its border.
"""

from typing import Any

import pytest
import torch

from fcmae.kernels import depthwise, depthwise_launch
from fcmae.kernels.depthwise import neighbors, packed_depthwise

ROWS, COLS = 2, 3
CORNER = [[0, 4]]
L_SHAPE = [[0, 1, 3]]
ALONE = [[1]]
TWO_IMAGES = [[0, 5], [1, 4]]
ALL = [list(range(ROWS * COLS))]


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


class PlainTaps:
    """``taps_kernel`` in plain torch."""

    def __getitem__(self, grid: tuple[int, ...]) -> "PlainTaps":
        return self

    def __call__(self, weight: Any, bias: Any, taps: Any, turned: int, **_: Any) -> None:
        rows = weight.flatten(1).t()
        taps[:-1] = rows.flip(0) if turned else rows
        taps[-1] = 0 if bias is None else bias


def plain_sum(partials: Any, taps: Any, k: int) -> Any:
    """``add_up`` of taps in plain torch."""
    total = taps.sum(0)
    return [], (total[:-1].t().reshape(-1, 1, k, k), total[-1])


def check(s: int, k: int, c: int, index: list[list[int]], dtype: torch.dtype = torch.float32) -> None:
    """Forward, input gradient and weight gradient."""
    torch.manual_seed(s)
    where = neighbors(torch.tensor(index), ROWS, COLS)
    x = torch.randn(len(index), len(index[0]), s, s, c).to(dtype)
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


# C = 5 leaves most of a block of channels masked, C = 70 fills one and starts a second.
@pytest.mark.parametrize(
    ("s", "k", "c", "index"), [(2, 3, 70, CORNER), slow(1, 7, 5, TWO_IMAGES), (1, 5, 5, ALL), (1, 1, 5, L_SHAPE)]
)
def test_equals_plain_torch(s, k, c, index):
    check(s, k, c, index)


@pytest.mark.parametrize(
    ("s", "k", "c", "index"),
    [
        slow(8, 7, 5, CORNER), slow(6, 7, 2, CORNER), slow(6, 5, 5, CORNER), slow(5, 3, 5, CORNER),
        slow(4, 7, 5, L_SHAPE), (4, 5, 5, ALONE), slow(3, 7, 5, L_SHAPE), (2, 7, 5, L_SHAPE),
    ],
)  # fmt: skip
def test_convolution_equals_plain_torch(s, k, c, index, monkeypatch):
    """Without the two small kernels before and after: they do not know S, and take half of the time."""
    monkeypatch.setattr(depthwise_launch, "taps_kernel", PlainTaps())
    monkeypatch.setattr(depthwise_launch, "add_up", plain_sum)
    check(s, k, c, index)


def test_float16_is_converted(monkeypatch):
    monkeypatch.setattr(depthwise_launch, "taps_kernel", PlainTaps())
    monkeypatch.setattr(depthwise_launch, "add_up", plain_sum)
    check(2, 7, 5, CORNER, torch.float16)


def test_without_bias():
    where = neighbors(torch.tensor([[0, 4]]), ROWS, COLS)
    x, weight = torch.randn(1, 2, 2, 2, 4), torch.randn(4, 1, 3, 3)
    out = depthwise_launch.forward(x, weight, None, where.slots, where.cells)
    torch.testing.assert_close(out, packed_depthwise(x, weight, None, where), rtol=1e-4, atol=1e-4)


def test_operator_with_triton_kernels(monkeypatch):
    """Autograd through the operator, as on a GPU."""
    torch.manual_seed(0)
    where = neighbors(torch.tensor(TWO_IMAGES), ROWS, COLS)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 2, 2, 2, 5), (5, 1, 3, 3), (5,))]
    expected = packed_depthwise(*leaves, where)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    monkeypatch.setattr(depthwise, "use_triton", lambda x, weight: True)
    out = packed_depthwise(*leaves, where)
    for actual, wanted in zip((out, *torch.autograd.grad(out, leaves, grad)), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
