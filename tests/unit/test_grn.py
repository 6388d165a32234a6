"""GELU and GRN against timm, against finite differences, and the Triton kernels in Triton's interpreter."""

import os
import subprocess
import sys

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


def test_triton_kernels_in_the_interpreter():
    """In a process of its own: Triton chooses the interpreter when it is imported."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr


def check_triton():
    from fcmae.kernels.grn_triton import gelu_grn_triton

    def gradients(op, leaves, dy):
        y = op(*leaves, 1e-6)
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]

    # The interpreter cuts float32 to bfloat16 where a device rounds, so its error is twice bfloat16's.
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 6e-3}
    for dtype in tolerance:
        for shape, zeros in [
            ((2, 16, 32), False),
            ((3, 19, 40), False),
            ((2, 5, 24), True),
            ((1, 76, 8), False),
            ((1, 700, 8), False),
        ]:
            x, dy = torch.randn(2, *shape).to(dtype).unbind(0)
            weight, bias, input_bias = (p.detach() for p in parameters(shape[2]))
            if zeros:
                x[:, :, 3] = 0
                x[1] = 0
                input_bias = None
            leaves = [t if t is None else t.clone().requires_grad_() for t in (x, input_bias, weight, bias)]
            exact = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
            expected = gradients(gelu_grn_torch, exact, dy.double())
            for value, reference in zip(gradients(gelu_grn_triton, leaves, dy), expected, strict=True):
                error = ((value.double() - reference).norm() / reference.norm()).item()
                assert error < tolerance[dtype], (dtype, shape, error)

    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 5, 8), (8,), (8,), (8,))]
    torch.library.opcheck(torch.ops.fcmae.gelu_grn.default, (*leaves, 1e-6))
    compiled = torch.compile(gelu_grn_triton, fullgraph=True, backend="aot_eager")
    dy = torch.randn(2, 5, 8)
    for a, b in zip(gradients(compiled, leaves, dy), gradients(gelu_grn_triton, leaves, dy), strict=True):
        assert torch.equal(a, b)


if __name__ == "__main__":
    check_triton()
