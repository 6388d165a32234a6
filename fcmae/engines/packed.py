"""The packed engine: only visible patches exist.

Every image keeps the same number of patches, so the visible part of a batch is a dense array ``[N, V, S, S, C]``
with a static shape. All layers but the depthwise convolution work per site, or (GRN) per image.
"""

from collections.abc import Collection, Iterator

from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext, fused
from fcmae.engines.compiled import recomputed, region
from fcmae.kernels import Neighbors, gather_patches, neighbors, packed_depthwise, precompile
from fcmae.masks.patches import grid_size, visible_indices
from fcmae.precision import has_float8_products


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
    all_stages: bool = False,
) -> list[Tensor]:
    """Runs ``backbone`` over the visible patches alone. See :data:`fcmae.engines.Engine` for the contract."""
    rows, cols = grid_size(imgs.shape[-2], imgs.shape[-1], patch_size)
    index = visible_indices(mask, keep)
    where = neighbors(index, rows, cols)
    if fused.needs_all_kernels(imgs, compiled):
        precompile.start(_shapes(backbone, imgs, where, patch_size, grn_scope))
    own, (conv, norm) = fused.has_layers(backbone, imgs), convnext.stem(backbone)
    if own:
        x = fused.stem(conv, norm, imgs, where, patch_size // conv.stride[0])
    else:
        x = region(_stem, compiled)(conv, norm, imgs, where)
    features = []
    for number, stage in enumerate(convnext.stages(backbone), start=1):
        recompute = number in recompute_stages or stage.grad_checkpointing
        if isinstance(stage.downsample, nn.Sequential):
            norm, conv = convnext.downsample(stage.downsample)
            if own:
                move = _move(x.shape[2], conv)
                x = fused.downsample(norm, conv, x, move).view(*x.shape[:2], move.after, move.after, -1)
            else:
                x = region(_downsample, compiled)(norm, conv, x)
        for block, copies in fused.with_copies(convnext.blocks(stage), x, has_float8_products()):
            if copies is not None:
                x = recomputed(fused.run, recompute)(block, x, copies, where, grn_scope)
            else:
                x = recomputed(region(_block, compiled), recompute)(block, x, where, grn_scope)
        if all_stages or number == len(backbone.stages):
            features.append(x)
    if isinstance(backbone.norm_pre, nn.LayerNorm):
        features[-1] = convnext.layer_norm(features[-1], backbone.norm_pre)
    return features


def _shapes(
    backbone: ConvNeXt, imgs: Tensor, where: Neighbors, patch_size: int, grn_scope: str
) -> Iterator[precompile.Shape]:
    """What the kernels of every stage are specialised for."""
    dtype, keep = precompile.dtype_of(imgs), where.index.shape[1]
    side, own = patch_size // convnext.stem(backbone)[0].stride[0], fused.has_layers(backbone, imgs)
    if own:
        yield fused.stem_shape(*convnext.stem(backbone), imgs, side)
    for stage in convnext.stages(backbone):
        if isinstance(stage.downsample, nn.Sequential):
            norm, conv = convnext.downsample(stage.downsample)
            if own:
                yield precompile.MovingNormShape(norm.normalized_shape[0], dtype, *_move(side, conv))
            side //= conv.stride[0]
        block = next(convnext.blocks(stage))
        channels, _, kernel, _ = block.conv_dw.weight.shape
        yield precompile.DepthwiseShape((where.rows, where.cols), keep, side, channels, kernel, dtype)
        yield precompile.SumsShape(kernel)
        yield precompile.NormShape(channels, dtype)
        if convnext.is_fused(block, imgs):
            float8 = has_float8_products()
            if grn_scope == "image":
                yield precompile.GeluGrnShape(keep * side**2, block.mlp.fc1.weight.shape[0], dtype, float8)
            yield precompile.ResidualShape(channels, dtype, drops=False)
            if float8:
                yield precompile.Float8Shape(dtype)


def _move(side: int, conv: nn.Conv2d) -> precompile.Move:
    """How the sites of a patch move, which counts as a map with ``side`` sites per side."""
    return precompile.Move(side, side, side, side // conv.stride[0], conv.stride[0])


def _stem(conv: nn.Conv2d, norm: nn.LayerNorm, imgs: Tensor, where: Neighbors) -> Tensor:
    """The visible pixels of ``[N, C, H, W]``, and no others, to the first stage's sites ``[N, V, S, S, D]``."""
    patches = gather_patches(imgs, where.index, where.rows, where.cols)
    x = convnext.patchwise_conv(patches, conv)
    # Autocast's norms are float32; the sums of the first stage's blocks have the type of the other stages'.
    return convnext.layer_norm(x, norm).to(x.dtype)


def _downsample(norm: nn.LayerNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    return convnext.patchwise_conv(convnext.layer_norm(x, norm), conv)


def _block(block: ConvNeXtBlock, x: Tensor, where: Neighbors, grn_scope: str) -> Tensor:
    """A ConvNeXt block over packed sites, without drop path (off in pretraining)."""
    h = packed_depthwise(x, block.conv_dw.weight, block.conv_dw.bias, where)
    return x + convnext.pointwise(block, h, grn_scope)
