"""Depthwise convolution over the visible patches of a masked image.

The visible part of a batch is packed as ``[N, V, S, S, C]``: V patches per image of S x S sites with C channels.
A k x k depthwise convolution reads across patch borders; sites of masked patches and beyond the image count as zero,
and outputs exist at visible sites only (the submanifold convolution of SparseConvNet, arXiv 1711.10275).

It is one torch operator, ``fcmae::packed_depthwise``, with a backward operator: kernels in Triton or CUDA C++ on a
GPU, elsewhere PyTorch's dense convolution between a scatter and a gather.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.kernels.depthwise_cuda import HALO
from fcmae.toolchain import HAS_C_COMPILER

try:
    from fcmae.kernels import depthwise_launch
except ImportError:  # Triton has no build for this platform
    depthwise_launch = None  # type: ignore[assignment]  # a module or None


class Neighbors(NamedTuple):
    """Where the packed patches of a batch lie, on a grid of ``rows`` x ``cols`` patches."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which has no use here
    """int64 ``[N, V]``: the grid position (row-major) of every visible patch, ascending."""
    rows: int
    cols: int
    slots: Tensor
    """int32 ``[N, rows + 2 * HALO, cols + 2 * HALO]``: which of the N * V patches lies there, -1 for none."""
    cells: Tensor
    """int32 ``[N * V]``: the flat position in ``slots`` of every patch."""


def neighbors(index: Tensor, rows: int, cols: int) -> Neighbors:
    """Tables for :func:`packed_depthwise` from the visible positions ``index`` (int64 ``[N, V]``, ascending)."""
    n, v = index.shape
    height, width = rows + 2 * HALO, cols + 2 * HALO
    if n * max(v, height * width) >= 2**31:
        raise ValueError(f"a batch of {n} images with {rows} x {cols} patches is too large for 32-bit patch numbers")
    image = torch.arange(n, device=index.device)[:, None]
    cells = ((image * height + index // cols + HALO) * width + index % cols + HALO).flatten()
    slots = torch.full((n * height * width,), -1, dtype=torch.int32, device=index.device)
    slots = slots.scatter(0, cells, torch.arange(n * v, dtype=torch.int32, device=index.device))
    return Neighbors(index, rows, cols, slots.view(n, height, width), cells.to(torch.int32))


def packed_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, where: Neighbors) -> Tensor:
    """Convolves packed patches with a depthwise kernel.

    Sums are accumulated in float32. Under autocast the input is cast to the autocast dtype.

    Args:
        x: ``[N, V, S, S, C]``.
        weight: ``[C, 1, k, k]`` as in ``torch.nn.Conv2d``, k odd.
        bias: ``[C]`` or None.
        where: the tables of :func:`neighbors`.

    Returns:
        ``[N, V, S, S, C]``, the dtype of ``x`` or of autocast.
    """
    if weight.shape[1] != 1 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"weight must be [C, 1, k, k] with k odd; got {list(weight.shape)}")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return _packed_depthwise(x, weight, bias, where.index, where.slots, where.cells, where.rows, where.cols)


# custom_op rather than triton_op: torch.compile would parse the unrolled kernels, which takes minutes.
@torch.library.custom_op("fcmae::packed_depthwise", mutates_args=())
def _packed_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, slots: Tensor, cells: Tensor, rows: int, cols: int
) -> Tensor:
    if use_triton(x, weight):
        return depthwise_launch.forward(x, weight, bias, slots, cells)
    bias = None if bias is None else bias.to(x.dtype)
    return _plain_convolution(x, weight.to(x.dtype), bias, index, rows, cols)


