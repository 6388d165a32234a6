"""ConvNeXt V2 blocks that run as one operation of our own, :func:`fcmae.kernels.block.convnext_block`.

They need no compiler, which would take most of the start, and make fewer passes over memory than it finds.
"""

from collections.abc import Iterable

import torch
from timm.layers import DropPath
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae.engines import convnext
from fcmae.kernels import Neighbors, precompile
from fcmae.kernels.depthwise import use_triton
from fcmae.kernels.norm import HAS_TRITON

Copies = tuple[Tensor, Tensor]
"""The weights of a block's two linear layers in the type of the activations: ``[D, C]`` and ``[C, D]``."""


def is_whole(block: ConvNeXtBlock, x: Tensor) -> bool:
    """Whether a block runs as one operation on packed sites ``[N, V, S, S, C]``: V2 with exact GELU, 16 bits, a GPU."""
    return (
        not torch.compiler.is_compiling()  # by a user, who compiles the whole network
        and convnext.is_fused(block, x)
        and block.gamma is None
        and isinstance(block.drop_path, nn.Identity | DropPath)
        and block.mlp.fc1.bias is not None
        and block.mlp.fc2.bias is not None
        and x.dtype in (torch.bfloat16, torch.float16)
        and (not torch.is_autocast_enabled("cuda") or torch.get_autocast_dtype("cuda") == x.dtype)
        and use_triton(x, block.conv_dw.weight)
    )


def with_copies(blocks: Iterable[nn.Module], x: Tensor) -> list[tuple[ConvNeXtBlock, Copies | None]]:
    """The blocks of a stage that starts with ``x``, and for :func:`run` their weights, all cast by one launch.

    None for a block that must run otherwise.
    """
    found: list[tuple[ConvNeXtBlock, bool]] = []
    for block in blocks:
        assert isinstance(block, ConvNeXtBlock)
        found.append((block, is_whole(block, x)))
    layers = [layer for block, whole in found if whole for layer in (block.mlp.fc1, block.mlp.fc2)]
    copies = iter(_cast([layer.weight.detach().flatten(1) for layer in layers], x.dtype))
    return [(block, (next(copies), next(copies)) if whole else None) for block, whole in found]


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
    trains = torch.is_grad_enabled() and precompile.dtype_of(imgs) in ("bfloat16", "float16")
    return imgs.is_cuda and (compiled or (HAS_TRITON and trains))


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
