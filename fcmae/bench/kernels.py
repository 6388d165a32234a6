"""``fcmae bench kernels``: the GPU kernels alone, against the least time that their bytes need.

The floor of a kernel is its traffic, each input read once and each output written once, at the bandwidth of a
device-to-device copy measured in the same run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fcmae import precision
from fcmae.bench.measure import (
    check_models,
    check_positive,
    copy_bandwidth,
    machine,
    median_ms,
    parse,
    title,
    write_report,
)
from fcmae.config.checks import check_one_of
from fcmae.engines import convnext
from fcmae.errors import UsageError
from fcmae.kernels import gelu_grn, neighbors
from fcmae.masks.patches import grid_size, len_keep
from fcmae.models import create_backbone


@dataclass
class KernelConfig:
    """What ``fcmae bench kernels`` measures: the shapes of every stage of the models."""

    models: list[str] = field(default_factory=lambda: ["convnextv2_base"])
    batch_size: int = 256
    image_size: int = 224
    mask_ratio: float = 0.6
    precision: str = "auto"
    repeats: int = 30

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "image_size", "repeats")
        check_one_of("precision", self.precision, (precision.AUTO, *precision.BY_DEMAND))


@dataclass
class KernelResult:
    """One kernel at one shape: ``sites`` a side of a patch, ``channels`` of the block."""

    model: str
    stage: int
    kernel: str
    sites: int
    channels: int
    ms: float
    floor_ms: float

    @property
    def ratio(self) -> float:
        """How many times its floor the kernel takes."""
        return self.ms / self.floor_ms


def run(overrides: Sequence[str], json_file: Path | None = None) -> list[KernelResult]:
    """Measures, prints a table, and writes JSON if asked. Raises UsageError without a GPU."""
    cfg = parse(KernelConfig, overrides)
    check_models(cfg.models, cfg.image_size, cfg.mask_ratio)
    if not torch.cuda.is_available():
        raise UsageError(f"bench kernels needs a GPU; torch {torch.__version__} sees none")
    device = torch.device("cuda")
    cfg.precision = precision.settle("precision", cfg.precision, device)
    where, bandwidth = machine(device), copy_bandwidth(device)
    print(f"{title(where)}, {cfg.precision}, batch {cfg.batch_size}, mask {cfg.mask_ratio}; "
          f"copy {bandwidth / 1e12:.2f} TB/s")  # fmt: skip
    print(f"{'model':17} stage {'kernel':21} {'S':>2} {'C':>5} {'ms':>8} {'floor':>8} {'ratio':>6}")
    results = []
    for result in _measure_all(cfg, bandwidth, device):
        results.append(result)
        print(
            f"{result.model:17} {result.stage:5} {result.kernel:21} {result.sites:2} {result.channels:5} "
            f"{result.ms:8.4f} {result.floor_ms:8.4f} {result.ratio:6.2f}",
            flush=True,
        )
    rows = [{**asdict(result), "ratio": result.ratio} for result in results]
    write_report(json_file, machine=where, copy_gb_per_second=bandwidth / 1e9, config=cfg, results=rows)
    return results


def _measure_all(cfg: KernelConfig, bandwidth: float, device: torch.device) -> Iterator[KernelResult]:
    dtype = precision.dtype_of(cfg.precision)
    for name in cfg.models:
        with torch.device("meta"):
            backbone = create_backbone(name)
        grid = grid_size(cfg.image_size, cfg.image_size, 32)
        sites = 32
        for stage, layers in enumerate(convnext.stages(backbone)):
            strides = [convnext.stem(backbone)[0].stride[0]] if stage == 0 else []
            strides += [conv.stride[0] for conv in layers.downsample.children() if isinstance(conv, torch.nn.Conv2d)]
            for stride in strides:
                sites //= stride
            conv = next(convnext.blocks(layers)).conv_dw
            channels, kernel = conv.weight.shape[0], conv.weight.shape[-1]
            keep = len_keep(grid[0] * grid[1], cfg.mask_ratio)
            shape = (cfg.batch_size, keep, sites, sites, channels)
            calls = {**_depthwise(shape, kernel, grid, dtype, device), **_gelu_grn(shape, dtype, device)}
            for label, (call, traffic) in calls.items():
                ms = median_ms(call, device, cfg.repeats)
                yield KernelResult(name, stage + 1, label, sites, channels, ms, traffic / bandwidth * 1e3)


Call = tuple[Callable[[], object], int]
"""A kernel's launch, and the bytes it has to move."""


def _depthwise(
    shape: tuple[int, ...], k: int, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Call]:
    from fcmae.kernels import depthwise_launch  # needs Triton, which only GPU builds bring

    n, visible, _, _, c = shape
    index = torch.rand(n, grid[0] * grid[1], device=device).argsort(1)[:, :visible].sort(1).values
    where = neighbors(index, *grid)
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias = torch.randn(c, 1, k, k, device=device), torch.zeros(c, device=device)
    tables = where.slots, where.cells
    traffic = 2 * x.nbytes + weight.nbytes
    return {
        "depthwise": (lambda: depthwise_launch.forward(x, weight, bias, *tables), traffic),
        "depthwise input grad": (lambda: depthwise_launch.input_grad(dy, weight, *tables), traffic),
        "depthwise weight grad": (lambda: depthwise_launch.weight_grad(x, dy, k, *tables), traffic),
    }


def _gelu_grn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    n, visible, s, _, c = shape
    x = torch.randn(n, visible * s * s, 4 * c, device=device).to(dtype).requires_grad_()
    dy = torch.randn_like(x)
    parameters = [torch.randn(4 * c, device=device, requires_grad=True) for _ in range(3)]
    weight, bias, input_bias = parameters
    y = gelu_grn(x, weight, bias, input_bias=input_bias)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, *parameters), dy, retain_graph=True)

    return {
        "GELU + GRN": (lambda: gelu_grn(x, weight, bias, input_bias=input_bias), 2 * x.nbytes),
        "GELU + GRN backward": (backward, 3 * x.nbytes),
    }
