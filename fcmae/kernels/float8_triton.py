"""Linear layers whose three products are of float8 matrices, on a GPU of compute capability 9.0.

Every matrix is divided by a power of two, the smallest that brings its values into float8's range (e4m3: 3 bits of
mantissa, up to 448). It follows from the matrix alone (current scaling), so that nothing is remembered between steps. A
matrix is read twice: for its largest value, unless the kernel that wrote it found that (GELU + GRN do), and to be
scaled and written, as it is for one product and transposed for another, because a GPU multiplies float8 matrices along
their rows alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels import precompile
from fcmae.kernels.target import target

FLOAT8 = torch.float8_e4m3fn
MULTIPLE = 16
"""What the sums of products of float8 matrices have a multiple of terms of."""
BLOCK = 8192
"""Values that a program compares at a time."""
TILE = 128
"""Rows and columns that a program scales."""


@triton.jit
def magnitude(value):
    """The bits of absolute values as float32, integers of the same order; those of infinity and NaN are the largest."""
    return value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def raise_to(largest, found):
    """Raises a number in memory to the largest of ``found``."""
    tl.atomic_max(largest, tl.max(found), sem="relaxed")


@triton.jit
def largest_kernel(x, largest, size, BLOCK: tl.constexpr):
    """x: ``[size]``. largest: int32 ``[1]``, raised to the :func:`magnitude` of all values."""
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        found = tl.maximum(found, magnitude(tl.load(x + place, mask=place < size, other=0.0)))
    raise_to(largest, found)


@triton.jit(do_not_specialize=["rows"])
def scale_kernel(x, largest, values, transposed, factor, rows, columns, length, TILE: tl.constexpr):
    """x: 16 bits ``[rows, columns]``. largest: see :func:`largest_kernel`. values: float8 ``[rows, columns]``.
    transposed: float8 ``[columns, length]``, zero beyond ``rows``. factor: float32 ``[1]``, what to multiply the values
    by; NaN if a value is not finite.
    """
    r = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    bits = tl.load(largest)
    least = tl.maximum(bits.to(tl.float32, bitcast=True) / 448.0, 1e-30)
    # The next power of two: without the bits of the mantissa, after 1 was carried into the exponent if there are any.
    power = ((least.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    place = r[:, None] * columns + c[None, :]
    value = tl.load(x + place, mask=inside, other=0.0)
    # In 16 bits: the assembler of CUDA 12.9 mixes up bytes that were rounded to float8 and then go to shared memory.
    turned = tl.trans(value)
    tl.store(values + place, (value.to(tl.float32) * (1.0 / power)).to(tl.float8e4nv), mask=inside)
    inside = (c < columns)[:, None] & (r < length)[None, :]
    place = c.to(tl.int64)[:, None] * length + r[None, :]
    tl.store(transposed + place, (turned.to(tl.float32) * (1.0 / power)).to(tl.float8e4nv), mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(factor, tl.where(bits < 0x7F800000, power, float("nan")))


class Scaled(NamedTuple):
    """A matrix ``[R, C]`` in float8."""

    values: Tensor
    """``[R, C]``."""
    transposed: Tensor
    """``[C, L]``: L is R, or the next multiple of 16, and what is beyond R is zero."""
    factor: Tensor
    """Float32 ``[1]``, a power of two, what the values are to be multiplied by."""


def scale(x: Tensor, largest: Tensor, known: bool = False) -> Scaled:
    """A matrix ``[R, C]`` of 16 bits in float8; C is a multiple of 16.

    Args:
        largest: int32 ``[1]``: zero, and afterwards the :func:`magnitude` of the largest value.
        known: the kernel that wrote the matrix has put that value there already.
    """
    precompile.wait()
    rows, columns = x.shape
    x, length = x.contiguous(), triton.cdiv(rows, MULTIPLE) * MULTIPLE
    if not known:
        programs = max(1, min(triton.cdiv(x.numel(), BLOCK), 8 * target(x).processors))
        largest_kernel[(programs,)](x, largest, x.numel(), BLOCK=BLOCK, num_warps=8)
    values = torch.empty(rows, columns, dtype=FLOAT8, device=x.device)
    transposed = torch.empty(columns, length, dtype=FLOAT8, device=x.device)
    factor = torch.empty(1, dtype=torch.float32, device=x.device)
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    scale_kernel[grid](x, largest, values, transposed, factor, rows, columns, length, TILE=TILE, num_warps=8)
    return Scaled(values, transposed, factor)


def zero_largest(layers: int, device: torch.device) -> Tensor:
    """Int32 ``[layers, 3, 1]``, where the largest values of layers' weights, inputs and outputs' gradients will be.

    Each is on 16 bytes of its own, as kernels in CUDA C++ want it.
    """
    return torch.zeros(layers, 3, 4, dtype=torch.int32, device=device)[..., :1]


class Float8(NamedTuple):
    """A linear layer of C inputs and D outputs, both multiples of 16, whose products are in float8."""

    values: Tensor | None
    """The weight ``[D, C]``; None in the backward pass."""
    transposed: Tensor
    """``[C, D]``."""
    factor: Tensor
    """Float32 ``[1]``, what the weight's values are to be multiplied by."""
    largest: Tensor
    """A layer's part of :func:`zero_largest`."""

    @classmethod
    def of(cls, weight: Tensor, largest: Tensor) -> "Float8":
        """Of a weight ``[D, C]`` in 16 bits, and a layer's part of :func:`zero_largest`."""
        return cls(*scale(weight, largest[0]), largest)

    @property
    def largest_of_input(self) -> Tensor:
        """Int32 ``[1]``, for the kernel that writes the input."""
        return self.largest[1]

    @property
    def largest_of_grad(self) -> Tensor:
        """Int32 ``[1]``, for the kernel that writes the output's gradient."""
        return self.largest[2]

    def product(self, x: Tensor, known: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """``x @ weight.T`` of ``[R, C]``, ``[R, D]`` in the type of ``x``, and what :func:`weight_grad` needs of ``x``.

        Tensor cores keep 14 bits of a sum. Here that is the sum of all terms; the gradients are more exact, because
        theirs is of 128 terms at a time. ``known``: the kernel that wrote ``x`` has filled ``largest_of_input``.
        """
        assert self.values is not None
        values, transposed, factor = scale(x, self.largest_of_input, known)
        out = _multiply(values, self.values, factor, self.factor, x.dtype, fast=True)
        return out, transposed, factor

    def scale_grad(self, grad: Tensor, known: bool = False) -> Scaled:
        """The output's gradient ``[R, D]``; ``known``: the kernel that wrote it has filled ``largest_of_grad``."""
        return scale(grad, self.largest_of_grad, known)

    def input_grad(self, grad: Scaled, dtype: torch.dtype) -> Tensor:
        """``grad @ weight``, ``[R, C]``."""
        return _multiply(grad.values, self.transposed, grad.factor, self.factor, dtype)


def weight_grad(grad: Scaled, x: Tensor, factor: Tensor) -> Tensor:
    """``grad.T @ x``, float32 ``[D, C]``, of what :meth:`Float8.product` gave for ``x``."""
    return _multiply(grad.transposed, x, grad.factor, factor, torch.float32)


def _multiply(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """``(a * of_a) @ (b * of_b).T``."""
    return torch._scaled_mm(a, b.t(), of_a, of_b, out_dtype=dtype, use_fast_accum=fast)
