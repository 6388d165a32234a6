"""UPerNet (arXiv 1807.10221): pyramid pooling and a feature pyramid over the features of all stages of a ConvNeXt.

As MMSegmentation's ``UPerHead`` and ``FCNHead``, with two differences. The norms are GroupNorm where the paper has
BatchNorm over all GPUs: an image's result must not depend on its batch, or training would depend on the number of GPUs
and on micro-batches. And maps are resized and pooled by matrix products, because torch's own backward passes on a GPU
add in no fixed order.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.models.dense_head import enlarged, shares
from fcmae.precision import no_autocast

POOLED = (1, 2, 3, 6)
"""Sites per side of the maps of pyramid pooling."""
GROUPS = 32
"""Of a norm, or fewer, so that each has at least :data:`LEAST` channels: one alone would be 0 at a site alone."""
LEAST = 8
AUXILIARY_WIDTH = 256
AUXILIARY_STAGE = -2
DROPOUT = 0.1
"""Probability that a channel is dropped before the last convolution."""


class ConvNorm(nn.Sequential):
    """A convolution without bias that keeps the size, GroupNorm and ReLU."""

    def __init__(self, dim: int, width: int, kernel: int) -> None:
        conv = nn.Conv2d(dim, width, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        super().__init__(conv, nn.GroupNorm(groups_of(width), width), nn.ReLU())


def groups_of(width: int) -> int:
    """How many groups the norm of ``width`` channels has."""
    groups = math.gcd(GROUPS, width)
    while groups > 1 and width // groups < LEAST:
        groups //= 2
    return groups


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map ``[N, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class UPerNet(nn.Module):
    """A prediction for each pixel, and in training mode a second one of the third stage (the auxiliary FCN head).

    Args:
        dims: channels of each stage's features, finest first.
        strides: pixels per side of a site of each stage.
        outputs: numbers per pixel.
        width: channels of all levels.
    """

    def __init__(self, dims: Sequence[int], strides: Sequence[int], outputs: int, width: int = 512) -> None:
        super().__init__()
        self.strides = list(strides)
        self.norms = nn.ModuleList(MapNorm(dim, eps=1e-6) for dim in dims)
        self.pools = nn.ModuleList(ConvNorm(dims[-1], width, 1) for _ in POOLED)
        self.bottleneck = ConvNorm(dims[-1] + len(POOLED) * width, width, 3)
        self.laterals = nn.ModuleList(ConvNorm(dim, width, 1) for dim in dims[:-1])
        self.levels = nn.ModuleList(ConvNorm(width, width, 3) for _ in dims[:-1])
        self.fuse = ConvNorm(len(dims) * width, width, 3)
        self.last = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(width, outputs, 1))
        stage = AUXILIARY_STAGE if len(dims) > 1 else -1
        self.auxiliary = nn.Sequential(
            ConvNorm(dims[stage], AUXILIARY_WIDTH, 3), nn.Dropout2d(DROPOUT), nn.Conv2d(AUXILIARY_WIDTH, outputs, 1)
        )
        self.auxiliary_stage = stage
        # The maps are channels last, and so is the gradient of a convolution's weight that data parallelism exchanges.
        self.to(memory_format=torch.channels_last)
        for conv in (self.last[-1], self.auxiliary[-1]):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """``[N, outputs, H, W]``, float32, of the maps ``[N, dims[i], H / strides[i], W / strides[i]]``; in training
        mode two of them: the prediction and the auxiliary one."""
        maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        found = enlarged(self.last(self.join(maps)), self.strides[0])
        if not self.training:
            return found
        stage = self.auxiliary_stage
        return found, enlarged(self.auxiliary(maps[stage]), self.strides[stage])

    def join(self, maps: Sequence[Tensor]) -> Tensor:
        """The map ``[N, width, H / strides[0], W / strides[0]]`` of normalised features of all stages."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps[:-1], strict=True)]
        levels.append(self._pool(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resized(levels[i], levels[i - 1].shape[-2:])
        outputs = [level(x) for level, x in zip(self.levels, levels[:-1], strict=True)] + levels[-1:]
        finest = outputs[0].shape[-2:]
        return self.fuse(torch.cat([resized(x, finest) for x in outputs], dim=1))

    def _pool(self, x: Tensor) -> Tensor:
        """The coarsest level: features beside their means over 1, 4, 9 and 36 parts of the image."""
        size = x.shape[-2:]
        parts = [resized(pool(pooled(x, side)), size) for side, pool in zip(POOLED, self.pools, strict=True)]
        return self.bottleneck(torch.cat([x, *parts], dim=1))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """``[N, C, h, w]`` to ``[N, C, *size]``, channels last, bilinear, as ``align_corners=False``."""
    if tuple(size) == tuple(x.shape[-2:]):
        return x
    return _products(x, *(shares(side, new, x.device) for side, new in zip(x.shape[-2:], size, strict=True)))


def pooled(x: Tensor, side: int) -> Tensor:
    """``[N, C, h, w]`` to the means of ``side`` x ``side`` parts, as ``adaptive_avg_pool2d``; at least float32."""
    means = (F.adaptive_avg_pool1d(torch.eye(old, device=x.device)[None], side)[0].T for old in x.shape[-2:])
    return _products(x.to(torch.promote_types(x.dtype, torch.float32)), *means)


def _products(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """``rows @ x @ cols.T`` of each channel, in the type of ``x``."""
    with no_autocast(x.device):
        sites = x.permute(0, 2, 3, 1)
        lines = (rows.to(x.dtype) @ sites.flatten(2)).unflatten(2, sites.shape[2:])
        return (cols.to(x.dtype) @ lines).permute(0, 3, 1, 2)
