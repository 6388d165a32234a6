"""Times GELU + GRN (:func:`fcmae.kernels.grn.gelu_grn`) against memory speed and against compiled plain torch.

The byte floor reads every input once and writes every output once (forward: x, y; backward: x, dy, dx) at the speed of
a large device-to-device copy on the same machine.

    python -m fcmae.bench.grn --models base atto --json grn.json
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from fcmae.kernels.grn import gelu_grn, gelu_grn_torch

WIDTHS = {"atto": 40, "tiny": 96, "base": 128, "large": 192, "huge": 352}
"""Channels of the first stage."""
BATCH = {"atto": 512, "tiny": 256, "base": 256, "large": 128, "huge": 64}
VISIBLE = 19
"""Visible patches of a 224 px image with 60 % masked."""


def shapes(model: str) -> list[tuple[int, int, int]]:
    """``[N, R, D]`` of the four stages of a model: D is four times the width, R the sites of the visible patches."""
    return [(BATCH[model], VISIBLE * 4 ** (3 - stage), 4 * WIDTHS[model] * 2**stage) for stage in range(4)]


def milliseconds(step: Callable[[], object], repeats: int = 30) -> float:
    """Median time of a step on the device.

    Before every run the L2 cache is overwritten; then the device sleeps while the host launches the step, so that
    the time holds no launch gaps.
    """
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(1_000_000)
        start.record()
        step()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times[3:])


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second by a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def forward_backward(
    op: Callable[..., Tensor], x: Tensor, parameters: Sequence[Tensor], dy: Tensor
) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass, the gradients of all parameters included."""
    leaves = (x, *parameters)
    y = op(*leaves)
    forward = milliseconds(lambda: op(*leaves))
    return forward, milliseconds(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))


def measure(shape: tuple[int, int, int], dtype: torch.dtype, bandwidth: float) -> dict:
    """Milliseconds of one shape; ``*_floor`` is the byte floor, ``*_compiled`` compiled plain torch."""
    x, dy = torch.randn(2, *shape, device="cuda").to(dtype).unbind(0)
    x = x.contiguous().requires_grad_()
    parameters = [torch.randn(shape[2], device="cuda", requires_grad=True) for _ in range(3)]

    def fused(x, weight, bias, input_bias):
        return gelu_grn(x, weight, bias, input_bias=input_bias)

    def plain(x, weight, bias, input_bias):
        return gelu_grn_torch(x, input_bias, weight, bias, 1e-6)

    forward, backward = forward_backward(fused, x, parameters, dy)
    torch.compiler.reset()
    forward_compiled, backward_compiled = forward_backward(torch.compile(plain, dynamic=False), x, parameters, dy)
    tensor_ms = x.numel() * x.element_size() / bandwidth * 1e3
    return {
        "shape": list(shape),
        "forward": forward,
        "forward_floor": 2 * tensor_ms,
        "forward_compiled": forward_compiled,
        "backward": backward,
        "backward_floor": 3 * tensor_ms,
        "backward_compiled": backward_compiled,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fcmae.bench.grn", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["base", "atto", "huge"], choices=list(WIDTHS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)

    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {args.dtype}, copy {bandwidth / 1e12:.2f} TB/s; ms, and x byte floor")
    columns = "".join(f"  {p:>8} {'floor':>6} {'compiled':>9}" for p in ("forward", "backward"))
    print(f"{'model':6} {'N, R, D':>18}{columns}")
    results = []
    for model in args.models:
        for shape in shapes(model):
            row = {"model": model, **measure(shape, getattr(torch, args.dtype), bandwidth)}
            results.append(row)
            cells = "".join(
                f"  {row[p]:8.3f} {row[p] / row[f'{p}_floor']:5.2f}x {row[f'{p}_compiled']:9.3f}"
                for p in ("forward", "backward")
            )
            print(f"{model:6} {', '.join(map(str, shape)):>18}{cells}", flush=True)
    if args.json:
        report = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "dtype": args.dtype}
        report |= {"copy_bytes_per_second": bandwidth, "milliseconds": results}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
