"""The dense engine: a timm ConvNeXt over whole images, for fine-tuning and evaluation, on the packed engine's kernels.

On a GPU the sites of every stage are kept in square tiles ``[N, V, S, S, C]``, as the packed engine keeps visible
patches, so that the same kernels run. A stage's tile is chosen for the speed of the depthwise kernels; between
stages the sites are laid out again. Elsewhere sites are ``[N, H, W, C]``.
"""

import functools
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext, fused
from fcmae.engines.compiled import recomputed, region
from fcmae.kernels import Neighbors, neighbors, packed_depthwise, precompile

SIDES = (8, 4, 14, 7, 12, 16, 10, 6, 13, 11, 9, 15, 5, 3, 2, 1)
"""Sides of a tile, the best first. Measured for the first four (H200, bf16, Base at batch 256): times over the byte
floor, forward and weight gradient, at 56 sites 8: 3.8, 3.5; at 28 sites 4: 3.2, 3.2 (14: 4.5, 4.2); at 14 sites
14: 3.9, 3.7 (7: 4.7, 5.1; 2: 6.0, 5.8); at 7 sites 7: 5.0, 5.3 (1: 16.7, 14.8)."""


class Layout(NamedTuple):
    """How a map of ``height`` x ``width`` sites is kept: in tiles of ``side`` x ``side``, or without tiles (0)."""

    height: int
    width: int
    side: int


def dense(
    backbone: ConvNeXt, imgs: Tensor, *, compiled: bool = False, recompute_stages: Collection[int] = ()
) -> list[Tensor]:
    """The features of every stage, as timm computes them, up to rounding. Drops paths as the backbone's modules do.

    Args:
        backbone: a timm ConvNeXt that passed :func:`fcmae.engines.check_backbone`.
        imgs: ``[N, C, H, W]``; a side's remainder beyond a multiple of a stride is ignored, as by timm.
        compiled: by torch.compile, region by region, but for blocks that are one operation.
        recompute_stages: stages, counted from 1, whose blocks keep no activations and run again in the backward pass.

    Returns:
        A map ``[N, D, h, w]`` per stage, channels last in memory; the last one after ``norm_pre``.
    """
    layouts = list(_layouts(backbone, imgs))
    if fused.needs_all_kernels(imgs, compiled):
        precompile.start(_shapes(backbone, imgs, layouts))
    x = region(_stem, compiled)(*convnext.stem(backbone), imgs, layouts[0])
    before, maps = layouts[0], []
    for number, (stage, layout) in enumerate(zip(convnext.stages(backbone), layouts, strict=True), start=1):
        recompute = number in recompute_stages or stage.grad_checkpointing
        if isinstance(stage.downsample, nn.Sequential):
            x = region(_downsample, compiled)(*convnext.downsample(stage.downsample), x, before, layout)
        where = _all_visible(len(imgs), layout, imgs.device) if layout.side else None
        for block, copies in fused.with_copies(stage.blocks, x):
            if copies is not None and where is not None:
                x = recomputed(fused.run, recompute)(block, x, copies, where, "image", fused.path_factors(block, x))
            else:
                x = recomputed(region(_block, compiled), recompute)(block, x, where)
        before = layout
        maps.append(_untiled(x, layout).permute(0, 3, 1, 2))
    if isinstance(backbone.norm_pre, nn.LayerNorm):
        maps[-1] = convnext.layer_norm(maps[-1].permute(0, 2, 3, 1), backbone.norm_pre).permute(0, 3, 1, 2)
    return maps


def _layouts(backbone: ConvNeXt, imgs: Tensor) -> Iterator[Layout]:
    """The layout of every stage."""
    stride = convnext.stem(backbone)[0].stride[0]
    height, width = imgs.shape[-2] // stride, imgs.shape[-1] // stride
    for stage in convnext.stages(backbone):
        if isinstance(stage.downsample, nn.Sequential):
            stride = convnext.downsample(stage.downsample)[1].stride[0]
            height, width = height // stride, width // stride
        if not height or not width:
            raise ValueError(f"images of {imgs.shape[-2]} x {imgs.shape[-1]} px leave a stage without a site")
        side = next(s for s in SIDES if height % s == width % s == 0) if imgs.is_cuda else 0
        yield Layout(height, width, side)


