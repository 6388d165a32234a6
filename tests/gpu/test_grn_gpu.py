"""The fused GELU and GRN kernels on the device."""

from functools import partial

import pytest
import torch
from torch import nn

from fcmae.engines import ENGINES
from fcmae.kernels.grn import gelu_grn, gelu_grn_torch
from fcmae.models import create_backbone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Rounding of the output: half a unit in the last place of 16-bit types; float32 sums a few thousand terms.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
SHAPES = [(3, 1216, 160), (5, 304, 1024), (7, 76, 2048), (9, 19, 4096), (2, 19, 11264), (1, 4000, 512), (4, 49, 24)]


def run(x, input_bias, weight, bias, dy, op=gelu_grn):
    leaves = [t.detach().clone().requires_grad_() for t in (x, input_bias, weight, bias)]
    x, input_bias, weight, bias = leaves
    if op is gelu_grn:
        y = gelu_grn(x, weight, bias, 1e-6, input_bias=input_bias)
    else:
        y = gelu_grn_torch(x, input_bias, weight, bias, 1e-6)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def inputs(shape, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    n, r, d = shape
    x, dy = torch.randn(2, n, r, d, device="cuda", generator=generator).to(dtype).unbind(0)
    return x, *torch.randn(3, d, device="cuda", generator=generator).unbind(0), dy


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype):
    tensors = inputs(shape, dtype)
    expected = run(*(t.double() for t in tensors), op=gelu_grn_torch)
    for name, value, reference in zip(("y", "x", "input_bias", "weight", "bias"), run(*tensors), expected, strict=True):
        error = (value.double() - reference).norm() / reference.norm()
        assert error < TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


def test_more_images_than_a_grid_has_rows():
    tensors = inputs((70_000, 2, 64), torch.bfloat16)
    expected = run(*(t.double() for t in tensors), op=gelu_grn_torch)
    for value, reference in zip(run(*tensors), expected, strict=True):
        assert (value.double() - reference).norm() / reference.norm() < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_values_are_found(shape):
    from fcmae.kernels import grn_triton

    x, input_bias, weight, bias, dy = inputs(shape, torch.bfloat16)
    for number in range(4):
        largest = torch.zeros(2, 4, dtype=torch.int32, device="cuda")[:, :1]
        x[-1, -1, 4 + number] = dy[-1, -1, 4 + number] = 100 * (number + 1)
        y, norms, means = grn_triton.launch_forward(x, input_bias, weight, bias, 1e-6, largest[0])
        dx, _ = grn_triton.launch_backward(dy, x, input_bias, weight, norms, means, 1e-6, largest[1])
        for found, written in zip(largest, (y, dx), strict=True):
            assert found.view(torch.float32) == written.float().abs().max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_twice(shape):
    tensors = inputs(shape, torch.bfloat16)
    for first, second in zip(run(*tensors), run(*tensors), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_zero_channels_and_images_have_zero_gradient(dtype):
    x, _, weight, bias, dy = inputs((4, 76, 512), dtype)
    x[:, :, 7] = 0
    x[2] = 0
    values = run(x, torch.zeros_like(weight), weight, bias, dy)
    assert all(v.isfinite().all() for v in values)
    exact = (t.double() for t in (x, torch.zeros_like(weight), weight, bias, dy))
    expected = run(*exact, op=gelu_grn_torch)
    torch.testing.assert_close(values[1][2].double(), expected[1][2], rtol=1e-2, atol=1e-4)


def test_opcheck():
    x, input_bias, weight, bias, _ = inputs((3, 19, 640), torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in (x, input_bias, weight, bias)]
    torch.library.opcheck(torch.ops.fcmae.gelu_grn.default, (*leaves, 1e-6))


def test_compiles_into_one_graph():
    x, input_bias, weight, bias, dy = inputs((8, 19, 512), torch.bfloat16)

    def step(x, w):
        return gelu_grn(x @ w, weight, bias, input_bias=input_bias)

    w = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16).mul_(0.05).requires_grad_()
    (eager,) = torch.autograd.grad(step(x, w), w, dy)
    (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, w), w, dy)
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", partial(nn.GELU, approximate="tanh")], ids=str)
def test_only_exact_gelu_takes_the_fused_kernel(act):
    backbone = create_backbone("convnextv2_atto", depths=(1, 1, 1, 1), dims=(16, 16, 16, 16), act_layer=act).cuda()
    for param in backbone.parameters():
        nn.init.normal_(param, std=0.3)
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    for backend in backends:  # restored after every test
        backend.allow_tf32 = False
    imgs = torch.randn(2, 3, 64, 64, device="cuda")
    mask = torch.tensor([[True, False, False, True]] * 2, device="cuda")
    packed, masked = (ENGINES[name](backbone, imgs, mask, keep=2, patch_size=32)[-1] for name in ("packed", "masked"))
    assert (packed - masked).norm() < 1e-5 * masked.norm()
