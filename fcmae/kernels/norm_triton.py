"""Layer normalisation over the last dimension by Triton, whose backward pass reads everything once.

In 16 bits CUDA C++ takes the backward pass where it can (:mod:`fcmae.kernels.norm_cuda`).

The gradients of weight and bias are sums over all rows. Every program adds up its own rows while it computes the
gradient of the input, and writes partial sums, added afterwards in a fixed order: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels import norm_cuda, precompile
from fcmae.kernels.precompile import Move
from fcmae.kernels.target import target

TILE = 4096
"""Elements of a tile, 32 per thread."""
PROGRAMS = 3
"""Per multiprocessor where each adds up sums over its rows."""


@triton.jit
def moved(
    row, rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """Where a :class:`Move` puts a row; ``rows``, which is outside, for those that it leaves out."""
    image = row // (HEIGHT * WIDTH)
    tile = row % (HEIGHT * WIDTH) // (BEFORE * BEFORE)
    within = row % (BEFORE * BEFORE)
    y = tile // (WIDTH // BEFORE) * BEFORE + within // BEFORE
    x = tile % (WIDTH // BEFORE) * BEFORE + within % BEFORE
    height: tl.constexpr = HEIGHT // STRIDE
    width: tl.constexpr = WIDTH // STRIDE
    top = y // STRIDE
    left = x // STRIDE
    tile = top // AFTER * (width // AFTER) + left // AFTER
    site = (image * (height * width) + tile * (AFTER * AFTER) + top % AFTER * AFTER + left % AFTER) * (STRIDE * STRIDE)
    place = site + y % STRIDE * STRIDE + x % STRIDE
    return tl.where((row < rows) & (top < height) & (left < width), place, rows)


@triton.jit
def load_rows(x, row, c, rows, C: tl.constexpr):
    """A tile of ``[rows, C]`` as float32; 0 outside."""
    inside = (row < rows)[:, None] & (c < C)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(y, value, row, c, rows, C: tl.constexpr):
    inside = (row < rows)[:, None] & (c < C)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * C + c[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x, weight, bias, y, means, scales, rows, eps, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    HEIGHT: tl.constexpr = 0, WIDTH_OF_MAP: tl.constexpr = 0, BEFORE: tl.constexpr = 0, AFTER: tl.constexpr = 0,
    STRIDE: tl.constexpr = 0,
):  # fmt: skip
    """x, y: ``[rows, C]``, the rows of y where a :class:`Move` puts them unless STRIDE is 0. means, scales: float32
    ``[rows]``, the mean and the inverse standard deviation.
    """
    c = tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = load_rows(x, row, c, rows, C)
    mean = tl.sum(value, 1) / C
    value = tl.where((c < C)[None, :], value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1) / C + eps)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    to = row
    if STRIDE > 0:
        to = moved(row, rows, HEIGHT, WIDTH_OF_MAP, BEFORE, AFTER, STRIDE)
    store_rows(y, value * scale[:, None] * w + b, to, c, rows, C)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "tiles_per_program"])
def layer_norm_backward_kernel(
    dy, x, weight, means, scales, dx, partial, rows, tiles_per_program, C: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, SUMS: tl.constexpr = 2, HEIGHT: tl.constexpr = 0,
    WIDTH_OF_MAP: tl.constexpr = 0, BEFORE: tl.constexpr = 0, AFTER: tl.constexpr = 0, STRIDE: tl.constexpr = 0,
):  # fmt: skip
    """dy, x, dx: ``[rows, C]``, dy as y of the forward kernel. partial: float32 ``[programs, SUMS, C]``, sums for
    weight and bias, and if SUMS is 3 of dx.
    """
    c = tl.arange(0, WIDTH)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    of_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    if SUMS == 3:
        of_x = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in tl.range(0, tiles_per_program, num_stages=STAGES):
        row = (tl.program_id(0) * tiles_per_program + i) * ROWS + tl.arange(0, ROWS)
        mean = tl.load(means + row, mask=row < rows, other=0.0)
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        unit = tl.where((c < C)[None, :], (load_rows(x, row, c, rows, C) - mean[:, None]) * scale[:, None], 0.0)
        from_row = row
        if STRIDE > 0:
            from_row = moved(row, rows, HEIGHT, WIDTH_OF_MAP, BEFORE, AFTER, STRIDE)
        d = load_rows(dy, from_row, c, rows, C)
        of_weight += d * unit
        of_bias += d
        d *= w
        pull = tl.sum(d * unit, 1) / C
        d = (d - tl.sum(d, 1)[:, None] / C - unit * pull[:, None]) * scale[:, None]
        store_rows(dx, d, row, c, rows, C)
        if SUMS == 3:
            of_x += d
    partial += tl.program_id(0) * (SUMS * C)
    tl.store(partial + c, tl.sum(of_weight, 0), mask=c < C)
    tl.store(partial + C + c, tl.sum(of_bias, 0), mask=c < C)
    if SUMS == 3:
        tl.store(partial + 2 * C + c, tl.sum(of_x, 0), mask=c < C)


def tiles(x: Tensor) -> dict[str, int]:
    """The constants of a kernel on tiles of whole rows of ``[..., C]``."""
    width = triton.next_power_of_2(x.shape[-1])
    return {"C": x.shape[-1], "WIDTH": width, "ROWS": max(1, TILE // width), "num_warps": 4}


def programs_of(x: Tensor, rows: int, rows_per_tile: int) -> tuple[int, int]:
    """How many programs fill the device once, and tiles per program."""
    count = -(-rows // rows_per_tile)
    tiles_per_program = -(-count // max(2, PROGRAMS * target(x).processors))
    return -(-count // tiles_per_program), tiles_per_program


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, means and inverse standard deviations of the rows."""
    return launch_moving_forward(x, weight, bias, eps, None)


