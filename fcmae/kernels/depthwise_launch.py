"""The packed depthwise convolution on a GPU: forward, input gradient, weight gradient, and how each is divided.

Small patches go to CUDA C++ (:mod:`fcmae.kernels.depthwise_cuda`) where it runs, the others to Triton.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fcmae.kernels import depthwise_cuda, precompile
from fcmae.kernels.depthwise_triton import forward_kernel, taps_kernel, weight_grad_kernel
from fcmae.kernels.residual_triton import add_and_sum
from fcmae.kernels.sums_triton import add_up
from fcmae.kernels.target import target


class _Plan(NamedTuple):
    """How a launch divides the work."""

    rows: int
    """Rows of a tile."""
    ahead: int
    """Groups of input sites read before they are needed."""
    programs: int
    """Programs per multiprocessor, as many as its registers hold at once."""
    tiles_ahead: int = 0
    """How many tiles before its own an input tile is brought into the cache: its lower neighbours need it first."""
    grads_ahead: int = 0
    """The same for gradients, which only their own tile needs."""
    registers: int | None = None
    """At most, per thread; None = the compiler decides."""


# By patch side, the fastest measured on an H200 and an H100 (bf16, ConvNeXt V2-Base at batch 256, mask ratio 0.6,
# Triton 3.6) with rows in {1, 2, 4}, ahead in {0, 1, 2, 4}, programs from 4 to 24, tiles_ahead in {0, 1, 3, 8, 16} and
# grads_ahead in {0, 1, 3}. Slower or no faster: one channel per thread, several warps per program, zeros read for
# masked neighbours instead of a branch, loads inside the branch or predicated, loads that run ahead into the next tile,
# which cost the registers of four resident warps, and tiles brought into the first-level cache.
_FORWARD_PLANS = {
    8: _Plan(2, 1, 8, tiles_ahead=1),
    4: _Plan(4, 1, 8, tiles_ahead=3),
    2: _Plan(2, 1, 12, tiles_ahead=8),
    1: _Plan(1, 1, 16),
}
_WEIGHT_GRAD_PLANS = {
    8: _Plan(2, 1, 8),
    4: _Plan(4, 0, 8),
    2: _Plan(2, 1, 8, tiles_ahead=8, grads_ahead=1),
    1: _Plan(1, 1, 16, registers=128),
}

_CHANNELS = 64
"""Channels per program: one warp, each thread with two channels, 4 bytes of bf16."""

_TAPS_CHANNELS = 128
"""Channels per program of the kernel that lays out the taps."""

MAX_KERNEL = 7
"""Larger kernels do not leave room in the registers for two channels' taps."""

MAX_SIDE = 16
"""Larger patches do not leave room in the registers for a row of sums."""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, cells: Tensor) -> Tensor:
    """The convolution of ``[N, V, S, S, C]`` in the dtype of ``x``, accumulated in float32."""
    precompile.wait()
    x = x.contiguous()
    if cuda := depthwise_cuda.launcher(x, weight.shape[-1], slots):
        bias = None if bias is None else bias.float().contiguous()
        return cuda.forward(x, weight.float().contiguous(), bias, slots, cells)
    return _launch_forward(x, weight, bias, slots, cells, turned=False)


def input_grad(grad: Tensor, weight: Tensor, slots: Tensor, cells: Tensor) -> Tensor:
    """The gradient of the input: the convolution of ``grad`` with the kernel turned by 180 degrees."""
    precompile.wait()
    grad = grad.contiguous()
    if cuda := depthwise_cuda.launcher(grad, weight.shape[-1], slots):
        return cuda.input_grad(grad, weight.float().contiguous(), slots, cells)
    return _launch_forward(grad, weight, None, slots, cells, turned=True)


