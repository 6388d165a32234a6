"""Layer normalisation of sites before a linear layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.toolchain import HAS_C_COMPILER

try:
    from fcmae.kernels.norm_triton import layer_norm_forward

    HAS_TRITON = HAS_C_COMPILER
except ModuleNotFoundError:
    HAS_TRITON = False


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last dimension; on a GPU one backward pass does all gradients.

    Arithmetic is float32. The result has the dtype of ``x`` on a GPU, where autocast's would be float32.
    """
    if HAS_TRITON and x.is_cuda and x.dtype != torch.float64:
        return layer_norm_forward(x, weight, bias, eps)[0]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
