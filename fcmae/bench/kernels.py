"""Times the packed depthwise convolution against the least time its bytes need.

The floor of a kernel is its traffic, each input read once and each output written once, at the bandwidth of a
device-to-device copy measured in the same run. Run as ``python -m fcmae.bench.kernels --json FILE``.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from fcmae.kernels import neighbors
from fcmae.masking import len_keep

DIMS = {"atto": 40, "femto": 48, "pico": 64, "nano": 80, "tiny": 96, "base": 128, "large": 192, "huge": 352}
"""Channels of stage 1 by size of ConvNeXt V2 (arXiv 2301.00808, table 9); every later stage has twice as many."""

PATCHES = 7
"""Patches a side of a 224 px image."""

KERNEL = 7


@dataclass(frozen=True)
class Timing:
    """One kernel at one shape."""

    size: str
    stage: int
    kernel: str
    sites: int
    """Sites a side of a patch."""
    channels: int
    ms: float
    floor_ms: float
    bytes: int
    multiply_adds: int
    """Taps of visible sites, whether the neighbour is visible or not."""

    @property
    def ratio(self) -> float:
        return self.ms / self.floor_ms

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.ms / 1e6


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a 1 GiB copy on the device."""
    source = torch.randint(0, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (_median_ms(lambda: target.copy_(source)) / 1e3)


def time_kernels(
    shapes: Sequence[tuple[str, int]], batch: int, mask_ratio: float, dtype: torch.dtype, bandwidth: float
) -> list[Timing]:
    """Times forward, input gradient and weight gradient for every (size, stage), stages counted from 1.

    Args:
        shapes: sizes are keys of :data:`DIMS`.
        batch: images.
        mask_ratio: share of the 49 patches that is masked.
        dtype: of activations; weights are float32.
        bandwidth: bytes a second, see :func:`copy_bandwidth`.
    """
    from fcmae.kernels import triton_depthwise  # here, so that --help works without Triton

    visible = len_keep(PATCHES**2, mask_ratio)
    generator = torch.Generator("cuda").manual_seed(0)
    timings = []
    for size, stage in shapes:
        s, c = 8 >> (stage - 1), DIMS[size] << (stage - 1)
        noise = torch.rand(batch, PATCHES**2, device="cuda", generator=generator)
        where = neighbors(noise.argsort(1)[:, :visible].sort(1).values, PATCHES, PATCHES)
        tables = where.slots, where.cells
        x = torch.randn(batch, visible, s, s, c, device="cuda", generator=generator).to(dtype)
        grad = torch.randn_like(x)
        weight = torch.randn(c, 1, KERNEL, KERNEL, device="cuda", generator=generator)
        bias = torch.zeros(c, device="cuda")
        calls: dict[str, Callable[[], object]] = {
            "forward": partial(triton_depthwise.forward, x, weight, bias, *tables),
            "input_grad": partial(triton_depthwise.input_grad, grad, weight, *tables),
            "weight_grad": partial(triton_depthwise.weight_grad, x, grad, KERNEL, *tables),
        }
        parameters = (weight.numel() + c) * weight.element_size()
        traffic = 2 * x.numel() * x.element_size() + parameters
        for kernel, call in calls.items():
            floor_ms = traffic / bandwidth * 1e3
            multiply_adds = x.numel() * KERNEL**2
            ms = _median_ms(_captured(call))
            timings.append(Timing(size, stage, kernel, s, c, ms, floor_ms, traffic, multiply_adds))
    return timings


def _captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph: without it the host's launches are slower than the kernels of the last stages."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _median_ms(call: Callable[[], object]) -> float:
    """Median time, the L2 cache flushed before every run."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median")


def table(timings: Sequence[Timing]) -> str:
    lines = [f"{'size':6} stage {'kernel':12} {'S':>2} {'C':>5} {'ms':>8} {'floor':>8} {'ratio':>6} {'GB/s':>6}"]
    for t in timings:
        lines.append(
            f"{t.size:6} {t.stage:5} {t.kernel:12} {t.sites:2} {t.channels:5} {t.ms:8.4f} {t.floor_ms:8.4f} "
            f"{t.ratio:6.2f} {t.gb_per_s:6.0f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the packed depthwise kernels against their byte floor (224 px).")
    parser.add_argument("--size", nargs="+", choices=DIMS, default=["base"])
    parser.add_argument("--stage", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    bandwidth = copy_bandwidth()
    shapes = [(size, stage) for size in args.size for stage in args.stage]
    timings = time_kernels(shapes, args.batch, args.mask_ratio, getattr(torch, args.dtype), bandwidth)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_per_s": bandwidth / 1e9}
    print(f"{machine['gpu']}, torch {machine['torch']}, copy {machine['copy_gb_per_s']:.0f} GB/s; "
          f"batch {args.batch}, mask {args.mask_ratio}, {args.dtype}")  # fmt: skip
    print(table(timings))
    if args.json:
        rows = [{**asdict(t), "ratio": t.ratio, "gb_per_s": t.gb_per_s} for t in timings]
        settings = {"batch": args.batch, "mask_ratio": args.mask_ratio, "dtype": args.dtype}
        args.json.write_text(json.dumps({"machine": machine, **settings, "kernels": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
