"""A light U-Net over the features of all stages of a ConvNeXt, for pretraining, segmentation and image to image."""

import itertools
from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext


class UNet(nn.Module):
    """Joins the features of all stages, from the coarsest to the finest, into one map at the finest stride.

    Each stage's features pass a norm and a 1 x 1 convolution to ``width``, are added to the coarser level, which a
    linear layer brings to this grid, and pass a ConvNeXt V2 block. The linear layer predicts each of the r * r finer
    sites by weights of its own, so that sites inside a masked patch, whose inputs are equal, can differ. No layer mixes
    images (LayerNorm; GRN's norm is over each image), so results do not depend on the batch.

    A prediction layer, such as a 1 x 1 convolution, comes after it.

    Args:
        dims: channels of each stage's features, finest first (:func:`fcmae.models.backbone.stage_shapes`).
        strides: pixels per side of a site of each stage; each is a multiple of the one before, or equal.
        width: channels of all levels, and of the result.

    Raises ValueError if ``dims`` and ``strides`` do not fit together.
    """

    def __init__(self, dims: Sequence[int], strides: Sequence[int], width: int = 128) -> None:
        super().__init__()
        self.dims, self.strides, self.width = list(dims), list(strides), width
        finer = [1, *strides][: len(strides)]
        if len(dims) != len(strides) or not dims or any(b % a for a, b in zip(finer, strides, strict=True)):
            raise ValueError(f"dims and strides must have a value per stage, finest first; got {dims} and {strides}")
        ratios = [b // a for a, b in itertools.pairwise(strides)]
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        self.laterals = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        # From level i + 1 to level i. Nothing where both have the same grid.
        self.ups = nn.ModuleList(nn.Linear(width, r * r * width) if r > 1 else nn.Identity() for r in ratios)
        self.blocks = nn.ModuleList(ConvNeXtBlock(width, use_grn=True, ls_init_value=None) for _ in dims)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # The maps are channels last, and so is the gradient of a convolution's weight that data parallelism exchanges.
        self.to(memory_format=torch.channels_last)
        init_weights(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """The map at the finest stride.

        Args:
            features: ``[N, dims[i], H / strides[i], W / strides[i]]`` of every stage, finest first. H and W must be
                multiples of the coarsest stride, ``strides[-1]``: pad the images otherwise (ValueError).

        Returns:
            ``[N, width, H / strides[0], W / strides[0]]``, normalised over the channels, channels last in memory.
        """
        self._check(features)
        x = self.join([self.lateral(level, f.permute(0, 2, 3, 1)) for level, f in enumerate(features)])
        return x.permute(0, 3, 1, 2)

    def lateral(self, level: int, x: Tensor) -> Tensor:
        """The features of one stage ``[..., dims[level]]``, site by site, to ``[..., width]``."""
        norm, lateral = self.norms[level], self.laterals[level]
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(lateral, nn.Linear)
        return convnext.linear(convnext.layer_norm(x, norm), lateral)

    def join(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of :meth:`lateral`, ``[N, h, w, width]`` of every stage, to one at the finest stride."""
        x = run_block(self.blocks[-1], maps[-1])
        for level in range(len(maps) - 2, -1, -1):
            up = self.ups[level]
            if isinstance(up, nn.Linear):
                x = finer(convnext.linear(x, up), self.strides[level + 1] // self.strides[level])
            x = run_block(self.blocks[level], x + maps[level])
        return convnext.layer_norm(x, self.norm)

    def _check(self, features: Sequence[Tensor]) -> None:
        if [f.shape[1] for f in features] != self.dims:
            raise ValueError(f"UNet expects features of {self.dims} channels; got {[list(f.shape) for f in features]}")
        pixels = {(f.shape[2] * s, f.shape[3] * s) for f, s in zip(features, self.strides, strict=True)}
        if len(pixels) > 1:
            raise ValueError(
                f"UNet expects images whose sides are divisible by {self.strides[-1]} px, the coarsest stride; "
                f"got features of {[list(f.shape[2:]) for f in features]} sites at strides {self.strides}"
            )


def run_block(block: nn.Module, x: Tensor) -> Tensor:
    """A ConvNeXt V2 block on a whole map ``[N, h, w, C]``."""
    assert isinstance(block, ConvNeXtBlock)
    h = block.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x + convnext.pointwise(block, h, grn_scope="image")


def finer(x: Tensor, ratio: int) -> Tensor:
    """``[N, h, w, ratio * ratio * C]`` to ``[N, h * ratio, w * ratio, C]``."""
    n, height, width, _ = x.shape
    x = x.view(n, height, width, ratio, ratio, -1).transpose(2, 3)
    return x.reshape(n, height * ratio, width * ratio, -1)


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 and zero biases, as timm initialises the encoder."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
