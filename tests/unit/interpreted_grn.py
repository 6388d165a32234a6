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


@pytest.mark.parametrize("shape", [(2, 19, 40), (1, 352, 64), (1, 700, 8), (2, 16, 64), (2, 21, 64)], ids=str)
@pytest.mark.parametrize(("place", "value"), [(None, 0), (4, 500.0), (5, -500.0), (5, float("nan"))])
def test_the_largest_values_are_found(shape, place, value):
    """Not beyond an image, where without a ``value`` they would be larger: GELU's input is the bias there."""
    from fcmae.kernels import grn_triton

    held = shape[1] < 320 and shape[2] % 64 == 0
    width, largest = shape[2], torch.zeros(2, 4, dtype=torch.int32)[:, :1]
    x, dy = torch.randn(2, *shape).bfloat16().unbind(0)
    x, dy = 0.1 * x - 9, 1e-3 * dy
    # What is held is GELU, 0 beyond an image, so that the output is the bias there.
    into, bias = (x + 9, -100) if held else (x, 100)
    if place is not None:
        for tensor in (into, dy):
            tensor[-1, -1, place] = value
    vectors = [torch.full((width,), v) for v in (9.0, 0.1, bias)]
    y, *_ = grn_triton.launch_forward(into, *vectors, 1e-6, largest[0])
    _, norms, means = grn_triton.launch_forward(x, *vectors, 1e-6)
    dx, _ = grn_triton.launch_backward(dy, x, *vectors[:2], norms, means, 1e-6, largest[1])
    for found, written in zip(largest, (y, dx), strict=True):
        expected = written.float().abs().max()[None]
        torch.testing.assert_close(found.view(torch.float32), expected, rtol=0, atol=0, equal_nan=True)


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
