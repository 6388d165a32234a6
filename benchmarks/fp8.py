"""How much faster a pretraining step is with float8 products. Nothing is trained, and ``precision`` has no such option.

    python -m benchmarks.fp8 [models=[convnextv2_huge] batch_size=96 ...] [--json FILE]

The options are those of ``fcmae bench step``, which measures the step as it is, and again with the products of every
block (two linear layers, forward, input and weight gradient) by ``torch._scaled_mm`` in float8: one scale per tensor
that is known before (delayed scaling), and one pass that scales, writes the copy that a product reads and the
transposed one for the weight gradient, and finds the largest value for the next step's scale.

Beside them stands an upper limit: the same products alone, and such passes at the speed of a copy, or for nothing, as
if the kernels that write a product's input wrote float8.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.bench.measure import copy_bandwidth, median_ms, write_report
from fcmae.bench.step import StepConfig, StepResult
from fcmae.bench.step import run as measure_steps
from fcmae.engines import convnext
from fcmae.kernels import block
from fcmae.kernels.linear import input_grad, product, product_float32, weight_grad
from fcmae.masks.patches import grid_size, len_keep
from fcmae.models import create_backbone

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
REPEATS = 20
TILES = ((64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 8))
"""Rows, columns and warps of a program of the scaling kernel; the fastest is taken."""
LIMIT = (
    "{model}, {variant}: products {now:.1f} ms in 16 bits, {then:.1f} in float8; scaling {scaling:.1f} ms at best; "
    "a step of {step:.1f} ms would be at most {gain:.1%} faster, {free:.1%} if scaling cost nothing"
)
MEASURED = "{model}, {variant}: a step of {step:.2f} ms takes {then:.2f}, {gain:+.1%} images per second"


class Variant(NamedTuple):
    """Which products are in float8."""

    weight_grads: bool
    """Forward and input gradients always are."""
    fast: bool
    """Whether gradients are accumulated as inexactly as the forward pass may be (``use_fast_accum``)."""

    def __str__(self) -> str:
        which = "all products" if self.weight_grads else "forward and input grad"
        return f"{which}, {'fast' if self.fast else 'exact'} sums of gradients"


VARIANTS = Variant(False, False), Variant(True, False), Variant(False, True), Variant(True, True)


def main(arguments: list[str]) -> None:
    file = Path(arguments[arguments.index("--json") + 1]) if "--json" in arguments else None
    overrides = [argument for argument in arguments if "=" in argument]
    if not any(override.startswith("models=") for override in overrides):
        overrides += ["models=[convnextv2_huge]", "batch_size=96"]
    overrides = ["engines=[packed]", *overrides]
    rows: list[dict[str, float | str]] = []
    steps = measure_steps(overrides)
    for variant in VARIANTS:
        print(f"\nIn float8: {variant}", flush=True)
        with Products(variant).replaced():
            changed = measure_steps(overrides)
        for step, then in zip(steps, changed, strict=True):
            row = {"model": step.model, "variant": str(variant), "step": step.ms, "then": then.ms}
            rows.append({**row, "gain": step.ms / then.ms - 1})
            print(MEASURED.format(**rows[-1]), flush=True)
            write_report(file, results=rows)
    for step in steps:
        for weight_grads in (False, True):
            rows.append(_limit(step, weight_grads))
            print(LIMIT.format(**rows[-1]), flush=True)
    write_report(file, results=rows)


@triton.jit
def scale_kernel(x, amax, scaled, transposed, largest, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x: ``[rows, columns]``. amax: float32 ``[1]``, the largest absolute value expected. scaled: ``x`` in float8.
    transposed: the same, ``[columns, rows]``, or None. largest: float32 ``[1]``, of ``x``.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (r < rows) & (c < columns)
    value = tl.load(x + r * columns + c, mask=inside, other=0.0).to(tl.float32)
    tl.atomic_max(largest, tl.max(tl.abs(value)), sem="relaxed")
    value = tl.minimum(tl.maximum(value * (448.0 / tl.load(amax)), -448.0), 448.0).to(tl.float8e4nv)
    tl.store(scaled + r * columns + c, value, mask=inside)
    if transposed is not None:
        tl.store(transposed + tl.trans(c) * rows + tl.trans(r), tl.trans(value), mask=tl.trans(inside))


class Scaled(NamedTuple):
    """A matrix in float8, and what its values are to be multiplied by."""

    values: Tensor
    transposed: Tensor | None
    factor: Tensor


class Expected(NamedTuple):
    """Of all matrices of a kind, float32 ``[1]`` each."""

    amax: Tensor
    """The largest absolute value so far."""
    factor: Tensor
    """What float8 values are to be multiplied by."""
    largest: Tensor
    """The largest absolute value since."""


class Products:
    """The products of blocks in float8."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.expected: dict[str, Expected] = {}
        self.kept: dict[int, Scaled] = {}  # by where the matrix in 16 bits is, from the forward pass to the backward
        self.grad: tuple[Tensor, Scaled] | None = None  # of the last gradient, which two products take
        self.tile: tuple[int, int, int] | None = None
        self.recorded = False

    @contextmanager
    def replaced(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in ("product", "input_grad", "weight_grad"):
                stack.enter_context(patch.object(block, name, getattr(self, name)))
            yield

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        a, b = self._scale("input", x, self.variant.weight_grads), self._scale("weight", weight, True)
        self.kept[x.data_ptr()], self.kept[weight.data_ptr()] = a, b
        return _multiply(a, a.values, b, b.values, torch.bfloat16, True)

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        a, b = self._scaled_grad(grad), self.kept.pop(weight.data_ptr())
        return _multiply(a, a.values, b, b.transposed, torch.bfloat16, self.variant.fast)

    def weight_grad(self, grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        a, b = self._scaled_grad(grad), self.kept.pop(x.data_ptr())
        if not self.variant.weight_grads:
            return weight_grad(grad, x, dtype)
        return _multiply(a, a.transposed, b, b.transposed, torch.float32, self.variant.fast)

    def _scaled_grad(self, grad: Tensor) -> Scaled:
        if self.grad is None or self.grad[0].data_ptr() != grad.data_ptr():
            self.grad = grad, self._scale("grad", grad, self.variant.weight_grads)
        return self.grad[1]

    def _scale(self, kind: str, x: Tensor, transpose: bool) -> Scaled:
        """By scales learnt before a CUDA graph is recorded; those of a training run would come from the step before."""
        x = x.detach()
        if kind not in self.expected:
            self.expected[kind] = Expected(*(torch.zeros(1, device=x.device) for _ in Expected._fields))
        of = self.expected[kind]
        self.recorded = self.recorded or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        if not self.recorded:
            of.amax.copy_(torch.maximum(of.amax, x.abs().max().float()))
            of.factor.copy_(of.amax / LARGEST)
            self.tile = self.tile or _fastest(x, of, transpose)
        assert self.tile is not None
        return _scale(x, of, transpose, self.tile)


def _fastest(x: Tensor, of: Expected, transpose: bool) -> tuple[int, int, int]:
    times = {tile: median_ms(lambda tile=tile: _scale(x, of, transpose, tile), x.device) for tile in TILES}
    found = min(TILES, key=lambda tile: times[tile])
    moved = x.numel() * (4 if transpose else 3)
    print(f"scaling {tuple(x.shape)}: {times[found]:.3f} ms, {moved / times[found] / 1e6:.0f} GB/s", flush=True)
    return found


def _scale(x: Tensor, of: Expected, transpose: bool, tile: tuple[int, int, int]) -> Scaled:
    rows, columns = x.shape
    scaled = torch.empty(rows, columns, dtype=FLOAT8, device=x.device)
    transposed = torch.empty(columns, rows, dtype=FLOAT8, device=x.device) if transpose else None
    grid = triton.cdiv(rows, tile[0]), triton.cdiv(columns, tile[1])
    scale_kernel[grid](x, of.amax, scaled, transposed, of.largest, rows, columns, *tile[:2], num_warps=tile[2])
    return Scaled(scaled, transposed, of.factor)


def _multiply(a: Scaled, left: Tensor, b: Scaled, right: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """``left @ right.T``."""
    return torch._scaled_mm(left, right.t(), a.factor, b.factor, out_dtype=dtype, use_fast_accum=fast)


def _limit(step: StepResult, weight_grads: bool) -> dict[str, float | str]:
    """The times of the products of a step, in milliseconds, and the gain in images per second."""
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    cfg = StepConfig()
    with torch.device("meta"):
        backbone = create_backbone(step.model)
    rows, cols = grid_size(cfg.image_size, cfg.image_size, 32)
    sites, stride = step.batch_size * len_keep(rows * cols, cfg.mask_ratio) * 32**2, 1
    now = then = scaling = 0.0
    for stage, stem in zip(convnext.stages(backbone), (True, False, False, False), strict=True):
        stride *= 4 if stem else 2
        blocks = list(convnext.blocks(stage))
        count, width = sites // stride**2, blocks[0].mlp.fc1.weight.shape[1]
        for calls in _calls(count, width, weight_grads):
            before, after = (median_ms(call, device, REPEATS) for call in calls)
            now, then = now + before * len(blocks), then + after * len(blocks)
        # The inputs of both layers and their gradients, 10 C values per site: 2 bytes read, 1 written per copy.
        scaling += len(blocks) * 10 * count * width * (4 if weight_grads else 3) / bandwidth * 1e3
    rest = step.ms - now + then
    times = {"now": now, "then": then, "scaling": scaling, "step": step.ms}
    gains = {"gain": step.ms / (rest + scaling) - 1, "free": step.ms / rest - 1}
    return {"model": step.model, "variant": str(Variant(weight_grads, True)), **times, **gains}


def _calls(sites: int, width: int, weight_grads: bool) -> list[tuple[Callable[[], object], Callable[[], object]]]:
    """Every product of a block, in 16 bits and in float8, sums as fast as there are."""
    found: list[tuple[Callable[[], object], Callable[[], object]]] = []
    for inner, outer in ((width, 4 * width), (4 * width, width)):
        x, grad = (torch.randn(sites, size, device="cuda").bfloat16() for size in (inner, outer))
        weight = torch.randn(outer, inner, device="cuda").bfloat16()
        found.append((lambda x=x, w=weight: product(x, w), _float8(x, weight, torch.bfloat16)))
        found.append((lambda g=grad, w=weight: input_grad(g, w), _float8(grad, weight.t(), torch.bfloat16)))
        if weight_grads:
            found.append((lambda g=grad, x=x: product_float32(g, x), _float8(grad.t(), x.t(), torch.float32)))
    return found


def _float8(a: Tensor, b: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """``a @ b.T``."""
    one = torch.ones(1, device="cuda")
    left, right = (Scaled(matrix.to(FLOAT8).contiguous(), None, one) for matrix in (a, b))
    return lambda: _multiply(left, left.values, right, right.values, dtype, True)


if __name__ == "__main__":
    main(sys.argv[1:])