def _shapes(backbone: ConvNeXt, imgs: Tensor, layouts: list[Layout]) -> Iterator[precompile.Shape]:
    """What the kernels of every stage are specialised for."""
    dtype = precompile.dtype_of(imgs)
    for stage, (height, width, side) in zip(convnext.stages(backbone), layouts, strict=True):
        block = stage.blocks[0]
        assert isinstance(block, ConvNeXtBlock)
        channels, _, kernel, _ = block.conv_dw.weight.shape
        rows, cols = height // side, width // side
        yield precompile.DepthwiseShape((rows, cols), rows * cols, side, channels, kernel, dtype)
        yield precompile.NormShape(channels, dtype)
        if convnext.is_fused(block, imgs):
            yield precompile.GeluGrnShape(height * width, block.mlp.fc1.weight.shape[0], dtype)
            yield precompile.ResidualShape(channels, dtype, fused.drops_paths(stage))


@functools.lru_cache(maxsize=64)
def _all_visible(images: int, layout: Layout, device: torch.device) -> Neighbors:
    """The tables of the depthwise kernels for whole images."""
    rows, cols = layout.height // layout.side, layout.width // layout.side
    with torch.inference_mode(False):  # an evaluation may make them first, and training use them
        return neighbors(torch.arange(rows * cols, device=device).repeat(images, 1), rows, cols)


def _stem(conv: nn.Conv2d, norm: nn.LayerNorm, imgs: Tensor, layout: Layout) -> Tensor:
    x = _strided(imgs.permute(0, 2, 3, 1), conv, layout)
    # Autocast's norms are float32; the sums of the first stage's blocks have the type of the other stages'.
    return convnext.layer_norm(x, norm).to(x.dtype)


def _downsample(norm: nn.LayerNorm, conv: nn.Conv2d, x: Tensor, before: Layout, layout: Layout) -> Tensor:
    return _strided(_untiled(convnext.layer_norm(x, norm), before), conv, layout)


def _strided(x: Tensor, conv: nn.Conv2d, layout: Layout) -> Tensor:
    """A convolution whose kernel k equals its stride: ``[N, H, W, C]`` to the sites of ``layout``."""
    k = conv.stride[0]
    return _tiled(convnext.patchwise_conv(x[:, : layout.height * k, : layout.width * k], conv), layout)


def _tiled(x: Tensor, layout: Layout) -> Tensor:
    """``[N, H, W, C]`` to ``[N, V, S, S, C]``, or as it is."""
    height, width, s = layout
    if not s:
        return x
    x = x.unflatten(2, (width // s, s)).unflatten(1, (height // s, s)).transpose(2, 3)
    return x.reshape(len(x), -1, s, s, x.shape[-1])


def _untiled(x: Tensor, layout: Layout) -> Tensor:
    """The inverse of :func:`_tiled`."""
    height, width, s = layout
    if not s:
        return x
    x = x.unflatten(1, (height // s, width // s)).transpose(2, 3)
    return x.reshape(len(x), height, width, x.shape[-1])


def _block(block: ConvNeXtBlock, x: Tensor, where: Neighbors | None) -> Tensor:
    """A ConvNeXt block on sites of either layout."""
    conv = block.conv_dw
    if where is not None:
        h = packed_depthwise(x, conv.weight, conv.bias, where)
    else:
        padding, maps = conv.weight.shape[-1] // 2, x.permute(0, 3, 1, 2)
        h = F.conv2d(maps, conv.weight, conv.bias, padding=padding, groups=len(conv.weight)).permute(0, 2, 3, 1)
    return x + block.drop_path(convnext.pointwise(block, h, grn_scope="image"))
