"""The Triton kernels on a GPU against float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fcmae.kernels import depthwise_launch
from fcmae.kernels.depthwise import neighbors, packed_depthwise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

N, V, ROWS, COLS = 5, 19, 7, 7
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def arguments(s: int, c: int, k: int, dtype: torch.dtype):
    torch.manual_seed(s)
    index = torch.rand(N, ROWS * COLS, device="cuda").argsort(1)[:, :V].sort(1).values
    x = torch.randn(N, V, s, s, c, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(c, 1, k, k, device="cuda", requires_grad=True)
    bias = torch.randn(c, device="cuda", requires_grad=True)
    return (x, weight, bias), neighbors(index, ROWS, COLS), torch.randn_like(x)


def outputs(function, leaves, where, grad):
    out = function(*leaves, where)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


# A kernel takes seconds to compile: the shapes of all stages in one dtype, the other dtypes in one shape.
@pytest.mark.parametrize(
    ("s", "c", "k", "dtype"),
    [
        (s, c, k, torch.bfloat16)
        for s, c, k in [(8, 128, 7), (4, 80, 7), (2, 320, 7), (1, 1024, 7), (3, 40, 7), (4, 33, 5)]
    ]
    + [(2, 320, 7, torch.float16), (2, 320, 7, torch.float32)],
)
def test_equals_float64(s, c, k, dtype):
    leaves, where, grad = arguments(s, c, k, dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = outputs(packed_depthwise, exact, where, grad.double())
    for actual, wanted in zip(outputs(packed_depthwise, leaves, where, grad), expected, strict=True):
        assert error(actual, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("s", [8, 4, 2, 1])
def test_same_bits_twice(s):
    call = arguments(s, 96, 7, torch.bfloat16)
    for first, second in zip(outputs(packed_depthwise, *call), outputs(packed_depthwise, *call), strict=True):
        assert torch.equal(first, second)


def test_compiled_equals_eager():
    call = arguments(2, 128, 7, torch.bfloat16)
    compiled = torch.compile(packed_depthwise, fullgraph=True)
    for actual, wanted in zip(outputs(compiled, *call), outputs(packed_depthwise, *call), strict=True):
        assert error(actual, wanted.double()) < 1e-6


def test_computes_in_the_autocast_dtype():
    (x, weight, bias), where, _ = arguments(2, 64, 7, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = packed_depthwise(x, weight, bias, where)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, packed_depthwise(x.bfloat16(), weight, bias, where))


@pytest.mark.parametrize("s", [2, 1])
def test_in_a_thread_without_a_context_and_from_a_view(s):
    """As in a thread of autograd whose first operation is ours; weights may begin anywhere."""
    (_, weight, _), where, grad = arguments(s, 96, 7, torch.bfloat16)
    tables = where.slots, where.cells
    expected = depthwise_launch.input_grad(grad, weight.detach(), *tables)
    view = torch.cat((weight.new_zeros(1), weight.detach().flatten()))[1:].view_as(weight)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(depthwise_launch.input_grad, grad, view, *tables).result(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    (_, weight, _), where, grad = arguments(2, 96, 7, torch.bfloat16)
    tensors = grad, weight.detach(), where.slots, where.cells
    actual = depthwise_launch.input_grad(*(t.to("cuda:1") for t in tensors))
    assert torch.equal(actual.cpu(), depthwise_launch.input_grad(*tensors).cpu())
    assert torch.cuda.current_device() == 0