def input_grad_and_skip(
    grad: Tensor, weight: Tensor, slots: Tensor, cells: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`input_grad` plus ``skip`` of the same shape, and partial sums of ``skip`` over all sites, ``[P, C]``."""
    precompile.wait()
    if cuda := depthwise_cuda.launcher(grad, weight.shape[-1], slots):
        weight, skip = weight.float().contiguous(), skip.contiguous()
        return cuda.input_grad_and_skip(grad.contiguous(), weight, slots, cells, skip)
    return add_and_sum(input_grad(grad, weight, slots, cells), skip)


def weight_grad(x: Tensor, grad: Tensor, k: int, slots: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the weight ``[C, 1, k, k]`` and the bias ``[C]``, float32; the same bits every time."""
    _, gradients = add_up((), partial_weight_grad(x, grad, k, slots, cells), k)
    assert gradients is not None
    of_weight, of_bias = gradients
    return of_weight, of_bias.clone()  # results of an operator may not share memory


def partial_weight_grad(x: Tensor, grad: Tensor, k: int, slots: Tensor, cells: Tensor) -> Tensor:
    """Partial sums ``[P, k * k + 1, C]`` of ``grad * x`` for every tap and of ``grad``, float32."""
    precompile.wait()
    x, grad = x.contiguous(), grad.contiguous()
    if cuda := depthwise_cuda.launcher(x, k, slots):
        return cuda.weight_grad(x, grad, slots, cells)
    _, _, s, _, c = x.shape
    plan = _plan(_WEIGHT_GRAD_PLANS, s)
    tiles, tiles_per_program, (blocks, programs) = _divide(x, plan)
    partial = x.new_empty(programs, k * k + 1, c, dtype=torch.float32)
    weight_grad_kernel[blocks, programs](
        x, grad, partial, slots, cells, tiles, tiles_per_program, plan.tiles_ahead, plan.grads_ahead,
        C=c, S=s, K=k, WIDTH=slots.shape[2], ROWS=plan.rows, CHANNELS=_CHANNELS, AHEAD=plan.ahead, num_warps=1,
        **_nvidia(plan, x),
    )  # fmt: skip
    return partial


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor, cells: Tensor, *, turned: bool
) -> Tensor:
    _, _, s, _, c = x.shape
    k = weight.shape[-1]
    plan = _plan(_FORWARD_PLANS, s)
    tiles, tiles_per_program, grid = _divide(x, plan)
    taps = x.new_empty(k * k + 1, c, dtype=torch.float32)
    taps_kernel[-(-c // _TAPS_CHANNELS), k * k + 1](
        weight.contiguous(), bias, taps, int(turned), C=c, TAPS=k * k, CHANNELS=_TAPS_CHANNELS
    )
    y = torch.empty_like(x)
    forward_kernel[grid](
        x, taps, y, slots, cells, tiles, tiles_per_program, plan.tiles_ahead,
        C=c, S=s, K=k, WIDTH=slots.shape[2], ROWS=plan.rows, CHANNELS=_CHANNELS, AHEAD=plan.ahead, num_warps=1,
        **_nvidia(plan, x),
    )  # fmt: skip
    return y


def _nvidia(plan: _Plan, x: Tensor) -> dict[str, int]:
    """What a launch can have on NVIDIA's GPUs alone."""
    if not target(x).nvidia:
        return {"PREFETCH": False}
    return {"PREFETCH": plan.tiles_ahead > 0, **({"maxnreg": plan.registers} if plan.registers else {})}


def _plan(plans: dict[int, _Plan], side: int) -> _Plan:
    """The measured plan, or for other sides as many rows as 16 sums per channel allow."""
    if side in plans:
        return plans[side]
    rows = max(r for r in range(1, side + 1) if side % r == 0 and (r == 1 or r * side <= 16))
    return _Plan(rows, 0, 8)


def _divide(x: Tensor, plan: _Plan) -> tuple[int, int, tuple[int, int]]:
    """Number of tiles, tiles per program, and a grid (blocks of channels, ranges of tiles) that fills the GPU once."""
    n, v, s, _, c = x.shape
    tiles = n * v * (s // plan.rows)
    blocks = -(-c // _CHANNELS)
    # Without a GPU two ranges are enough to exercise everything.
    ranges = max(2, target(x).processors * plan.programs // blocks)
    tiles_per_program = -(-tiles // ranges)
    return tiles, tiles_per_program, (blocks, -(-tiles // tiles_per_program))
