"""The Triton kernels of :func:`fcmae.kernels.grn.gelu_grn`, and their torch operation.

An image couples its channels by one number only: the mean norm, and in the backward pass the sum in its derivative.
So a program owns some channels of one image: it reduces them over all sites, exchanges that number with the other
programs of the image, and writes the result in the same launch. In between it holds its channels in registers
(:mod:`fcmae.kernels.grn_held`, up to 320 sites: bfloat16, in the forward pass float16 too) or reads them again
microseconds after the first time.

The exchange needs the programs of an image to run at the same time. They are neighbours in the launch order, which is
the order that devices start programs in, and never more than the device has multiprocessors; so the programs that wait
always wait for ones that run or are next. Sums have a fixed order: the same input gives the same bits.

At the speed of memory there are about 27 instructions per element (H200), and the erf of the maths library takes 25.
Two measures make GELU cheap for 16-bit inputs:

- With the Mills ratio m, the tail of the normal distribution is exp(-x^2 / 2) m(|x|) / sqrt(2 pi), and here m is a
  polynomial in r = 1 / sqrt(1 + 0.55 |x|), fitted to a relative error of 5.5e-5 up to |x| = 6: a ninth of float16's
  rounding, a thirtieth of bfloat16's. The derivative uses the same exponential. Float32 takes the library's erf.
- The kernels work on u = ALPHA x with ALPHA^2 = log2(e) / 2, so that exp(-x^2 / 2) = exp2(-u^2), and on
  2 ALPHA GELU(x) = u + |u| erf(|x| / sqrt(2)); the constant factors are folded into per-channel ones.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels import grn_cuda, precompile
from fcmae.kernels.float8_triton import magnitude, raise_to
from fcmae.kernels.gelu import ALPHA, scaled_gelu, scaled_gelu_and_slope, sum_over_image
from fcmae.kernels.grn_held import backward_held, forward_held
from fcmae.kernels.target import target


@triton.jit
def _load(pointer, inside, WHOLE: tl.constexpr):
    value = tl.load(pointer) if WHOLE else tl.load(pointer, mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _store(pointer, value, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _shift(input_bias, c, in_width, HAS_INPUT_BIAS: tl.constexpr):
    """The input bias on the scale of u, ``[1, CHANNELS]``."""
    bias = tl.load(input_bias + c, mask=in_width, other=0.0).to(tl.float32) if HAS_INPUT_BIAS else 0.0 * c
    return ALPHA * bias[None, :]


@triton.jit
def _forward(
    x, input_bias, weight, bias, y, norms, means, mail, largest, R, D, parts, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    HAS_INPUT_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    c = part * CHANNELS + tl.arange(0, CHANNELS)
    in_width = c < D
    row = tl.arange(0, ROWS)
    tile = row[:, None] * D + c[None, :]
    x += image * R * D
    y += image * R * D
    shift = _shift(input_bias, c, in_width, HAS_INPUT_BIAS)

    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in tl.range(0, R, ROWS, num_stages=STAGES):
        inside = (start + row < R)[:, None] & in_width[None, :]
        v = _load(x + tl.cast(start, tl.int64) * D + tile, inside, WHOLE)
        h = scaled_gelu(v * ALPHA + shift, EXACT)
        if not WHOLE:
            h = tl.where(inside, h, 0.0)
        squares += h * h

    norm = tl.sqrt(tl.sum(squares, 0)) * (0.5 / ALPHA)
    norm = tl.where(in_width, norm, 0.0)
    tl.store(norms + image * D + c, norm, mask=in_width)
    mean = sum_over_image(tl.sum(norm, 0), mail, image, part, parts, PARTS) / D
    if part == 0:
        tl.store(means + image, mean)
    w = tl.load(weight + c, mask=in_width, other=0.0).to(tl.float32)
    scale = ((1.0 + w * (norm / (mean + eps))) * (0.5 / ALPHA))[None, :]
    b = tl.load(bias + c, mask=in_width, other=0.0).to(tl.float32)[None, :]

    steps = tl.cdiv(R, ROWS)
    found = tl.zeros((ROWS, CHANNELS), tl.int32)
    for i in tl.range(0, steps, num_stages=STAGES):
        start = (steps - 1 - i) * ROWS  # last read first: the likeliest to be in the cache still
        inside = (start + row < R)[:, None] & in_width[None, :]
        v = _load(x + tl.cast(start, tl.int64) * D + tile, inside, WHOLE)
        h = (scaled_gelu(v * ALPHA + shift, EXACT) * scale + b).to(y.dtype.element_ty)
        _store(y + tl.cast(start, tl.int64) * D + tile, h, inside, WHOLE)
        if largest is not None:
            found = tl.maximum(found, magnitude(h) if WHOLE else tl.where(inside, magnitude(h), 0))
    if largest is not None:
        raise_to(largest, found)


@triton.jit
def _backward(
    dy, x, input_bias, weight, norms, means, dx, sums, mail, largest, R, D, parts, eps,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
    HAS_INPUT_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    c = part * CHANNELS + tl.arange(0, CHANNELS)
    in_width = c < D
    row = tl.arange(0, ROWS)
    tile = row[:, None] * D + c[None, :]
    x += image * R * D
    dy += image * R * D
    dx += image * R * D
    sums += image * 3 * D
    shift = _shift(input_bias, c, in_width, HAS_INPUT_BIAS)

    dot = tl.zeros((ROWS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in tl.range(0, R, ROWS, num_stages=STAGES):
        inside = (start + row < R)[:, None] & in_width[None, :]
        offset = tl.cast(start, tl.int64) * D
        v = _load(x + offset + tile, inside, WHOLE)
        d = _load(dy + offset + tile, inside, WHOLE)
        dot += d * scaled_gelu(v * ALPHA + shift, EXACT)
        total += d

    # dL/dn_c = w_c dot_c with dot_c = sum_r dy_rc g_rc, and n_c = G_c / m with m = mean G + eps, so
    # dL/dG_c = w_c dot_c / m - sum_k (w_k dot_k n_k) / (D m), which reaches g_rc as dL/dG_c g_rc / G_c.
    norm = tl.load(norms + image * D + c, mask=in_width, other=0.0)
    inverse = 1.0 / (tl.load(means + image) + eps)
    w = tl.load(weight + c, mask=in_width, other=0.0).to(tl.float32)
    dot_c = tl.sum(dot, 0) * (0.5 / ALPHA)
    tl.store(sums + c, dot_c * norm * inverse, mask=in_width)
    tl.store(sums + D + c, tl.sum(total, 0), mask=in_width)
    coupled = sum_over_image(tl.sum(w * dot_c * norm * inverse, 0), mail, image, part, parts, PARTS)
    pull = (w * dot_c - coupled / D) * inverse / tl.where(norm > 0, norm, 1.0)
    pull = (tl.where(norm > 0, pull, 0.0) * (0.25 / ALPHA))[None, :]
    scale = (0.5 + 0.5 * w * norm * inverse)[None, :]

    dx_total = tl.zeros((ROWS, CHANNELS), tl.float32)
    found = tl.zeros((ROWS, CHANNELS), tl.int32)
    steps = tl.cdiv(R, ROWS)
    for i in tl.range(0, steps, num_stages=STAGES):
        start = (steps - 1 - i) * ROWS
        inside = (start + row < R)[:, None] & in_width[None, :]
        offset = tl.cast(start, tl.int64) * D
        v = _load(x + offset + tile, inside, WHOLE)
        d = _load(dy + offset + tile, inside, WHOLE)
        h, slope = scaled_gelu_and_slope(v * ALPHA + shift, EXACT)
        z = (d * scale + h * pull) * slope
        _store(dx + offset + tile, z, inside, WHOLE)
        if not WHOLE:
            z = tl.where(inside, z, 0.0)
        dx_total += z
        if largest is not None:
            found = tl.maximum(found, magnitude(z.to(dx.dtype.element_ty)))
    tl.store(sums + 2 * D + c, tl.sum(dx_total, 0), mask=in_width)
    if largest is not None:
        raise_to(largest, found)


class Tiling(NamedTuple):
    """A program owns ``channels`` of an image and takes ``rows`` sites at a time."""

    rows: int
    channels: int
    warps: int


# The fastest of about twenty measured for each of 19, 76, 304 and 1216 sites (rows 1, 4, 16 and streamed) on an H200.
HELD_TILES = 20
"""Tiles that a program holds in registers at most."""
FORWARD_HELD = {
    1: Tiling(1, 256, 2),
    2: Tiling(2, 128, 2),
    4: Tiling(4, 64, 2),
    8: Tiling(8, 64, 4),
    16: Tiling(16, 64, 8),
}
BACKWARD_HELD = {
    1: Tiling(1, 256, 4),
    2: Tiling(2, 128, 4),
    4: Tiling(4, 64, 4),
    8: Tiling(8, 32, 4),
    16: Tiling(16, 32, 8),
}
FORWARD_STREAMED, FORWARD_STAGES = Tiling(32, 64, 4), 3
BACKWARD_STREAMED, BACKWARD_STAGES = Tiling(16, 64, 4), 4


def _rows(sites: int) -> int:
    """Rows of a tile, a power of two, so that all sites make at most ``HELD_TILES`` tiles."""
    return triton.next_power_of_2(triton.cdiv(sites, HELD_TILES))


def _fit(tiling: Tiling, x: Tensor) -> tuple[Tiling, int]:
    """The tiling adapted to the width of ``x``, and the number of programs per image."""
    rows, channels, warps = tiling
    width = x.shape[2]
    while channels > 32 and width % channels:
        rows, channels = 2 * rows, channels // 2
    # Programs that do not run at the same time cannot wait for each other: without a GPU an image has one program.
    most = max(1, target(x).processors)
    while triton.cdiv(width, channels) > most:
        channels, warps = 2 * channels, min(2 * warps, 16)
    return Tiling(rows, channels, warps), triton.cdiv(width, channels)


def _plan(
    held: dict[int, Tiling], streamed: Tiling, x: Tensor, input_bias: Tensor | None, types: tuple[torch.dtype, ...]
) -> tuple[int, bool, dict]:
    """Programs per image, whether they hold their sites in registers, and the constants of the kernels."""
    _, sites, width = x.shape
    tiling, parts = _fit(held.get(_rows(sites), streamed), x)
    hold = x.dtype in types and _rows(sites) in held and width % tiling.channels == 0
    constants = {
        "ROWS": tiling.rows,
        "PARTS": triton.next_power_of_2(parts),
        "HAS_INPUT_BIAS": input_bias is not None,
        "num_warps": tiling.warps,
    }
    if hold:
        constants |= {"PAIRS": tiling.channels // 2, "HELD": triton.cdiv(sites, tiling.rows)}
        constants |= {"TAIL": sites % tiling.rows != 0, "NVIDIA": target(x).converts_pairs}
    else:
        whole = sites % tiling.rows == 0 and width % tiling.channels == 0
        constants |= {"CHANNELS": tiling.channels, "WHOLE": whole}
    return parts, hold, constants


def launch_forward(
    x: Tensor, input_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, largest: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, norms ``[N, D]`` and mean norms ``[N]``.

    Args:
        largest: int32 ``[1]``, for the largest value of the output, bfloat16 (:func:`.float8_triton.zero_largest`).
    """
    assert largest is None or x.dtype == torch.bfloat16
    precompile.wait()
    n, r, d = x.shape
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    input_bias = None if input_bias is None else input_bias.contiguous()
    if n <= grn_cuda.MOST_IMAGES and (cuda := grn_cuda.launcher(x.device, x.dtype, r, d, eps)):
        input_bias = None if input_bias is None else input_bias.float()
        return cuda.forward(x, input_bias, weight.float(), bias.float(), largest)
    y = torch.empty_like(x)
    norms = torch.empty(n, d, dtype=torch.float32, device=x.device)
    means = torch.empty(n, dtype=torch.float32, device=x.device)
    parts, hold, constants = _plan(FORWARD_HELD, FORWARD_STREAMED, x, input_bias, (torch.bfloat16, torch.float16))
    mail = torch.zeros(n, parts, dtype=torch.int64, device=x.device)
    others = input_bias, weight, bias
    rest = norms, means, mail, largest, r, d, parts, eps
    if hold:
        bf16 = x.dtype == torch.bfloat16
        forward_held[(n * parts,)](x.view(torch.int32), *others, y.view(torch.int32), *rest, BF16=bf16, **constants)
    else:
        _forward[(n * parts,)](x, *others, y, *rest, STAGES=FORWARD_STAGES, **constants)
    return y, norms, means


