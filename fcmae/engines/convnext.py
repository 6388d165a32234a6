"""What an engine may assume of a timm ConvNeXt, checked in one place, and its layers on sites with channels last.

A patch may be processed apart from its neighbours only if nothing but the depthwise convolutions looks across its
border: the stem and the downsampling layers must be convolutions whose kernel equals their stride.
"""

import math
from collections.abc import Iterator

import torch.nn.functional as F
from timm.layers import GELU
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from torch import Tensor, nn

from fcmae import kernels

PATCHWISE_CONV = "a convolution whose kernel equals its stride, without padding or dilation"


def stages(backbone: ConvNeXt) -> Iterator[ConvNeXtStage]:
    """The stages of a backbone."""
    for stage in backbone.stages:
        assert isinstance(stage, ConvNeXtStage)
        yield stage


def blocks(stage: ConvNeXtStage) -> Iterator[ConvNeXtBlock]:
    """The residual blocks of a stage. Raises ValueError for one that would drop paths, which engines do not do."""
    for block in stage.blocks:
        assert isinstance(block, ConvNeXtBlock)
        if block.training:
            _check_drop_path(block)
        yield block


def check_no_drop_path(backbone: ConvNeXt) -> None:
    """Raises ValueError if a block drops paths in training."""
    for stage in stages(backbone):
        for block in stage.blocks:
            _check_drop_path(block)


def _check_drop_path(block: nn.Module) -> None:
    rate = getattr(block.drop_path, "drop_prob", 0.0)
    if rate:
        raise ValueError(
            f"backbone has a block with drop path {rate:.3g}, which engines do not compute in training; create it with "
            "drop_path_rate=0"
        )


def stem(backbone: ConvNeXt) -> tuple[nn.Conv2d, nn.LayerNorm]:
    """The first convolution and its norm."""
    conv, norm = backbone.stem
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.LayerNorm)
    return conv, norm


def downsample(layers: nn.Sequential) -> tuple[nn.LayerNorm, nn.Conv2d]:
    """The norm and the convolution before a stage."""
    norm, conv = layers
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(conv, nn.Conv2d)
    return norm, conv


def grn(block: ConvNeXtBlock) -> GlobalResponseNorm | None:
    """The global response normalisation of a V2 block; V1 has none."""
    return getattr(block.mlp, "grn", None)


def downsampling(backbone: ConvNeXt) -> Iterator[nn.Conv2d]:
    """The stem convolution and every convolution between stages, in order."""
    for layers in (backbone.stem, *(stage.downsample for stage in stages(backbone))):
        for layer in layers.children():
            if isinstance(layer, nn.Conv2d):
                yield layer


def total_stride(backbone: ConvNeXt) -> int:
    """Pixels per side that one site of the last stage stands for: 32 for the published models."""
    return math.prod(conv.stride[0] for conv in downsampling(backbone))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A norm over the last dimension, where timm's LayerNorm2d expects channels in the second."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def linear(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A linear layer or 1 x 1 convolution (timm's conv_mlp) over the last dimension."""
    return kernels.linear(x, layer.weight.flatten(1), layer.bias)


def patchwise_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution whose kernel k equals its stride: ``[..., H, W, C]`` to ``[..., H / k, W / k, D]``."""
    *outer, height, width, c = x.shape
    k = conv.stride[0]
    x = x.unflatten(-2, (width // k, k)).unflatten(-4, (height // k, k)).transpose(-4, -3)
    x = x.reshape(*outer, height // k, width // k, k * k * c)
    # A 1 x 1 kernel stays in its order: otherwise the gradient gets other strides than the parameter.
    weight = conv.weight.permute(0, 2, 3, 1) if k > 1 else conv.weight
    return kernels.linear(x, weight.flatten(1), conv.bias)


def is_gelu(act: nn.Module) -> bool:
    """Whether an activation is exact GELU, neither an approximation of it nor a subclass."""
    return type(act) in (GELU, nn.GELU) and getattr(act, "approximate", "none") == "none"


def is_fused(block: ConvNeXtBlock, x: Tensor) -> bool:
    """Whether one kernel adds the bias of the block's first linear layer, and does GELU and GRN."""
    return x.is_cuda and grn(block) is not None and is_gelu(block.mlp.act)


def pointwise(block: ConvNeXtBlock, x: Tensor, grn_scope: str) -> Tensor:
    """A block from its depthwise convolution's output to the residual sum: norm, MLP with GRN, layer scale.

    Args:
        x: ``[N, ..., C]``, the sites of N images.
        grn_scope: GRN's norm over the sites of an ``image`` or of the whole ``batch``.
    """
    h = _activate(block, kernels.layer_norm(x, block.norm.weight, block.norm.bias, block.norm.eps), grn_scope)
    h = linear(h, block.mlp.fc2)
    return h if block.gamma is None else h * block.gamma


def _activate(block: ConvNeXtBlock, x: Tensor, grn_scope: str) -> Tensor:
    """The MLP's first half: linear layer, activation, and GRN."""
    fc1, act, grn_layer = block.mlp.fc1, block.mlp.act, grn(block)
    if grn_layer is None:
        return act(linear(x, fc1))
    if not is_gelu(act):
        h = act(linear(x, fc1))
        return kernels.grn(_images(h, grn_scope), grn_layer.weight, grn_layer.bias, grn_layer.eps).view_as(h)
    # A GPU's kernel adds fc1's bias, see gelu_grn; on a CPU the product does.
    bias = fc1.bias if is_fused(block, x) else None
    h = linear(x, fc1) if bias is None else kernels.linear_mixed(x, fc1.weight.flatten(1))
    sites = _images(h, grn_scope)
    return kernels.gelu_grn(sites, grn_layer.weight, grn_layer.bias, grn_layer.eps, input_bias=bias).view_as(h)


def _images(x: Tensor, grn_scope: str) -> Tensor:
    """``[N, R, C]``, the R sites of every image; with scope ``batch`` all sites as one image."""
    return x.flatten(1, -2) if grn_scope == "image" else x.flatten(0, -2).unsqueeze(0)


def check_backbone(backbone: nn.Module) -> None:
    """Raises ValueError, naming the layer, unless the engines can run ``backbone`` over visible patches."""
    if not isinstance(backbone, ConvNeXt):
        raise ValueError(f"backbone must be a ConvNeXt of timm (V1 or V2); got {type(backbone).__name__}")
    if len(backbone.stem) != 2:
        raise ValueError("backbone.stem must have timm's stem_type 'patch'; got one whose convolutions overlap patches")
    norms = {"stem.1": backbone.stem[1]}
    for name, module in backbone.named_modules():
        if isinstance(module, ConvNeXtStage) and isinstance(module.downsample, nn.Sequential):
            norms[f"{name}.downsample.0"] = module.downsample[0]
        if isinstance(module, ConvNeXtBlock):
            norms[f"{name}.norm"] = module.norm
            conv = module.conv_dw
            if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.kernel_size[0] % 2 == 0:
                raise ValueError(f"backbone.{name}.conv_dw must have an odd kernel, stride 1, no dilation; got {conv}")
    for conv in downsampling(backbone):
        plain = conv.kernel_size == conv.stride and conv.dilation == (1, 1) and conv.padding == (0, 0)
        if not plain or conv.stride[0] != conv.stride[1]:
            raise ValueError(f"backbone must downsample by {PATCHWISE_CONV}; got {conv}")
    for name, norm in norms.items():
        if not isinstance(norm, nn.LayerNorm):
            raise ValueError(f"backbone.{name} must be LayerNorm; got {type(norm).__name__}")
