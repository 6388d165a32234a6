"""The sums of a residual block by Triton: at its end with a bias, in its backward pass with the bias's gradient.

Arithmetic is float32. Every program adds up the rows that it writes; :func:`.sums_triton.add_up` then adds these
partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels import precompile
from fcmae.kernels.norm_triton import load_rows, programs_of, store_rows, tiles


@triton.jit
def _factors(factor, row, rows, rows_per_image):
    return tl.load(factor + row // rows_per_image, mask=row < rows, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows", "rows_per_image"])
def residual_kernel(
    x, z, bias, factor, out, rows, rows_per_image, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """out = x + factor * (z + bias). x, z, out: ``[rows, C]``. bias: ``[C]``. factor: of each image, or None."""
    c = tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = load_rows(z, row, c, rows, C) + tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if factor is not None:
        value *= _factors(factor, row, rows, rows_per_image)
    store_rows(out, load_rows(x, row, c, rows, C) + value, row, c, rows, C)


@triton.jit(do_not_specialize=["rows", "rows_per_image", "tiles_per_program"])
def add_and_sum_kernel(
    x, skip, factor, out, partial, rows, rows_per_image, tiles_per_program, C: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = x + factor * skip; x and factor may be None. partial: float32 ``[programs, C]``, sums of factor * skip."""
    c = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in tl.range(0, tiles_per_program, num_stages=STAGES):
        row = (tl.program_id(0) * tiles_per_program + i) * ROWS + tl.arange(0, ROWS)
        value = load_rows(skip, row, c, rows, C)
        if factor is not None:
            value *= _factors(factor, row, rows, rows_per_image)
        total += value
        if x is not None:
            value += load_rows(x, row, c, rows, C)
        store_rows(out, value, row, c, rows, C)
    tl.store(partial + tl.program_id(0) * C + c, tl.sum(total, 0), mask=c < C)


def residual(x: Tensor, z: Tensor, bias: Tensor, factor: Tensor | None) -> Tensor:
    """``x + factor * (z + bias)``.

    Args:
        x, z: ``[N, ..., C]`` of one type, which the result has.
        bias: ``[C]``.
        factor: ``[N]``, or None for 1.
    """
    precompile.wait()
    x, z, out = x.contiguous(), z.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, constants = x.numel() // x.shape[-1], tiles(x)
    residual_kernel[(triton.cdiv(rows, constants["ROWS"]),)](x, z, bias, factor, out, rows, rows // len(x), **constants)
    return out


def add_and_sum(x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """``x + skip``, written over ``x``, and sums of parts of ``skip`` over all dimensions but the last, ``[P, C]``."""
    return _launch(x, skip, None, x)


def scale_and_sum(skip: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """``factor * skip``, and its sums as :func:`add_and_sum`; skip: ``[N, ..., C]``, factor: ``[N]``."""
    return _launch(None, skip, factor, torch.empty_like(skip, memory_format=torch.contiguous_format))


def _launch(x: Tensor | None, skip: Tensor, factor: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    precompile.wait()
    skip = skip.contiguous()
    rows, constants = skip.numel() // skip.shape[-1], tiles(skip)
    programs, tiles_per_program = programs_of(skip, rows, constants["ROWS"])
    partial = skip.new_empty(programs, skip.shape[-1], dtype=torch.float32)
    add_and_sum_kernel[(programs,)](
        x, skip, factor, out, partial, rows, rows // len(skip), tiles_per_program, STAGES=2, **constants
    )
    return out, partial