@torch.library.custom_op("fcmae::gelu_grn", mutates_args=())
def gelu_grn_forward(
    x: Tensor, input_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`launch_forward` as an operator."""
    return launch_forward(x, input_bias, weight, bias, eps)


@gelu_grn_forward.register_fake
def _(x, input_bias, weight, bias, eps):
    norms = x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), norms, norms.new_empty(x.shape[0])


def launch_backward(
    dy: Tensor, x: Tensor, input_bias: Tensor | None, weight: Tensor, norms: Tensor, means: Tensor, eps: float,
    largest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of ``x``, and every image's part ``[N, 3, D]`` of the gradients of weight, bias and input bias.

    Args:
        largest: int32 ``[1]``, for the largest value of the gradient of ``x``, bfloat16.
    """
    assert largest is None or x.dtype == torch.bfloat16
    precompile.wait()
    n, r, d = x.shape
    x, dy, weight = x.contiguous(), dy.contiguous(), weight.contiguous()
    input_bias = None if input_bias is None else input_bias.contiguous()
    dx = torch.empty_like(x)
    sums = torch.empty(n, 3, d, dtype=torch.float32, device=x.device)
    # What the backward pass holds is rounded to fewer bits than float16 has.
    parts, hold, constants = _plan(BACKWARD_HELD, BACKWARD_STREAMED, x, input_bias, (torch.bfloat16,))
    mail = torch.zeros(n, parts, dtype=torch.int64, device=x.device)
    others = input_bias, weight, norms, means
    rest = sums, mail, largest, r, d, parts, eps
    if hold:
        words = (t.view(torch.int32) for t in (dy, x))
        backward_held[(n * parts,)](*words, *others, dx.view(torch.int32), *rest, **constants)
    else:
        _backward[(n * parts,)](dy, x, *others, dx, *rest, STAGES=BACKWARD_STAGES, **constants)
    return dx, sums


@torch.library.custom_op("fcmae::gelu_grn_backward", mutates_args=())
def gelu_grn_backward(
    dy: Tensor, x: Tensor, input_bias: Tensor | None, weight: Tensor, norms: Tensor, means: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`launch_backward` as an operator."""
    return launch_backward(dy, x, input_bias, weight, norms, means, eps)


@gelu_grn_backward.register_fake
def _(dy, x, input_bias, weight, norms, means, eps):
    sums = x.new_empty(x.shape[0], 3, x.shape[2], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), sums


def _save(ctx, inputs, output):
    x, input_bias, weight, bias, eps = inputs
    _, norms, means = output
    ctx.save_for_backward(x, input_bias, weight, norms, means)
    ctx.eps, ctx.bias_dtype = eps, bias.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _norms, _means):
    x, input_bias, weight, norms, means = ctx.saved_tensors
    dx, sums = gelu_grn_backward(dy, x, input_bias, weight, norms, means, ctx.eps)
    weight_grad, bias_grad, input_bias_grad = sums.sum(0).unbind(0)
    input_bias_grad = None if input_bias is None else input_bias_grad.to(input_bias.dtype)
    return dx, input_bias_grad, weight_grad.to(weight.dtype), bias_grad.to(ctx.bias_dtype), None


gelu_grn_forward.register_autograd(_gradients, setup_context=_save)


def gelu_grn_triton(x: Tensor, input_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """:func:`fcmae.kernels.grn.gelu_grn` by the kernels above."""
    return gelu_grn_forward(x, input_bias, weight, bias, eps)[0]
