"""The masked engine: dense layers with masks around the depthwise convolution. Slow, plain, the oracle for others."""

from collections.abc import Collection

import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext
from fcmae.engines.compiled import recomputed, region
from fcmae.kernels import gather_patches
from fcmae.masks.patches import grid_size, upsample_mask, visible_indices


def masked(
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
    """Runs ``backbone`` over whole images, masked. See :data:`fcmae.engines.Engine` for the contract."""
    rows, cols = grid_size(imgs.shape[-2], imgs.shape[-1], patch_size)
    x = region(_apply, compiled)(backbone.stem, imgs)
    maps = []
    for number, stage in enumerate(convnext.stages(backbone), start=1):
        run_block = recomputed(region(_block, compiled), number in recompute_stages or stage.grad_checkpointing)
        x = region(_apply, compiled)(stage.downsample, x)
        visible = ~upsample_mask(mask, rows, cols, x.shape[-1] // cols).unsqueeze(1)
        for block in convnext.blocks(stage):
            x = run_block(block, x, visible, grn_scope)
        if all_stages or number == len(backbone.stages):
            maps.append(x)
    maps[-1] = backbone.norm_pre(maps[-1])
    index = visible_indices(mask, keep)
    return [gather_patches(x, index, rows, cols) for x in maps]


def _apply(layers: nn.Module, x: Tensor) -> Tensor:
    return layers(x)


def _block(block: ConvNeXtBlock, x: Tensor, visible: Tensor, grn_scope: str) -> Tensor:
    """A ConvNeXt block on a map ``[N, C, H, W]`` whose masked sites (``visible`` False) must not be felt elsewhere."""
    h = torch.where(visible, block.conv_dw(torch.where(visible, x, 0)), 0)
    last = not block.use_conv_mlp  # the MLP works on [N, H, W, C], else on [N, C, H, W]
    h = block.mlp.act(block.mlp.fc1(block.norm(h.permute(0, 2, 3, 1) if last else h)))
    grn = convnext.grn(block)
    if grn is not None:
        h = _grn(h, grn, visible.permute(0, 2, 3, 1) if last else visible, grn_scope)
    h = block.mlp.fc2(h)
    h = h.permute(0, 3, 1, 2) if last else h
    if block.gamma is not None:
        h = h * block.gamma.view(1, -1, 1, 1)
    return x + h


def _grn(x: Tensor, grn: GlobalResponseNorm, visible: Tensor, scope: str) -> Tensor:
    """GRN whose statistics come from visible sites, of each image or of the whole batch."""
    channels = grn.channel_dim % 4
    sites = tuple(d for d in range(0 if scope == "batch" else 1, 4) if d != channels)
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(torch.where(visible, x, 0), dim=sites, keepdim=True, dtype=dtype)
    response = (norm / (norm.mean(dim=channels, keepdim=True) + grn.eps)).to(x.dtype)
    weight, bias = (p.view(grn.wb_shape).to(x.dtype) for p in (grn.weight, grn.bias))
    return x + torch.addcmul(bias, weight, x * response)