def launch_moving_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, move: Move | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`launch_forward`; with ``move`` the output is ``[sites, stride * stride * C]``."""
    precompile.wait()
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    rows, shape = x.numel() // x.shape[-1], tiles(x)
    y, means, scales = torch.empty_like(x), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if move is not None:
        shape.update(move.constants())
        images = rows // (move.height * move.width)
        y = x.new_empty(images * move.sites, move.stride**2 * x.shape[-1])
    layer_norm_kernel[(triton.cdiv(rows, shape["ROWS"]),)](x, weight, bias, y, means, scales, rows, eps, **shape)
    return y, means, scales


layer_norm_forward = torch.library.custom_op("fcmae::layer_norm", launch_forward, mutates_args=())


@layer_norm_forward.register_fake
def _(x, weight, bias, eps):
    means = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), means, torch.empty_like(means)


def launch_backward(dy: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``x``, and partial sums ``[programs, 2, C]`` of the gradients of weight and bias."""
    precompile.wait()
    if cuda := norm_cuda.launcher(x.device, x.dtype, x.shape[-1]):
        return cuda.backward(dy.contiguous(), x.contiguous(), weight.float().contiguous(), means, scales)
    return launch_moving_backward(dy, x, weight, means, scales, None, 2)


def launch_moving_backward(
    dy: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor, move: Move | None, sums: int
) -> tuple[Tensor, Tensor]:
    """The backward pass of :func:`launch_moving_forward`. With 3 ``sums`` the gradient of ``x`` is added up, too."""
    precompile.wait()
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    rows, shape = len(means), tiles(x)
    if sums == 3:  # the third tile of sums leaves registers for two programs per multiprocessor only, unless smaller
        shape["ROWS"] = max(1, shape["ROWS"] // 2)
    programs, tiles_per_program = programs_of(x, rows, shape["ROWS"])
    dx, partial = torch.empty_like(x), x.new_empty(programs, sums, x.shape[-1], dtype=torch.float32)
    if move is not None:
        shape.update(move.constants())
    layer_norm_backward_kernel[(programs,)](
        dy, x, weight, means, scales, dx, partial, rows, tiles_per_program, STAGES=2, SUMS=sums, **shape
    )
    return dx, partial


def _backward(dy: Tensor, x: Tensor, weight: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and, float32 ``[2, C]``, of weight and bias."""
    dx, partial = launch_backward(dy, x, weight, means, scales)
    return dx, partial.sum(0)


layer_norm_backward = torch.library.custom_op("fcmae::layer_norm_backward", _backward, mutates_args=())


@layer_norm_backward.register_fake
def _(dy, x, weight, means, scales):
    of_parameters = x.new_empty(2, x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), of_parameters


def _save(ctx, inputs, output):
    x, weight, ctx.bias_dtype = inputs[0], inputs[1], inputs[2].dtype
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _means, _scales):
    x, weight, means, scales = ctx.saved_tensors
    dx, of_parameters = layer_norm_backward(dy, x, weight, means, scales)
    of_weight, of_bias = of_parameters.unbind(0)
    return dx, of_weight.to(weight.dtype), of_bias.to(ctx.bias_dtype), None


layer_norm_forward.register_autograd(_gradients, setup_context=_save)
