"""The mean squared error of normalised pixels by Triton: masked patches alone are read, and no target is stored."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fcmae.kernels import precompile

BLOCK = 2048
"""Values of a patch that are handled at once."""


@triton.jit
def _pixels(
    imgs, patch, e, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """Values ``e`` of a patch as float32, the channel fastest; 0 beyond its end."""
    at = patch % PATCHES
    y = at // (WIDTH // SIDE) * SIDE
    x = at % (WIDTH // SIDE) * SIDE
    imgs += (patch // PATCHES).to(tl.int64) * (CHANNELS * HEIGHT * WIDTH) + y * WIDTH + x
    place = (e % CHANNELS * HEIGHT + e // (SIDE * CHANNELS)) * WIDTH + e // CHANNELS % SIDE
    return tl.load(imgs + place, mask=e < SIDE * SIDE * CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def patch_error_kernel(
    imgs, pred, hidden, errors, means, scales, eps, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """errors, means, scales (inverse deviations): float32, of each patch; 0 of those that are not hidden."""
    patch = tl.program_id(0)
    size: tl.constexpr = SIDE * SIDE * CHANNELS
    error = 0.0
    mean = 0.0
    scale = 0.0
    if tl.load(hidden + patch) != 0:
        count = 0.0
        squares = 0.0
        for start in range(0, size, BLOCK):
            # Exact in each block, and blocks are combined (Chan, Golub and LeVeque).
            e = start + tl.arange(0, BLOCK)
            value = _pixels(imgs, patch, e, PATCHES, CHANNELS, HEIGHT, WIDTH, SIDE)
            more = tl.minimum(size - start, BLOCK).to(tl.float32)
            mean_here = tl.sum(value, 0) / more
            value = tl.where(e < size, value - mean_here, 0.0)
            apart = mean_here - mean
            squares += tl.sum(value * value, 0) + apart * apart * (count * more / (count + more))
            count += more
            mean += apart * (more / count)
        scale = 1.0 / tl.sqrt(squares / (size - 1) + eps)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            e = start + tl.arange(0, BLOCK)
            wanted = (_pixels(imgs, patch, e, PATCHES, CHANNELS, HEIGHT, WIDTH, SIDE) - mean) * scale
            value = tl.load(pred + patch.to(tl.int64) * size + e, mask=e < size, other=0.0).to(tl.float32)
            value = tl.where(e < size, value - wanted, 0.0)
            total += value * value
        error = tl.sum(total, 0) / size
    tl.store(errors + patch, error)
    tl.store(means + patch, mean)
    tl.store(scales + patch, scale)


@triton.jit
def patch_error_grad_kernel(
    imgs, pred, hidden, grads, means, scales, out, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grads: float32, of each patch's error. out: the gradient of ``pred``."""
    patch = tl.program_id(0)
    size: tl.constexpr = SIDE * SIDE * CHANNELS
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = patch.to(tl.int64) * size
    value = tl.zeros((BLOCK,), tl.float32)
    if tl.load(hidden + patch) != 0:
        mean = tl.load(means + patch)
        scale = tl.load(scales + patch)
        wanted = (_pixels(imgs, patch, e, PATCHES, CHANNELS, HEIGHT, WIDTH, SIDE) - mean) * scale
        value = tl.load(pred + first + e, mask=e < size, other=0.0).to(tl.float32) - wanted
        value *= tl.load(grads + patch) * (2.0 / size)
    tl.store(out + first + e, value.to(out.dtype.element_ty), mask=e < size)


def patch_errors(pred: Tensor, imgs: Tensor, hidden: Tensor, patch_size: int, eps: float) -> Tensor:
    """The mean squared error of each patch's normalised pixels, float32 ``[N, L]``; 0 where a patch is not hidden.

    Pixels are normalised over all P > 1 values of a patch (unbiased variance, ``eps`` inside the root).

    Args:
        pred: ``[N, L, P]``, the channel fastest.
        imgs: ``[N, C, H, W]``; gets no gradient.
        hidden: bool ``[N, L]``.
    """
    return _PatchErrors.apply(pred, imgs, hidden, patch_size, eps)


class _PatchErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, imgs: Tensor, hidden: Tensor, patch_size: int, eps: float) -> Tensor:
        pred, imgs, hidden = pred.contiguous(), imgs.contiguous(), hidden.contiguous()
        errors, means, scales = launch_forward(pred, imgs, hidden, patch_size, eps)
        ctx.save_for_backward(pred, imgs, hidden, means, scales)
        ctx.patch_size = patch_size
        return errors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, imgs, hidden, means, scales = ctx.saved_tensors
        return launch_backward(grad, pred, imgs, hidden, means, scales, ctx.patch_size), None, None, None, None


def launch_forward(
    pred: Tensor, imgs: Tensor, hidden: Tensor, patch_size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors, means and inverse standard deviations, float32 ``[N, L]``; of contiguous tensors."""
    precompile.wait()
    errors, means, scales = (pred.new_empty(hidden.shape, dtype=torch.float32) for _ in range(3))
    patch_error_kernel[(hidden.numel(),)](
        imgs, pred, hidden.view(torch.uint8), errors, means, scales, eps, **_constants(imgs, hidden, patch_size)
    )
    return errors, means, scales


def launch_backward(
    grad: Tensor, pred: Tensor, imgs: Tensor, hidden: Tensor, means: Tensor, scales: Tensor, patch_size: int
) -> Tensor:
    """The gradient of ``pred``, given ``grad``, the gradient of the errors ``[N, L]``."""
    precompile.wait()
    out = torch.empty_like(pred)
    patch_error_grad_kernel[hidden.numel(), triton.cdiv(pred.shape[-1], BLOCK)](
        imgs, pred, hidden.view(torch.uint8), grad.float().contiguous(), means, scales, out,
        **_constants(imgs, hidden, patch_size),
    )  # fmt: skip
    return out


def _constants(imgs: Tensor, hidden: Tensor, patch_size: int) -> dict[str, int]:
    _, channels, height, width = imgs.shape
    block = min(BLOCK, triton.next_power_of_2(patch_size**2 * channels))
    return {
        "PATCHES": hidden.shape[1], "CHANNELS": channels, "HEIGHT": height, "WIDTH": width, "SIDE": patch_size,
        "BLOCK": block, "num_warps": 8 if block >= 2048 else 4,
    }  # fmt: skip
