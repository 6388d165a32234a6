"""The Triton kernels of GELU and GRN against plain torch, on the CPU; test_depthwise.py runs this file."""

import itertools

import pytest
import torch

from fcmae.kernels.grn import gelu_grn_torch
from tests.unit.test_grn import parameters


def gradients(op, leaves, dy):
    y = op(*leaves, 1e-6)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


SHAPES = [(2, 16, 32), (3, 19, 40), (2, 5, 24), (1, 76, 8), (1, 700, 8), (2, 21, 64)]
ZEROS = (SHAPES[2], SHAPES[5])
"""With images and channels of zeros, and without a bias before."""
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 6e-3}
"""The interpreter cuts float32 to bfloat16 where a device rounds, so its error is twice bfloat16's."""
QUICK = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[1], torch.float16), (SHAPES[1], torch.bfloat16)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(SHAPES, TOLERANCE)
    ],
)
def test_equals_plain_torch(shape, dtype):
    from fcmae.kernels.grn_triton import gelu_grn_triton

    x, dy = torch.randn(2, *shape).to(dtype).unbind(0)
    weight, bias, input_bias = (p.detach() for p in parameters(shape[2]))
    if shape in ZEROS:
        x[:, :, 3] = 0
        x[1] = 0
        input_bias = None
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, input_bias, weight, bias)]
    exact = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
    expected = gradients(gelu_grn_torch, exact, dy.double())
    for value, reference in zip(gradients(gelu_grn_triton, leaves, dy), expected, strict=True):
        error = ((value.double() - reference).norm() / reference.norm()).item()
        assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("value", [1.0, float("nan")])
@pytest.mark.parametrize("shape", [(3, 19, 40), (2, 21, 64), (1, 700, 8)], ids=["rows", "held", "streamed"])
def test_the_largest_values_are_found(shape, value):
    """Without what lies beyond an image, where GELU of the bias is not zero."""
    from fcmae.kernels.grn_triton import launch_backward, launch_forward

    x, dy = torch.randn(2, *shape).bfloat16().unbind(0)
    x[0, 4, 5] = dy[0, 4, 5] = value
    weight, bias, input_bias = (p.detach() for p in parameters(shape[2]))
    largest = torch.zeros(2, 4, dtype=torch.int32)[:, :1]
    y, norms, means = launch_forward(x, 9 + input_bias, weight, bias - 100, 1e-6, largest[0])
    dx, _ = launch_backward(dy, x, 9 + input_bias, weight, norms, means, 1e-6, largest[1])
    for found, written in zip(largest, (y, dx), strict=True):
        torch.testing.assert_close(found.view(torch.float32), written.float().abs().max()[None], rtol=0, atol=0,
                                   equal_nan=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_is_an_operator_that_compiles():
    from fcmae.kernels.grn_triton import gelu_grn_triton

    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 5, 8), (8,), (8,), (8,))]
    torch.library.opcheck(torch.ops.fcmae.gelu_grn.default, (*leaves, 1e-6))
    compiled = torch.compile(gelu_grn_triton, fullgraph=True, backend="aot_eager")
    dy = torch.randn(2, 5, 8)
    for a, b in zip(gradients(compiled, leaves, dy), gradients(gelu_grn_triton, leaves, dy), strict=True):
        assert torch.equal(a, b)
