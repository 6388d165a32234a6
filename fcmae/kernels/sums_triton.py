"""Sums over rows by Triton, float32 and in a fixed order: the same input gives the same bits."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels import precompile
from fcmae.kernels.target import target

MOST = 3
"""Tensors that :func:`add_up` adds up beside the taps."""


@triton.jit(do_not_specialize=["rows", "width", "rows_per_program"])
def sum_rows_kernel(
    x, wanted, total, rows, width, rows_per_program, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """x: ``[rows, width]``. wanted: uint8 ``[rows]``, which to add, or None. total: float32 ``[programs, width]``."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * rows_per_program
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        counts = (start + tl.arange(0, ROWS) < rows_per_program) & (row < rows)
        if wanted is not None:
            counts = counts & (tl.load(wanted + row, mask=counts, other=0) != 0)
        inside = counts[:, None] & (c < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + c[None, :]
        value += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + tl.program_id(1) * width + c, tl.sum(value, 0), mask=c < width)


@triton.jit
def _or_next(block, x, rows, width, total, next_x, next_rows, next_width, COLUMNS: tl.constexpr):
    """The matrix that a block of columns belongs to, ``x`` or the next one, and where its sums go."""
    blocks = tl.cdiv(width, COLUMNS)
    passed = block >= blocks
    block -= tl.where(passed, blocks, 0)
    total += tl.where(passed, width, 0)
    x = tl.where(passed, next_x, x)
    return block, x, tl.where(passed, next_rows, rows), tl.where(passed, next_width, width), total, passed


@triton.jit(do_not_specialize=["rows_1", "rows_2", "rows_3", "rows_4", "width_1", "width_2", "width_3", "channels"])
def add_up_kernel(
    one, two, three, taps, total, rows_1, rows_2, rows_3, rows_4, width_1, width_2, width_3, channels,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """one, two, three: ``[rows, width]``. taps: ``[rows, TAPS + 1, channels]``. total: their sums over rows in this
    order, the taps' as a matrix ``[channels, TAPS]`` and a vector ``[channels]``.
    """
    block, x, rows, width = tl.program_id(0), one, rows_1, width_1
    block, x, rows, width, total, _ = _or_next(block, x, rows, width, total, two, rows_2, width_2, COLUMNS)
    block, x, rows, width, total, _ = _or_next(block, x, rows, width, total, three, rows_3, width_3, COLUMNS)
    width_4 = (TAPS + 1) * channels
    block, x, rows, width, total, is_taps = _or_next(block, x, rows, width, total, taps, rows_4, width_4, COLUMNS)
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (c < width)[None, :]
        value += tl.load(x + row.to(tl.int64)[:, None] * width + c[None, :], mask=inside, other=0.0)
    place = c
    if is_taps:
        tap = c // channels
        place = tl.where(tap < TAPS, c % channels * TAPS + tap, c)
    tl.store(total + place, tl.sum(value, 0), mask=c < width)


def add_up(
    partials: Sequence[Tensor], taps: Tensor | None, kernel: int
) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
    """Adds up a block's partial sums by one launch.

    Args:
        partials: up to three, float32 ``[rows, ...]``, the one with the most rows first: it takes longest.
        taps: float32 ``[rows, k * k + 1, C]``, partial sums of a depthwise convolution's gradients, the bias's last.
        kernel: k.

    Returns:
        The sums over rows, and the gradients ``[C, 1, k, k]`` and ``[C]`` of the convolution's weight and bias; all are
        parts of one tensor.
    """
    precompile.wait()
    given = [*partials] if taps is None else [*partials, taps]
    widths = [one.numel() // len(one) for one in partials]
    channels = 0 if taps is None else taps.shape[2]
    total = given[0].new_empty(sum(widths) + (kernel**2 + 1) * channels)
    absent = MOST - len(partials)
    pointers = [*partials, *[total] * absent, total if taps is None else taps]
    rows = [*map(len, partials), *[0] * absent, 0 if taps is None else len(taps)]
    columns = 32  # few, so that there are many programs
    blocks = sum(triton.cdiv(width, columns) for width in (*widths, (kernel**2 + 1) * channels))
    add_up_kernel[(blocks,)](
        *pointers, total, *rows, *widths, *[0] * absent, channels,
        TAPS=kernel**2, ROWS=256, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    *sums, rest = total.split([*widths, total.numel() - sum(widths)])
    sums = [one.view(partial.shape[1:]) for one, partial in zip(sums, partials, strict=True)]
    if taps is None:
        return sums, None
    return sums, (rest[:-channels].view(channels, 1, kernel, kernel), rest[-channels:])


def sum_rows(partial: Tensor) -> Tensor:
    """``partial.sum(0)`` of float32, in a fixed order; few columns make many programs."""
    return _sum_rows(partial, None, 1, 32)[0].view(partial.shape[1:])


def sum_many_rows(x: Tensor, wanted: Tensor | None = None) -> Tensor:
    """The float32 sum ``[C]`` of the rows of ``[R, C]``, or of those ``wanted``, bool ``[R]``; in a fixed order."""
    programs = max(2, 4 * target(x).processors // triton.cdiv(x.shape[1], 64))
    programs = min(programs, triton.cdiv(len(x), 64))
    return sum_rows(_sum_rows(x.contiguous(), wanted, programs, 64))


def _sum_rows(x: Tensor, wanted: Tensor | None, programs: int, columns: int) -> Tensor:
    """Sums of equal parts of the rows, float32 ``[programs, columns of x]``."""
    precompile.wait()
    width = x.numel() // len(x)
    total = x.new_empty(programs, width, dtype=torch.float32)
    wanted = None if wanted is None else wanted.view(torch.uint8)
    sum_rows_kernel[(triton.cdiv(width, columns), programs)](
        x, wanted, total, len(x), width, triton.cdiv(len(x), programs), ROWS=128, COLUMNS=columns, num_warps=8
    )
    return total
