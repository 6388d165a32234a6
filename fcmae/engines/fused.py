"""What of a ConvNeXt V2 runs as operations of our own (:mod:`fcmae.kernels.block`, :mod:`fcmae.kernels.layers`).

They need no compiler, which would take most of the start, and make fewer passes over memory than it finds.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from timm.layers import DropPath
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext
from fcmae.errors import UsageError
from fcmae.kernels import Neighbors, precompile
from fcmae.kernels.depthwise import use_triton
from fcmae.kernels.norm import HAS_TRITON

if TYPE_CHECKING:
    from fcmae.kernels.float8_triton import Float8  # needs Triton

Copies = tuple["Tensor | Float8", "Tensor | Float8"]
"""The weights of a block's two linear layers in the type of the activations, or in float8: ``[D, C]``, ``[C, D]``."""
SIXTEEN_BITS = ("bfloat16", "float16")


def _can_run_on(x: Tensor) -> bool:
    """Not while a user compiles the whole network, nor on a tensor without values or of another kind."""
    return type(x) is Tensor and not torch.compiler.is_compiling()


def has_layers(backbone: ConvNeXt, imgs: Tensor) -> bool:
    """Whether stem and downsampling layers run as operations: V2 with exact GELU, 16 bits, a GPU.

    They give the images no gradient.
    """
    first = next(convnext.stages(backbone)).blocks[0]
    assert isinstance(first, ConvNeXtBlock)
    return (
        HAS_TRITON
        and _can_run_on(imgs)
        and convnext.is_fused(first, imgs)
        and precompile.dtype_of(imgs) in SIXTEEN_BITS
        and not (imgs.requires_grad and torch.is_grad_enabled())
    )


def stem(conv: nn.Conv2d, norm: nn.LayerNorm, imgs: Tensor, where: Neighbors, side: int) -> Tensor:
    """The pixels of tiles of ``side`` sites per side to the first stage's sites ``[N, V, S, S, D]``."""
    from fcmae.kernels import layers  # needs Triton

    dtype = getattr(torch, precompile.dtype_of(imgs))
    return layers.stem(imgs, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, where.index, side, dtype)


def stem_shape(conv: nn.Conv2d, norm: nn.LayerNorm, imgs: Tensor, side: int) -> precompile.Shape:
    """What the kernels of :func:`stem` are specialised for."""
    size, pixels = (imgs.shape[1], imgs.shape[2], imgs.shape[3]), precompile.name_of(imgs.dtype)
    return precompile.StemShape(size, pixels, conv.stride[0], norm.normalized_shape[0], side, precompile.dtype_of(imgs))


def downsample(norm: nn.LayerNorm, conv: nn.Conv2d, x: Tensor, move: precompile.Move) -> Tensor:
    """From the sites of one stage, in tiles, to the sites of the next, ``[sites, D]``."""
    from fcmae.kernels import layers  # needs Triton

    return layers.downsample(x, norm.weight, norm.bias, norm.eps, conv.weight, conv.bias, move)


def is_whole(block: ConvNeXtBlock, x: Tensor) -> bool:
    """Whether a block runs as one operation on packed sites ``[N, V, S, S, C]``: V2 with exact GELU, 16 bits, a GPU."""
    return (
        _can_run_on(x)
        and convnext.is_fused(block, x)
        and block.gamma is None
        and isinstance(block.drop_path, nn.Identity | DropPath)
        and block.mlp.fc1.bias is not None
        and block.mlp.fc2.bias is not None
        and x.dtype in (torch.bfloat16, torch.float16)
        and (not torch.is_autocast_enabled("cuda") or torch.get_autocast_dtype("cuda") == x.dtype)
        and use_triton(x, block.conv_dw.weight)
    )


def with_copies(
    blocks: Iterable[nn.Module], x: Tensor, float8: bool = False
) -> list[tuple[ConvNeXtBlock, Copies | None]]:
    """The blocks of a stage that starts with ``x``, and for :func:`run` their weights, all cast by one launch.

    None for a block that must run otherwise. Raises UsageError for one that cannot be in ``float8``.
    """
    found: list[tuple[ConvNeXtBlock, bool]] = []
    for block in blocks:
        assert isinstance(block, ConvNeXtBlock)
        found.append((block, is_whole(block, x)))
    if float8 and not all(whole for _, whole in found):
        raise UsageError(
            "precision=fp8: a block does not run as one operation of 16 bits on this device (docs/engines.md); "
            "precision=bf16 does not need it"
        )
    layers = [layer for block, whole in found if whole for layer in (block.mlp.fc1, block.mlp.fc2)]
    weights = [layer.weight.detach().flatten(1) for layer in layers]
    cast = _cast(weights, x.dtype)
    copies: Iterator[Tensor | Float8] = iter(_in_float8(cast) if float8 else cast)
    return [(block, (next(copies), next(copies)) if whole else None) for block, whole in found]


