"""The encoder: a timm ConvNeXt that owns its weights in the ordinary dense layout."""

import difflib
import itertools
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
from timm.layers import DropPath, get_act_layer
from timm.models import named_apply
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage, _init_weights
from torch import nn

from fcmae.engines import check_backbone
from fcmae.engines.convnext import downsampling

STAGES = 4
"""Stages of every ConvNeXt that timm builds."""


def create_backbone(
    name: str,
    *,
    in_chans: int = 3,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    strides: Sequence[int] | None = None,
    **kwargs: Any,
) -> ConvNeXt:
    """A timm ConvNeXt, V1 or V2, with random weights.

    Args:
        name: a timm model name, e.g. ``convnextv2_base``.
        strides: of the stem and before each later stage, three to five numbers, one per stage; None = timm's.
        kwargs: passed to timm; ``depths``, ``dims``, ``kernel_sizes``, and ``patch_size``, timm's name of the stem's
            stride: 4 and 2 give a total stride of 32 (timm downsamples once more after a stem of 2), 1 gives 8.

    Raises ValueError for an unknown name or a model that cannot run over visible patches.
    """
    names = timm.list_models("convnext*")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=4)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('convnext*') lists the names"
        raise ValueError(f"model.backbone is {name!r}, not a ConvNeXt known to timm {timm.__version__}; {hint}")
    _check_activation(kwargs.get("act_layer"))
    create = partial(timm.create_model, name, in_chans=in_chans, num_classes=num_classes, drop_path_rate=drop_path_rate)
    backbone = create(**kwargs) if strides is None else _with_strides(create, strides, drop_path_rate, **kwargs)
    check_backbone(backbone)
    assert isinstance(backbone, ConvNeXt)
    return backbone


def _check_activation(name: Any) -> None:
    """Raises ValueError for a name that timm does not know."""
    try:
        get_act_layer(name)
    except KeyError:
        expected = "an activation of timm, such as gelu or silu"
        raise ValueError(f"model.timm.act_layer must be {expected}; got {name!r}") from None


def _with_strides(
    create: "partial[nn.Module]",
    strides: Sequence[int],
    drop_path_rate: float,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    kernel_sizes: int | Sequence[int] = 7,
    patch_size: int | None = None,  # strides[0] instead
    **kwargs: Any,
) -> ConvNeXt:
    """timm's network with other strides between its stages, and with three or five stages."""
    if len(strides) != STAGES and not (depths and dims and len(depths) == len(dims) == len(strides)):
        raise ValueError(
            f"model.strides={list(strides)} makes {len(strides)} stages; model.depths and model.dims must have "
            f"{len(strides)} values each, got {depths} and {dims}"
        )
    kernels = [kernel_sizes] * len(strides) if isinstance(kernel_sizes, int) else kernel_sizes
    sizes = {"depths": depths, "dims": dims, "kernel_sizes": kernels}
    first_four = {key: [*value, *value[-1:]][:STAGES] for key, value in sizes.items() if value is not None}
    backbone = create(**first_four, **kwargs)
    assert isinstance(backbone, ConvNeXt)
    stages = list(backbone.stages)[: len(strides)]
    if len(strides) != STAGES and dims is not None and depths is not None:
        # timm's loop makes four stages: the fifth, and the head of another width, are those of a second network.
        last = create(depths=[1, 1, 1, depths[-1]], dims=[8, 8, dims[-2], dims[-1]], kernel_sizes=kernels[-1], **kwargs)
        assert isinstance(last, ConvNeXt)
        stages += list(last.stages)[-1:] * (len(strides) > STAGES)
        backbone.norm_pre, backbone.head = last.norm_pre, last.head
        backbone.num_features, backbone.head_hidden_size = last.num_features, last.head_hidden_size
    backbone.stages = nn.Sequential(*stages)
    _set_strides(backbone, strides)
    if len(strides) != STAGES:
        _set_drop_path(backbone, drop_path_rate)
    return backbone


def _set_strides(backbone: ConvNeXt, strides: Sequence[int]) -> None:
    """Replaces the stem and the layers between stages: k x k convolutions of stride k; 1 x 1 or nothing at stride 1."""
    info, reduction = [], 1
    conv, norm = backbone.stem
    backbone.stem = nn.Sequential(_strided(conv, strides[0]), norm)
    for number, (stage, stride) in enumerate(zip(backbone.stages, strides, strict=True)):
        assert isinstance(stage, ConvNeXtStage)
        width = stage.blocks[-1].conv_dw.out_channels  # type: ignore[union-attr]
        reduction *= stride
        info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{number}"})
        if number == 0:
            stage.downsample = nn.Identity()  # type: ignore[assignment]  # as timm does
            continue
        if isinstance(stage.downsample, nn.Sequential):  # else two stages of one width, which timm joins at stride 1
            norm, conv = stage.downsample
            same = stride == 1 and conv.in_channels == conv.out_channels
            stage.downsample = nn.Identity() if same else nn.Sequential(norm, _strided(conv, stride))  # type: ignore[assignment]
    backbone.feature_info = info


def _strided(conv: nn.Module, stride: int) -> nn.Conv2d:
    """``conv`` if that is its stride, else one of that stride and kernel with initial weights."""
    assert isinstance(conv, nn.Conv2d)
    if conv.stride == (stride, stride):
        return conv
    other = nn.Conv2d(conv.in_channels, conv.out_channels, stride, stride, bias=conv.bias is not None)
    named_apply(_init_weights, other)
    return other


def _set_drop_path(backbone: ConvNeXt, rate: float) -> None:
    """Rates that rise linearly from 0 to ``rate`` over all blocks, as timm's."""
    blocks = [module for module in backbone.modules() if isinstance(module, ConvNeXtBlock)]
    for number, block in enumerate(blocks):
        share = rate * number / max(1, len(blocks) - 1)
        block.drop_path = DropPath(share) if share else nn.Identity()


def strides_of(backbone: ConvNeXt) -> list[int]:
    """The stride of the stem and before each later stage."""
    strides = [1] * len(backbone.stages)
    stem, *rest = downsampling(backbone)
    strides[0] = stem.stride[0]
    convs = iter(rest)
    for number, stage in enumerate(backbone.stages):
        assert isinstance(stage, ConvNeXtStage)
        if isinstance(stage.downsample, nn.Sequential):
            strides[number] *= next(convs).stride[0]
    return strides


def stage_shapes(backbone: ConvNeXt) -> tuple[list[int], list[int]]:
    """The channels of every stage's features, and the pixels per side of one of their sites; the finest stage first."""
    widths = [stage.blocks[-1].conv_dw.out_channels for stage in backbone.stages]  # type: ignore[union-attr,index]
    return widths, list(itertools.accumulate(strides_of(backbone), operator.mul))
