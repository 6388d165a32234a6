"""The dense engine: a timm ConvNeXt over whole images, for fine-tuning and evaluation, on the packed engine's kernels.

On a GPU the sites of every stage are kept in square tiles ``[N, V, S, S, C]``, as the packed engine keeps visible
patches, so that the same kernels run. A stage's tile is chosen for the speed of the depthwise kernels; between
stages the sites are laid out again. Elsewhere sites are ``[N, H, W, C]``.
"""

from collections.abc import Collection, Iterator

import torch.nn.functional as F
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext, fused
from fcmae.engines.compiled import recomputed, region
from fcmae.engines.tiles import Layout, all_visible, best, tiled, untiled
from fcmae.kernels import Neighbors, packed_depthwise, precompile


def dense(
    backbone: ConvNeXt, imgs: Tensor, *, compiled: bool = False, recompute_stages: Collection[int] = ()
) -> list[Tensor]:
    """The features of every stage, as timm computes them, up to rounding. Drops paths as the backbone's modules do.

    Args:
        backbone: a timm ConvNeXt that passed :func:`fcmae.engines.check_backbone`.
        imgs: ``[N, C, H, W]``; a side's remainder beyond a multiple of a stride is ignored, as by timm.
        compiled: by torch.compile, region by region, but for what is one operation (:mod:`fcmae.engines.fused`).
        recompute_stages: stages, counted from 1, whose blocks keep no activations and run again in the backward pass.

    Returns:
        A map ``[N, D, h, w]`` per stage, channels last in memory; the last one after ``norm_pre``.
    """
    layouts = list(_layouts(backbone, imgs))
    if fused.needs_all_kernels(imgs, compiled):
        precompile.start(_shapes(backbone, imgs, layouts))
    own = fused.has_layers(backbone, imgs) and all(layout.side for layout in layouts)
    before, maps = _before_stages(backbone, imgs, layouts[0]), []
    if own:
        where = all_visible(len(imgs), before, imgs.device)
        x = fused.stem(*convnext.stem(backbone), imgs, where, before.side)
    else:
        x = region(_stem, compiled)(*convnext.stem(backbone), imgs, before)
    for number, (stage, layout) in enumerate(zip(convnext.stages(backbone), layouts, strict=True), start=1):
        recompute = number in recompute_stages or stage.grad_checkpointing
        if isinstance(stage.downsample, nn.Sequential):
            norm, conv = convnext.downsample(stage.downsample)
            if own:
                sites = (len(imgs), -1, layout.side, layout.side)
                x = fused.downsample(norm, conv, x, _move(before, layout, conv)).unflatten(0, sites)
            else:
                x = region(_downsample, compiled)(norm, conv, x, before, layout)
        tables = all_visible(len(imgs), layout, imgs.device) if layout.side else None
        for block, copies in fused.with_copies(stage.blocks, x):
            if copies is not None and tables is not None:
                x = recomputed(fused.run, recompute)(block, x, copies, tables, "image", fused.path_factors(block, x))
            else:
                x = recomputed(region(_block, compiled), recompute)(block, x, tables)
        before = layout
        maps.append(untiled(x, layout).permute(0, 3, 1, 2))
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
        yield best(height, width) if imgs.is_cuda else Layout(height, width, 0)


def _before_stages(backbone: ConvNeXt, imgs: Tensor, first: Layout) -> Layout:
    """The layout of the stem's sites: the first stage's, unless that one has a downsampling layer, too."""
    if not isinstance(next(convnext.stages(backbone)).downsample, nn.Sequential):
        return first
    stride = convnext.stem(backbone)[0].stride[0]
    height, width = imgs.shape[-2] // stride, imgs.shape[-1] // stride
    return best(height, width) if first.side else Layout(height, width, 0)


def _shapes(backbone: ConvNeXt, imgs: Tensor, layouts: list[Layout]) -> Iterator[precompile.Shape]:
    """What the kernels of every stage are specialised for."""
    dtype, own = precompile.dtype_of(imgs), fused.has_layers(backbone, imgs)
    before = _before_stages(backbone, imgs, layouts[0])
    if own:
        yield fused.stem_shape(*convnext.stem(backbone), imgs, before.side)
    for stage, layout in zip(convnext.stages(backbone), layouts, strict=True):
        if own and isinstance(stage.downsample, nn.Sequential):
            norm, conv = convnext.downsample(stage.downsample)
            yield precompile.MovingNormShape(norm.normalized_shape[0], dtype, *_move(before, layout, conv))
        before = layout
        height, width, side = layout
        block = stage.blocks[0]
        assert isinstance(block, ConvNeXtBlock)
        channels, _, kernel, _ = block.conv_dw.weight.shape
        rows, cols = height // side, width // side
        yield precompile.DepthwiseShape((rows, cols), rows * cols, side, channels, kernel, dtype)
        yield precompile.SumsShape(kernel)
        yield precompile.NormShape(channels, dtype)
        if convnext.is_fused(block, imgs):
            yield precompile.GeluGrnShape(height * width, block.mlp.fc1.weight.shape[0], dtype)
            yield precompile.ResidualShape(channels, dtype, fused.drops_paths(stage))


def _move(before: Layout, layout: Layout, conv: nn.Conv2d) -> precompile.Move:
    return precompile.Move(before.height, before.width, before.side, layout.side, conv.stride[0])


def _stem(conv: nn.Conv2d, norm: nn.LayerNorm, imgs: Tensor, layout: Layout) -> Tensor:
    x = _strided(imgs.permute(0, 2, 3, 1), conv, layout)
    # Autocast's norms are float32; the sums of the first stage's blocks have the type of the other stages'.
    return convnext.layer_norm(x, norm).to(x.dtype)


def _downsample(norm: nn.LayerNorm, conv: nn.Conv2d, x: Tensor, before: Layout, layout: Layout) -> Tensor:
    return _strided(untiled(convnext.layer_norm(x, norm), before), conv, layout)


def _strided(x: Tensor, conv: nn.Conv2d, layout: Layout) -> Tensor:
    """A convolution whose kernel k equals its stride: ``[N, H, W, C]`` to the sites of ``layout``."""
    k = conv.stride[0]
    return tiled(convnext.patchwise_conv(x[:, : layout.height * k, : layout.width * k], conv), layout)


def _block(block: ConvNeXtBlock, x: Tensor, where: Neighbors | None) -> Tensor:
    """A ConvNeXt block on sites of either layout."""
    conv = block.conv_dw
    if where is not None:
        h = packed_depthwise(x, conv.weight, conv.bias, where)
    else:
        padding, maps = conv.weight.shape[-1] // 2, x.permute(0, 3, 1, 2)
        h = F.conv2d(maps, conv.weight, conv.bias, padding=padding, groups=len(conv.weight)).permute(0, 2, 3, 1)
    return x + block.drop_path(convnext.pointwise(block, h, grn_scope="image"))