def _in_float8(weights: list[Tensor]) -> "list[Float8]":
    from fcmae.kernels.float8_triton import Float8, zero_largest  # needs Triton

    largest = zero_largest(len(weights), weights[0].device)
    return [Float8.of(weight, of_layer) for weight, of_layer in zip(weights, largest, strict=True)]


def check_float8(backbone: ConvNeXt, patch_size: int) -> None:
    """Raises UsageError for a network whose blocks cannot multiply in float8.

    Args:
        patch_size: of the mask, in pixels.
    """
    if not HAS_TRITON:
        raise UsageError("precision=fp8 needs Triton and a C compiler; fcmae doctor says what is missing")
    from fcmae.kernels.depthwise_launch import MAX_KERNEL, MAX_SIDE
    from fcmae.kernels.float8_triton import MULTIPLE

    side = patch_size // convnext.stem(backbone)[0].stride[0]
    for stage in convnext.stages(backbone):
        block = next(convnext.blocks(stage))
        hidden, width = block.mlp.fc1.weight.shape[:2]
        if convnext.grn(block) is None or not convnext.is_gelu(block.mlp.act) or block.gamma is not None:
            raise UsageError("precision=fp8 needs ConvNeXt V2 with exact GELU and without layer scale")
        if hidden % MULTIPLE or width % MULTIPLE:
            raise UsageError(
                f"precision=fp8 needs stages whose width is a multiple of {MULTIPLE}; got one of {width} channels; "
                "precision=auto takes it"
            )
        if isinstance(stage.downsample, nn.Sequential):
            side //= convnext.downsample(stage.downsample)[1].stride[0]
        kernel = block.conv_dw.weight.shape[-1]
        if kernel > MAX_KERNEL or side > MAX_SIDE:
            raise UsageError(
                f"precision=fp8 needs convolutions of at most {MAX_KERNEL} and mask patches of at most {MAX_SIDE} "
                f"sites per side; got {kernel} and {side}, which precision=bf16 takes"
            )


def _cast(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Those that have the type already are not copied."""
    others = [w for w in weights if w.dtype != dtype]
    cast = [torch.empty_like(w, dtype=dtype) for w in others]
    if cast:
        torch._foreach_copy_(cast, others)
    copies = iter(cast)
    return [w if w.dtype == dtype else next(copies) for w in weights]


def needs_all_kernels(imgs: Tensor, compiled: bool) -> bool:
    """Whether to compile every kernel ahead: for what is ``compiled``, and for training in 16 bits."""
    trains = torch.is_grad_enabled() and precompile.dtype_of(imgs) in SIXTEEN_BITS
    return imgs.is_cuda and _can_run_on(imgs) and (compiled or (HAS_TRITON and trains))


def drops_paths(layers: nn.Module) -> bool:
    """Whether a block among ``layers`` multiplies its images by factors."""
    return any(isinstance(m, DropPath) and m.training and m.drop_prob > 0 for m in layers.modules())


def path_factors(block: ConvNeXtBlock, x: Tensor) -> Tensor | None:
    """What drop path multiplies each image's block by, ``[N]``, drawn as for the block's output; None = 1."""
    if not drops_paths(block.drop_path):
        return None
    return block.drop_path(x.new_ones(len(x), *[1] * (x.dim() - 1))).flatten()


def run(
    block: ConvNeXtBlock, x: Tensor, copies: Copies, where: Neighbors, grn_scope: str, factors: Tensor | None = None
) -> Tensor:
    """A block for which :func:`is_whole` holds, ``[N, V, S, S, C]`` to the same."""
    from fcmae.kernels.block import Constants, Parameters, convnext_block  # needs Triton

    conv, norm, fc1, fc2, grn = block.conv_dw, block.norm, block.mlp.fc1, block.mlp.fc2, convnext.grn(block)
    assert grn is not None
    assert fc1.bias is not None
    assert fc2.bias is not None
    parameters = Parameters(
        conv.weight, conv.bias, norm.weight, norm.bias, fc1.weight, fc1.bias, grn.weight, grn.bias, fc2.weight, fc2.bias
    )
    return convnext_block(x, parameters, Constants(*copies, norm.eps, grn.eps, grn_scope), where, factors)
