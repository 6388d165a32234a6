"""The packed engine: only visible patches exist.

Every image keeps the same number of patches, so the visible part of a batch is a dense array ``[N, V, S, S, C]``
with a static shape. All layers but the depthwise convolution work per site, or (GRN) per image.
"""

from collections.abc import Collection

import torch.nn.functional as F
from timm.layers import GELU
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext
from fcmae.engines.regions import recomputed, region
from fcmae.kernels import Neighbors, gather_patches, gelu_grn, grn, neighbors, packed_depthwise
from fcmae.masking import grid_size, visible_indices


def packed(
    backbone: ConvNeXt,
    imgs: Tensor,
    mask: Tensor,
    *,
    keep: int,
    patch_size: int,
    grn_scope: str = "image",
    compiled: bool = False,
    recompute_stages: Collection[int] = (),
) -> Tensor:
    """Runs ``backbone`` over the visible patches alone. See :data:`fcmae.engines.Engine` for the contract."""
    rows, cols = grid_size(imgs.shape[-2], imgs.shape[-1], patch_size)
    index = visible_indices(mask, keep)
    where = neighbors(index, rows, cols)
    x = region(_stem, compiled)(*convnext.stem(backbone), imgs, where)
    for number, stage in enumerate(convnext.stages(backbone), start=1):
        run_block = recomputed(region(_block, compiled), number in recompute_stages)
        if isinstance(stage.downsample, nn.Sequential):
            x = region(_downsample, compiled)(*convnext.downsample(stage.downsample), x)
        for block in convnext.blocks(stage):
            x = run_block(block, x, where, grn_scope)
    if isinstance(backbone.norm_pre, nn.LayerNorm):
        x = _layer_norm(x, backbone.norm_pre)
    return x


def _stem(conv: nn.Conv2d, norm: nn.LayerNorm, imgs: Tensor, where: Neighbors) -> Tensor:
    """The visible pixels of ``[N, C, H, W]``, and no others, to the first stage's sites ``[N, V, S, S, D]``."""
    patches = gather_patches(imgs, where.index, where.rows, where.cols)
    return _layer_norm(_patchwise_conv(patches, conv), norm)


def _downsample(norm: nn.LayerNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    return _patchwise_conv(_layer_norm(x, norm), conv)


def _block(block: ConvNeXtBlock, x: Tensor, where: Neighbors, grn_scope: str) -> Tensor:
    """A ConvNeXt block over packed sites, without drop path (off in pretraining)."""
    h = packed_depthwise(x, block.conv_dw.weight, block.conv_dw.bias, where)
    h = _layer_norm(h, block.norm)
    h = _activate(block, h, grn_scope)
    h = _linear(h, block.mlp.fc2)
    if block.gamma is not None:
        h = h * block.gamma
    return x + h


def _activate(block: ConvNeXtBlock, x: Tensor, grn_scope: str) -> Tensor:
    """The MLP's first half: linear layer, activation, and GRN over the sites of an image or of the whole batch."""
    fc1, act, grn_layer = block.mlp.fc1, block.mlp.act, convnext.grn(block)
    if grn_layer is None:
        return act(_linear(x, fc1))
    fused = x.is_cuda and isinstance(act, GELU | nn.GELU)  # leaves fc1's bias to the kernel, see gelu_grn
    h = F.linear(x, fc1.weight.flatten(1), None if fused else fc1.bias)
    sites = h.flatten(1, 3) if grn_scope == "image" else h.flatten(0, 3).unsqueeze(0)
    if isinstance(act, GELU | nn.GELU):
        bias = fc1.bias if fused else None
        sites = gelu_grn(sites, grn_layer.weight, grn_layer.bias, grn_layer.eps, input_bias=bias)
    else:
        sites = grn(act(sites), grn_layer.weight, grn_layer.bias, grn_layer.eps)
    return sites.view_as(h)


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _linear(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A linear layer or 1 x 1 convolution (timm's conv_mlp) over the last dimension."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def _patchwise_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution whose kernel k equals its stride: ``[N, V, S, S, C]`` to ``[N, V, S / k, S / k, D]``."""
    n, v, size, _, c = x.shape
    k = conv.stride[0]
    x = x.view(n, v, size // k, k, size // k, k, c).transpose(3, 4).reshape(n, v, size // k, size // k, k * k * c)
    # Of a 1 x 1 kernel nothing is to be reordered, and the gradient would get other strides than the parameter.
    weight = conv.weight.permute(0, 2, 3, 1) if k > 1 else conv.weight
    return F.linear(x, weight.flatten(1), conv.bias)
