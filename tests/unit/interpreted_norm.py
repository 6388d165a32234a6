"""The Triton kernels of layer normalisation against plain torch, on the CPU; test_depthwise.py runs this file."""

import pytest
import torch
import torch.nn.functional as F

from fcmae.kernels import norm_triton


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (7, 3, 24)), (torch.bfloat16, (5, 32))])
def test_equals_plain_torch(dtype, shape, monkeypatch):
    """Rows that end within a tile, of a width that is no power of two, in several tiles per program."""
    monkeypatch.setattr(norm_triton, "TILE", 64)
    x, dy = torch.randn(2, *shape).to(dtype).unbind(0)
    leaves = [x.requires_grad_(), *(torch.randn(shape[-1], requires_grad=True) for _ in range(2))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = F.layer_norm(exact[0], shape[-1:], *exact[1:], 1e-6)
    out = norm_triton.layer_norm_forward(*leaves, 1e-6)[0]
    pairs = zip(
        (out, *torch.autograd.grad(out, leaves, dy)),
        (expected, *torch.autograd.grad(expected, exact, dy.double())),
        strict=True,
    )
    for value, wanted in pairs:
        # The interpreter cuts float32 to bfloat16 where a device rounds.
        assert (value.double() - wanted).norm() < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype] * wanted.norm()
