"""The head of dense objectives: a U-Net over the features of all stages, and a prediction for each pixel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.models.unet import UNet
from fcmae.precision import no_autocast


class DenseHead(nn.Module):
    """The U-Net's map, a 1 x 1 convolution, and bilinear interpolation to the size of the image.

    Args:
        dims: channels of each stage's features, finest first.
        strides: pixels per side of a site of each stage.
        outputs: numbers per pixel.
        width: channels of the U-Net.
    """

    def __init__(self, dims: Sequence[int], strides: Sequence[int], outputs: int, width: int = 128) -> None:
        super().__init__()
        self.unet = UNet(dims, strides, width)
        self.last = nn.Conv2d(width, outputs, 1)
        nn.init.trunc_normal_(self.last.weight, std=0.02)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]  # it has one
        self.stride = strides[0]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """``[N, outputs, H, W]``, float32, of the maps ``[N, dims[i], H / strides[i], W / strides[i]]``."""
        x = self.last(self.unet(maps))
        return x.float() if self.stride == 1 else enlarged(x, self.stride)


def enlarged(x: Tensor, factor: int) -> Tensor:
    """``[N, C, h, w]`` to ``[N, C, h * factor, w * factor]``, float32, bilinear, as ``align_corners=False``.

    By two matrix products, since torch's own backward pass on a GPU adds in no fixed order.
    """
    with no_autocast(x.device):
        rows, cols = (shares(side, side * factor, x.device) for side in x.shape[-2:])
        return rows @ x.float() @ cols.T


def shares(side: int, new: int, device: torch.device) -> Tensor:
    """``[new, side]``: the share of each old site of a line in each new one."""
    return F.interpolate(torch.eye(side, device=device)[None], size=new, mode="linear")[0].T
