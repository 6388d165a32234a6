"""How much faster a pretraining step could be with float8 products: an upper limit, without training anything.

    python -m benchmarks.fp8 [models=[convnextv2_huge] batch_size=96 ...] [--json FILE]

The options are those of ``fcmae bench step``, which measures the step. Beside it, the six products of a block (two
linear layers, forward, input and weight gradient) are timed at the shapes of every stage, in 16 bits as they run now,
and by ``torch._scaled_mm`` in float8 with a scale per row. What becomes float8 must be read, scaled and written, once
as it is for the product and once transposed for the weight gradient: at best at the speed of a copy.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fcmae.bench.measure import copy_bandwidth, median_ms, write_report
from fcmae.bench.step import StepConfig, StepResult
from fcmae.bench.step import run as measure_steps
from fcmae.engines import convnext
from fcmae.kernels.linear import product_float32
from fcmae.masks.patches import grid_size, len_keep
from fcmae.models import create_backbone

FLOAT8 = torch.float8_e4m3fn
REPEATS = 20
LINE = (
    "{model}, {products}: products {now:.1f} ms in 16 bits, {then:.1f} in float8; scaling {scaling:.1f} ms at best; "
    "a step of {step:.1f} ms would be at most {gain:.1%} faster, {free:.1%} if scaling cost nothing"
)


def main(arguments: list[str]) -> None:
    file = Path(arguments[arguments.index("--json") + 1]) if "--json" in arguments else None
    overrides = [argument for argument in arguments if "=" in argument]
    if not any(override.startswith("models=") for override in overrides):
        overrides += ["models=[convnextv2_huge]", "batch_size=96"]
    rows = []
    steps = measure_steps(["engines=[packed]", *overrides])
    for step in (step for step in steps if step.engine == "packed"):
        rows += [_limit(step, products) for products in (("forward", "input grad"), ("all",))]
        for row in rows[-2:]:
            print(LINE.format(**row), flush=True)
    write_report(file, results=rows)


def _limit(step: StepResult, products: tuple[str, ...]) -> dict[str, float | str]:
    """The times of the products of a step, in milliseconds, and the gain in images per second."""
    device, whole = torch.device("cuda"), products == ("all",)
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
        for calls in _calls(count, width, whole):
            before, after = (median_ms(call, device, REPEATS) for call in calls)
            now, then = now + before * len(blocks), then + after * len(blocks)
        # The inputs of both layers and their gradients, 10 C values per site: 2 bytes read, 1 written per copy.
        scaling += len(blocks) * 10 * count * width * (4 if whole else 3) / bandwidth * 1e3
    rest = step.ms - now + then
    times = {"now": now, "then": then, "scaling": scaling, "step": step.ms}
    gains = {"gain": step.ms / (rest + scaling) - 1, "free": step.ms / rest - 1}
    return {"model": step.model, "products": " and ".join(products), **times, **gains}


def _calls(sites: int, width: int, whole: bool) -> list[tuple[Callable[[], object], Callable[[], object]]]:
    """Every product of a block, in 16 bits and in float8."""
    found = []
    for inner, outer in ((width, 4 * width), (4 * width, width)):
        x, grad = (torch.randn(sites, size, device="cuda").bfloat16() for size in (inner, outer))
        weight = torch.randn(outer, inner, device="cuda").bfloat16()
        found.append((lambda x=x, w=weight: x @ w.t(), _scaled(x, weight)))
        found.append((lambda g=grad, w=weight: g @ w, _scaled(grad, weight.t().contiguous())))
        if whole:
            operands = grad.t().contiguous(), x.t().contiguous()
            found.append((lambda g=grad, x=x: product_float32(g, x), _scaled(*operands)))
    return found


def _scaled(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """``a @ b.T`` in float8."""
    a8, b8 = a.to(FLOAT8), b.to(FLOAT8)
    of_a, of_b = torch.ones(len(a), 1, device="cuda"), torch.ones(1, len(b), device="cuda")
    return lambda: torch._scaled_mm(a8, b8.t(), of_a, of_b, out_dtype=torch.bfloat16, use_fast_accum=True)


if __name__ == "__main__":
    main(sys.argv[1:])
