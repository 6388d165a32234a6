"""Linear layers over the last dimension.

On a CPU, torch multiplies float32 matrices by MKL, which does not use AVX-512 on AMD's processors: about 105 GFLOP/s
on a core of an EPYC (Zen 5). oneDNN's 1 x 1 convolutions compute the same product in half the time, forward and
backward, and a convolution is torch's public way to oneDNN.
"""

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's threads for backward passes may meet cuBLAS before any other library of CUDA; that is no fault.
warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")

HAS_ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN_BATCH = 16
"""Images from which torch gives 1 x 1 convolutions of a single thread to oneDNN (its ``use_mkldnn``)."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, by the faster library.

    Args:
        x: ``[..., C]``.
        weight: ``[D, C]``.
        bias: ``[D]`` or None.

    Returns:
        ``[..., D]``.
    """
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    *outer, channels = x.shape
    images = math.gcd(math.prod(outer), ONEDNN_BATCH)
    maps = x.reshape(images, 1, -1, channels).permute(0, 3, 1, 2)  # channels last in memory, as oneDNN likes them
    out = F.conv2d(maps, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*outer, -1)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Float32 on a CPU; 16-bit products go to oneDNN anyway, which includes autocast's."""
    return (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def linear_mixed(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``; for 16-bit ``x`` on a GPU the float32 gradient of ``weight`` is written by the product itself.

    Autocast's product writes 16 bits, which another pass reads, converts and writes.

    Args:
        x: ``[..., C]``.
        weight: ``[D, C]``.

    Returns:
        ``[..., D]`` in the dtype of ``x``.
    """
    if x.is_cuda and x.element_size() == 2 and weight.dtype == torch.float32:
        return _linear_mixed(x, weight)[0]
    return F.linear(x, weight)


@torch.library.custom_op("fcmae::linear_mixed", mutates_args=())
def _linear_mixed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and the weight in the dtype of ``x``."""
    cast = weight.to(x.dtype)
    return F.linear(x, cast), cast


@_linear_mixed.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), weight.new_empty(weight.shape, dtype=x.dtype)


def product_float32(grad: Tensor, x: Tensor) -> Tensor:
    """``grad.T @ x`` of 16-bit matrices, in float32."""
    if x.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return grad.t().float() @ x.float()


class Form(NamedTuple):
    """What the gradient of a parameter looks like."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, parameter: Tensor) -> "Form":
        return cls(parameter.shape, parameter.stride(), parameter.dtype)

    def take(self, grad: Tensor) -> Tensor:
        """``grad`` as the parameter's gradient, copied only where its memory must be in another order."""
        grad = grad.reshape(self.shape).to(self.dtype)
        if all(mine == of for size, mine, of in zip(self.shape, grad.stride(), self.stride, strict=True) if size > 1):
            return grad.as_strided(self.shape, self.stride)  # for data parallelism, which compares all strides
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=grad.device).copy_(grad)


def weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad.T @ x`` in a type at least as exact as ``dtype``."""
    return grad.t() @ x if grad.dtype == dtype else product_float32(grad, x)


_product_float32 = torch.library.custom_op("fcmae::product_float32", product_float32, mutates_args=())


@_product_float32.register_fake
def _(grad, x):
    return x.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    x, cast = ctx.saved_tensors
    grad = grad.reshape(-1, cast.shape[0])
    of_weight = _product_float32(grad, x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
    return (grad @ cast).view(x.shape), of_weight


_linear_mixed.register_autograd(_gradients, setup_context=_save)
