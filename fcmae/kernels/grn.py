"""GELU and global response normalisation (GRN) of packed visible sites, as one operation.

GRN (ConvNeXt V2, arXiv 2301.00808, section 3.2) scales a channel by its norm over an image, relative to the mean norm
of all channels. With g = GELU(x), over the R visible sites of an image and its D channels::

    G_c = sqrt(sum_r g_rc^2)        n_c = G_c / (mean_c G_c + eps)        y_rc = g_rc + weight_c * g_rc * n_c + bias_c

which is ``timm.layers.grn.GlobalResponseNorm`` after ``torch.nn.GELU`` if the sites are the image's positions. The
official sparse code takes the norm over all images of the batch; pass ``x.view(1, N * R, D)`` for that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.toolchain import HAS_C_COMPILER

try:
    from fcmae.kernels.grn_triton import gelu_grn_triton

    HAS_TRITON = HAS_C_COMPILER
except ModuleNotFoundError:
    HAS_TRITON = False


def gelu_grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, input_bias: Tensor | None = None) -> Tensor:
    """GELU, then GRN over the sites of every image: fused on a GPU, plain torch elsewhere.

    Args:
        x: ``[N, R, D]``, N images of R sites with D channels. Statistics and arithmetic are float32 for 16-bit inputs.
        weight: ``[D]``, GRN's scale.
        bias: ``[D]``, GRN's shift.
        eps: added to the mean norm.
        input_bias: ``[D]``, added to ``x`` first. Leaving the bias of the linear layer that made ``x`` to this
            operation saves a pass over the gradient of ``x``: its sum falls out of the pass that writes it.

    Returns:
        ``[N, R, D]`` in the dtype of ``x``. The gradient through the norm of an all-zero channel is zero.

    Raises ValueError if the shapes do not fit.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}; expected [images, sites, channels]")
    for name, parameter in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if parameter is not None and parameter.shape != x.shape[2:]:
            raise ValueError(f"{name} has shape {list(parameter.shape)}; x has {x.shape[2]} channels")
    if HAS_TRITON and x.is_cuda and x.dtype != torch.float64:
        return gelu_grn_triton(x, input_bias, weight, bias, eps)
    return gelu_grn_torch(x, input_bias, weight, bias, eps)


def gelu_grn_torch(x: Tensor, input_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """:func:`gelu_grn` in plain torch, the reference of the fused kernels."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    g = x.to(dtype) if input_bias is None else x + input_bias.to(dtype)
    return grn(F.gelu(g), weight, bias, eps).to(x.dtype)


def grn(g: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """GRN over the sites of every image, for activations other than GELU: ``[N, R, D]`` to the same, float32 inside."""
    dtype = torch.promote_types(g.dtype, torch.float32)
    return _GRN.apply(g.to(dtype), weight.to(dtype), bias.to(dtype), eps).to(g.dtype)


class _GRN(torch.autograd.Function):
    """GRN with the derivative written down: half of autograd's passes over memory, and it saves ``g`` alone.

    The root of a sum of squares takes a fifth of the time of ``torch.linalg.vector_norm`` over a dimension that is not
    the last (CPU), and a derivative of its own gives 0, not NaN, at an all-zero channel.
    """

    @staticmethod
    def forward(ctx, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        norm = g.square().sum(dim=1, keepdim=True).sqrt()
        mean = norm.mean(dim=2, keepdim=True) + eps
        ctx.save_for_backward(g, weight, norm, mean)
        return torch.addcmul(bias, g, 1 + weight * (norm / mean))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        g, weight, norm, mean = ctx.saved_tensors
        n = norm / mean
        grad_scale = (grad * g).sum(dim=1, keepdim=True)
        grad_n = grad_scale * weight
        grad_norm = (grad_n - (grad_n * n).mean(dim=2, keepdim=True)) / mean
        # d norm / d g = g / norm
        pull = torch.where(norm > 0, grad_norm / norm, 0)
        grad_g = (grad * (1 + weight * n)).addcmul_(g, pull)
        return grad_g, (grad_scale * n).sum(dim=(0, 1)), grad.sum(dim=(0, 1)), None
