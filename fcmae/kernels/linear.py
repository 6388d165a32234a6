"""Linear layers over the last dimension.

On a CPU, torch multiplies float32 matrices by MKL, which does not use AVX-512 on AMD's processors: about 105 GFLOP/s
on a core of an EPYC (Zen 5). oneDNN's 1 x 1 convolutions compute the same product in half the time, forward and
backward, and a convolution is torch's public way to oneDNN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