@torch.library.custom_op("fcmae::packed_depthwise_backward", mutates_args=())
def _packed_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, slots: Tensor, cells: Tensor, rows: int, cols: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; of weight and bias in float32 at least."""
    if use_triton(x, weight):
        grad_weight, grad_bias = depthwise_launch.weight_grad(x, grad, weight.shape[-1], slots, cells)
        return depthwise_launch.input_grad(grad, weight, slots, cells), grad_weight, grad_bias
    return _plain_backward(grad, x, weight.to(x.dtype), index, rows, cols)


@_packed_depthwise.register_fake
def _(x, weight, bias, index, slots, cells, rows, cols):
    return x.new_empty(x.shape)


@_packed_depthwise_backward.register_fake
def _(grad, x, weight, index, slots, cells, rows, cols):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=dtype), x.new_empty(x.shape[-1], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, index, slots, cells, ctx.rows, ctx.cols = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, index, slots, cells)


def _backward(ctx, grad):
    x, weight, index, slots, cells = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _packed_depthwise_backward(
        grad, x, weight, index, slots, cells, ctx.rows, ctx.cols
    )
    grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight.to(weight.dtype), grad_bias, None, None, None, None, None


_packed_depthwise.register_autograd(_backward, setup_context=_setup_context)


def use_triton(x: Tensor, weight: Tensor) -> bool:
    """Whether kernels on a GPU take this call; float64 and sizes that overflow the registers go the plain way."""
    return (
        depthwise_launch is not None
        and HAS_C_COMPILER
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and weight.shape[-1] <= depthwise_launch.MAX_KERNEL
        and x.shape[2] <= depthwise_launch.MAX_SIDE
    )


def _plain_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, rows: int, cols: int) -> Tensor:
    dense = scatter_patches(x, index, rows, cols)
    dense = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return gather_patches(dense, index, rows, cols)


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, rows: int, cols: int
) -> tuple[Tensor, Tensor, Tensor]:
    c, _, k, _ = weight.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    dense_grad, dense = scatter_patches(grad, index, rows, cols), scatter_patches(x, index, rows, cols)
    grad_dense = F.conv2d(dense_grad, weight.flip(2, 3), padding=k // 2, groups=c)
    grad_x, grad_bias = gather_patches(grad_dense, index, rows, cols), grad.sum((0, 1, 2, 3), dtype=dtype)
    if x.device.type != "cpu":
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            dense_grad, dense, weight, None, [1, 1], [k // 2] * 2, [1, 1], False, [0, 0], c, [False, True, False]
        )
        return grad_x, grad_weight.to(dtype).contiguous(), grad_bias
    # Every channel of every image as a group whose kernel is the map of its gradients: oneDNN's forward convolution
    # does this 2 to 4 times as fast as its weight gradient.
    n, _, height, width = dense.shape
    maps = dense.to(dtype).permute(2, 3, 0, 1).reshape(1, height, width, n * c).permute(0, 3, 1, 2)
    kernels = dense_grad.to(dtype).reshape(n * c, 1, height, width)
    grad_weight = F.conv2d(maps, kernels, padding=k // 2, groups=n * c).view(n, c, 1, k, k).sum(0)
    return grad_x, grad_weight.contiguous(), grad_bias


def scatter_patches(x: Tensor, index: Tensor, rows: int, cols: int) -> Tensor:
    """Packed ``[N, V, S, S, C]`` to a dense map ``[N, C, rows * S, cols * S]``, channels last in memory, else zero."""
    n, _, s, _, c = x.shape
    dense = x.new_zeros(n * rows * s * cols, s * c)
    dense = dense.index_copy(0, _site_rows(index, s, rows, cols), x.reshape(-1, s * c))
    return dense.view(n, rows * s, cols * s, c).permute(0, 3, 1, 2)


def gather_patches(dense: Tensor, index: Tensor, rows: int, cols: int) -> Tensor:
    """The visible patches ``[N, V, S, S, C]`` of a dense map ``[N, C, rows * S, cols * S]``."""
    n, c, height, _ = dense.shape
    s = height // rows
    lines = dense.permute(0, 2, 3, 1).reshape(n * height * cols, s * c)
    return lines.index_select(0, _site_rows(index, s, rows, cols)).view(n, -1, s, s, c)


def _site_rows(index: Tensor, s: int, rows: int, cols: int) -> Tensor:
    """Where the rows of every visible patch lie in a dense map ``[N * rows * S * cols, S * C]``: int64 ``[N * V * S]``.

    A row of a patch is contiguous in a channels-last map, so that whole rows can be copied.
    """
    image = torch.arange(index.shape[0], device=index.device)[:, None]
    first = (image * rows + index // cols) * (s * cols) + index % cols
    return (first[..., None] + torch.arange(s, device=index.device) * cols).flatten()
